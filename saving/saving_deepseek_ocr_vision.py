"""`save_pretrained` with the code that loads the folder, and atomic wherever the package is installed."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .checkpoint_code_deepseek_ocr_vision import CHECKSUMS, IN_PACKAGE, name_code


class AtomicSavingMixin:
    """For classes of transformers with a `save_pretrained`: the same, but atomic, and with the code that loads it."""

    def parts_to_save(self) -> list[Any]:
        """The objects in the checkpoint whose `code_entries` are the Auto classes that load them."""
        return [self]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save as transformers does, with the code that loads the folder where this package is not installed.

        An interruption at any point is harmless: the folder holds what was there before or what is saved now. Saved by
        the code of a checkpoint alone, without the package, it is transformers' own save, which is not atomic.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to upload it as well.
            kwargs: As in transformers.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            OSError: The folder cannot be written to, or the disk is full.
        """
        save = super().save_pretrained  # type: ignore[misc]  # of the class of transformers beside the mixin
        return save_with_code(
            self, save, save_directory, parts=self.parts_to_save(), push_to_hub=push_to_hub, **kwargs
        )


def save_with_code(
    saved: Any,
    save: Callable,
    save_directory: str | os.PathLike,
    *,
    parts: Sequence[Any] = (),
    publish: bool = True,
    push_to_hub: bool = False,
    **options: Any,
) -> list[str] | None:
    """Save by transformers' own `save_pretrained`, with the code's names in the JSON files.

    Args:
        saved: What is saved.
        save: Its `save_pretrained`, as transformers has it.
        save_directory: The folder.
        parts: Objects whose `code_entries` are the Auto classes that load them.
        publish: Whether this process is the one that writes. The others only take part in gathering the weights.
        push_to_hub: Whether to upload the files as well.
        options: What `save` and `push_to_hub` of transformers take.

    Returns:
        What `save` returns: `None`, or the paths of files.
    """
    with name_code(*parts):
        try:
            from deepseek_ocr_vision.saving.atomic import save_atomically
        except ImportError:
            # They are the sums of the files that are about to be replaced.
            Path(save_directory, CHECKSUMS).unlink(missing_ok=True)
            return save(save_directory, push_to_hub=push_to_hub, **options)
        # A class that came with a checkpoint brings its own code along, which transformers copies.
        return save_atomically(
            saved,
            save,
            save_directory,
            with_code=IN_PACKAGE,
            publish=publish,
            push_to_hub=push_to_hub,
            options=options,
        )


__all__ = ["AtomicSavingMixin", "save_with_code"]
