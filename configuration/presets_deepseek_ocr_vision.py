"""Presets: the ways of preparing a page that the encoder was trained or is used with, each under one name.

`"deepseek-ocr-encoder"` is what the package of that name does, `"deepseek-ocr"` what the released model does
(arXiv 2510.18234, section 3.2, and its code). A preset names the preprocessing and the `feature_mode` that belong
together; tokens of one are not tokens of the other.
"""

from dataclasses import dataclass

from .configuration_deepseek_ocr_vision import FeatureMode


@dataclass(frozen=True)
class Preset:
    """One way of preparing a page.

    Attributes:
        feature_mode: The feature mode that goes with it.
        image_mean: Mean of each channel, of pixels in [0, 1].
        image_std: Standard deviation of each channel, of pixels in [0, 1].
        padded_from: Side in pixels from which on a page is fitted into the square and padded, its aspect ratio kept.
            Below, and always if `None`, it is resized to the square directly.
    """

    feature_mode: FeatureMode
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    padded_from: int | None

    def pads(self, height: int, width: int) -> bool:
        """Whether a page is padded, not stretched, on its way to `height` x `width` pixels."""
        return self.padded_from is not None and min(height, width) >= self.padded_from


PRESETS = {
    "deepseek-ocr-encoder": Preset(
        feature_mode="residual",
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        padded_from=None,
    ),
    "deepseek-ocr": Preset(
        feature_mode="concat",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        padded_from=1024,
    ),
}


def preset_of(feature_mode: FeatureMode) -> str:
    """The name of the preset that goes with a feature mode; `"projected"` goes with the released model's."""
    return "deepseek-ocr-encoder" if feature_mode == "residual" else "deepseek-ocr"


def require_preset(preset: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: There is none of that name.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"`preset` is {preset!r}; it has to be one of {list(PRESETS)}.")
    return PRESETS[preset]


__all__ = ["PRESETS", "Preset", "preset_of", "require_preset"]
