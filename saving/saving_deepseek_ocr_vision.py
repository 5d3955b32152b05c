"""`save_pretrained` with the code by which `trust_remote_code=True` loads the folder, and atomic if it can be."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


PACKAGE = "deepseek_ocr_vision"
CHECKSUMS = "SHA256SUMS"
IN_PACKAGE = __name__.startswith(f"{PACKAGE}.")
NEEDS_PACKAGE = "This needs the package deepseek-ocr-vision; what a checkpoint carries only loads, runs and trains."
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek_ocr_vision.DeepSeekOCRVisionConfig",
    "AutoModel": "modeling_deepseek_ocr_vision.DeepSeekOCRVisionModel",
    "AutoImageProcessor": "image_processing_deepseek_ocr_vision.DeepSeekOCRVisionImageProcessor",
    "AutoProcessor": "processing_deepseek_ocr_vision.DeepSeekOCRVisionProcessor",
}


class AtomicSavingMixin:
    """For classes of transformers with a `save_pretrained`: the same, but atomic, and with the code that loads it."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any):
        """Save as transformers does, with the code that loads the folder where this package is not installed.

        An interruption at any point is harmless: the folder holds what was there before or what is saved now. Saved by
        the code of a checkpoint alone, without the package, it is transformers' own save, which is not atomic.

        Args:
            save_directory: The folder.
            args: As in transformers.
            kwargs: As in transformers, such as `push_to_hub`, and `is_main_process` of a model, false in processes
                that only take part in gathering the weights.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            OSError: The folder cannot be written to, or the disk is full.
        """
        save = super().save_pretrained  # type: ignore[misc]  # of the class of transformers beside the mixin
        options = inspect.signature(save).bind(save_directory, *args).arguments | kwargs
        del options["save_directory"]
        with _name_code(self, getattr(self, "image_processor", None)):
            try:
                from deepseek_ocr_vision.saving.atomic import save_atomically
            except ImportError:
                # They are the sums of the files that are about to be replaced.
                Path(save_directory, CHECKSUMS).unlink(missing_ok=True)
                return save(save_directory, **options)
            # A class that came with a checkpoint brings its own code along, which transformers copies.
            return save_atomically(self, save, save_directory, with_code=IN_PACKAGE, options=options)


@contextmanager
def _name_code(*candidates: Any) -> Iterator[None]:
    """Give objects with `code_entries`, the Auto classes that load them, an `auto_map` while they are saved.

    It belongs to the JSON files, not to the objects.
    """
    parts = [part for part in candidates if hasattr(part, "code_entries")]
    before = [vars(part).get("auto_map") for part in parts]
    for part in parts:
        part.auto_map = {entry: AUTO_MAP[entry] for entry in part.code_entries}
    try:
        yield
    finally:
        for part, auto_map in zip(parts, before, strict=True):
            del part.auto_map
            if auto_map is not None:
                part.auto_map = auto_map
