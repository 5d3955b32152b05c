"""Weights in: a model from a released checkpoint, on the Hub or on this machine."""

import os
from functools import reduce
from typing import Any

import torch
from transformers.utils import logging

from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig, FeatureMode
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import is_emulated

from .checkpoints import LocalCheckpoint, compare_checksums, open_local
from .hub import open_remote
from .names import match_tensors, our_name
from .repository import HUB_OPTIONS, repository_named
from .safetensors_files import DTYPES
from .sizes import Model, check_layers, config_of_checkpoint, expected_shapes


logger = logging.get_logger(__name__)


def load_deepseek_ocr(
    model_class: type[Model],
    source: str | os.PathLike,
    *,
    feature_mode: FeatureMode,
    config: DeepSeekOCRVisionConfig | None = None,
    dtype: str | torch.dtype | None = None,
    verify_checksums: bool = False,
    **kwargs: Any,
) -> Model:
    """What `DeepSeekOCRVisionModel.from_deepseek_ocr` says, of a class and for a feature mode."""
    hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    repo_id = repository_named(source, argument="source")
    if verify_checksums and repo_id is not None:
        raise ValueError(
            f"`verify_checksums` is true, but of {repo_id} only the encoder's part is fetched, not the whole files "
            "that were summed."
        )
    if verify_checksums:
        compare_checksums(source, required=True)
    checkpoint = open_local(source) if repo_id is None else open_remote(repo_id, **hub_options)
    config = config_of_checkpoint(checkpoint.config, feature_mode) if config is None else config
    check_layers(config, [our_name(name).key for name in checkpoint.shapes])
    # Everything is matched before a byte of the weights is fetched or read.
    match_tensors(checkpoint.shapes, expected_shapes(model_class, config))
    local = checkpoint.local()
    sources = match_tensors(local.shapes, expected_shapes(model_class, config))
    dtype = chosen_dtype(dtype, stored=widest_dtype(local, sources))
    weights = {key: tensor.to(dtype) for key, tensor in local.read(sources)}
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, strict=True, **kwargs)


def chosen_dtype(dtype: str | torch.dtype | None, *, stored: torch.dtype) -> torch.dtype:
    """What a caller asks for by `dtype`: `"auto"` for as it is stored, `None` for what is fast of that.

    Raises:
        ValueError: Weights do not have such a dtype.
    """
    if dtype is None or dtype == "auto":
        return fast_dtype(stored) if dtype is None else stored
    chosen: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        allowed = ", ".join(str(allowed) for allowed in DTYPES.values())
        raise ValueError(f"`dtype` is {dtype!r}; it has to be one of {allowed}, their names, 'auto' or None.")
    return chosen


def fast_dtype(stored: torch.dtype) -> torch.dtype:
    """What to compute in where nobody has chosen: the stored dtype, or float32 where there is no accelerator and the
    processor has no products in half precision, which would be emulated or converted. The log says so.
    """
    if torch.accelerator.is_available() or not is_emulated(stored, torch.device("cpu")):
        return stored
    logger.warning(
        f"The weights are converted from {stored} to float32: this processor has no products in {stored}. "
        '`dtype="auto"` keeps them as they are, in half the memory.'
    )
    return torch.float32


def widest_dtype(checkpoint: LocalCheckpoint, sources: dict[str, list[str]]) -> torch.dtype:
    """One dtype that holds all of the checkpoint's weights exactly."""
    stored = {checkpoint.tensors[name].dtype for names in sources.values() for name in names} & DTYPES.keys()
    return reduce(torch.promote_types, [DTYPES[name] for name in stored] or [torch.float32])
