"""How large the encoder in a checkpoint is: by its configuration, or by its tensors where nothing else tells."""

import os
from collections.abc import Iterable, Mapping
from inspect import signature
from math import isqrt
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepseek_ocr_vision.configuration.at_home import read_object
from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import require_integer
from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import (
    DeepSeekOCRVisionClipConfig,
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionSamConfig,
    FeatureMode,
)


Model = TypeVar("Model", bound=PreTrainedModel)

_OUR_FIELDS = ("sam_config", "clip_config", "image_size", "num_channels", "projection_dim")


def config_of_checkpoint(checkpoint_config: dict[str, Any], feature_mode: FeatureMode) -> DeepSeekOCRVisionConfig:
    """The encoder that a checkpoint's `config.json` describes.

    DeepSeek's own configuration leaves the sizes to its code, which has them as constants: the defaults of ours.
    transformers' Unlimited-OCR states them.
    """
    vision_config = _part(checkpoint_config, "vision_config")
    for candidate in (checkpoint_config, vision_config):
        if candidate.get("model_type") == DeepSeekOCRVisionConfig.model_type:
            fields = {name: candidate[name] for name in _OUR_FIELDS if name in candidate}
            return DeepSeekOCRVisionConfig(**fields, feature_mode=feature_mode)
    fields = {}
    sam, clip = _part(vision_config, "sam_config"), _part(vision_config, "encoder_config")
    if sam and clip:
        fields["sam_config"] = _known_fields(DeepSeekOCRVisionSamConfig, sam)
        fields["clip_config"] = _known_fields(DeepSeekOCRVisionClipConfig, clip)
        if "image_size" in clip and "patch_size" in clip:
            fields["clip_config"]["grid_size"] = _grid_size(clip["image_size"], clip["patch_size"])
    # The projector leads to the language model's width, which DeepSeek's configuration has under another name.
    for language_config in (_part(checkpoint_config, "text_config"), _part(checkpoint_config, "language_config")):
        if "hidden_size" in language_config:
            fields["projection_dim"] = language_config["hidden_size"]
    return DeepSeekOCRVisionConfig(**fields, feature_mode=feature_mode)


def _known_fields(config_class: type[PreTrainedConfig], stated: dict[str, Any]) -> dict[str, Any]:
    """What transformers states of a stage under the names that ours has; how it initialises weights is its own."""
    names = signature(config_class).parameters.keys() - {"initializer_range"}
    return {name: stated[name] for name in names if name in stated}


def _grid_size(image_size: Any, patch_size: Any) -> int:
    """Side of the grid of positions, by sizes in pixels of the image and of a patch."""
    image_size = require_integer("encoder_config.image_size", image_size, at_least=1)
    return image_size // require_integer("encoder_config.patch_size", patch_size, at_least=1)


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration inside another, empty if there is none."""
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def image_size_of(source: str | os.PathLike, **hub_options: Any) -> int:
    """Side in pixels of the page that the encoder in a checkpoint, a folder, a file or a Hub id, is meant for."""
    folder = os.path.dirname(source) or "." if os.path.isfile(source) else source
    if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "config.json")):
        return DeepSeekOCRVisionConfig().image_size
    return config_of_checkpoint(read_config_of(folder, **hub_options), "residual").image_size


def read_config_of(source: str | os.PathLike, **hub_options: Any) -> dict[str, Any]:
    """What the `config.json` of a folder or of a repository on the Hub says, whatever model it is of.

    Raises:
        OSError: There is none, or it cannot be fetched.
        ValueError: It is corrupt, or holds no object.
    """
    return read_object(PreTrainedConfig.get_config_dict, source, **hub_options)[0]


MAX_MORE_LAYERS = 64


def check_layers(config: PreTrainedConfig, keys: Iterable[str]) -> None:
    """Refuse a number of layers that is far above what a checkpoint has, before a model of that size is built."""
    keys = list(keys)
    for stage, prefix in (("sam_config", "sam_model.blocks."), ("clip_config", "vision_model.transformer.layers.")):
        stated, found = getattr(config, stage).num_hidden_layers, _count(keys, prefix)
        if stated > found + MAX_MORE_LAYERS:
            raise ValueError(
                f"`{stage}.num_hidden_layers` is {stated:,}; the checkpoint's weights have {found} layers."
            )


def expected_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of a model's tensors, without making them."""
    try:
        with torch.device("meta"):
            return {key: tuple(tensor.shape) for key, tensor in model_class(config).state_dict().items()}
    except (OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"The configuration's sizes are beyond what a tensor can have ({error}).") from error


def config_of_shapes(
    shapes: Mapping[str, tuple[int, ...]], *, num_clip_heads: int | None = None
) -> DeepSeekOCRVisionConfig:
    """The encoder that tensors of these shapes, under our names, are the weights of, in feature mode `"residual"`.

    No shape tells the heads of the CLIP stage; without `num_clip_heads` it is one a 64 channels, as in CLIP-L.
    """
    try:
        sam, clip = _sam_fields(shapes), _clip_fields(shapes)
    except KeyError as error:
        raise ValueError(f"There is no tensor {error}, which tells the size of the encoder.") from error
    clip["num_attention_heads"] = num_clip_heads or max(1, clip["hidden_size"] // 64)
    return DeepSeekOCRVisionConfig(
        sam_config=DeepSeekOCRVisionSamConfig(**sam), clip_config=DeepSeekOCRVisionClipConfig(**clip)
    )


def _sam_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    _, rows, _, width = shapes["sam_model.pos_embed"]
    patch_size = shapes["sam_model.patch_embed.proj.weight"][-1]
    num_blocks = _count(shapes, "sam_model.blocks.")
    tables = [shapes[f"sam_model.blocks.{index}.attn.rel_pos_h"] for index in range(num_blocks)]  # [2n - 1, D] each
    sides = [(table[0] + 1) // 2 for table in tables]
    fields = {
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": width // tables[0][1],
        "mlp_dim": shapes["sam_model.blocks.0.mlp.lin1.weight"][0],
        "patch_size": patch_size,
        # A window as large as the page is no other thing than global attention.
        "global_attn_indexes": [index for index, side in enumerate(sides) if side == rows],
        "output_channels": shapes["sam_model.neck.0.weight"][0],
        "downsample_channels": [shapes["sam_model.net_2.weight"][0], shapes["sam_model.net_3.weight"][0]],
        "image_size": rows * patch_size,
    }
    windows = {side for side in sides if side != rows}
    return fields | ({"window_size": windows.pop()} if windows else {})


def _clip_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    num_positions, width = shapes["vision_model.embeddings.position_embedding.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.transformer.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "vision_model.transformer.layers."),
        "grid_size": isqrt(num_positions - 1),
    }


def _count(keys: Iterable[str], prefix: str) -> int:
    """How many layers there are whose names begin so."""
    return len({key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)})
