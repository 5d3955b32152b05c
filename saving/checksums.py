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


# What people edit on the Hub's own pages.
_NOT_SUMMED = ("README.md",)

_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^/\\\n]+)")


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: str | os.PathLike) -> Path:
    """Write `SHA256SUMS` for every file in `folder` except the model card and hidden files.

    Returns:
        The path of the file.
    """
    folder = Path(folder)
    passed_over = (CHECKSUMS, *_NOT_SUMMED)
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in passed_over]
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in paths if not path.name.startswith(".")]
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
    """Compare the files of a folder with its `SHA256SUMS`.

    Args:
        folder: The checkpoint.
        allow_missing: Whether files may be missing, as in the Hub's cache, which holds only what was asked for.

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
    """Compare the files that `from_pretrained` has read, in a folder or in the Hub's cache, with their sums.

    Args:
        source: The folder or the Hub id.
        hub_options: `cache_dir`, `revision` and so on, as transformers takes them.

    Raises:
        OSError: There are no sums.
        ValueError: There is no source, or a file is not the one that was summed.
    """
    if source is None:
        raise ValueError("`verify_checksums` is true, but without a checkpoint there are no files to compare.")
    path: Any = cached_file(source, CHECKSUMS, **hub_options)
    return verify_checksums(os.path.dirname(path), allow_missing=not os.path.isdir(source))


__all__ = ["read_checksums", "sha256_of", "verify_checksums", "verify_loaded", "write_checksums"]
