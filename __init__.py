"""The DeepSeek-OCR vision encoder as an ordinary, trainable Hugging Face model.

Importing the package registers its classes with transformers' `AutoConfig`, `AutoModel`, `AutoImageProcessor` and
`AutoProcessor`.
"""

from deepseek_ocr_vision.configuration import (
    PRESETS,
    DeepSeekOCRVisionClipConfig,
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionSamConfig,
    Preset,
)
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionProcessor


__all__ = [
    "PRESETS",
    "DeepSeekOCRVisionClipConfig",
    "DeepSeekOCRVisionConfig",
    "DeepSeekOCRVisionImageProcessor",
    "DeepSeekOCRVisionModel",
    "DeepSeekOCRVisionProcessor",
    "DeepSeekOCRVisionSamConfig",
    "Preset",
]
