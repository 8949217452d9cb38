"""An adapter's own files on the Hugging Face Hub: fetched, and sent.

`huggingface_hub` is imported when a repository is asked for, and not before. What it
fetches lies in its cache, and is read from there as the files of any stranger are.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._errors import AdapterError, CorruptFileError, HubError, UnsafeFormatError
from .untrusted import UNSAFE

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FORM = "a repository of the Hub is called 'owner/name'"


def repository_of(path: Any, revision: str | None = None) -> str | None:
    """Returns the repository of the Hub that is meant, or None for a file or folder.

    What exists on disk is never a repository, and neither is what is no text or does
    not read `owner/name`.

    Args:
        path: what was given for a folder.
        revision: a branch, a tag or a commit, which folders have not.

    Raises:
        ValueError: if a revision is given for what is no repository.
        FileNotFoundError: if nothing is there, and `owner` is a folder: a name that is
            mistyped does not become that of a stranger's repository.

    Example:
        >>> repository_of("no-such-owner/adapter")
        'no-such-owner/adapter'
        >>> repository_of("./adapter"), repository_of("runs/7/adapter")
        (None, None)
    """
    there = os.path.lexists(path)
    named = _is_repository(path)
    if revision is not None and (there or not named):
        why = f"{path} is on disk" if there else f"{path} is none: {_FORM}"
        raise ValueError(
            f"`revision` is {revision!r}, and {why}; leave the revision out, or give a "
            "repository that nothing on disk is called like"
        )
    if there or not named:
        return None
    owner = path.partition("/")[0]
    if revision is None and os.path.isdir(owner):
        raise FileNotFoundError(
            f"there is no {path}, though {owner} is a folder; if a repository of the "
            "Hub is meant, say so by its revision, such as 'main'"
        )
    return path


def _is_repository(path: Any) -> bool:
    if not isinstance(path, str) or path.endswith((".json", ".safetensors", *UNSAFE)):
        return False
    return _REPOSITORY.fullmatch(path) is not None


def check_repository(repository: Any) -> None:
    """Raises unless an adapter can be sent to a repository of this name.

    Raises:
        ValueError: if it is no name of one.
        HubError: if `huggingface_hub` is not installed.
    """
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"`push_to` is {repository!r}; {_FORM}")
    _library(f"to send an adapter to {repository}")


def _library(why: str) -> Any:
    """Returns `huggingface_hub`; `why` is the beginning of an error without it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise HubError(
            f"{why}, huggingface_hub is needed: pip install 'jlora[hub]' ({error})"
        ) from error
    return huggingface_hub


# --- fetching ---


def fetch(repository: str, revision: str | None, limits: Mapping[str, int]) -> Path:
    """Returns a folder of the Hub's cache that has these files of one commit.

    Args:
        repository: `owner/name`.
        revision: a branch, a tag or a commit; the main branch by default.
        limits: the most bytes of each file. No other file is fetched.

    Raises:
        HubError: if it cannot be reached, is not there, or may not be read, with what
            to do.
        UnsafeFormatError: if it has pickles in place of the files.
        CorruptFileError: if a file is larger than its limit.
    """
    hub = _library(f"there is no folder {repository}; to look for it on the Hub")
    # What is not on disk yet is asked for first: the names and the sizes.
    api, offline = hub.HfApi(library_name="jlora"), hub.constants.HF_HUB_OFFLINE
    with _told(repository, revision, offline=offline):
        if not offline:
            info = api.model_info(repository, revision=revision, files_metadata=True)
            sizes = {file.rfilename: file.size for file in info.siblings or ()}
            _check_files(repository, sizes, limits)
        folder: Path | None = None
        for name in limits:
            # The branch may move meanwhile: the others are of the commit of the first.
            commit = folder.name if folder else revision
            file = api.hf_hub_download(
                repository, name, revision=commit, local_files_only=offline
            )
            folder = Path(file).parent
    return folder or Path()


def _check_files(
    repository: str, sizes: Mapping[str, int | None], limits: Mapping[str, int]
) -> None:
    """Raises if files are missing or too large, before any is fetched."""
    missing = [name for name in limits if name not in sizes]
    stems = {name.partition(".")[0] for name in missing}
    unsafe = [n for n in sizes if n.partition(".")[0] in stems and n.endswith(UNSAFE)]
    if unsafe:
        raise UnsafeFormatError(
            f"{repository} has {unsafe} in place of {missing}, which may run code when "
            "opened, and jlora does not fetch it; convert it to safetensors where you "
            "trust it"
        )
    if missing:
        has = ", ".join(sorted(sizes)[:8]) or "no files"
        raise HubError(
            f"{repository} on the Hub has no {' and no '.join(missing)}; it has {has}"
        )
    large = [
        f"{name} has {size:,} bytes, more than the {limit:,} that jlora reads"
        for name, limit in limits.items()
        if (size := sizes[name]) is not None and size > limit
    ]
    if large:
        raise CorruptFileError(f"{repository}: {'; '.join(large)}")


# --- sending ---


def push(repository: str, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Sends files to a repository, in one commit on its main branch.

    A repository that is not there is made, and is private.

    Raises:
        FileExistsError: if it has one of the files, and `overwrite` is False.
        HubError: if it cannot be reached or may not be written, with what to do.
    """
    hub = _library(f"to send an adapter to {repository}")
    api = hub.HfApi(library_name="jlora")
    with _told(repository, None, writing=True, offline=hub.constants.HF_HUB_OFFLINE):
        api.create_repo(repository, private=True, exist_ok=True)
        info = api.model_info(repository)
        there = sorted({file.rfilename for file in info.siblings or ()} & set(files))
        if there and not overwrite:
            raise FileExistsError(
                f"{repository} on the Hub has {there} already; give another name or "
                "`overwrite=True`"
            )
        operations = [hub.CommitOperationAdd(n, data) for n, data in files.items()]
        api.create_commit(
            repository,
            operations,
            commit_message="Adapter written by jlora",
            parent_commit=info.sha,  # or else nothing of it is changed
        )


# --- what went wrong ---


@contextlib.contextmanager
def _told(
    repository: str, revision: str | None, *, offline: bool, writing: bool = False
) -> Iterator[None]:
    """Makes one line of any error of the library's, and says what to do."""
    try:
        yield
    except (AdapterError, FileExistsError):
        raise
    except Exception as error:
        hint = _offline(revision) if offline else _hint(error, repository, writing)
        raise HubError(f"{repository} on the Hub: {hint}") from error


def _offline(revision: str | None) -> str:
    at = f" at {revision!r}" if revision else ""
    return (
        f"HF_HUB_OFFLINE is set, and what is asked for{at} is not in the cache; unset "
        "it, or fetch it once with a network"
    )


def _hint(error: Exception, repository: str, writing: bool) -> str:
    """Returns what an error means and what to do."""
    hub = _library("")
    # What is said of a whole file or a whole upload has the reason behind it.
    while isinstance(error, RuntimeError | FileNotFoundError):
        if not isinstance(error.__cause__, Exception):
            break
        error = error.__cause__
    page = f"{hub.constants.ENDPOINT}/{repository}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {
        hub.errors.GatedRepoError: f"it is gated; ask for access at {page}. "
        + _token(writing),
        hub.errors.RevisionNotFoundError: f"it has no such revision; see {page}",
        hub.errors.RepositoryNotFoundError: "there is no such repository, or it is "
        f"private, and nothing on disk is called so either. {_token(writing)}",
        hub.errors.HFValidationError: f"no repository has such a name. {_first(error)}",
    }
    for kind, hint in kinds.items():  # the narrower first
        if isinstance(error, kind):
            return hint
    if status in (401, 403):
        return f"the Hub refuses. {_token(writing)}"
    if status in (409, 412):
        return "someone else changed it meanwhile; send the adapter again"
    if status is not None:
        return f"the Hub answers with an error, {_first(error)}; try again later"
    done = "sent" if writing else "fetched"
    cached = "; without a network HF_HUB_OFFLINE=1 takes what is in the cache"
    return (
        f"it cannot be {done}, {type(error).__name__}: {_first(error)}; try again"
        + cached * (not writing)
    )


def _token(writing: bool) -> str:
    """Returns what to do about the token."""
    right = "write to" if writing else "read"
    if _library("").get_token():
        return f"The token in use (`hf auth whoami`, or HF_TOKEN) may not {right} it"
    return (
        "No token is in use: `hf auth login`, or set HF_TOKEN to one that may "
        f"{right} it"
    )


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else "it says no more"
