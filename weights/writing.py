"""Weights out: a full checkpoint in the layout of another one, with the encoder's weights in it replaced."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import list_some
from deepseek_ocr_vision.saving.checksums import write_checksums
from deepseek_ocr_vision.saving.saving_deepseek_ocr_vision import CHECKSUMS
from deepseek_ocr_vision.saving.staging import atomic_write

from .checkpoints import LocalCheckpoint, compare_checksums, open_local
from .names import is_vision, match_tensors
from .repository import local_checkpoint
from .safetensors_files import DTYPES, byte_view, in_pieces, is_finite, require_float
from .sizes import expected_shapes


CHUNK_BYTES = 1 << 20
# Weights of an earlier state, and what belongs to a run or a machine rather than to the checkpoint.
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".tmp", ".incomplete", ".lock")


@dataclass(frozen=True)
class WriteReport:
    """What `write_deepseek_ocr` wrote.

    Attributes:
        target: The folder or the file.
        replaced: Names of the tensors with the model's values.
        rounded: Those of them that the base's dtype cannot hold exactly.
        kept: Names of vision tensors that the model's feature mode does not have; they keep the base's values.
        left_out: Files of the base that are not copied: hidden ones, pickles, and weights that its index leaves out.
    """

    target: Path
    replaced: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.target}: {len(self.replaced)} tensors replaced."]
        if self.rounded:
            lines.append(f"{len(self.rounded)} of them were rounded to the base's dtype: {list_some(self.rounded)}.")
        if self.kept:
            lines.append(f"The model has none of these, they keep the base's values: {list_some(self.kept)}.")
        if self.left_out:
            lines.append(f"Not copied: {list_some(self.left_out)}.")
        return "\n".join(lines)


def write_deepseek_ocr(
    model: PreTrainedModel, base: str | os.PathLike, target: str | os.PathLike, **hub_options: Any
) -> WriteReport:
    """What `DeepSeekOCRVisionModel.write_deepseek_ocr` says.

    Memory stays below that of the model plus its largest tensor.
    """
    return write_weights(weights_of(model), local_checkpoint(base, "base", **hub_options), target)


def write_weights(
    weights: Mapping[str, torch.Tensor], base: Path, target: str | os.PathLike, *, whole: bool = False
) -> WriteReport:
    """Write a copy of a checkpoint with tensors under our names in place of its own.

    With `whole` the weights are those of a whole model, so that the base may hold nothing beyond them.
    """
    target = Path(target)
    if target.resolve() == base.resolve() or base.resolve() in target.resolve().parents:
        raise ValueError(f"`target` is {target}, which lies in the base {base}; name another place.")
    compare_checksums(base)
    checkpoint = open_local(base)
    sources = match_tensors(
        checkpoint.shapes, {key: tuple(tensor.shape) for key, tensor in weights.items()}, whole=whole
    )
    replacements = _replacements(checkpoint, weights, sources)
    kept = [name for name in checkpoint.tensors if is_vision(name) and name not in replacements]
    report = WriteReport(target, list(replacements), _rounded(checkpoint, replacements), kept)
    total = sum((checkpoint.folder / file).stat().st_size for file in checkpoint.files)
    _require_space(target, total)
    with atomic_write(target) as partial:
        if base.is_dir():
            report.left_out.extend(_copy_side_files(base, partial, checkpoint.files))
        with tqdm(total=total, unit="B", unit_scale=True, desc=target.name) as bar:
            for file in checkpoint.files:
                path = partial / file if base.is_dir() else partial
                _write_file(checkpoint, file, path, replacements=replacements, bar=bar)
        if (base / CHECKSUMS).is_file():
            write_checksums(partial)
    return report


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's weights, checked to be its own, present and finite."""
    weights = model.state_dict()
    strange = sorted(weights.keys() ^ expected_shapes(type(model), model.config).keys())
    if strange:
        raise ValueError(
            f"The model has other tensors than its configuration ({list_some(strange, most=3)}). Adapters have to be "
            "merged first: `model = peft_model.merge_and_unload()`."
        )
    for key, tensor in weights.items():
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device, without values; load all of the model.")
        if not is_finite(tensor):
            raise ValueError(f"{key} holds NaN or infinity.")
    return weights


def _replacements(
    checkpoint: LocalCheckpoint, weights: Mapping[str, torch.Tensor], sources: Mapping[str, list[str]]
) -> dict[str, torch.Tensor]:
    """The base's names, each with the tensor or the third of one that takes its place."""
    replacements = {}
    for key, names in sources.items():
        for name, part in zip(names, weights[key].detach().chunk(len(names)), strict=True):
            require_float("The base", name, checkpoint.tensors[name])
            replacements[name] = part
    return replacements


def _rounded(checkpoint: LocalCheckpoint, replacements: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that change when they are brought to the base's dtype, into which they have to fit."""
    rounded = []
    for name, tensor in replacements.items():
        dtype, exact = DTYPES[checkpoint.tensors[name].dtype], True
        for piece in in_pieces(tensor):
            stored = piece.to(dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(f"{name} has values too large for {dtype}, the base's dtype.")
            exact = exact and torch.equal(stored.to(piece.dtype), piece)
        if not exact:
            rounded.append(name)
    return rounded


def _require_space(target: Path, num_bytes: int) -> None:
    parent = next(parent for parent in target.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OSError(f"{target} needs {num_bytes / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free.")


def _copy_side_files(base: Path, partial: Path, files: tuple[str, ...]) -> list[str]:
    """Copy all of a checkpoint but its weights; give the names of what was left out."""
    left_out = []
    partial.mkdir()
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        if path.is_dir() or name.as_posix() in files:
            continue
        if path.name.endswith(_LEFT_OUT) or any(part.startswith(".") for part in name.parts) or not path.is_file():
            left_out.append(name.as_posix())
        elif name.as_posix() != CHECKSUMS:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)
    return left_out


def _write_file(
    checkpoint: LocalCheckpoint, file: str, path: Path, *, replacements: Mapping[str, torch.Tensor], bar: tqdm
) -> None:
    """Copy one file, with the bytes of the replaced tensors exchanged and all others as they are."""
    with open(checkpoint.folder / file, "rb") as source, path.open("wb") as output:
        for name, entry in checkpoint.tensors.items():
            if entry.file == file and name in replacements:
                _copy_until(source, output, entry.start, bar)
                output.write(byte_view(replacements[name].to("cpu", DTYPES[entry.dtype]).contiguous()))
                source.seek(entry.stop)
                bar.update(entry.num_bytes)
        _copy_until(source, output, None, bar)
        output.flush()
        os.fsync(output.fileno())


def _copy_until(source: BinaryIO, output: BinaryIO, stop: int | None, bar: tqdm) -> None:
    """Copy from where `source` stands to a position, or to its end."""
    while stop is None or source.tell() < stop:
        chunk = source.read(CHUNK_BYTES if stop is None else min(CHUNK_BYTES, stop - source.tell()))
        if not chunk:
            return
        output.write(chunk)
        bar.update(len(chunk))
