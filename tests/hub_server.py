"""A small Hugging Face Hub on loopback, for tests that talk to one through the real `huggingface_hub` client.

It speaks the part of the Hub's interface that downloads, loading, commits and LFS uploads need, keeps commits in
memory and large files on disk, records every request, and fails on demand:

    with HubServer() as hub:
        hub.add_repository("org/name", {"config.json": b"{}", "model.safetensors": Path("model.safetensors")})
        hub.faults.append(Fault(path="resolve/.*safetensors", cut_after=1000))
        run_python("...", **hub.environment(tmp_path / "home"))

The client reads `HF_ENDPOINT` when it is imported, so it is to run in a fresh interpreter with `hub.environment`. Like
the Hub, the server has two origins: itself, and a storage (a CDN, S3) that takes and gives LFS objects at signed URLs.
"""

import base64
import collections
import hashlib
import io
import json
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit


USER = "tester"
PIECE = 1 << 18  # how many bytes are read, sent and received at a time

# What the Hub's `.gitattributes` sends to LFS; besides, it takes what is binary or too large for git there.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx", ".msgpack", ".npz", ".gguf", ".zip")
LFS_SIZE = 10 * 1000 * 1000
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
TIMESTAMP = "2026-01-01T00:00:00.000Z"


@dataclass
class Request:
    """One request as it came in and was answered; it is listed from the moment it comes in.

    Attributes:
        origin: `"hub"` or `"storage"`.
        method: As sent, so also HEAD.
        path: The path with the query, unquoted.
        range: The `Range` header.
        authorization: The `Authorization` header.
        status: The status of the answer; None where the connection was cut before there was one.
        bytes_received: How much of the body was read.
        bytes_sent: How much of the answer's body was given to the connection.
    """

    origin: str
    method: str
    path: str
    range: str | None
    authorization: str | None
    status: int | None = None
    bytes_received: int = 0
    bytes_sent: int = 0


@dataclass
class Fault:
    """What goes wrong with the requests that match; the first fault that matches a request is taken.

    Attributes:
        path: A regular expression that is searched for in `Request.path`.
        method: The method it is about, or None for any.
        status: An answer of this status instead of the proper one, which then does not happen.
        headers: Headers that replace those of the answer or are added, such as `Retry-After` or `X-Error-Code`.
        etag: An etag that replaces the proper one.
        cut_after: The connection is closed after so many bytes of the body: of a PUT's own, or else of the answer's,
            where the request has been carried out by then. Not for HEAD, which has no body.
        times: How many requests it is good for; None for all.
    """

    path: str = ""
    method: str | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    etag: str | None = None
    cut_after: int | None = None
    times: int | None = 1

    def matches(self, method: str, path: str) -> bool:
        if self.times == 0 or (self.cut_after is not None and method == "HEAD"):
            return False
        return self.method in (None, method) and re.search(self.path, path) is not None


class HubServer:
    """The Hub; a context manager that serves while it is open.

    Args:
        token: The one valid token. It reads and writes everything, but for gated repositories that are not granted.
        ranges: Whether `Range` is heeded; if not, the whole file comes with status 200.
        redirects: Whether LFS files are served by the storage, to which `resolve` redirects; the Hub does so.

    Attributes:
        url: Where the Hub is.
        storage_url: Where the storage is: another port, and so another origin.
        requests: All requests, in the order in which they came in.
        faults: What goes wrong from now on, in the order of precedence.
    """

    def __init__(self, token: str = "hf_test_token", *, ranges: bool = True, redirects: bool = False):
        self.token, self.ranges, self.redirects = token, ranges, redirects
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.repositories: dict[str, _Repository] = {}
        self._servers = [_Server(self, origin) for origin in ("hub", "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        for server in self._servers:
            # Closing waits for as long as the server sleeps between two looks at whether it is to stop.
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._temporary.cleanup()

    def environment(self, home: str | Path, *, token: str = "") -> dict[str, str]:
        """Environment variables for a process that is to use this Hub and nothing of the user's own.

        Args:
            home: A folder for the caches.
            token: The token of the process; without, it is anonymous.
        """
        home = Path(home)
        folders = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_MODULES_CACHE": home / "modules"}
        switches = ("TELEMETRY", "XET", "PROGRESS_BARS", "UPDATE_CHECK")
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
            "HUGGING_FACE_HUB_TOKEN": token,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **{name: str(folder) for name, folder in folders.items()},
            **{f"HF_HUB_DISABLE_{switch}": "1" for switch in switches},
        }

    def add_repository(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path],
        *,
        private: bool = False,
        gated: bool = False,
        granted: bool = True,
    ) -> str:
        """Make a repository that has the files on its branch `main`, and return the id of the commit.

        Args:
            repo_id: Its name, `"org/name"`.
            files: Contents by their paths in the repository: bytes, or where a file is, which is then served from
                there and must stay as it is.
            private: Whether it is there only for those who have the token.
            gated: Whether its files are there only for those who have been granted access.
            granted: Whether the owner of the token has been granted access.
        """
        repository = _Repository(repo_id, private=private, gated=gated, granted=granted)
        blobs = {name: _Blob.of_file(name, content) for name, content in files.items()}
        repository.stored |= {blob.sha256: blob for blob in blobs.values() if blob.lfs}
        self.repositories[repo_id] = repository
        return repository.commit("main", blobs)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repository by their paths."""
        repository = self.repositories[repo_id]
        return {name: blob.read() for name, blob in repository.commits[repository.resolve(revision)].items()}

    def commit_id(self, repo_id: str, revision: str = "main") -> str:
        """The commit that a revision stands for."""
        return self.repositories[repo_id].resolve(revision)

    def is_private(self, repo_id: str) -> bool:
        """Whether a repository is private."""
        return self.repositories[repo_id].private

    def take_fault(self, method: str, path: str) -> Fault:
        """The fault that a request is to suffer; one that does nothing if there is none."""
        with self.lock:
            fault = next((fault for fault in self.faults if fault.matches(method, path)), Fault())
            if fault.times is not None:
                fault.times -= 1
            return fault


# What is in the repositories.


def _open(content: bytes | Path) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    """The next `length` bytes of a file, or fewer if it ends before."""
    while length and (piece := file.read(min(length, PIECE))):
        length -= len(piece)
        yield piece


def _goes_to_lfs(name: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file in LFS, by its name, its size, and its first 512 bytes."""
    return size > 0 and (name.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)


@dataclass(frozen=True)
class _Blob:
    """A content: the bytes, or the file that has them."""

    content: bytes | Path
    size: int
    sha256: str
    lfs: bool

    @classmethod
    def of(cls, content: bytes | Path, *, lfs: bool) -> Self:
        with _open(content) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(content, file.seek(0, io.SEEK_END), sha256, lfs)

    @classmethod
    def of_file(cls, name: str, content: bytes | str | Path) -> Self:
        content = content if isinstance(content, bytes) else Path(content)
        with _open(content) as file:
            sample = file.read(512)
            size = file.seek(0, io.SEEK_END)
        return cls.of(content, lfs=_goes_to_lfs(name, size, sample))

    def read(self) -> bytes:
        with _open(self.content) as file:
            return file.read()

    @cached_property
    def pointer(self) -> bytes:
        """What git has in place of an LFS object."""
        spec = "https://git-lfs.github.com/spec/v1"
        return f"version {spec}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        """The id that git gives to what it has of the file."""
        data = self.pointer if self.lfs else self.read()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        """What the Hub gives for the etag, and what the client names its cached file by."""
        return self.sha256 if self.lfs else self.blob_id


class _Repository:
    """Commits by their ids, each a dictionary of all its files; refs (`main`, `refs/pr/1`); LFS objects."""

    def __init__(self, repo_id: str, *, private: bool = False, gated: bool = False, granted: bool = True):
        self.repo_id, self.private, self.gated, self.granted = repo_id, private, gated, granted
        self.commits: dict[str, dict[str, _Blob]] = {}
        self.refs: dict[str, str] = {}
        self.stored: dict[str, _Blob] = {}

    def resolve(self, revision: str) -> str:
        """The id of the commit that a ref, an id, or the start of an id stands for."""
        if revision in self.refs:
            return self.refs[revision]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [commit for commit in self.commits if commit.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise _HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def commit(self, ref: str, files: dict[str, _Blob], parent: str | None = None) -> str:
        """Put a commit on a ref. Its id follows from its files and its parent."""
        content = json.dumps([parent, sorted((name, blob.blob_id) for name, blob in files.items())])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def apply(self, files: dict[str, _Blob], operation: str, value: dict[str, Any]) -> None:
        """Change the files by one line of a commit."""
        path = value["path"].rstrip("/")
        if operation == "file":
            files[path] = _Blob.of(base64.b64decode(value["content"]), lfs=False)
        elif operation == "lfsFile":
            if value["oid"] not in self.stored:
                message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                raise _HubError(400, message)
            files[path] = self.stored[value["oid"]]
        elif operation in ("deletedFile", "deletedFolder"):
            doomed = [name for name in files if name == path or name.startswith(f"{path}/")]
            if not doomed:
                raise _HubError(404, "A file with this name doesn't exist", code="EntryNotFound")
            for name in doomed:
                del files[name]
        else:
            raise _HubError(400, f"{operation} is no operation of a commit.")


# How requests are answered.


class _HubError(Exception):
    """An answer that is an error; the client tells by `X-Error-Code` which of its exceptions to raise."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.answer = _Answer.json({"error": message}, status=status)
        self.answer.headers.update({"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))
        self.answer.headers.update(headers or {})


@dataclass
class _Answer:
    """An answer whose body is a content from `start` to before `stop`."""

    status: int
    headers: dict[str, str]
    content: bytes | Path
    start: int
    stop: int

    @classmethod
    def json(cls, data: Any, *, status: int = 200) -> Self:
        content = json.dumps(data).encode()
        return cls(status, {"Content-Type": "application/json; charset=utf-8"}, content, 0, len(content))


_Route = tuple[str, str, re.Pattern[str], Callable[..., _Answer]]
_ROUTES: list[_Route] = []


def _route(origin: str, method: str, path: str) -> Callable[[Callable[..., _Answer]], Callable[..., _Answer]]:
    """Register what answers a path; what stands in braces there is passed on by name, unquoted."""
    shapes = {"repo": "[^/]+/[^/]+", "file": ".+"}
    pattern = re.sub(r"{(\w+)}", lambda match: f"(?P<{match[1]}>{shapes.get(match[1], '[^/]+')})", path)

    def register(function: Callable[..., _Answer]) -> Callable[..., _Answer]:
        _ROUTES.append((origin, method, re.compile(pattern), function))
        return function

    return register


def _requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Where a `Range` header begins and ends; None for the whole file, as for what is no single valid range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    first, last = match.groups() if match else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise _HubError(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


class _Server(ThreadingHTTPServer):
    """One of the two origins."""

    def __init__(self, hub: HubServer, origin: str):
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.hub, self.origin = hub, origin

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that has gone, and a connection that a fault has cut, are nothing to report.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Exchange(BaseHTTPRequestHandler):
    """One connection: every request on it is recorded, routed and answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def serve(self) -> None:
        self.hub = self.server.hub
        path = unquote(self.path)
        range_, authorization = self.headers.get("Range"), self.headers.get("Authorization")
        self.record = Request(self.server.origin, self.command, path, range_, authorization)
        self.hub.requests.append(self.record)
        self.fault = self.hub.take_fault(self.command, path)
        self.unread = int(self.headers.get("Content-Length") or 0)
        try:
            answer = self.answer()
        except _HubError as error:
            answer = error.answer
        # What is left unread would be taken for the next request on this connection.
        collections.deque(self.body(), maxlen=0)
        self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815, these are the base class's names

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `HubServer.requests` has it."""

    def answer(self) -> _Answer:
        if self.fault.status is not None:
            raise _HubError(self.fault.status, "This is a fault that the test asked for.")
        authorization = self.record.authorization
        if self.server.origin == "hub" and authorization not in (None, f"Bearer {self.hub.token}"):
            raise _HubError(401, "Invalid credentials in Authorization header")
        target = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(target.query).items()}
        for origin, method, pattern, function in _ROUTES:
            if origin == self.server.origin and method == self.command.replace("HEAD", "GET"):
                match = pattern.fullmatch(target.path)
                if match:
                    return function(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise _HubError(404, "Sorry, we can't find the page you are looking for.")

    def body(self) -> Iterator[bytes]:
        """What is still unread of the request's body; a fault may cut a PUT within it."""
        cut_after = self.fault.cut_after if self.command == "PUT" else None
        length = self.unread if cut_after is None else min(self.unread, cut_after)
        cut = length < self.unread
        for piece in _pieces(self.rfile, length):
            self.unread -= len(piece)
            self.record.bytes_received += len(piece)
            yield piece
        if cut:
            raise ConnectionAbortedError

    def send(self, answer: _Answer) -> None:
        for name in ("ETag", "X-Linked-Etag"):
            if self.fault.etag is not None and name in answer.headers:
                answer.headers[name] = f'"{self.fault.etag}"'
        length = answer.stop - answer.start
        self.record.status = answer.status
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(length)} | dict(self.fault.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(answer, length)

    def send_body(self, answer: _Answer, length: int) -> None:
        cut_after = self.fault.cut_after if self.command != "PUT" else None
        passed = length if cut_after is None else min(length, cut_after)
        with _open(answer.content) as file:
            file.seek(answer.start)
            for piece in _pieces(file, passed):
                # Counted first, or a test could look at the count before the piece that it has received is in it.
                self.record.bytes_sent += len(piece)
                self.wfile.write(piece)
        if passed < length:
            raise ConnectionAbortedError

    # What the answers have in common.

    def json_body(self) -> Any:
        return json.loads(b"".join(self.body()) or b"{}")

    def repository(self, repo: str, *, write: bool = False, content: bool = False) -> _Repository:
        """A repository, if this request may see it, or write to it, or read the content of its files."""
        repository, anonymous = self.hub.repositories.get(repo), self.record.authorization is None
        if anonymous and (write or repository is None or repository.private):
            # On https, the client makes "not found" of any 401 to an anonymous request; here it takes the code.
            raise _HubError(401, "Invalid username or password.", code="RepoNotFound")
        if repository is None:
            raise _HubError(404, "Repository not found", code="RepoNotFound")
        if content and repository.gated and (anonymous or not repository.granted):
            message = f"Access to model {repo} is restricted. You must have access to it and be authenticated."
            raise _HubError(401 if anonymous else 403, message, code="GatedRepo")
        return repository

    def content(self, blob: _Blob, headers: dict[str, str]) -> _Answer:
        """A file, or the range of it that is asked for."""
        headers = {"Content-Type": "application/octet-stream"} | headers
        if not self.hub.ranges:
            return _Answer(200, headers, blob.content, 0, blob.size)
        headers["Accept-Ranges"] = "bytes"
        part = _requested_range(self.record.range, blob.size)
        if part is None:
            return _Answer(200, headers, blob.content, 0, blob.size)
        headers["Content-Range"] = f"bytes {part[0]}-{part[1] - 1}/{blob.size}"
        return _Answer(206, headers, blob.content, *part)

    def signature(self, method: str, repo: str, oid: str) -> str:
        return hashlib.sha256(f"{self.hub.token} {method} {repo} {oid}".encode()).hexdigest()[:16]

    def signed_url(self, method: str, repo: str, oid: str, **query: str) -> str:
        query["Signature"] = self.signature(method, repo, oid)
        return f"{self.hub.storage_url}/lfs/{repo}/{oid}?{urlencode(query, quote_via=quote)}"

    def check_signature(self, method: str, repo: str, oid: str) -> None:
        if self.query.get("Signature") != self.signature(method, repo, oid):
            raise _HubError(403, "SignatureDoesNotMatch")

    # Reading.

    @_route("hub", "GET", "/{repo}/resolve/{revision}/{file}")
    def resolve(self, repo: str, revision: str, file: str) -> _Answer:
        repository = self.repository(repo, content=True)
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit}
        blob = repository.commits[commit].get(file)
        if blob is None:
            raise _HubError(404, "Entry not found", code="EntryNotFound", headers=headers)
        if not blob.lfs:
            return self.content(blob, headers | {"ETag": f'"{blob.etag}"'})
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        if not self.hub.redirects:
            return self.content(blob, headers | {"ETag": f'"{blob.etag}"'})
        disposition = f'inline; filename="{file.split("/")[-1]}"'
        url = self.signed_url("GET", repo, blob.sha256, **{"response-content-disposition": disposition})
        text = b"Found. Redirecting to the storage."
        return _Answer(302, headers | {"Content-Type": "text/plain", "Location": url}, text, 0, len(text))

    @_route("storage", "GET", "/lfs/{repo}/{oid}")
    def stored_object(self, repo: str, oid: str) -> _Answer:
        self.check_signature("GET", repo, oid)
        # The storage names its objects in its own way: its etag is not the one that the Hub gives.
        headers = {"ETag": f'"{hashlib.md5(oid.encode()).hexdigest()}"'}
        if "response-content-disposition" in self.query:
            headers["Content-Disposition"] = self.query["response-content-disposition"]
        return self.content(self.hub.repositories[repo].stored[oid], headers)

    @_route("hub", "GET", "/api/models/{repo}")
    @_route("hub", "GET", "/api/models/{repo}/revision/{revision}")
    def model_info(self, repo: str, revision: str = "main") -> _Answer:
        repository = self.repository(repo)
        commit = repository.resolve(revision)
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in sorted(repository.commits[commit])]
        for sibling in siblings if self.query.get("blobs", "").lower() == "true" else ():
            entry = _file_entry(sibling["rfilename"], repository.commits[commit][sibling["rfilename"]])
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit, "siblings": siblings}
        flags = {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
        return _Answer.json(info | flags | {"tags": [], "lastModified": TIMESTAMP, "createdAt": TIMESTAMP})

    @_route("hub", "GET", "/api/models/{repo}/tree/{revision}")
    @_route("hub", "GET", "/api/models/{repo}/tree/{revision}/{file}")
    def tree(self, repo: str, revision: str, file: str = "") -> _Answer:
        repository = self.repository(repo)
        commit = repository.resolve(revision)
        entries = _entries(repository.commits[commit])
        prefix = f"{file}/" if file else ""
        if file and file not in entries:
            headers = {"X-Repo-Commit": commit}
            raise _HubError(404, f"{file} does not exist on {revision}", code="EntryNotFound", headers=headers)
        deep = self.query.get("recursive", "").lower() == "true"
        below = {path: path.removeprefix(prefix) for path in entries if path.startswith(prefix)}
        return _Answer.json([entries[path] for path, rest in below.items() if deep or "/" not in rest])

    @_route("hub", "POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, repo: str, revision: str) -> _Answer:
        repository = self.repository(repo)
        entries = _entries(repository.commits[repository.resolve(revision)])
        body = b"".join(self.body())
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        return _Answer.json([entries[path] for path in paths if path in entries])

    @_route("hub", "GET", "/api/models/{repo}/refs")
    def list_refs(self, repo: str) -> _Answer:
        refs = self.repository(repo).refs
        data: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, commit in refs.items():
            kind, ref = ("pullRequests", name) if name.startswith("refs/pr/") else ("branches", f"refs/heads/{name}")
            data[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        return _Answer.json(data)

    @_route("hub", "GET", "/api/whoami-v2")
    def whoami(self) -> _Answer:
        if self.record.authorization is None:
            raise _HubError(401, "Invalid username or password.")
        names = sorted({name.split("/")[0] for name in self.hub.repositories} - {USER})
        organizations = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in names]
        token = {"displayName": "test", "role": "write", "createdAt": TIMESTAMP}
        user = {"type": "user", "id": "0" * 24, "name": USER, "fullname": USER, "email": f"{USER}@localhost"}
        return _Answer.json(user | {"orgs": organizations, "auth": {"type": "access_token", "accessToken": token}})

    # Writing.

    @_route("hub", "POST", "/api/repos/create")
    def create_repository(self) -> _Answer:
        if self.record.authorization is None:
            raise _HubError(401, "Invalid username or password.")
        settings = self.json_body()
        if settings.get("type") not in (None, "model"):
            raise _HubError(400, "Only models are kept here.")
        repo = f"{settings.get('organization') or USER}/{settings['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        with self.hub.lock:
            if repo in self.hub.repositories:
                return _Answer.json(answer | {"error": "You already created this model repo"}, status=409)
            private = bool(settings.get("private")) or settings.get("visibility") == "private"
            self.hub.add_repository(repo, {".gitattributes": GIT_ATTRIBUTES}, private=private)
        return _Answer.json(answer)

    @_route("hub", "POST", "/api/validate-yaml")
    def validate_yaml(self) -> _Answer:
        return _Answer.json({"errors": [], "warnings": []})

    @_route("hub", "POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, repo: str, revision: str) -> _Answer:
        repository = self.repository(repo, write=True)
        present = repository.commits[repository.resolve(revision)]
        files = []
        for file in self.json_body()["files"]:
            lfs = _goes_to_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            blob = present.get(file["path"])
            files.append(answer | ({"oid": blob.etag} if blob else {}))
        return _Answer.json({"files": files, "commitOid": repository.resolve(revision)})

    @_route("hub", "POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> _Answer:
        repository = self.repository(repo, write=True)
        objects = []
        for wanted in self.json_body()["objects"]:
            upload = {"href": self.signed_url("PUT", repo, wanted["oid"]), "header": {}}
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify", "header": {}}
            actions = {} if wanted["oid"] in repository.stored else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        return _Answer.json({"transfer": "basic", "objects": objects})

    @_route("storage", "PUT", "/lfs/{repo}/{oid}")
    def store_object(self, repo: str, oid: str) -> _Answer:
        self.check_signature("PUT", repo, oid)
        if "Content-Length" not in self.headers:
            raise _HubError(411, "MissingContentLength", headers={"Connection": "close"})
        # Another upload of the same object may be on its way, so each has a file of its own.
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False) as file:
            for piece in self.body():
                file.write(piece)
        blob = _Blob.of(Path(file.name), lfs=True)
        if blob.sha256 != oid:
            raise _HubError(400, "XAmzContentSHA256Mismatch")
        self.hub.repositories[repo].stored[oid] = blob
        return _Answer(200, {"ETag": f'"{hashlib.md5(oid.encode()).hexdigest()}"'}, b"", 0, 0)

    @_route("hub", "POST", "/{repo}.git/info/lfs/objects/verify")
    def lfs_verify(self, repo: str) -> _Answer:
        repository, wanted = self.repository(repo, write=True), self.json_body()
        blob = repository.stored.get(wanted["oid"])
        if blob is None or blob.size != wanted["size"]:
            raise _HubError(404, "The object is not in the storage.")
        return _Answer.json({"success": True})

    @_route("hub", "POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, repo: str, revision: str) -> _Answer:
        repository = self.repository(repo, write=True)
        lines = [json.loads(line) for line in b"".join(self.body()).splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        operations = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
        with self.hub.lock:
            if self.query.get("create_pr") == "1":
                return self.pull_request(repository, header.get("parentCommit", revision), operations)
            if revision not in repository.refs:
                raise _HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
            parent = repository.resolve(revision)
            if not parent.startswith(header.get("parentCommit") or ""):
                raise _HubError(412, "A commit has happened since. Please refresh and try again.")
            return self.committed(repository, revision, parent, operations)

    def pull_request(self, repository: _Repository, revision: str, operations: list[tuple[str, dict]]) -> _Answer:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        url = f"{self.hub.url}/{repository.repo_id}/discussions/{number}"
        ref, parent = f"refs/pr/{number}", repository.resolve(revision)
        return self.committed(repository, ref, parent, operations, pullRequestUrl=url)

    def committed(
        self, repository: _Repository, ref: str, parent: str, operations: list[tuple[str, dict]], **further: str
    ) -> _Answer:
        files = dict(repository.commits[parent])
        for operation, value in operations:
            repository.apply(files, operation, value)
        commit = repository.commit(ref, files, parent)
        url = f"{self.hub.url}/{repository.repo_id}/commit/{commit}"
        return _Answer.json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": "", **further})

    @_route("hub", "POST", "/api/models/{repo}/branch/{name}")
    def create_branch(self, repo: str, name: str) -> _Answer:
        repository = self.repository(repo, write=True)
        start = self.json_body().get("startingPoint") or "main"
        with self.hub.lock:
            if name in repository.refs:
                raise _HubError(409, f"Reference already exists: {name}")
            repository.refs[name] = repository.resolve(start)
        return _Answer.json({"success": True})

    @_route("hub", "DELETE", "/api/models/{repo}/branch/{name}")
    def delete_branch(self, repo: str, name: str) -> _Answer:
        repository = self.repository(repo, write=True)
        if name == "main" or repository.refs.pop(name, None) is None:
            raise _HubError(400, f"{name} is no branch that can be deleted.")
        return _Answer.json({"success": True})


def _file_entry(path: str, blob: _Blob) -> dict[str, Any]:
    """What a tree says about a file."""
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.blob_id, "size": blob.size}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


def _entries(files: Mapping[str, _Blob]) -> dict[str, dict[str, Any]]:
    """All files and the folders that they are in, by their paths."""
    entries = {path: _file_entry(path, blob) for path, blob in files.items()}
    for folder in {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}:
        oid = hashlib.sha1(folder.encode()).hexdigest()
        entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
    return dict(sorted(entries.items()))
