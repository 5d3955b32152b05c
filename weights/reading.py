"""Weights in: a model from a released checkpoint, on the Hub or on this machine."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig, FeatureMode
from deepseek_ocr_vision.modeling.modeling_deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.saving.checkpoint_code_deepseek_ocr_vision import CHECKSUMS
from deepseek_ocr_vision.saving.checksums_deepseek_ocr_vision import verify_checksums

from .checkpoints import LocalCheckpoint, open_local
from .hub import open_remote
from .names import match_tensors, our_name
from .repository import repository_named
from .safetensors_files import DTYPES
from .sizes import config_of_checkpoint


def load_deepseek_ocr(
    model_class: type[DeepSeekOCRVisionModel],
    source: str | os.PathLike,
    *,
    feature_mode: FeatureMode,
    config: DeepSeekOCRVisionConfig | None,
    dtype: str | torch.dtype | None,
    hub_options: dict[str, Any],
    **kwargs: Any,
) -> DeepSeekOCRVisionModel:
    """What `DeepSeekOCRVisionModel.from_deepseek_ocr` says."""
    repo_id = repository_named(source, argument="source")
    checkpoint = open_local(source) if repo_id is None else open_remote(repo_id, **hub_options)
    config = config_of_checkpoint(checkpoint.config, feature_mode) if config is None else config
    # The whole account first, before a byte of the weights is fetched or read.
    match_tensors(checkpoint.shapes, expected_shapes(model_class, config))
    local = checkpoint.local()
    sources = match_tensors(local.shapes, expected_shapes(model_class, config))
    dtype = chosen_dtype(dtype) or widest_dtype(local, sources)
    weights = {key: tensor.to(dtype) for key, tensor in local.read(sources)}
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, strict=True, **kwargs)


def expected_shapes(
    model_class: type[DeepSeekOCRVisionModel], config: DeepSeekOCRVisionConfig
) -> dict[str, tuple[int, ...]]:
    """Name to shape of a model's tensors, without making them."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in model_class(config).state_dict().items()}


def chosen_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """What a caller asks for by `dtype`; `None` for as it is stored.

    Raises:
        ValueError: Weights do not have such a dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        allowed = ", ".join(str(allowed) for allowed in DTYPES.values())
        raise ValueError(f"`dtype` is {dtype!r}; it has to be one of {allowed}, their names, 'auto' or None.")
    return chosen


def widest_dtype(checkpoint: LocalCheckpoint, sources: dict[str, list[str]]) -> torch.dtype:
    """One dtype that holds all of the checkpoint's weights exactly."""
    names = {checkpoint.tensors[name].dtype for names in sources.values() for name in names}
    dtypes = [DTYPES[name] for name in names if name in DTYPES]
    widest = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def check_files(folder: str | os.PathLike) -> None:
    """Check the files of weights in a folder by their headers, where transformers opens whatever the index names.

    Raises:
        OSError: A file that the index names is missing.
        ValueError: A file or the index is corrupt, or leads out of the folder.
    """
    if any(os.path.isfile(os.path.join(folder, name)) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        open_local(folder)


def check_checkpoint(source: str | os.PathLike) -> str:
    """Check a checkpoint on this machine: its files by their checksums, and every weight of the encoder in it.

    Args:
        source: A folder of this package's or with a whole released model, or a safetensors file.

    Returns:
        What was found, in words.

    Raises:
        OSError: There is nothing, or a file is missing.
        ValueError: A file is not the one that was summed, or a weight is missing, of another shape or not finite.
    """
    checkpoint = open_local(source)
    lines = [f"{source}: no {CHECKSUMS}, so a flipped byte would not be found."]
    if (checkpoint.folder / CHECKSUMS).is_file():
        lines = [f"{source}: {len(verify_checksums(checkpoint.folder))} files are as {CHECKSUMS} says."]
    is_ours = checkpoint.config.get("model_type") == DeepSeekOCRVisionConfig.model_type
    feature_mode = checkpoint.config.get("feature_mode", "residual") if is_ours else _richest_mode(checkpoint.shapes)
    config = config_of_checkpoint(checkpoint.config, feature_mode)
    sources = match_tensors(checkpoint.shapes, expected_shapes(DeepSeekOCRVisionModel, config))
    num_parameters = sum(tensor.numel() for _, tensor in checkpoint.read(sources))
    dtypes = sorted({checkpoint.tensors[name].dtype for names in sources.values() for name in names})
    lines.append(f"{len(sources)} tensors, {num_parameters:,} parameters, {', '.join(dtypes)}: all there and finite.")
    return "\n".join(lines)


def _richest_mode(names: Iterable[str]) -> FeatureMode:
    """The mode that uses the most of a whole model: its projector, and the marks of its sequence if it has any."""
    return "sequence" if {our_name(name).key for name in names} >= {"image_newline", "view_seperator"} else "projected"
