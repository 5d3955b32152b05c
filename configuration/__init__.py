"""What an encoder is. Importing this registers the configuration with `AutoConfig`."""

from transformers import AutoConfig

from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import (
    DeepSeekOCRVisionClipConfig,
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionSamConfig,
)
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import MODES, PRESETS, Mode, Preset, preset_of


AutoConfig.register(DeepSeekOCRVisionConfig.model_type, DeepSeekOCRVisionConfig, exist_ok=True)

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
