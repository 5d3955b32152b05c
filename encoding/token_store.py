"""Tokens on disk: Arrow files in a folder that many processes may fill at once.

    <folder>/settings.json     what the tokens were computed with
    <folder>/<rows>.arrow      rows of tokens and what belongs to them, memory-mapped when read
    <folder>/.work/<piece>.*   a piece of work: its lock, and the file that is being written

An Arrow file appears in one step and never changes, so whatever is there is whole.

Letters in the shapes: N tokens of a picture, C channels.
"""

import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedConfig, PreTrainedModel


if TYPE_CHECKING:
    import datasets


STORED_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "int16",  # its bits: Arrow has no bfloat16
}
SETTINGS, WORK = "settings.json", ".work"
_NOT_SETTINGS = ("auto_map", "processor_class")  # what a saved image processor says about its code


# What tokens depend on


def encoder_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all that an encoder's tokens depend on: its weights, bit by bit, and its configuration.

    How attention is computed (`attn_implementation`) is left out: it changes nothing but rounding.
    """
    digest = hashlib.sha256(canonical(_fields(model.config)))
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


def canonical(value: Any) -> bytes:
    """A value as JSON that is the same at every call."""
    return json.dumps(value, sort_keys=True, default=str, indent=1).encode()


# The store


class TokenStore(ABC):
    """Rows of tokens that one encoder with one image processor gave, in a folder that many processes may fill.

    Args:
        folder: The folder; made if there is none.
        settings: What the tokens depend on, in values that JSON has.
        columns: What a row has. `tokens` is one of them, made by `tokens_column`.
        dtype: Of the tokens, a key of `STORED_TYPES`.

    Raises:
        NotADirectoryError: There is a file at `folder`.
        ValueError: The folder holds tokens of other settings, or a file of it is damaged; the message names it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict[str, Any],
        *,
        columns: dict[str, Any],
        dtype: torch.dtype,
    ):
        import datasets

        self.folder = Path(folder).absolute()
        self.dtype = dtype
        self.columns = datasets.Features(columns)
        self.work = self.folder / WORK
        self.shards: dict[Path, datasets.Dataset] = {}
        self._rows: dict[Hashable, int] = {}
        self.work.mkdir(parents=True, exist_ok=True)
        self._agree_on(settings)
        self._sweep()
        self.refresh()

    @abstractmethod
    def keys_of(self, rows: Mapping[str, list]) -> list[Hashable]:
        """What rows go by, of their columns less `tokens`."""

    def _agree_on(self, settings: dict[str, Any]) -> None:
        """Note what the folder is for, or make sure that it is for the same."""
        text = canonical(settings)
        with FileLock(self.work / "settings.lock"):
            if not (self.folder / SETTINGS).exists():
                self.put(self.folder / SETTINGS, text.decode())
        differences = _differences(read_settings(self.folder), json.loads(text))
        if differences:
            raise ValueError(f"{self.folder} holds tokens of other settings: {'; '.join(differences)}.")

    def put(self, path: Path, text: str) -> None:
        """Write a small file of the folder in one step; the caller holds a lock on it."""
        new = self.work / f"{path.name}.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)

    def _sweep(self) -> None:
        """Delete what processes that were killed had begun to write."""
        for path in self.work.glob("*.tmp"):
            lock = FileLock(path.with_suffix(".lock"))
            try:
                with lock.acquire(timeout=0):
                    path.unlink(missing_ok=True)
            except Timeout:
                continue  # somebody is writing it

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def row_of(self, key: Hashable) -> int:
        """The row of `rows` with the tokens of a key; a later `refresh` leaves it where it is."""
        return self._rows[key]

    def refresh(self) -> None:
        """Take notice of what other processes have stored in the meantime."""
        import datasets

        names = [name for name in self.columns if name != "tokens"]
        for path in sorted(set(self.folder.glob("*.arrow")) - self.shards.keys()):
            try:
                shard = datasets.Dataset.from_file(str(path))
                keys = self.keys_of(shard.select_columns(names).with_format("arrow")[:].to_pydict())
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}); delete it, and what it held is computed again."
                ) from error
            start = sum(map(len, self.shards.values()))
            self.shards[path] = shard
            for row, key in enumerate(keys, start=start):
                self._rows.setdefault(key, row)

    def rows(self) -> "datasets.Dataset":
        """All that is stored, read as Arrow tables."""
        import datasets

        nothing = datasets.Dataset.from_dict({name: [] for name in self.columns}, self.columns)
        return datasets.concatenate_datasets(list(self.shards.values()) or [nothing]).with_format("arrow")

    def lock(self, keys: Sequence[Hashable]) -> FileLock:
        """What a process holds while it computes the rows `keys`. The system takes it from a process that dies."""
        return FileLock(self.work / f"{_name(keys)}.lock")

    def write(self, keys: Sequence[Hashable], batches: Iterable[dict[str, list]]) -> None:
        """Write one file, in one step at the end, while the batches are computed. Without any batch there is no file.

        Args:
            keys: The piece of work, whose lock the caller holds.
            batches: Those of its rows that were not there yet, as columns. Each of `tokens` is a tensor [N, C] in this
                store's dtype, on the CPU.

        Raises:
            OSError: The disk is full or the folder cannot be written to. What was stored before stays.
        """
        temporary = self.work / f"{_name(keys)}.tmp"
        try:
            written = self._write_stream(temporary, batches)
            if written:
                self._publish(temporary, written)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_stream(self, path: Path, batches: Iterable[dict[str, list]]) -> list[Hashable]:
        import pyarrow as pa

        written: list[Hashable] = []
        with open(path, "wb") as file:
            with pa.ipc.new_stream(file, self.columns.arrow_schema) as stream:
                for rows in batches:
                    stream.write_table(self._table(rows))
                    written += self.keys_of(rows)
            file.flush()
            os.fsync(file.fileno())
        return written

    def _publish(self, path: Path, written: list[Hashable]) -> None:
        """Make a file one of the store's, less what is there by now: processes may have cut their work differently."""
        with FileLock(self.work / "publish.lock"):
            self.refresh()
            is_new = [key not in self for key in written]
            if not all(is_new):
                _filter_rows(path, is_new)
            if any(is_new):
                os.replace(path, self.folder / f"{_name(written)}.arrow")

    def _table(self, rows: dict[str, list]) -> Any:
        """Rows as an Arrow table. `datasets` would take some milliseconds a page, through numpy."""
        import pyarrow as pa

        schema = self.columns.arrow_schema
        arrays = [
            self._array(rows[field.name], field.type)
            if field.name == "tokens"
            else pa.array(rows[field.name], field.type)
            for field in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _array(self, tokens: list[torch.Tensor], array_type: Any) -> Any:
        """Tokens, each [N, C], as lists of lists of numbers."""
        import pyarrow as pa

        joined = torch.cat(tokens)  # [all tokens, C]
        numbers = joined.view(torch.int16) if self.dtype == torch.bfloat16 else joined
        starts_of_tokens = np.arange(len(joined) + 1, dtype=np.int32) * joined.shape[1]
        starts_of_pictures = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        values = pa.ListArray.from_arrays(starts_of_tokens, pa.array(numbers.flatten().numpy()))
        return pa.ExtensionArray.from_storage(array_type, pa.ListArray.from_arrays(starts_of_pictures, values))


def tokens_column(width: int, dtype: torch.dtype) -> Any:
    """The type of a column of tokens [N, width]."""
    import datasets

    return datasets.Array2D((None, width), STORED_TYPES[dtype])


def _filter_rows(path: Path, is_kept: list[bool]) -> None:
    import pyarrow as pa

    table = pa.ipc.open_stream(path.read_bytes()).read_all().filter(pa.array(is_kept))
    with open(path, "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        file.flush()
        os.fsync(file.fileno())


def read_settings(folder: Path) -> dict[str, Any]:
    """What the tokens in a folder were computed with.

    Raises:
        ValueError: The folder's note of it cannot be read.
    """
    path = Path(folder) / SETTINGS
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _differences(stored: Any, given: Any, name: str = "") -> list[str]:
    """What differs between two values of JSON, by name."""
    if isinstance(stored, dict) and isinstance(given, dict):
        names = sorted(stored.keys() | given.keys())
        parts = [_differences(stored.get(key), given.get(key), f"{name}.{key}".strip(".")) for key in names]
        return [difference for part in parts for difference in part]
    return [] if stored == given else [f"{name} is {stored!r} there and {given!r} now"]


def _name(keys: Sequence[Hashable]) -> str:
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:32]


# Reading


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
