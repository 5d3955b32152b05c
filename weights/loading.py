"""The encoder and the image processor that a command line names."""

import os
from pathlib import Path

from transformers import PreTrainedConfig

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import FeatureMode
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import ModeName
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor


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
            `"deepseek-ocr-encoder"`, as everywhere.
        mode: Another resolution.
        feature_mode: Another feature mode, for which the checkpoint has to have the weights.
        dtype: What to compute in. Defaults to what the checkpoint is stored in.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: The checkpoint is corrupt or lacks weights, or the preset has no such mode.
    """
    if _is_encoder(source):
        fields = {} if feature_mode is None else {"feature_mode": feature_mode}
        model = DeepSeekOCRVisionModel.from_pretrained(source, dtype=dtype or "auto", **fields)
        if preset is None:
            image_processor = DeepSeekOCRVisionImageProcessor.from_pretrained(source)
        else:
            image_processor = DeepSeekOCRVisionImageProcessor(preset, size=model.config.image_size)
    else:
        preset = preset or "deepseek-ocr-encoder"
        model = DeepSeekOCRVisionModel.from_deepseek_ocr(source, preset=preset, feature_mode=feature_mode, dtype=dtype)
        image_processor = DeepSeekOCRVisionImageProcessor.from_deepseek_ocr(source, preset=preset)
    if mode is not None:
        image_processor.mode = mode
    return model.eval(), image_processor


def _is_encoder(source: str | os.PathLike) -> bool:
    if Path(source).is_file():
        return False
    fields, _ = PreTrainedConfig.get_config_dict(source)
    return fields.get("model_type") == DeepSeekOCRVisionConfig.model_type
