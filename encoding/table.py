"""Tokens in a table of Parquet parts, in a folder or at any URL that fsspec knows, such as `s3://bucket/tokens`.

    <location>/settings.json        what the tokens were computed with
    <location>/part-*.parquet       rows: pages, or other images, and their tokens
    <location>/errors.jsonl         what could not be encoded, a line each; not there if there is nothing

A part appears in one step and never changes, so the table can be read at any moment, by anything that reads Parquet.

Letters in the shapes: M images, N tokens of an image, C channels.
"""

import glob
import io
import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import torch

from deepseek_ocr_vision.configuration.extras import require
from deepseek_ocr_vision.saving.staging import PREFIX, locked, staging_folder


if TYPE_CHECKING:
    import datasets
    import pyarrow


STORED_TYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,  # its bits, as int16: Parquet has no bfloat16
    "int8": torch.int8,  # a scale for each token beside it
    "none": None,  # the mean of the tokens alone
}
LAYOUT = 2
"""Version of what is in a table."""
SETTINGS, ERRORS = "settings.json", "errors.jsonl"
_ROW_GROUP_BYTES = 1 << 18  # at the most; it is read as a whole for the tokens of one image


@dataclass(frozen=True)
class Problem:
    """Why a page, counted from 0, or all of a source (`None`) could not be encoded."""

    source: str
    page: int | None
    error: str


# Columns


def table_schema(stored: str) -> "pyarrow.Schema":
    """The columns of a table whose tokens are stored as `stored`, a key of `STORED_TYPES`."""
    pa = require_pyarrow()
    sizes = pa.list_(pa.int64())
    columns = {"id": pa.string(), "source": pa.string(), "page": pa.int64()}
    columns |= {"grid": sizes, "patches_grid": sizes, "num_tokens": pa.int64()}
    if stored != "none":
        numbers = {"bfloat16": "int16", "float16": "halffloat"}.get(stored, stored)
        columns["tokens"] = pa.list_(pa.list_(pa.type_for_alias(numbers)))
    if stored == "int8":
        columns["scales"] = pa.list_(pa.float32())
    return pa.schema(columns | {"pooled": pa.list_(pa.float32()), "seconds": pa.float64()})


def token_columns(tokens: Sequence[torch.Tensor], stored: str) -> dict[str, Any]:
    """The columns that hold tokens, each [N, C]: stored as they are, or per token scaled to int8.

    A token of int8 is its numbers divided by its scale, the largest of them / 127, and rounded.
    """
    columns: dict[str, Any] = {"num_tokens": [len(each) for each in tokens]}
    columns["pooled"] = _lists(torch.stack([each.float().mean(dim=0) for each in tokens]))
    joined = torch.cat(list(tokens))  # [all tokens, C]
    if stored == "int8":
        scales = joined.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        columns["scales"] = _split(_numbers(scales), columns["num_tokens"])
        joined = (joined.float() / scales[:, None]).round()
    if stored != "none":
        columns["tokens"] = _split(_lists(joined.to(STORED_TYPES[stored])), columns["num_tokens"])
    return columns


def _numbers(numbers: torch.Tensor) -> "pyarrow.Array":
    is_bits = numbers.dtype == torch.bfloat16
    return require_pyarrow().array((numbers.view(torch.int16) if is_bits else numbers).flatten().numpy())


def _lists(rows: torch.Tensor) -> "pyarrow.ListArray":
    """Rows [M, C] as M lists."""
    return _split(_numbers(rows), [rows.shape[1]] * len(rows))


def _split(values: "pyarrow.Array", lengths: Sequence[int]) -> "pyarrow.ListArray":
    """Values one behind the other as lists of the lengths given."""
    pa = require_pyarrow()
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), values)


def read_tokens(row: "pyarrow.Table", stored: str) -> torch.Tensor:
    """The tokens [N, C] of a table's one row, as they were stored; int8 comes as float32."""
    lists = row["tokens"].combine_chunks().flatten()
    numbers = lists.flatten().to_numpy(zero_copy_only=False)
    tokens = torch.from_numpy(numbers.copy()).view(len(lists), -1)
    if stored == "int8":
        return tokens * torch.from_numpy(row["scales"].combine_chunks().flatten().to_numpy().copy())[:, None]
    return tokens.view(torch.bfloat16) if stored == "bfloat16" else tokens


# The table


class TokenTable:
    """A table of tokens, which many processes may read and add to.

    Args:
        location: Folder or URL. With `settings` it is made if it is not there.
        settings: What the tokens depend on, in values that JSON has. Without, the table is there to be read.
        errors: Name of the file of problems.

    Raises:
        FileNotFoundError: There is no such table to read.
        NotADirectoryError: There is a file at `location`.
        ValueError: The location holds something else, tokens of other settings, or a damaged file.
    """

    def __init__(self, location: str | os.PathLike, settings: dict[str, Any] | None = None, *, errors: str = ERRORS):
        require_pyarrow()
        self.errors = errors
        self.fs, root = fsspec.core.url_to_fs(os.fspath(location))
        self.root = root.rstrip("/")
        self.is_local = "file" in self.fs.protocol
        self.location = self.root if self.is_local else self.fs.unstrip_protocol(self.root)
        self.rows: dict[str, tuple[str, int]] = {}
        self.parts: set[str] = set()
        if settings is not None:
            self._agree_on(json.loads(canonical({"layout": LAYOUT, **settings})))
        self.settings = self._read_settings()
        self.stored: str = self.settings["tokens"]
        self.refresh()

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _agree_on(self, settings: dict[str, Any]) -> None:
        """Note what the table is for, or make sure that it is for the same."""
        if self.fs.isfile(self.root):
            raise NotADirectoryError(f"{self.location} is a file; a table of tokens is a folder.")
        self.fs.makedirs(self.root, exist_ok=True)
        with self._locked():
            if not self.fs.isfile(self.path(SETTINGS)):
                others = [name for name in self._names() if not name.startswith(PREFIX)]  # a kill leaves such a folder
                if others:
                    raise ValueError(
                        f"{self.location} holds no table of tokens, but {others[0]!r}; name a new folder."
                    )
                self._put(SETTINGS, canonical(settings))
        differences = _differences(self._read_settings(), settings)
        if differences:
            raise ValueError(f"{self.location} holds tokens of other settings: {'; '.join(differences)}.")
        if self.is_local:
            with staging_folder(self.root):
                pass  # what killed processes left in the folder is removed first

    def _names(self) -> list[str]:
        try:
            return sorted(Path(path).name for path in self.fs.ls(self.root, detail=False))
        except FileNotFoundError:  # in a store there is no folder without a file
            return []

    def _locked(self) -> Any:
        return locked(Path(self.root)) if self.is_local else nullcontext()

    def _read_settings(self) -> dict[str, Any]:
        try:
            return json.loads(self.fs.cat_file(self.path(SETTINGS)))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.location} has no {SETTINGS}: no pages were encoded into it.") from None
        except ValueError as error:
            raise ValueError(f"{self.path(SETTINGS)} is damaged: {error}") from error

    def refresh(self) -> None:
        """Take notice of what has been stored in the meantime."""
        import pyarrow.parquet as pq

        self.fs.invalidate_cache()  # some remember what they have listed
        for name in self._names():
            if name in self.parts or not (name.startswith("part-") and name.endswith(".parquet")):
                continue
            try:
                with self.fs.open(self.path(name)) as file:
                    ids = pq.read_table(file, columns=["id"])["id"].to_pylist()
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self.path(name)} is damaged ({error}); delete it, and what it held is computed again."
                ) from error
            self.parts.add(name)
            for row, each in enumerate(ids):
                self.rows.setdefault(each, (name, row))

    def __contains__(self, id: str) -> bool:
        return id in self.rows

    # Writing

    def write(self, rows: "pyarrow.Table") -> None:
        """Write a part, less the rows with an error, and those that somebody else has stored in the meantime.

        Raises:
            OSError: The disk is full or the folder cannot be written to. What was stored before stays.
        """
        with self._locked():
            self.refresh()
            ids = rows.select(["id", "error"]).to_pylist()
            is_new = [row["error"] is None and row["id"] not in self for row in ids]
            rows = rows.filter(require_pyarrow().array(is_new, "bool")).select(table_schema(self.stored).names)
            if len(rows):
                self._write_part(rows)
        self.refresh()

    def _write_part(self, rows: "pyarrow.Table") -> None:
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(
            rows,
            buffer,
            row_group_size=max(1, _ROW_GROUP_BYTES * len(rows) // rows.nbytes),
            # These have few values enough for a dictionary, which makes them smaller; float16 and float32 do not.
            use_dictionary=self.stored in ("bfloat16", "int8"),
            write_statistics=["id", "source", "page"],
        )
        # Sorted by name, parts are in the order in which they were written.
        self._put(f"part-{time.time_ns():020}-{uuid.uuid4().hex[:8]}.parquet", buffer.getbuffer())

    def _put(self, name: str, content: bytes | memoryview) -> None:
        """Make a file of the table appear in one step, whole and on the disk."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), bytes(content))
            return
        try:
            with staging_folder(self.root) as folder:
                with open(folder / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(folder / name, self.path(name))
        except OSError as error:
            raise OSError(error.errno, f"{self.path(name)} could not be written: {error.strerror or error}") from error

    def write_problems(self, problems: Iterable[Problem]) -> None:
        """Replace the file of problems; without any there is none."""
        if lines := _lines(problems):
            self._put(self.errors, lines)
            return
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(self.errors))

    def add_problems(self, problems: Iterable[Problem]) -> None:
        """Add to the file of problems, in a folder. Objects of a store can be replaced alone."""
        with open(self.path(self.errors), "ab") as file:
            file.write(_lines(problems))

    # Reading

    def read(self, id: str) -> torch.Tensor:
        """The tokens [N, C] of one image, on the CPU."""
        if id not in self:
            self.refresh()
        part, row = self.rows[id]
        file = _opened_part(self.fs, self.path(part), os.getpid())
        rows_per_group = file.metadata.row_group(0).num_rows
        columns = ["tokens", "scales"] if self.stored == "int8" else ["tokens"]
        group = file.read_row_group(row // rows_per_group, columns=columns, use_threads=False)
        return read_tokens(group.slice(row % rows_per_group, 1), self.stored)


@lru_cache(maxsize=64)
def _opened_part(fs: fsspec.AbstractFileSystem, path: str, process: int) -> Any:
    """A part, opened for this process: two that share an open file share their place in it."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, memory_map=True) if "file" in fs.protocol else pq.ParquetFile(fs.open(path))


def canonical(value: Any) -> bytes:
    """A value as JSON that is the same at every call."""
    return json.dumps(value, sort_keys=True, default=str, indent=1).encode()


def _lines(problems: Iterable[Problem]) -> bytes:
    return "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems).encode()


def _differences(stored: Any, given: Any, name: str = "") -> list[str]:
    """What differs between two values of JSON, by name."""
    if isinstance(stored, dict) and isinstance(given, dict):
        names = sorted(stored.keys() | given.keys())
        parts = [_differences(stored.get(key), given.get(key), f"{name}.{key}".strip(".")) for key in names]
        return [difference for part in parts for difference in part]
    return [] if stored == given else [f"{name} is {stored!r} there and {given!r} now"]


def require_pyarrow() -> Any:
    return require("pyarrow", "A table of tokens", extra="encode")


def load_pages(location: str | os.PathLike) -> "datasets.Dataset":
    """The pages that `encode_pages` wrote, as far as they are there at this moment.

    `datasets` converts the parts to Arrow in its cache, once, and reads them memory-mapped from there. What it exports
    (`to_parquet`, `to_pandas`, `save_to_disk`, `push_to_hub`, ...) has the tokens.

    Args:
        location: What was `out`.

    Returns:
        A dataset with a row a page: `id`, `source`, `page`, `grid`, `patches_grid`, `num_tokens`, `tokens`, a tensor
        [N, C], `pooled`, a tensor [C], and `seconds`. Tokens stored as bfloat16 come as float32, exactly; those stored
        as int8 are multiplied by their scales. `info.description` holds the settings that made them, as JSON.

    Raises:
        FileNotFoundError: There are no encoded pages.
        ImportError: `datasets` is not installed.
        ValueError: A part is damaged.
    """
    datasets = require("datasets", "load_pages", extra="encode")
    table = TokenTable(location)
    if not table.parts:
        raise FileNotFoundError(f"{location} has no parts: no page was encoded into it yet.")
    folder = glob.escape(table.location)
    pages = datasets.Dataset.from_parquet([f"{folder}/{name}" for name in sorted(table.parts)])
    if table.stored in ("bfloat16", "int8"):
        pages = pages.with_format("arrow").map(
            _with_floats, batched=True, batch_size=16, fn_kwargs={"stored": table.stored}
        )
    pages.info.description = canonical(table.settings).decode()
    columns = [name for name in ("tokens", "pooled") if name in pages.column_names]
    return pages.with_format("torch", columns=columns, output_all_columns=True)


def _with_floats(rows: "pyarrow.Table", stored: str) -> "pyarrow.Table":
    tokens = [read_tokens(rows.slice(index, 1), stored).float() for index in range(len(rows))]
    column = token_columns(tokens, "float32")["tokens"]
    rows = rows.set_column(rows.column_names.index("tokens"), "tokens", column)
    return rows.drop_columns(["scales"]) if stored == "int8" else rows
