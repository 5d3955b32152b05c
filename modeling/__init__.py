"""What an encoder computes. Importing this registers the model with `AutoModel`."""

from transformers import AutoModel

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.modeling.modeling_deepseek_ocr_vision import DeepSeekOCRVisionModel


AutoModel.register(DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel, exist_ok=True)

__all__ = ["DeepSeekOCRVisionModel"]
