"""Models around the encoder: LLaVA, with any language model that it takes, and the whole of DeepSeek-OCR."""

import importlib
from typing import Any

import transformers

from deepseek_ocr_vision.composites.llava import build_llava, build_model, build_processor, save_llava
from deepseek_ocr_vision.composites.prompts import IMAGE_TOKEN, PROMPTS


__all__ = ["IMAGE_TOKEN", "PROMPTS", "build_llava", "build_model", "build_processor", "save_llava"]

if hasattr(transformers, "UnlimitedOcrForConditionalGeneration"):
    from deepseek_ocr_vision.composites.deepseek_ocr import (
        DeepSeekOCRConfig,
        DeepSeekOCRForConditionalGeneration,
        NoRepeatNGram,
    )
    from deepseek_ocr_vision.composites.deepseek_ocr_processor import DeepSeekOCRProcessor

    __all__ += ["DeepSeekOCRConfig", "DeepSeekOCRForConditionalGeneration", "DeepSeekOCRProcessor", "NoRepeatNGram"]


def __getattr__(name: str) -> Any:
    """What an older transformers leaves missing, with an error that names the version.

    Raises:
        ImportError: The installed transformers has no Unlimited-OCR.
    """
    if name == "NoRepeatNGram" or name.startswith("DeepSeekOCR"):
        importlib.import_module("deepseek_ocr_vision.composites.deepseek_ocr")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
