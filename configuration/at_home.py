"""What of a configuration need not travel: tiny sizes, and what is refused before transformers stumbles over it."""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from .configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig, FeatureMode


def require_common_fields(fields: dict[str, Any]) -> None:
    """Refuse values of the fields that every model has over which transformers stumbles without naming them."""
    for name, value in fields.items():
        try:
            config = PreTrainedConfig(**{name: value})
            config.to_dict()
            if not isinstance(config.dtype, torch.dtype | None):
                raise TypeError("no dtype of torch")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"`{name}` is {value!r}, which transformers does not take ({error}).") from error


def read_object(read: Callable, source: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
    """Read a configuration by `read`, which is transformers' `get_config_dict`, and refuse a list or a text."""
    found: Any
    try:
        found, kwargs = read(source, **kwargs)
    except (AttributeError, TypeError) as error:  # of older versions, about what they have read
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"config.json of {source} has to hold an object, but holds {found!r:.100}.")
    return found, kwargs


def read_config_dict(read: Callable, source: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
    """Read a configuration as `read_object` does, and refuse a whole model's.

    Of a model around this encoder transformers takes the encoder's part.
    """
    found, kwargs = read_object(read, source, **kwargs)
    part = found.get(DeepSeekOCRVisionConfig.base_config_key)
    if not isinstance(part, dict) or part.get("model_type") != DeepSeekOCRVisionConfig.model_type:
        refuse_whole_model(source, found)
    return found, kwargs


def refuse_whole_model(source: str | os.PathLike, config_dict: dict[str, Any]) -> None:
    """Raise a ValueError if it is a whole model's checkpoint that stands where an encoder's was asked for."""
    model_type = config_dict.get("model_type")
    if DeepSeekOCRVisionConfig.base_config_key in config_dict and model_type != DeepSeekOCRVisionConfig.model_type:
        raise ValueError(
            f"{source} is a whole checkpoint (model_type {model_type!r}): to get the encoder out of it, use "
            "`DeepSeekOCRVisionModel.from_deepseek_ocr`, or `deepseek-ocr-vision extract`."
        )


def tiny_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of `DeepSeekOCRVisionConfig.tiny(**fields)`.

    One SAM block attends in windows and one to the whole grid of 8 x 8 patches, which is no multiple of a window.
    `initializer_range` is large, so that new weights matter to the tokens.
    """
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
    sam = sizes | {"num_attention_heads": 2, "mlp_dim": 64, "window_size": 3, "global_attn_indexes": [1]}
    sam |= {"output_channels": 16, "downsample_channels": [24, 32], "image_size": 128}
    clip = sizes | {"num_attention_heads": 4, "intermediate_size": 64, "grid_size": 2}
    stages: dict[str, Any] = {"sam_config": sam, "clip_config": clip}
    for field, stage in stages.items():
        given = fields.get(field, {})
        stages[field] = stage | given if isinstance(given, dict) else given
    return {"projection_dim": 48} | fields | stages


def preset_of(feature_mode: FeatureMode) -> str:
    """The name of the preset that goes with a feature mode; all but `"residual"` go with the released model's."""
    return "deepseek-ocr-encoder" if feature_mode == "residual" else "deepseek-ocr"
