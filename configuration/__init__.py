"""What an encoder is. Importing this registers the configuration with `AutoConfig`."""

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from deepseek_ocr_vision.configuration.at_home import preset_of
from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import (
    DeepSeekOCRVisionClipConfig,
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionSamConfig,
)
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import MODES, PRESETS, Mode, Preset


def _register() -> None:
    """Register the configuration, but never in place of one that transformers brings along itself."""
    model_type = DeepSeekOCRVisionConfig.model_type
    # Not by `.get`, which passes over what transformers has not imported yet.
    is_native = model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type].__module__.split(".")[0] == "transformers"
    if is_native:
        raise ImportError(
            f"transformers {transformers.__version__} has a model of its own under the model_type {model_type!r} "
            f"({CONFIG_MAPPING[model_type].__name__}), which this version of deepseek-ocr-vision would replace. "
            "Install a newer deepseek-ocr-vision, or an older transformers."
        )
    AutoConfig.register(model_type, DeepSeekOCRVisionConfig, exist_ok=True)


_register()

__all__ = [
    "MODES",
    "PRESETS",
    "DeepSeekOCRVisionClipConfig",
    "DeepSeekOCRVisionConfig",
    "DeepSeekOCRVisionSamConfig",
    "Mode",
    "Preset",
    "preset_of",
]
