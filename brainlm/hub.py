"""Checkpoints on the Hugging Face hub: which text names one, and its download.

``huggingface_hub`` is imported only where something is downloaded. Its own environment variables apply: ``HF_TOKEN``,
``HF_HOME`` (where downloads are kept), ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from brainlm.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)  # owner/name
INSTALL = "pip install huggingface_hub"


def is_hub_id(text: str) -> bool:
    """Say whether `text` reads as ``owner/name``: one slash, no scheme, no leading dot, slash or tilde."""
    return HUB_ID.fullmatch(text) is not None


def local_folder(path_or_hub_id: str, files: Sequence[str], revision: str | None = None) -> str:
    """Return the folder that a path, an fsspec URL or a hub id stands for; only the last is downloaded.

    Parameters
    ----------
    path_or_hub_id : str
        What exists as a local path is one, whatever it looks like.
    files : sequence of str
        Names of the files to download; no other file of the repository is.
    revision : str, optional
        Branch, tag or commit on the hub; None = its main branch.

    Raises
    ------
    CheckpointError
        If it is neither a local path nor can be downloaded, or a revision is given with a path or URL.
    """
    if is_hub_id(path_or_hub_id) and not os.path.lexists(path_or_hub_id):
        return download(path_or_hub_id, files, revision)
    if revision is not None:
        kind = "a local path, which goes before a hub id" if is_hub_id(path_or_hub_id) else "a path or URL"
        raise CheckpointError(
            f"revision={revision!r} was given, but {path_or_hub_id} is {kind}: only repositories on the hub have "
            "revisions. Leave it out"
        )
    return path_or_hub_id


def download(repo_id: str, files: Sequence[str], revision: str | None = None, endpoint: str | None = None) -> str:
    """Download the named files of a repository on the hub, or find them in its cache; return their folder.

    Parameters
    ----------
    endpoint : str, optional
        Address of the hub; None = ``$HF_ENDPOINT``, or the public one.

    Raises
    ------
    CheckpointError
        If ``huggingface_hub`` is not installed, or there is no such repository, revision, right of access or network.
    """
    no_folder = f"{repo_id}: there is no folder {Path(repo_id).absolute()}"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"{no_folder}, and without the package huggingface_hub it was not looked for on the hub. Correct the path, "
            f"or install the package: {INSTALL}"
        ) from error
    from huggingface_hub import constants

    hub = endpoint or constants.ENDPOINT
    try:
        # Exact names, so that no pickle that lies beside them is ever fetched.
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=list(files), endpoint=endpoint, library_name="brainlm"
        )
    except errors.GatedRepoError as error:  # before RepositoryNotFoundError, whose kind it is
        raise CheckpointError(
            f"{repo_id} on {hub} is only given to those who asked for access: ask on its page {hub}/{repo_id}, then "
            "log in here (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{no_folder}, and no repository {repo_id} on {hub} that you may read. Correct the path or the id; for a "
            "private repository log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} on {hub} has no revision {revision!r}: give a branch, tag or commit that it has"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{no_folder}, and {repo_id} cannot be the id of a repository: {error}") from error
    except Exception as error:  # no network, a refused or failing server, a full disk: families of several libraries
        raise CheckpointError(
            f"{no_folder}, and {repo_id} could not be fetched from {hub}: {_in_words(error)}. Correct the path; or "
            "check the network and the address (HF_ENDPOINT) and try again; or download the repository elsewhere and "
            "give its folder"
        ) from error
    if not any((Path(folder) / name).is_file() for name in files):
        raise CheckpointError(
            f"{repo_id} on {hub} holds no checkpoint of ours (none of {', '.join(files)}). The published BrainLM "
            "models lie in subfolders: download these and read them with brainlm.official"
        )
    return str(folder)


def _in_words(error: BaseException) -> str:
    """Return the first line of the error at the root, which says more than those around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}".rstrip(".") if lines else type(error).__name__
