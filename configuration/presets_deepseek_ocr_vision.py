"""Presets: the ways of preparing a page that the encoder was trained or is used with, each under one name.

`"deepseek-ocr-encoder"` is what the package of that name does, `"deepseek-ocr"` what the released model does
(arXiv 2510.18234, section 3.2, and its code). A preset names the preprocessing and the `feature_mode` that belong
together; tokens of one are not tokens of the other. The released model knows several resolutions, its modes.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from .checks_deepseek_ocr_vision import require_choice
from .configuration_deepseek_ocr_vision import FeatureMode


ModeName = Literal["tiny", "small", "base", "large", "gundam"]


@dataclass(frozen=True)
class Mode:
    """One of the released model's resolutions.

    Attributes:
        size: Side in pixels of the page that an image becomes.
        tile_size: Side in pixels of the tiles that an image larger than one is cut into besides; `None` for none.
    """

    size: int
    tile_size: int | None = None


MODES = {
    "tiny": Mode(512),
    "small": Mode(640),
    "base": Mode(1024),
    "large": Mode(1280),
    "gundam": Mode(1024, tile_size=640),
}


@dataclass(frozen=True)
class Preset:
    """One way of preparing a page.

    Attributes:
        feature_mode: The feature mode that goes with it.
        image_mean: Mean of each channel, of pixels in [0, 1].
        image_std: Standard deviation of each channel, of pixels in [0, 1].
        padded_from: Side in pixels from which on a page is fitted into the square and padded, its aspect ratio kept.
            Below, and always if `None`, it is resized to the square directly.
        modes: Names of the resolutions that go with it, keys of `MODES`.
    """

    feature_mode: FeatureMode
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    padded_from: int | None
    modes: tuple[str, ...] = ()

    def pads(self, height: int, width: int) -> bool:
        """Whether a page is padded, not stretched, on its way to `height` x `width` pixels."""
        return self.padded_from is not None and min(height, width) >= self.padded_from


PRESETS = {
    "deepseek-ocr-encoder": Preset(
        "residual", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), padded_from=None
    ),
    "deepseek-ocr": Preset("concat", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), padded_from=1024, modes=get_args(ModeName)),
}


def require_preset(preset: str) -> Preset:
    """The preset of a name; a `TypeError` if that is no string, a `ValueError` if there is none of that name."""
    return PRESETS[require_choice("preset", preset, PRESETS)]


def require_mode(mode: str, preset: str) -> Mode:
    """The mode of a name, of those that go with a preset; errors as of `require_preset`."""
    allowed = require_preset(preset).modes
    if not allowed:
        raise ValueError(f"`mode` is {mode!r}; with preset {preset!r} it has to be left out: choose a `size`.")
    return MODES[require_choice("mode", mode, allowed)]
