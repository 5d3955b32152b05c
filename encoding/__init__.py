"""Pages to tokens on disk: files, PDFs and datasets in, a table of tokens out."""

from deepseek_ocr_vision.encoding.encode_pages import EncodePages, Summary, encode_pages
from deepseek_ocr_vision.encoding.table import load_pages


__all__ = ["EncodePages", "Summary", "encode_pages", "load_pages"]
