"""Seeing what an encoder sees: images over the page, made of its tokens, its attention and its gradients."""

from deepseek_ocr_vision.visualize.maps import attention_from, cosine_similarity, pca_colors, pixel_gradient, strength
from deepseek_ocr_vision.visualize.pages import PageMap, PageView, view_page
from deepseek_ocr_vision.visualize.sheets import draw_sheet


__all__ = [
    "PageMap",
    "PageView",
    "attention_from",
    "cosine_similarity",
    "draw_sheet",
    "pca_colors",
    "pixel_gradient",
    "strength",
    "view_page",
]
