"""The names of the code that a checkpoint carries, by which `trust_remote_code=True` finds it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


PACKAGE = "deepseek_ocr_vision"
CHECKSUMS = "SHA256SUMS"
IN_PACKAGE = __name__.startswith(f"{PACKAGE}.")
NEEDS_PACKAGE = (
    "This needs the package deepseek-ocr-vision; what a checkpoint carries of it only loads, runs and trains."
)
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek_ocr_vision.DeepSeekOCRVisionConfig",
    "AutoModel": "modeling_deepseek_ocr_vision.DeepSeekOCRVisionModel",
    "AutoImageProcessor": "image_processing_deepseek_ocr_vision.DeepSeekOCRVisionImageProcessor",
    "AutoProcessor": "processing_deepseek_ocr_vision.DeepSeekOCRVisionProcessor",
}


@contextmanager
def name_code(*parts: Any) -> Iterator[None]:
    """Give objects an `auto_map` while they are saved: it belongs to the JSON files, not to the objects.

    Args:
        parts: Objects whose `code_entries` are the Auto classes that load them.
    """
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_with_auto_map(part))
        yield


@contextmanager
def _with_auto_map(part: Any) -> Iterator[None]:
    before = vars(part).get("auto_map")
    part.auto_map = {entry: AUTO_MAP[entry] for entry in part.code_entries}
    try:
        yield
    finally:
        del part.auto_map
        if before is not None:
            part.auto_map = before


__all__ = ["AUTO_MAP", "CHECKSUMS", "IN_PACKAGE", "NEEDS_PACKAGE", "PACKAGE", "name_code"]
