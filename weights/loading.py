"""The one way to an encoder with its image processor, from a checkpoint of whatever kind."""

import os
from typing import Any

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.configuration.at_home import preset_of
from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import FeatureMode
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import ModeName
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor

from .checkpoints import CONFIG
from .reading import fast_dtype
from .sizes import read_config_of


def load_encoder(
    source: str | os.PathLike,
    *,
    preset: str | None = None,
    mode: ModeName | None = None,
    feature_mode: FeatureMode | None = None,
    dtype: str | None = None,
) -> tuple[DeepSeekOCRVisionModel, DeepSeekOCRVisionImageProcessor]:
    """Load an encoder's checkpoint, or the encoder out of a released one, and what prepares its pages.

    Args:
        source: Folder or Hub id; of a released checkpoint also its safetensors file.
        preset: Another preprocessing than the checkpoint's. Of a released checkpoint the default is
            `"deepseek-ocr-encoder"`; of a LLaVA around this encoder it is what was saved with it.
        mode: Another resolution.
        feature_mode: Another feature mode, for which the checkpoint has to have the weights.
        dtype: What to compute in, `"auto"` for what the checkpoint is stored in. By default that too, but float32
            where the processor has no products in it: see `reading.fast_dtype`.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: The checkpoint is corrupt or lacks weights, or the preset has no such mode.
    """
    fields: dict[str, Any] = {} if feature_mode is None else {"feature_mode": feature_mode}
    if is_encoder(source):
        model = DeepSeekOCRVisionModel.from_pretrained(source, dtype=dtype or "auto", **fields)
        if dtype is None and not hasattr(model, "hf_quantizer"):
            model.to(fast_dtype(model.dtype))  # type: ignore[arg-type]  # transformers wraps it as a plain function
        image_processor = model.default_image_processor()
        if preset is not None:
            image_processor = DeepSeekOCRVisionImageProcessor(preset, size=model.config.image_size)
    elif preset is None and (tower := _tower_of(source)):
        fields = {"feature_mode": tower["feature_mode"]} | fields
        model = DeepSeekOCRVisionModel.from_deepseek_ocr(source, dtype=dtype, **fields)
        image_processor = DeepSeekOCRVisionImageProcessor.from_pretrained(source)
    else:
        preset = preset or "deepseek-ocr-encoder"
        model = DeepSeekOCRVisionModel.from_deepseek_ocr(source, preset=preset, dtype=dtype, **fields)
        image_processor = DeepSeekOCRVisionImageProcessor.from_deepseek_ocr(source, preset=preset)
    if mode is not None:
        image_processor.mode = mode
    return model.eval(), image_processor


def default_image_processor(
    config: DeepSeekOCRVisionConfig, *, size: int | None = None
) -> DeepSeekOCRVisionImageProcessor:
    """The image processor of the preset that goes with an encoder's feature mode, at its size or another one."""
    return DeepSeekOCRVisionImageProcessor(preset_of(config.feature_mode), size=size or config.image_size)


def is_encoder(source: str | os.PathLike) -> bool:
    """Whether a folder or a Hub id is a checkpoint of the encoder alone, not one with a whole model or a file.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: Its configuration is corrupt.
    """
    return _config_of(source).get("model_type") == DeepSeekOCRVisionConfig.model_type


def _tower_of(source: str | os.PathLike) -> dict[str, Any]:
    """The configuration of this encoder as the vision tower of a LLaVA, which is saved with its image processor."""
    tower = _config_of(source).get("vision_config")
    if not isinstance(tower, dict) or tower.get("model_type") != DeepSeekOCRVisionConfig.model_type:
        return {}
    return {"feature_mode": "residual"} | tower


def _config_of(source: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint's `config.json` says, empty for a file or a folder without one."""
    if os.path.isfile(source) or (os.path.isdir(source) and not os.path.isfile(os.path.join(source, CONFIG))):
        return {}
    return read_config_of(source)
