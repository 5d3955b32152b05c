"""Models around the encoder: LLaVA, with any language model that it takes."""

from deepseek_ocr_vision.composites.llava import IMAGE_TOKEN, build_llava, build_model, build_processor


__all__ = ["IMAGE_TOKEN", "build_llava", "build_model", "build_processor"]
