"""Repositories on the Hub: what their ids may be, and what an error that the Hub answers with means."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id


HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""What says, of a repository on the Hub, which state of it and how it is fetched; as huggingface_hub names them."""

TOKEN = re.compile(r"(?<!\w)hf_\w{20,}")
"""What looks like a token of the Hub."""

RUN_AGAIN = "Run it again: what has been transferred already is not transferred a second time."
_ADVICE = {
    401: "The repository is private or its name wrong, or the token is not valid: log in with `hf auth login`, or set "
    "HF_TOKEN.",
    403: "The token does not allow it: ask for access on the repository's page, or use another token. To publish "
    "without the right to write, open a pull request with --create-pr.",
    404: "There is no such repository, revision or file, or the token may not see it.",
    409: "It is there, but the token may not see it.",
    412: "Somebody else has committed in the meantime; run it again.",
    429: "Too many requests; wait a while and run it again.",
}


def check_repository_id(repo_id: Any) -> str:
    """The id itself, if it is one of a repository, `namespace/name`, and else a `ValueError`."""
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


def local_checkpoint(
    source: str | os.PathLike, argument: str, *, patterns: Iterable[str] | None = None, **hub_options: Any
) -> Path:
    """Where a checkpoint is on this machine, fetched if it is on the Hub: all of it, or the files of some patterns."""
    repo_id = repository_named(source, argument=argument)
    if repo_id is None:
        return Path(source)
    with explained(repo_id):
        allowed = None if patterns is None else list(patterns)
        return Path(snapshot_download(repo_id, allow_patterns=allowed, **hub_options))


@contextmanager
def explained(repo_id: str, *, token: str | None = None) -> Iterator[None]:
    """Make an `OSError` of an error that the Hub answered with: its status, its repository, what to do, and no token.

    A failed upload of a large file comes out of the client as a `RuntimeError` around its cause, a download that could
    not begin as an `EntryNotFoundError`, and an error page in place of an answer as a `JSONDecodeError`.
    """
    try:
        yield
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, RuntimeError, json.JSONDecodeError) as error:
        raise OSError(without_token(f"{repo_id}: {_explanation(error)}", token)) from error


def _explanation(error: BaseException) -> str:
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    answers = [cause for cause in causes if isinstance(cause, HfHubHTTPError) and cause.response is not None]
    if not answers:
        broken = next((cause for cause in causes if isinstance(cause, HTTPError)), error)
        return (
            f"the connection to the Hub failed ({type(broken).__name__}: {broken}), and the cache does not hold what "
            f"is needed. {RUN_AGAIN}"
        )
    response, message = answers[0].response, answers[0].server_message
    said = f" ({message})" if message else ""
    # Without the query: a storage's URL is signed there.
    where = f"{response.request.method} {response.request.url.path}"
    return f"the Hub answered {response.status_code} to {where}{said}. {_ADVICE.get(response.status_code, RUN_AGAIN)}"


def without_token(text: str, token: str | None) -> str:
    """A text with a token, and whatever looks like one, hidden."""
    return TOKEN.sub("hf_...", text.replace(token, "hf_...") if token else text)
