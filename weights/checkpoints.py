"""Checkpoints around the encoder: a folder of safetensors, one file, or a repository on the Hub.

Each is opened by its headers and its configuration alone. A local checkpoint can then read tensors, one at a time; one
on the Hub has to be fetched first, which `hub` does, for the encoder's part of it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from deepseek_ocr_vision.saving.atomic import PENDING
from deepseek_ocr_vision.saving.checksums import read_checksums, sha256_of, verify_checksums
from deepseek_ocr_vision.saving.saving_deepseek_ocr_vision import CHECKSUMS

from .safetensors_files import TensorEntry, is_finite, read_local_header, read_tensor, require_float


CONFIG = "config.json"


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine."""

    folder: Path  # where its files are
    files: tuple[str, ...]  # names of its safetensors files
    tensors: dict[str, TensorEntry]  # the places of all tensors in them, by name
    config: dict[str, Any]  # what its `config.json` says, empty if there is none

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    def local(self) -> "LocalCheckpoint":
        """The checkpoint itself: it is here already."""
        return self

    def read(self, sources: Mapping[str, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read tensors in the order of their bytes and in their dtype; each has to be of numbers that are finite.

        Args:
            sources: Key to the names of the tensors it is made of: one, or several that are put together by rows.
        """
        places = {key: self.tensors[names[0]] for key, names in sources.items()}
        for file in self.files:
            keys = sorted((key for key in places if places[key].file == file), key=lambda key: places[key].start)
            for key in keys:
                yield key, torch.cat(parts) if len(parts := [*map(self._read, sources[key])]) > 1 else parts[0]

    def _read(self, name: str) -> torch.Tensor:
        entry = self.tensors[name]
        require_float(self.folder / entry.file, name, entry)
        with open(self.folder / entry.file, "rb", buffering=0) as file:
            tensor = read_tensor(file, entry)
        if not is_finite(tensor):
            raise ValueError(f"{self.folder / entry.file}: {name} holds NaN or infinity.")
        return tensor


def open_local(source: str | os.PathLike) -> LocalCheckpoint:
    """Open a folder with one or many safetensors files, or one such file.

    Raises:
        OSError: There is nothing there, or a file that the index names is missing.
        ValueError: A file, the index or the configuration is corrupt, or there are only pickles.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_dir():
        return open_weights(path, read_config(path.parent / CONFIG))
    config = read_config(path / CONFIG)
    # A configuration names its weights while a save into the folder is not finished.
    named = config.get("transformers_weights")
    if named is not None:
        return open_weights(path / require_name(named, path / CONFIG), config)
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if (path / name).is_file():
            return open_weights(path / name, config)
    files = _files_without_index(path)
    return LocalCheckpoint(path, files, _tensors(path, files), config)


def open_weights(path: Path, config: dict[str, Any]) -> LocalCheckpoint:
    """Open a safetensors file, or the files that an index names, which have to lie beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    # The index of a pending save names files by their way from the checkpoint's folder.
    folder = path.parents[len(Path(PENDING).parts)] if path.parent.as_posix().endswith(PENDING) else path.parent
    if path.suffix != ".json":
        files: tuple[str, ...] = (path.relative_to(folder).as_posix(),)
        return LocalCheckpoint(folder, files, _tensors(folder, files), config)
    index = read_index(path)
    files = tuple(dict.fromkeys(index.values()))
    return LocalCheckpoint(folder, files, _tensors(folder, files, index=index, index_name=path.name), config)


def require_name(named: Any, config: str | os.PathLike) -> str:
    """The file of weights that a configuration names, if it lies beside it, and else a `ValueError`."""
    if not _is_name(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"{config} names {named!r} as `transformers_weights`, which is no safetensors file beside it; refused."
        )
    return named


def _files_without_index(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = tuple(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not files and pickles:
        raise ValueError(
            f"{folder} holds weights only as pickles ({', '.join(pickles)}), which can run code; refused."
        )
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors file.")
    return files


def _tensors(
    folder: Path,
    files: tuple[str, ...],
    *,
    index: dict[str, str] | None = None,
    index_name: str = SAFE_WEIGHTS_INDEX_NAME,
) -> dict[str, TensorEntry]:
    """All files' tensors, none twice, and where the index says they are."""
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing, though {index_name} names it.")
        for name, entry in read_local_header(folder / file).items():
            if name in tensors:
                raise ValueError(f"{folder}: {name} is in {tensors[name].file} and in {file}.")
            tensors[name] = replace(entry, file=file)
    for name, file in (index or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise ValueError(f"{folder / index_name} is corrupt: it looks for {name} in {file}.")
    return tensors


def compare_checksums(source: str | os.PathLike, *, required: bool = False, allow_missing: bool = False) -> list[str]:
    """Compare a folder, or one file in it, with its `SHA256SUMS`, which need not be there unless they are required.

    A Hub id is no path: of it nothing is compared. What was fetched from there is, with `allow_missing`.

    Returns:
        The names of the files that were compared.

    Raises:
        FileNotFoundError: There are no sums though they are required, or a file that they name is missing.
        ValueError: A file is not the one that was summed.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if not required and not (path.exists() and (folder / CHECKSUMS).is_file()):
        return []
    if path.is_dir():
        return verify_checksums(folder, allow_missing=allow_missing)
    digest = read_checksums(folder).get(path.name)
    if digest is None and required:
        raise FileNotFoundError(f"{folder / CHECKSUMS} has no sum for {path.name}.")
    if digest not in (None, sha256_of(path)):
        raise ValueError(f"{path} is not what {CHECKSUMS} says; fetch or convert the checkpoint again.")
    return [path.name] if digest else []


def read_index(path: Path) -> dict[str, str]:
    """Which tensor is in which file, by a checkpoint's index. Each has to be a safetensors file beside it."""
    contents = _read_object(path)
    weight_map = contents.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} is corrupt: it has no `weight_map`.")
    for file in weight_map.values():
        if not _is_name(file) or not file.endswith(".safetensors"):
            raise ValueError(f"{path} names {file!r}, which is no safetensors file in the same folder; refused.")
    return weight_map


def _is_name(file: Any) -> bool:
    """Whether it names a file in the same folder, or one that an interrupted save has left in its pending folder."""
    # Both kinds of slash: what is a name here may be a path elsewhere.
    name = file.removeprefix(f"{PENDING}/") if isinstance(file, str) else "/"
    return not set(name) & set("/\\\0:") and not name.startswith(".")


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's configuration, empty if there is none."""
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON, or cut ({error}).") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} has to hold an object, but holds a {type(contents).__name__}.")
    return contents
