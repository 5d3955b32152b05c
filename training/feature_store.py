"""Tokens on disk, under the content of the picture that they were computed from.

    <cache_dir>/<settings>/settings.json     what the tokens were computed with; its hash names the folder
    <cache_dir>/<settings>/<rows>.arrow      rows of `key` and `tokens`, memory-mapped when read
    <cache_dir>/<settings>/.work/<piece>.*   a piece of work: its lock, and the file that is being written

An Arrow file appears in one step and never changes, so whatever is there is whole. Other weights or other settings get
a folder of their own, and nothing that was computed is ever deleted.

Letters in the shapes: N tokens of a picture, C channels.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedConfig, PreTrainedModel


if TYPE_CHECKING:
    import datasets


LAYOUT = 1
"""Version of what is in a folder; another one recomputes everything."""

STORED_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "int16",  # its bits: Arrow has no bfloat16
}
_NOT_SETTINGS = ("auto_map", "processor_class")  # what a saved image processor says about its code


# What tokens depend on


def encoder_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all that an encoder's tokens depend on: its weights, bit by bit, and its configuration.

    How attention is computed (`attn_implementation`) is left out: it changes nothing but rounding.
    """
    digest = hashlib.sha256(_canonical(_fields(model.config)))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a configuration declares, and not what transformers notes beside them, such as versions."""
    names = [name for name in inspect.signature(type(config).__init__).parameters if name not in ("self", "kwargs")]
    values = {name: getattr(config, name) for name in names}
    return {k: _fields(v) if isinstance(v, PreTrainedConfig) else v for k, v in values.items()}


def image_processor_settings(image_processor: Any) -> dict[str, Any]:
    """The fields of an image processor, as it would save them."""
    return {name: value for name, value in image_processor.to_dict().items() if name not in _NOT_SETTINGS}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str, indent=1).encode()


# The store


class FeatureStore:
    """The tokens that one encoder with one image processor gave, in a folder that many processes may fill.

    Args:
        cache_dir: Folder that holds such folders.
        settings: What the tokens depend on, in values that JSON has.
        dtype: Of the tokens, a key of `STORED_TYPES`.
        width: Channels of a token.

    Raises:
        NotADirectoryError: There is a file at `cache_dir`.
        ValueError: A file of the store is damaged; the message names it.
    """

    def __init__(self, cache_dir: str | os.PathLike, settings: dict[str, Any], *, dtype: torch.dtype, width: int):
        import datasets

        text = _canonical({"layout": LAYOUT, "dtype": str(dtype), **settings})
        self.folder = Path(cache_dir).absolute() / hashlib.sha256(text).hexdigest()[:32]
        self.dtype = dtype
        self.columns = datasets.Features(
            key=datasets.Value("string"), tokens=datasets.Array2D((None, width), STORED_TYPES[dtype])
        )
        self._work = self.folder / ".work"
        self._shards: dict[Path, datasets.Dataset] = {}
        self._rows: dict[str, int] = {}
        self._work.mkdir(parents=True, exist_ok=True)
        self._write_settings(text)
        self._sweep()
        self.refresh()

    def _write_settings(self, text: bytes) -> None:
        """Note what the folder is for; its own code reads only the folder's name."""
        with FileLock(self._work / "settings.lock"):
            if not (self.folder / "settings.json").exists():
                temporary = self._work / "settings.tmp"
                temporary.write_bytes(text)
                os.replace(temporary, self.folder / "settings.json")

    def _sweep(self) -> None:
        """Delete what processes that were killed had begun to write."""
        for path in self._work.glob("*.tmp"):
            lock = FileLock(path.with_suffix(".lock"))
            try:
                with lock.acquire(timeout=0):
                    path.unlink(missing_ok=True)
            except Timeout:
                continue  # somebody is writing it

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def row_of(self, key: str) -> int:
        """The row of `rows` with the tokens of a picture; a later `refresh` leaves it where it is."""
        return self._rows[key]

    def refresh(self) -> None:
        """Take notice of what other processes have stored in the meantime."""
        import datasets

        for path in sorted(set(self.folder.glob("*.arrow")) - self._shards.keys()):
            try:
                shard = datasets.Dataset.from_file(str(path))
                keys = shard.with_format("arrow")[:]["key"].to_pylist()
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}); delete it, and what it held is computed again."
                ) from error
            start = sum(map(len, self._shards.values()))
            self._shards[path] = shard
            for row, key in enumerate(keys, start=start):
                self._rows.setdefault(key, row)

    def rows(self) -> "datasets.Dataset":
        """All that is stored, `key` and `tokens`, read as Arrow tables."""
        import datasets

        shards = list(self._shards.values()) or [datasets.Dataset.from_dict({"key": [], "tokens": []}, self.columns)]
        return datasets.concatenate_datasets(shards).with_format("arrow")

    def lock(self, keys: Sequence[str]) -> FileLock:
        """What a process holds while it computes the pictures `keys`. The system takes it from a process that dies."""
        return FileLock(self._work / f"{_name(keys)}.lock")

    def write(self, keys: Sequence[str], batches: Iterable[tuple[list[str], torch.Tensor]]) -> None:
        """Write one file, in one step at the end, while the batches are computed. Without any batch there is no file.

        Args:
            keys: The piece of work, whose lock the caller holds.
            batches: Those of its pictures that were not there yet, and their tokens [pictures, N, C] in this store's
                dtype.

        Raises:
            OSError: The disk is full or the folder cannot be written to. What was stored before stays.
        """
        temporary = self._work / f"{_name(keys)}.tmp"
        try:
            written = self._write_stream(temporary, batches)
            if written:
                os.replace(temporary, self.folder / f"{_name(written)}.arrow")
        finally:
            temporary.unlink(missing_ok=True)

    def _write_stream(self, path: Path, batches: Iterable[tuple[list[str], torch.Tensor]]) -> list[str]:
        import pyarrow as pa

        written: list[str] = []
        with open(path, "wb") as file:
            with pa.ipc.new_stream(file, self.columns.arrow_schema) as stream:
                for keys, tokens in batches:
                    stream.write_table(self._table(keys, tokens))
                    written += keys
            file.flush()
            os.fsync(file.fileno())
        return written

    def _table(self, keys: list[str], tokens: torch.Tensor) -> Any:
        import datasets

        numbers = tokens.view(torch.int16) if self.dtype == torch.bfloat16 else tokens
        rows = {"key": keys, "tokens": list(numbers.numpy())}
        return datasets.Dataset.from_dict(rows, features=self.columns).with_format("arrow")[:]


@dataclass(frozen=True, eq=False)
class ReadFeatures:
    """Puts tokens in the place of their row numbers whenever rows of a dataset are read: what `with_transform` takes.

    Attributes:
        column: Column of the dataset with the row numbers: a number a row, `None`, or a list of numbers.
        rows: What is stored.
        dtype: Of the tokens.
        encoder: Fingerprint of the encoder that computed them.
    """

    column: str
    rows: "datasets.Dataset"
    dtype: torch.dtype
    encoder: str

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Rows as columns, with tokens [N, C] where there was a number."""
        if self.column not in rows:
            return rows
        return rows | {self.column: [self._tokens(number) for number in rows[self.column]]}

    def _tokens(self, number: int | list[int] | None) -> Any:
        if number is None:
            return None
        if isinstance(number, list):
            return [self._tokens(each) for each in number]
        (array,) = self.rows[number]["tokens"].chunk(0).to_numpy(zero_copy_only=True)
        tokens = torch.from_numpy(array)
        return tokens.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tokens


def _name(keys: Sequence[str]) -> str:
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:32]
