"""Checksums of a checkpoint's files, in the form that `sha256sum --check SHA256SUMS` reads.

safetensors finds a file that was cut, not a byte that flipped. Converting and publishing write these sums,
`from_pretrained(..., verify_checksums=True)` compares them.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from .saving_deepseek_ocr_vision import CHECKSUMS


_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^/\\\n]+)")


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: str | os.PathLike) -> Path:
    """Write `SHA256SUMS` for every file in `folder` except the model card, which people edit on the Hub's own pages,
    and hidden files; give its path.
    """
    folder = Path(folder)
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in paths if path.name not in (CHECKSUMS, "README.md")]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    return folder / CHECKSUMS


def read_checksums(folder: str | os.PathLike) -> dict[str, str]:
    """The sums in a folder, file name to hexadecimal digits.

    Raises:
        FileNotFoundError: The folder has no `SHA256SUMS`.
        ValueError: A line is not a sum and the name of a file in this folder.
    """
    path = Path(folder) / CHECKSUMS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; only converted and published checkpoints have checksums.")
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match or match["name"] in (".", ".."):
            raise ValueError(f"{path}, line {number}: {line!r} is no SHA-256 with the name of a file beside it.")
        sums[match["name"]] = match["digest"]
    if not sums:
        raise ValueError(f"{path} is empty; it has to name the files of the checkpoint.")
    return sums


def verify_checksums(folder: str | os.PathLike, *, allow_missing: bool = False) -> list[str]:
    """Compare the files of a folder with its `SHA256SUMS`; with `allow_missing` those that are there, as in the Hub's
    cache, which holds only what was asked for.

    Returns:
        The names of the files that were compared.

    Raises:
        FileNotFoundError: The folder has no `SHA256SUMS`, or lacks a file named there.
        ValueError: A file is not the one that was summed; the message names all of them.
    """
    folder = Path(folder)
    sums = read_checksums(folder)
    present = [name for name in sums if (folder / name).is_file()]
    if len(present) < len(sums) and not allow_missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(sorted(sums.keys() - set(present)))} of its {CHECKSUMS}.")
    changed = [name for name in present if sha256_of(folder / name) != sums[name]]
    if changed:
        raise ValueError(
            f"{folder}: {', '.join(changed)} is not what {CHECKSUMS} says; fetch or convert the checkpoint again. If "
            "you have changed it yourself, remove that file."
        )
    return present


def verify_loaded(source: str | os.PathLike | None, **hub_options: Any) -> list[str]:
    """Compare the files that `from_pretrained` has read, in a folder or in the Hub's cache, with their sums."""
    if source is None:
        raise ValueError("`verify_checksums` is true, but without a checkpoint there are no files to compare.")
    path: Any = cached_file(source, CHECKSUMS, **hub_options)
    return verify_checksums(os.path.dirname(path), allow_missing=not os.path.isdir(source))
