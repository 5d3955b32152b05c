"""The image processor as a processor, for `AutoProcessor`: images only, no tokenizer."""

import os
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from ..saving.saving_deepseek_ocr_vision import AtomicSavingMixin
from .image_processing_deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor


if TYPE_CHECKING:
    # Never runs. By these lines older versions of transformers learn which further files a checkpoint travels with.
    from ..configuration.checks_deepseek_ocr_vision import require_choice  # noqa: F401
    from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig  # noqa: F401
    from ..configuration.presets_deepseek_ocr_vision import PRESETS  # noqa: F401
    from .images_deepseek_ocr_vision import read_image  # noqa: F401


class DeepSeekOCRVisionProcessor(AtomicSavingMixin, ProcessorMixin):
    """A processor whose only part is a `DeepSeekOCRVisionImageProcessor`.

    `processor(images=..., return_tensors="pt").pixel_values` is [B, 3, H, W], with tiles beside it where the image
    processor cuts any. For text with images use transformers' own
    `LlavaProcessor(image_processor, tokenizer, patch_size=64, vision_feature_select_strategy="full")`.

    Args:
        image_processor: Defaults to a `DeepSeekOCRVisionImageProcessor()`. What is none is a `TypeError`.
    """

    code_entries: ClassVar = ("AutoImageProcessor", "AutoProcessor")

    def __init__(self, image_processor: Any = None, **kwargs):
        super().__init__(DeepSeekOCRVisionImageProcessor() if image_processor is None else image_processor, **kwargs)

    @classmethod
    def from_deepseek_ocr(cls, source: str | os.PathLike, **kwargs) -> "DeepSeekOCRVisionProcessor":
        """Make it around what `DeepSeekOCRVisionImageProcessor.from_deepseek_ocr` of the same arguments gives."""
        return cls(DeepSeekOCRVisionImageProcessor.from_deepseek_ocr(source, **kwargs))

    def __call__(self, images: Any = None, **kwargs: Unpack[ProcessingKwargs]) -> BatchFeature:
        """Prepare images, as `DeepSeekOCRVisionImageProcessor` takes them.

        What that takes for one call may also stand inside `images_kwargs` or `common_kwargs`.

        Raises:
            TypeError, ValueError: There is text or no image, an image cannot be read, or an argument is not known.
        """
        given: dict[str, Any] = {**kwargs}
        if given.pop("text", None) is not None or given.pop("text_kwargs", None):
            raise ValueError(
                "`text` was given, but this processor has no tokenizer. For text with images use transformers' "
                "LlavaProcessor(image_processor=processor.image_processor, tokenizer=..., patch_size=64, "
                "vision_feature_select_strategy='full')."
            )
        if images is None:
            raise ValueError("`images` is None; give an image or a list of images.")
        groups = ("common_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")
        common, own, *_ = (given.pop(group, None) or {} for group in groups)
        twice = sorted(name for name in own if name in given)
        if twice:
            raise ValueError(f"{twice} are given twice: by themselves and inside `images_kwargs`.")
        return self.image_processor(images, **common | own | given)
