"""Repositories on the Hub: what their ids may be, and what an error that the Hub answers with means."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id


_ADVICE = {
    401: "the repository is private or its name wrong; check the name, or log in with `hf auth login`",
    403: "access to it has to be asked for on its page, or the token does not allow it",
    404: "there is no such repository, revision or file",
    429: "too many requests; wait a while and try again",
}


def check_repository_id(repo_id: Any) -> str:
    """The id itself, if it is one of a repository, `namespace/name`.

    Raises:
        ValueError: It is not.
    """
    allowed = "it has to be namespace/name, of letters, digits, single '-', '_' and '.'"
    # Older versions of the client pass a line break at the end, and letters that are not ASCII.
    if not isinstance(repo_id, str) or not re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", repo_id):
        raise ValueError(f"{repo_id!r} is no repository id; {allowed}.")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no repository id; {allowed}.") from error
    return repo_id


def repository_named(source: Any, *, argument: str) -> str | None:
    """The Hub id that an argument is, or `None` if it is the path of something on this machine.

    Raises:
        TypeError: It is no text and no path.
        FileNotFoundError: It is a path, and there is nothing there.
        ValueError: It is neither a path nor the name of a repository.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"`{argument}` has to be a path or a Hub id, got {source!r}.")
    if os.path.exists(source):
        return None
    name = os.fspath(source)
    if os.path.isabs(name) or name.startswith((".", "~")) or name.endswith(".safetensors") or name.count("/") != 1:
        raise FileNotFoundError(f"{name!r} does not exist, and is not the name of a repository on the Hub.")
    return check_repository_id(name)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Say of an error that the Hub answered with its status, its repository, and what to do about it.

    Raises:
        OSError: In place of huggingface_hub's own errors, which cover offline use as well.
    """
    try:
        yield
    # Where no connection comes about, older versions of the client end with a RuntimeError.
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, RuntimeError) as error:
        raise OSError(_explanation(repo_id, error)) from error


def _explanation(repo_id: str, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            advice = _ADVICE.get(status, "the Hub's own fault; try again")
            return f"{repo_id}: the Hub answered {status}: {advice}. ({cause})"
        cause = cause.__cause__
    return f"{repo_id} could not be reached, and is not in the cache. ({error})"


__all__ = ["check_repository_id", "explained", "repository_named"]
