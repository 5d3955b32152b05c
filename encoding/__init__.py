"""Pages to tokens on disk: files, PDFs and datasets in, a dataset of tokens out, by as many processes as there are."""

from deepseek_ocr_vision.encoding.encode_pages import Summary, encode_pages
from deepseek_ocr_vision.encoding.page_store import load_pages


__all__ = ["Summary", "encode_pages", "load_pages"]
