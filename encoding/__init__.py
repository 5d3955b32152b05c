"""Pages to tokens on disk: files, PDFs and datasets in, a table of tokens out."""

from deepseek_ocr_vision.encoding.encode_pages import Summary, encode_pages
from deepseek_ocr_vision.encoding.table import load_pages


__all__ = ["Summary", "encode_pages", "load_pages"]
