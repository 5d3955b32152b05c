"""Write the encoder as a file for another runtime, run that file there, and keep it only if it gives the same tokens.

What is exported is a function of the pixels alone, with the attention that needs least memory in these runtimes: the
relative positions folded into queries and keys (`"sdpa_folded"`), so that no bias of 0.8 GB a global block is made.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import require_choice, require_flag, require_integer
from deepseek_ocr_vision.configuration.extras import require
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import resize_positions
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor
from deepseek_ocr_vision.saving.staging import staging_folder

from . import runtimes


Format = Literal["onnx", "pt2", "openvino"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Whose runtimes resize tables of positions as PyTorch does.
_DYNAMIC_FORMATS: tuple[Format, ...] = ("onnx", "pt2")

_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "openvino": ("openvino",)}
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}
_INPUT, _OUTPUT = "pixel_values", "last_hidden_state"

_LEAST_TOKENS = 2
"""Tokens that a page has in height and in width at least, where its size is left open."""


class ExportError(ValueError):
    """The exported file gives other tokens than the model."""


@dataclass(frozen=True)
class Export:
    """What was written, and how it ran in its own runtime.

    Attributes:
        file: The exported model; a file with its weights may lie beside it.
        description: The JSON file with inputs, outputs and preprocessing.
        difference: The largest difference to the model's tokens, relative to their standard deviation.
        tolerance: How large it may be.
        seconds: What each batch of the check took in the runtime.
        peak_bytes: The most memory that the runtime's process held; `None` on Windows.
    """

    file: Path
    description: Path
    difference: float
    tolerance: float
    seconds: tuple[float, ...]
    peak_bytes: int | None


class _Tokens(nn.Module):
    """The encoder as a function of pixels that gives tokens."""

    def __init__(self, model: DeepSeekOCRVisionModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values, return_dict=True).last_hidden_state


class _FixedEmbeddings(nn.Module):
    """The CLIP stage's embeddings for grids of one size, with what they add to a grid as a table."""

    added: torch.Tensor

    def __init__(self, embeddings: nn.Module, grid: torch.Tensor):
        super().__init__()
        self.register_buffer("added", embeddings(torch.zeros_like(grid)))  # [1, N (+ 1), C]
        self.num_class_tokens = self.added.shape[1] - grid.shape[-2:].numel()

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:  # [B, C, H, W] -> [B, N (+ 1), C]
        tokens = feature_map.to(self.added.dtype).flatten(2).transpose(1, 2)
        return F.pad(tokens, (0, 0, self.num_class_tokens, 0)) + self.added


class _TokensOfImages(_Tokens):
    """The same of images as they are stored, uint8 [B, height, width, 3], which it normalises itself."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: DeepSeekOCRVisionModel, image_processor: DeepSeekOCRVisionImageProcessor):
        super().__init__(model)
        for name, each in zip(("scale", "shift"), image_processor.factor_and_shift(1.0), strict=True):
            self.register_buffer(name, each.flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward((images.float() * self.scale + self.shift).permute(0, 3, 1, 2))


def export_encoder(
    model: DeepSeekOCRVisionModel,
    file: str | os.PathLike,
    *,
    format: Format,
    size: int | tuple[int, int] | None = None,
    dynamic: bool = False,
    raw_images: bool = False,
    image_processor: DeepSeekOCRVisionImageProcessor | None = None,
) -> Export:
    """Write an encoder for another runtime; pages of one size or of any, in batches of any.

    The file is run in its own runtime, in a fresh process, on random pixels in some batches, and gets its name only if
    its tokens are the model's. Beside it a JSON file says what goes in, what comes out, and how pages are prepared.

    Args:
        model: The encoder, in float32 or float16, on the CPU. It stays as it is.
        file: The name to write, ending in `.onnx`, `.pt2`, or, for OpenVINO, `.xml`. What is there is replaced.
        format: `"onnx"` for ONNX Runtime and others, `"pt2"` for `torch.export.load`, or `"openvino"`.
        size: Side of a square page in pixels, or height and width; multiples of `config.patch_size`. By default
            `config.image_size`.
        dynamic: Whether pages may be of any size, of at least two tokens in height and in width, in place of `size`.
            OpenVINO cannot resize the tables of positions that this takes.
        raw_images: Whether the input is uint8 [B, height, width, 3] of that size in place of normalised pixels.
        image_processor: What prepares the pages. By default the one that belongs to the model.

    Raises:
        ExportError: The file gives other tokens than the model. It is not left behind.
        ImportError: A package of the extra `export` is not installed.
        OSError: The folder of `file` is not there, or the file cannot be written.
        TypeError: An argument is of a wrong type.
        ValueError: `format` is none of these, or `file`, `size`, `dynamic`, or the model's dtype or device does not
            fit.
    """
    file = Path(file)
    _check_arguments(model, file, format, size=size, dynamic=dynamic)
    height, width = _page_size(model, size)
    for package in _PACKAGES[format]:
        require(package, f"Export to {format}", extra="export")
    image_processor = image_processor or model.default_image_processor()
    module = _TokensOfImages(model, image_processor) if raw_images else _Tokens(model)
    token_size = model.config.patch_size
    # The first is exported; the others are what the file is to run with besides.
    shapes = [(2, height, width), (1, height, width)]
    if dynamic:
        least = _LEAST_TOKENS * token_size
        shapes = [(2, least, least + token_size), (3, 3 * token_size, least), (1, least + height, least + width)]
    batches = [_random_input(*shape, model, raw_images) for shape in shapes]
    with _ready_to_export(model), staging_folder(file.parent) as folder:
        expected = [module(batch) for batch in batches]
        with nullcontext() if dynamic else _positions_for(model, height, width):
            program = _program(module, batches[0], token_size=token_size if dynamic else None)
            _WRITERS[format](program, batches[0], folder / file.name)
        measured, difference = _compare(format, folder / file.name, batches, expected)
        tolerance = _TOLERANCES[model.dtype]
        if not difference <= tolerance:
            raise ExportError(
                f"In its own runtime the exported file gives other tokens than the model: they differ by "
                f"{difference:.1e} of the standard deviation, and {tolerance:.0e} is allowed. {file} was not written."
            )
        export = Export(file, file.with_name(f"{file.name}.json"), difference, tolerance, **measured)
        preprocessing = _preprocessing(image_processor, None if dynamic else (height, width), raw_images=raw_images)
        describe = partial(_describe, model, batches[0], expected[0], preprocessing)
        description = describe(format=format, dynamic=dynamic) | _plain(export)
        (folder / export.description.name).write_text(json.dumps(description, indent=2) + "\n")
        # The file itself last: it is complete when it is there.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == file.name):
            os.replace(path, file.parent / path.name)
    return export


def _check_arguments(
    model: DeepSeekOCRVisionModel, file: Path, format: Format, *, size: int | tuple[int, int] | None, dynamic: bool
) -> None:
    require_choice("format", format, FORMATS)
    if file.is_dir():
        raise IsADirectoryError(f"`file` is {str(file)!r}, which is a folder.")
    if file.suffix != _SUFFIXES[format]:
        raise ValueError(f"`file` is {str(file)!r}; for format {format!r} it has to end in {_SUFFIXES[format]!r}.")
    if model.dtype not in _TOLERANCES or model.device.type != "cpu":
        raise ValueError(
            f"`model` is in {model.dtype} on {model.device}; it has to be in float32 or float16 on the CPU."
        )
    if require_flag("dynamic", dynamic) and size is not None:
        raise ValueError(f"`dynamic` is for pages of any size, so it takes no `size`, but `size` is {size!r}.")
    if dynamic and format not in _DYNAMIC_FORMATS:
        raise ValueError(
            f"`dynamic` does not go with format {format!r}, whose conversion cannot resize the tables of positions as "
            f"PyTorch does; it goes with {_DYNAMIC_FORMATS}."
        )


def _page_size(model: DeepSeekOCRVisionModel, size: int | tuple[int, int] | None) -> tuple[int, int]:
    size = model.config.image_size if size is None else size
    sides = size if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"`size` is {size}; it has to be the side of a square page, or its height and width.")
    for side in sides:
        if require_integer("size", side, at_least=1) % model.config.patch_size:
            raise ValueError(f"`size` is {size}; height and width have to be multiples of {model.config.patch_size}.")
    return sides[0], sides[1]


def _random_input(
    batch_size: int, height: int, width: int, model: DeepSeekOCRVisionModel, raw_images: bool
) -> torch.Tensor:
    draw = torch.Generator().manual_seed(batch_size)
    if raw_images:
        return torch.randint(0, 256, (batch_size, height, width, 3), generator=draw, dtype=torch.uint8)
    channels = model.config.num_channels
    return torch.randn(batch_size, channels, height, width, generator=draw).to(model.dtype)


def _preprocessing(
    image_processor: DeepSeekOCRVisionImageProcessor, size: tuple[int, int] | None, *, raw_images: bool
) -> dict[str, Any]:
    """The fields of what prepares pages for the file: of its size, if it has one, and without tiles."""
    fields: dict[str, Any] = {"tile_size": None}
    if size is not None:
        fields["size"] = {"height": size[0], "width": size[1]}
    if raw_images:
        fields |= {"do_rescale": False, "do_normalize": False}
    return type(image_processor).from_dict(image_processor.to_dict(), **fields).to_dict()


@contextmanager
def _ready_to_export(model: DeepSeekOCRVisionModel) -> Iterator[None]:
    """Evaluation mode, no gradients, and the attention to export; afterwards all is as it was."""
    stages = {"sam_config": model.sam_model, "clip_config": model.vision_model}
    before = {name: stage.config._attn_implementation for name, stage in stages.items()}
    before[""] = model.config._attn_implementation
    was_training = model.training
    try:
        model.eval().set_attn_implementation("sdpa_folded")
        with torch.no_grad(), warnings.catch_warnings():
            # Of the exporters themselves, about their own next versions.
            warnings.simplefilter("ignore")
            yield
    finally:
        model.train(was_training).set_attn_implementation(before)


@contextmanager
def _positions_for(model: DeepSeekOCRVisionModel, height: int, width: int) -> Iterator[None]:
    """Tables of positions for pages of one size: not every runtime can resize them as PyTorch does."""
    sam, clip, token_size = model.sam_model, model.vision_model, model.config.patch_size
    table, embeddings = sam.pos_embed, clip.get_input_embeddings()
    sides = [side // model.config.sam_config.patch_size for side in (height, width)]
    grid = table.new_empty(1, model.config.clip_config.hidden_size, height // token_size, width // token_size)
    try:
        sam.pos_embed = nn.Parameter(resize_positions(table[0], (sides[0], sides[1]), antialias=True)[None])
        clip.set_input_embeddings(_FixedEmbeddings(embeddings, grid))
        yield
    finally:
        sam.pos_embed = table
        clip.set_input_embeddings(embeddings)


def _program(module: nn.Module, batch: torch.Tensor, *, token_size: int | None) -> torch.export.ExportedProgram:
    """The graph, for batches of any size, and for pages of any where the pixels a token are given."""
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", max=1024)}
    if token_size is not None:
        # An export takes one token for a size that stays.
        sides = {name: torch.export.Dim(name, min=_LEAST_TOKENS, max=1024) for name in ("rows", "columns")}
        sizes |= {dim: token_size * side for dim, side in zip(_page_dims(batch), sides.values(), strict=True)}
    return torch.export.export(module, (batch,), dynamic_shapes=(sizes,), strict=False)


def _page_dims(batch: torch.Tensor) -> dict[int, str]:
    """Which dimensions of pixels, or of images as they are stored, are a page's height and width."""
    first = 1 if batch.dtype == torch.uint8 else 2
    return {first: "height", first + 1: "width"}


def _write_pt2(program: torch.export.ExportedProgram, batch: torch.Tensor, file: Path) -> None:
    torch.export.save(program, file)


def _write_onnx(program: torch.export.ExportedProgram, batch: torch.Tensor, file: Path) -> None:
    model = torch.onnx.export(
        program, (batch,), input_names=[_INPUT], output_names=[_OUTPUT], dynamo=True, verbose=False
    )
    if model is None:
        raise RuntimeError("`torch.onnx.export` gave nothing.")
    model.save(file)


def _write_openvino(program: torch.export.ExportedProgram, batch: torch.Tensor, file: Path) -> None:
    import openvino

    model = openvino.convert_model(program)
    model.inputs[0].set_names({_INPUT})
    model.outputs[0].set_names({_OUTPUT})
    # It would store weights in float16.
    openvino.save_model(model, file, compress_to_fp16=False)


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "openvino": _write_openvino}


def _compare(
    format: Format, file: Path, batches: list[torch.Tensor], expected: list[torch.Tensor]
) -> tuple[dict[str, Any], float]:
    """Run a file in a fresh process; what it took, and the largest difference relative to the standard deviation."""
    with tempfile.TemporaryDirectory() as folder:
        for number, batch in enumerate(batches):
            np.save(Path(folder, f"{number}.npy"), batch.numpy())
        command = [sys.executable, runtimes.__file__, format, str(file), folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ExportError(f"The exported file does not run in its own runtime:\n{result.stderr.strip()}")
        measured = json.loads(Path(folder, "measured.json").read_text())
        outputs = [torch.from_numpy(np.load(Path(folder, f"{number}-output.npy"))) for number in range(len(batches))]
    # By torch, whose largest of several numbers is NaN where one of them is; Python's may not be.
    differences = [_difference(*pair) for pair in zip(outputs, expected, strict=True)]
    measured["seconds"] = tuple(measured["seconds"])
    return measured, torch.tensor(differences).max().item()


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual.double() - expected.double()).abs().max() / expected.double().std()).item()


def _describe(
    model: DeepSeekOCRVisionModel,
    batch: torch.Tensor,
    tokens: torch.Tensor,
    preprocessing: dict[str, Any],
    *,
    format: Format,
    dynamic: bool,
) -> dict[str, Any]:
    """What whoever runs the file needs to know."""

    def described(name: str, tensor: torch.Tensor, open_sizes: dict[int, str]) -> dict[str, Any]:
        names = {0: "batch"} | (open_sizes if dynamic else {})
        shape = [names.get(dim, size) for dim, size in enumerate(tensor.shape)]
        return {"name": name, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}

    token_size = model.config.patch_size
    sides = {"multiples_of": token_size, "at_least": _LEAST_TOKENS * token_size}
    return {
        "format": format,
        "feature_mode": model.config.feature_mode,
        "inputs": [described(_INPUT, batch, _page_dims(batch)) | ({"height_and_width": sides} if dynamic else {})],
        "outputs": [described(_OUTPUT, tokens, {1: "tokens"})],
        "preprocessing": preprocessing,
        "versions": {name: version(name) for name in ("torch", *_PACKAGES[format])},
    }


def _plain(export: Export) -> dict[str, Any]:
    """The check as JSON has it."""
    return {"check": {name: value for name, value in asdict(export).items() if name not in ("file", "description")}}
