"""safetensors files: headers read without trust, tensors read straight into their memory.

The format (https://github.com/huggingface/safetensors, section "Format"): eight bytes with the length of a JSON
header, little-endian; the header, which names each tensor's dtype, shape and place; the tensors' bytes without a gap.
The library `safetensors` reads whole files on this machine. Here a header is read before the rest of the file is
there, and a tensor into memory that is counted: pages of a memory map would come on top of the weights.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
PIECE_SIZE = 1 << 22
MAX_DIMENSIONS = 8
MAX_SHOWN = 200

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that an encoder's weights may have; those of other tensors in its checkpoint are only skipped."""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}

_FETCH_AGAIN = "fetch it again"
# How files begin that are found in a checkpoint's place.
_LOOKALIKES = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the file it stands for; `git lfs pull` or the Hub fetch it"),
    (b"<", "an HTML or XML page, such as an error page that was saved under the file's name"),
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickles are; only safetensors are read, pickles can run code"),
    (b"\x80", "a pickle; only safetensors are read, pickles can run code"),
    (b"GGUF", "a GGUF file; only safetensors are read"),
    (b"{", "JSON text"),
)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies."""

    file: str  # its name, for messages and to find it by
    dtype: str  # as the format names it
    shape: tuple[int, ...]
    start: int  # position of the first byte in the file
    stop: int  # position after the last byte

    @property
    def num_bytes(self) -> int:
        """How many bytes it takes."""
        return self.stop - self.start


def read_header(file: str, file_size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file that is here or elsewhere.

    `read` gives the bytes from a position to another.

    Returns:
        Name to entry of every tensor, in the order of their bytes.

    Raises:
        ValueError: The file is cut, no safetensors file, or its header contradicts itself or the file's size.
    """
    if file_size == 0:
        raise ValueError(f"{file} is empty; {_FETCH_AGAIN}.")
    beginning = read(0, min(file_size, 64))
    header_size = int.from_bytes(beginning[:LENGTH_BYTES], "little")
    if file_size < LENGTH_BYTES or header_size > MAX_HEADER_BYTES:
        _refuse_lookalike(file, beginning)
        raise ValueError(
            f"{file} is no safetensors file: it gives the length of its header as {header_size:,} bytes; the format "
            f"allows {MAX_HEADER_BYTES:,}."
        )
    data_start = LENGTH_BYTES + header_size
    if data_start > file_size:
        _refuse_lookalike(file, beginning)
        raise ValueError(
            f"{file} is cut: {data_start:,} bytes of header expected, {file_size:,} found; {_FETCH_AGAIN}."
        )
    contents = _tensor_fields(file, read(LENGTH_BYTES, data_start))
    found = [_entry(file, name, fields, data_start) for name, fields in contents.items()]
    entries = dict(sorted(found, key=lambda item: (item[1].start, item[1].stop)))
    _require_gapless(file, entries, data_start, file_size)
    return entries


def _refuse_lookalike(file: str, beginning: bytes) -> None:
    for start, what in _LOOKALIKES:
        if beginning.lstrip().startswith(start):
            raise ValueError(f"{file} is no safetensors file. It looks like {what}.")


def _tensor_fields(file: str, header: bytes) -> dict[str, Any]:
    """What a header says of each tensor."""
    duplicates: list[str] = []

    def note_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        contents = dict(pairs)
        if len(contents) < len(pairs):
            duplicates.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return contents

    try:
        # As text, since from bytes Python would guess UTF-16 and others, which the format does not have.
        contents = json.loads(header.decode("utf-8"), object_pairs_hook=note_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no safetensors file, or corrupt: its header is no JSON ({error}).") from error
    if duplicates:
        raise ValueError(f"{file} is corrupt: its header names {_short(duplicates[0])} twice.")
    if not isinstance(contents, dict):
        raise ValueError(f"{file} is corrupt: its header is a {type(contents).__name__}, not an object.")
    metadata = contents.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file} is corrupt: its `__metadata__` has to hold texts, but is {_short(metadata)}.")
    return contents


def _short(value: Any) -> str:
    """A value from a header as text, cut where it would fill pages."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _entry(file: str, name: str, fields: Any, data_start: int) -> tuple[str, TensorEntry]:
    if not isinstance(fields, dict) or not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{file} is corrupt: its header has no dtype, shape and data_offsets for {_short(name)}.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(
            f"{file}: {_short(name)} has the unknown dtype {_short(dtype)}; known are {', '.join(_BITS)}."
        )
    if not _are_sizes(shape, at_most=MAX_DIMENSIONS) or not _are_sizes(offsets, at_most=2) or len(offsets) != 2:
        raise ValueError(
            f"{file} is corrupt: {_short(name)} has shape {_short(shape)} and data_offsets {_short(offsets)}; a shape "
            f"has at most {MAX_DIMENSIONS} sizes."
        )
    expected_bits, num_bytes = prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if expected_bits != num_bytes * 8:
        raise ValueError(
            f"{file} is corrupt: {_short(name)} of shape {shape} and dtype {dtype} takes {expected_bits // 8:,} "
            f"bytes, its data_offsets {offsets} span {num_bytes:,}."
        )
    return name, TensorEntry(file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: Any, *, at_most: int) -> bool:
    if not isinstance(values, list) or len(values) > at_most:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _require_gapless(file: str, entries: dict[str, TensorEntry], data_start: int, file_size: int) -> None:
    position = data_start
    for name, entry in entries.items():
        if entry.start != position:
            what = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            raise ValueError(
                f"{file} is corrupt: {_short(name)} {what} (starts at {entry.start:,}, not {position:,})."
            )
        position = entry.stop
    if position != file_size:
        what = "cut" if file_size < position else "too long"
        raise ValueError(f"{file} is {what}: {position:,} bytes expected, {file_size:,} found; {_FETCH_AGAIN}.")


def read_local_header(path: Path) -> dict[str, TensorEntry]:
    """`read_header` of a file on this machine."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a safetensors file.")

    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    with path.open("rb") as file:
        entries = read_header(str(path), path.stat().st_size, read)
    # transformers will read it by the library, which refuses more than the format's description says.
    try:
        str(path).encode()
        with safe_open(path, framework="pt"):
            return entries
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: safetensors reads no file whose path is not UTF-8; rename it.") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt: {error}; {_FETCH_AGAIN}.") from error


def require_float(file: str | os.PathLike, name: str, entry: TensorEntry) -> None:
    """Refuse a tensor that is no weight: integers would be taken for numbers of another meaning."""
    if entry.dtype not in DTYPES:
        raise ValueError(f"{file}: {name} has dtype {entry.dtype}; weights have {', '.join(DTYPES)}.")


def read_tensor(file: FileIO, entry: TensorEntry) -> torch.Tensor:
    """Read one tensor, whose dtype is one of `DTYPES`, into new memory."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    file.seek(entry.start)
    if file.readinto(byte_view(tensor)) != entry.num_bytes:
        raise ValueError(f"{entry.file} has become shorter while it was read; {_FETCH_AGAIN}.")
    return tensor


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not a copy of them."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def in_pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A tensor's rows in pieces of some millions of numbers, so that what is computed of them needs little memory."""
    if not tensor.ndim:
        return (tensor,)
    row_size = max(1, tensor[:1].numel())
    return tensor.split(max(1, PIECE_SIZE // row_size))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    return all(bool(torch.isfinite(piece).all()) for piece in in_pieces(tensor))
