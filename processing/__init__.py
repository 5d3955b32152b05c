"""What an encoder reads. Importing this registers the classes with `AutoImageProcessor` and `AutoProcessor`."""

from transformers import AutoImageProcessor, AutoProcessor

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor
from deepseek_ocr_vision.processing.processing_deepseek_ocr_vision import DeepSeekOCRVisionProcessor
from deepseek_ocr_vision.processing.text_pages import TextRenderer, text_to_pages


try:
    # One class, whichever backend is asked for: what resizes is a field of it.
    AutoImageProcessor.register(
        DeepSeekOCRVisionConfig,
        image_processor_classes=dict.fromkeys(("torchvision", "pil"), DeepSeekOCRVisionImageProcessor),
        exist_ok=True,
    )
except TypeError:
    # transformers 5.0 asks for a slow class, a fast one, or both.
    AutoImageProcessor.register(
        DeepSeekOCRVisionConfig, slow_image_processor_class=DeepSeekOCRVisionImageProcessor, exist_ok=True
    )
AutoProcessor.register(DeepSeekOCRVisionConfig, DeepSeekOCRVisionProcessor, exist_ok=True)

__all__ = ["DeepSeekOCRVisionImageProcessor", "DeepSeekOCRVisionProcessor", "TextRenderer", "text_to_pages"]
