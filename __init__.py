"""The DeepSeek-OCR vision encoder as an ordinary, trainable Hugging Face model.

Importing the package registers its classes with transformers' `AutoConfig`, `AutoModel`, `AutoImageProcessor` and
`AutoProcessor`, and the whole DeepSeek-OCR with `AutoModelForImageTextToText`. Images of what an encoder sees are in
`deepseek_ocr_vision.visualize`.
"""

from deepseek_ocr_vision.composites import build_llava, save_llava
from deepseek_ocr_vision.configuration import (
    MODES,
    PRESETS,
    DeepSeekOCRVisionClipConfig,
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionSamConfig,
    Mode,
    Preset,
)
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.processing import (
    DeepSeekOCRVisionImageProcessor,
    DeepSeekOCRVisionProcessor,
    TextRenderer,
    text_to_pages,
)
from deepseek_ocr_vision.training import (
    LORA_TARGETS,
    FeatureCollator,
    GradientReport,
    ImageTextCollator,
    gradient_report,
    last_complete_checkpoint,
    layer_decay_groups,
    load_weights,
    make_resumable,
    precompute_features,
    precomputed_features,
    resume,
    why_incomplete,
)
from deepseek_ocr_vision.weights import load_encoder


__version__ = "0.2.0"

__all__ = [
    "LORA_TARGETS",
    "MODES",
    "PRESETS",
    "DeepSeekOCRVisionClipConfig",
    "DeepSeekOCRVisionConfig",
    "DeepSeekOCRVisionImageProcessor",
    "DeepSeekOCRVisionModel",
    "DeepSeekOCRVisionProcessor",
    "DeepSeekOCRVisionSamConfig",
    "FeatureCollator",
    "GradientReport",
    "ImageTextCollator",
    "Mode",
    "Preset",
    "TextRenderer",
    "build_llava",
    "gradient_report",
    "last_complete_checkpoint",
    "layer_decay_groups",
    "load_encoder",
    "load_weights",
    "make_resumable",
    "precompute_features",
    "precomputed_features",
    "resume",
    "save_llava",
    "text_to_pages",
    "why_incomplete",
]
