"""Whether a checkpoint on this machine is sound: it is what was summed, it loads, and it gives finite tokens."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig, FeatureMode
from deepseek_ocr_vision.modeling.modeling_deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.saving.saving_deepseek_ocr_vision import CHECKSUMS

from .checkpoints import CONFIG, compare_checksums, open_local, read_config
from .names import our_name
from .reading import load_deepseek_ocr
from .safetensors_files import is_finite


PAGE_TOKENS = 8
"""Side, in tokens, of the page that is encoded: 512 pixels for the released encoder."""


def check_checkpoint(source: str | os.PathLike) -> str:
    """Check a checkpoint on this machine: its checksums, that it loads, and that a page gives finite tokens.

    Returns:
        What was found, in words.

    Raises:
        OSError: There is nothing, or a file is missing.
        ValueError: A file is not the one that was summed, the checkpoint does not load, or its weights or the tokens
            of a page are not finite.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    compared = compare_checksums(path)
    found = f"{len(compared)} files are as {CHECKSUMS} says."
    sums = found if compared else f"no {CHECKSUMS}, so a flipped byte would not be found."
    model = load_whatever_is_there(path)
    weights = model.state_dict()
    for name, weight in weights.items():
        if not is_finite(weight):
            raise ValueError(f"{path}: {name} holds NaN or infinity.")
    _check_tokens(model, path)
    num_parameters, dtype = model.num_parameters(), str(model.dtype).removeprefix("torch.")
    return (
        f"{source}: {sums}\n{len(weights)} tensors, {num_parameters:,} parameters, {dtype}: all there and finite, and "
        "so are the tokens of a page."
    )


def load_whatever_is_there(path: Path) -> DeepSeekOCRVisionModel:
    """The encoder in a folder of its own, or in a whole checkpoint, in the feature mode that uses the most of it."""
    if path.is_dir() and read_config(path / CONFIG).get("model_type") == DeepSeekOCRVisionConfig.model_type:
        return DeepSeekOCRVisionModel.from_pretrained(path, dtype="auto")
    feature_mode = richest_feature_mode(open_local(path).tensors)
    return load_deepseek_ocr(DeepSeekOCRVisionModel, path, feature_mode=feature_mode, config=None, dtype="auto")


def richest_feature_mode(names: Iterable[str]) -> FeatureMode:
    """The feature mode that uses the most of what a checkpoint has."""
    keys = {our_name(name).key for name in names}
    if keys >= {"image_newline", "view_seperator", "projector.layers.weight"}:
        return "sequence"
    if "projector.layers.weight" in keys:
        return "projected"
    return "concat" if "vision_model.embeddings.class_embedding" in keys else "residual"


@torch.no_grad()
def _check_tokens(model: DeepSeekOCRVisionModel, path: Path) -> None:
    config = model.config
    side = min(config.image_size, PAGE_TOKENS * config.patch_size)
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, config.num_channels, side, side, generator=generator)
    tokens = model.eval()(pixel_values).last_hidden_state
    if not torch.isfinite(tokens).all():
        raise ValueError(f"{path}: the tokens of a page are not finite, though all weights are.")
