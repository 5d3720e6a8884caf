"""The commit of the source tree, with a mark if files differ from it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import brainlm
from brainlm import provenance

git_needed = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree that the module takes for its own."""
    (tmp_path / "brainlm").mkdir()
    (tmp_path / "brainlm" / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "brainlm" / "provenance.py"))
    return tmp_path


@git_needed
def test_the_commit_is_marked_when_tracked_files_differ_from_it(tree: Path) -> None:
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "first")
    head = git(tree, "rev-parse", "HEAD")
    assert provenance.git_commit() == head
    (tree / "notes.txt").write_text("not tracked")
    assert provenance.git_commit() == head
    (tree / "brainlm" / "provenance.py").write_text("changed")
    assert provenance.git_commit() == f"{head}+changes"


@git_needed
def test_a_repository_without_commits_has_none(tree: Path) -> None:
    git(tree, "init", "--quiet")
    assert provenance.git_commit() == ""


def test_an_installed_copy_has_no_commit(tree: Path) -> None:
    assert not (tree / ".git").exists()
    assert provenance.git_commit() == ""


def test_without_git_the_commit_is_not_known(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tree))
    assert provenance.git_commit() == ""


def test_versions_name_what_is_installed_and_what_is_not() -> None:
    found = provenance.versions("numpy", "no-such-package")
    assert found["numpy"] == np.__version__
    assert found["no-such-package"] == ""
    assert found["python"] == platform.python_version()
    assert found["brainlm"] == brainlm.__version__
