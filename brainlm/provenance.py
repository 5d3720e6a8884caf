"""Where numbers come from: git commit and package versions."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path


def git_commit() -> str:
    """Return the commit of the source tree, with ``+changes`` if files differ from it; "" where git cannot tell."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}+changes" if status else commit


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of this project, of Python and of the named packages ("" = not installed)."""
    found = {"brainlm": _version("brainlm"), "python": platform.python_version()}
    return found | {name: _version(name) for name in packages}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
