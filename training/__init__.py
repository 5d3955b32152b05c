"""What people train the encoder with, beside transformers' `Trainer`."""

from deepseek_ocr_vision.training.adapters import (
    LANGUAGE_MODEL_LORA_PARAMETERS,
    LANGUAGE_MODEL_LORA_TARGETS,
    LORA_TARGETS,
)
from deepseek_ocr_vision.training.collator import ImageTextCollator
from deepseek_ocr_vision.training.features import FeatureCollator, precompute_features, precomputed_features
from deepseek_ocr_vision.training.gradient_report import GradientReport, gradient_report
from deepseek_ocr_vision.training.optimization import layer_decay_groups
from deepseek_ocr_vision.training.resuming import (
    last_complete_checkpoint,
    load_weights,
    make_resumable,
    resume,
    why_incomplete,
)


__all__ = [
    "LANGUAGE_MODEL_LORA_PARAMETERS",
    "LANGUAGE_MODEL_LORA_TARGETS",
    "LORA_TARGETS",
    "FeatureCollator",
    "GradientReport",
    "ImageTextCollator",
    "gradient_report",
    "last_complete_checkpoint",
    "layer_decay_groups",
    "load_weights",
    "make_resumable",
    "precompute_features",
    "precomputed_features",
    "resume",
    "why_incomplete",
]
