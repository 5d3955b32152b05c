"""The encoder's part of a checkpoint on the Hub, fetched by itself: 0.8 of 6.7 GB.

The files' headers come first, then by HTTP range requests the bytes of the vision tensors, neighbours together. They
are kept in the Hub's cache, in the repository's own folder, as one safetensors file a commit:
`models--owner--name/vision/<commit>.safetensors`. huggingface_hub does the talking: its endpoint, tokens, proxies and
waiting times.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .checkpoints import CONFIG, LocalCheckpoint, open_local, read_config, read_index
from .names import is_vision
from .repository import explained
from .safetensors_files import LENGTH_BYTES, TensorEntry, read_header, read_local_header


logger = logging.get_logger(__name__)

MAX_FAILURES = 5
CHUNK_BYTES = 1 << 20


class RefusedError(OSError):
    """The server gives something else than was asked for; asking again would not help."""


class RangesNotServedError(RefusedError):
    """The server answers a request for a part of a file with the whole of it."""


@dataclass(frozen=True)
class Repository:
    """A commit of a repository on the Hub, and how to get at its files."""

    repo_id: str  # owner and name
    folder: Path  # the commit's in the cache, named after it
    token: str | bool | None
    cache_dir: str | Path | None

    @property
    def commit(self) -> str:
        """The commit that everything is read of."""
        return self.folder.name

    @property
    def vision_file(self) -> Path:
        """Where the encoder's part is kept."""
        return self.folder.parents[1] / "vision" / f"{self.commit}.safetensors"

    def download(self, file: str) -> Path:
        """A whole file, from the cache if it is there."""
        path = hf_hub_download(self.repo_id, file, revision=self.commit, token=self.token, cache_dir=self.cache_dir)
        return Path(path)


class RemoteFile:
    """A file of a repository, of which any part can be read."""

    def __init__(self, repository: Repository, name: str):
        self.repository = repository
        self.name = name
        self.url = hf_hub_url(repository.repo_id, name, revision=repository.commit)
        metadata = get_hf_file_metadata(self.url, token=repository.token, retry_on_errors=True)
        if metadata.size is None:
            raise OSError(f"{repository.repo_id}: the server does not tell the size of {name}.")
        self.size, self.etag = metadata.size, metadata.etag

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from a position to another."""
        return b"".join(self.stream(start, stop))

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """The same piece by piece, going on where a connection breaks off.

        Raises:
            RangesNotServedError: The server gives whole files only.
            OSError: It answers with an error, or breaks off again and again.
        """
        failures = 0
        while start < stop:
            try:
                for chunk in self._request(start, stop):
                    start += len(chunk)
                    failures = 0
                    yield chunk
            except (RefusedError, HfHubHTTPError):
                raise
            except (HTTPError, OSError) as error:
                failures += 1
                if failures > MAX_FAILURES:
                    raise OSError(f"{self.repository.repo_id}: {self.name} breaks off at byte {start:,}.") from error
                logger.warning(f"{self.name}: the connection broke off at byte {start:,}; going on there.")
                time.sleep(min(2.0 ** (failures - 1), 8.0) / 2)

    def _request(self, start: int, stop: int) -> Iterator[bytes]:
        headers = build_hf_headers(token=self.repository.token, library_name="deepseek-ocr-vision")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        # A connection that breaks off is taken up again above, from where it broke.
        with http_stream_backoff("GET", self.url, headers=headers, retry_on_exceptions=()) as response:
            hf_raise_for_status(response)
            self._check_answer(response, start)
            remaining = stop - start
            for chunk in response.iter_bytes(CHUNK_BYTES):
                yield chunk[:remaining]
                remaining -= min(len(chunk), remaining)
        if remaining:
            raise OSError(f"the answer ended {remaining:,} bytes early")

    def _check_answer(self, response: Any, start: int) -> None:
        place = f"{self.repository.repo_id}: {self.name}"
        if response.status_code != 206:
            raise RangesNotServedError(f"{place}: asked for a part, the server gives the whole file.")
        answered = response.headers.get("Content-Range", "")
        if not answered.startswith(f"bytes {start}-") or not answered.endswith(f"/{self.size}"):
            raise RefusedError(
                f"{place}: asked for bytes from {start:,} of {self.size:,}, the server gives {answered!r}."
            )
        # After a redirect to a store of its own the Hub's answer tells the etag, the store's answer perhaps another.
        answers = [*response.history, response]
        etags = {answer.headers["X-Linked-Etag"] for answer in answers if "X-Linked-Etag" in answer.headers}
        if not etags and not response.history and "ETag" in response.headers:
            etags = {response.headers["ETag"]}
        if etags and self.etag not in {etag.removeprefix("W/").strip('"') for etag in etags}:
            raise RefusedError(f"{place} changed while it was read: etag {self.etag} before, now {', '.join(etags)}.")


class WholeFile(RemoteFile):
    """A file that had to be fetched whole, and is read from the cache."""

    def __init__(self, file: RemoteFile):
        logger.warning(
            f"{file.repository.repo_id}: the server does not give parts of files; fetching all of {file.name}, "
            f"{file.size / 1e9:.2f} GB."
        )
        self.repository, self.name, self.url, self.etag = file.repository, file.name, file.url, file.etag
        self.path = file.repository.download(file.name)
        self.size = self.path.stat().st_size

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from a position to another, piece by piece."""
        with self.path.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
                start += len(chunk)
                yield chunk


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint on the Hub of which only headers have been read."""

    repository: Repository
    files: dict[str, RemoteFile]  # those that hold vision tensors, by name
    tensors: dict[str, TensorEntry]  # the places of the tensors in them, by name
    others: tuple[str, ...]  # names of all other tensors, from the index
    config: dict[str, Any]  # what its `config.json` says

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor; those of the language model in files that were not opened have none."""
        return dict.fromkeys(self.others, ()) | {name: entry.shape for name, entry in self.tensors.items()}

    def local(self) -> LocalCheckpoint:
        """Fetch the encoder's part into the cache, and open it there.

        What was fetched before an interruption is kept. Of several processes one fetches and the others wait; one
        that dies lets go of its lock.
        """
        target = self.repository.vision_file
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"), explained(self.repository.repo_id):
            if not target.is_file():
                partial = target.with_suffix(".incomplete")
                self._fetch(partial)
                try:
                    read_local_header(partial)
                except ValueError:  # not as planned, such as after a crash of the machine
                    partial.unlink()
                    raise
                os.replace(partial, target)
        return replace(open_local(target), config=self.config)

    def _fetch(self, partial: Path) -> None:
        chosen = {name: entry for name, entry in self.tensors.items() if is_vision(name)}
        etags = {name: str(file.etag) for name, file in self.files.items()}
        header = _header(chosen, source=f"{self.repository.repo_id}@{self.repository.commit}", **etags)
        with open(partial, "ab+") as output:
            output.seek(0)
            if output.read(len(header)) != header:
                # Of another state of the repository, or a header that was cut.
                output.truncate(0)
                output.write(header)
            self._append(output, _spans(chosen.values()), already=output.seek(0, os.SEEK_END) - len(header))
            output.flush()
            os.fsync(output.fileno())

    def _append(self, output: BinaryIO, spans: list[tuple[str, int, int]], already: int) -> None:
        total = sum(stop - start for _, start, stop in spans)
        with tqdm(total=total, initial=already, unit="B", unit_scale=True, desc=self.repository.repo_id) as bar:
            for file, start, stop in spans:
                skipped = min(already, stop - start)
                already -= skipped
                for chunk in self.files[file].stream(start + skipped, stop):
                    output.write(chunk)
                    bar.update(len(chunk))


def _header(entries: dict[str, TensorEntry], **metadata: str) -> bytes:
    """The beginning of a safetensors file that holds these tensors in this order."""
    contents: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    position = 0
    for name, entry in entries.items():
        offsets = [position, position + entry.num_bytes]
        contents[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        position += entry.num_bytes
    text = json.dumps(contents, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _spans(entries: Iterable[TensorEntry]) -> list[tuple[str, int, int]]:
    """File, start and stop of the bytes of tensors, neighbours joined."""
    spans: list[tuple[str, int, int]] = []
    for entry in entries:
        if spans and spans[-1][0] == entry.file and spans[-1][2] == entry.start:
            spans[-1] = (entry.file, spans[-1][1], entry.stop)
        else:
            spans.append((entry.file, entry.start, entry.stop))
    return [span for span in spans if span[1] < span[2]]


def open_remote(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> RemoteCheckpoint | LocalCheckpoint:
    """Open a checkpoint on the Hub by its headers, or the encoder's part of it from the cache.

    Raises:
        OSError: The Hub cannot be reached or refuses, and the cache has not what is needed; with status and
            repository.
        ValueError: The name is no repository's, or a file is not what it should be.
    """
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    options["local_files_only"] = local_files_only
    with explained(repo_id):
        config = Path(hf_hub_download(repo_id, CONFIG, force_download=force_download, **options))
        repository = Repository(repo_id, config.parent, token, cache_dir)
        if force_download:
            repository.vision_file.unlink(missing_ok=True)
        if repository.vision_file.is_file():
            return replace(open_local(repository.vision_file), config=read_config(config))
        if local_files_only:
            raise FileNotFoundError(
                f"{repo_id}: the encoder's weights at commit {repository.commit} are not in the cache, and "
                "`local_files_only` is true."
            )
        return _open_headers(repository, read_config(config))


def _open_headers(repository: Repository, config: dict[str, Any]) -> RemoteCheckpoint:
    try:
        files = {SAFE_WEIGHTS_NAME: RemoteFile(repository, SAFE_WEIGHTS_NAME)}
        index: dict[str, str] = {}
    except EntryNotFoundError:
        index = read_index(repository.download(SAFE_WEIGHTS_INDEX_NAME))
        # Without a vision tensor in the index every file is opened, to say what the checkpoint looks like.
        needed = {file for name, file in index.items() if is_vision(name)} or set(index.values())
        files = {file: RemoteFile(repository, file) for file in sorted(needed)}
    tensors: dict[str, TensorEntry] = {}
    for name in files:
        try:
            header = read_header(f"{repository.repo_id}/{name}", files[name].size, files[name].read)
        except RangesNotServedError:
            files[name] = WholeFile(files[name])
            header = read_header(f"{repository.repo_id}/{name}", files[name].size, files[name].read)
        for tensor, entry in header.items():
            if tensor in tensors or index.get(tensor, name) != name:
                raise ValueError(f"{repository.repo_id}: {tensor} is in {name} and in another file as well.")
            tensors[tensor] = replace(entry, file=name)
    missing = [tensor for tensor, name in index.items() if name in files and tensor not in tensors]
    if missing:
        raise ValueError(f"{repository.repo_id}: {index[missing[0]]} lacks {missing[0]}, which the index says it has.")
    others = tuple(name for name in index if name not in tensors)
    return RemoteCheckpoint(repository, files, tensors, others, config)
