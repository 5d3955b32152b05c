"""What an encoder reads: images of any kind in, `pixel_values` out.

An image is read to 8-bit RGB, brought to the size of a page, and normalised, as a preset says; in the released model's
mode Gundam (arXiv 2510.18234, section 3.2, and its code) a large image is cut into tiles besides.
"""

import inspect
import os
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from ..configuration.checks_deepseek_ocr_vision import (
    require_choice,
    require_flag,
    require_integer,
    require_number,
    require_whole_tokens,
)
from ..configuration.configuration_deepseek_ocr_vision import FEATURE_MODES, FeatureMode
from ..configuration.presets_deepseek_ocr_vision import MODES, PRESETS, ModeName, require_mode, require_preset
from ..saving.saving_deepseek_ocr_vision import NEEDS_PACKAGE, AtomicSavingMixin
from .images_deepseek_ocr_vision import fetch_images_of, named_images, read_image


try:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as torchvision_functional
except ImportError:
    torchvision_functional = None

if TYPE_CHECKING:
    # Never runs. By this line older versions of transformers learn which further file a checkpoint travels with.
    from .processing_deepseek_ocr_vision import DeepSeekOCRVisionProcessor  # noqa: F401


Backend = Literal["auto", "pil", "torchvision"]
BACKENDS: tuple[str, ...] = get_args(Backend)
# What no longer holds when another field is replaced: a mode is a size with or without tiles.
_VOIDED_BY: dict[str, tuple[str, ...]] = dict.fromkeys(("size", "tile_size", "do_resize"), ("mode",))
_VOIDED_BY |= {"preset": ("mode", "do_pad", "image_mean", "image_std"), "mode": ("size", "tile_size")}
# What a JSON file says about the class.
FILE_FIELDS = ("image_processor_type", "processor_class", "auto_map")
CHANNEL_ORDERS = ("channels_first", "channels_last")
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")

TOKEN_SIZE = 64  # side in pixels of the square that one token stands for
PAGE_SIZE = 1024  # side in pixels of a page unless `size` says otherwise; what the released weights were trained at
MIN_TILES = 2  # an image that is cut at all is cut into at least so many
MAX_PATCHES = 6  # tiles at the most unless `max_patches` says otherwise, as DeepSeek's own server has it
MARGIN = (127, 127, 127)  # colour around a page that keeps its aspect ratio, as in the released code
_TORCHVISION_MODES = {
    Image.Resampling.NEAREST: "nearest-exact",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}


class DeepSeekOCRVisionImageProcessorKwargs(ImagesKwargs, total=False):
    """What transformers' processors may hand on to the image processor, besides what every one of them knows."""

    preset: str | None
    mode: str | None
    tile_size: int | None
    max_patches: int | None
    resize_backend: str | None


Pixels = torch.Tensor | list[torch.Tensor]


class Views(NamedTuple):
    """What an image becomes."""

    page: torch.Tensor  # the whole of it, uint8 [3, H, W]
    tiles: torch.Tensor  # its tiles in reading order, uint8 [T, 3, S, S]; none if it is not cut
    grid: tuple[int, int]  # columns and rows of tiles; 1 and 1 if it is not cut
    scale: float  # the value of one of its 256 levels before any rescaling: 1, or 1/255 if it came in [0, 1]


class DeepSeekOCRVisionImageProcessor(AtomicSavingMixin, BaseImageProcessor):
    """Turns images into the `pixel_values` that a `DeepSeekOCRVisionModel` reads.

    `processor(images, return_tensors="pt").pixel_values` is [B, 3, H, W], float32. `images` is an image, a list of
    images (nested lists are flattened), or a 4-D array or tensor of them. An image is any of:

    - a `PIL.Image.Image`, or the path of a file (`str` or `os.PathLike`; nothing is ever downloaded), a PNG,
      JPEG, MPO, TIFF, WebP, GIF, BMP, PPM, JPEG 2000, AVIF or TGA file, or HEIF where pillow-heif is registered;
    - a numpy array or torch tensor, [H, W], [H, W, C] or [C, H, W] with 1 to 4 channels (grey, grey and alpha, RGB,
      RGBA). Where shape alone does not tell which axis is the channels, three or four channels win over one, and after
      that arrays are [H, W, C] and tensors [C, H, W]; `input_data_format` settles it.

    All are read to 8-bit RGB first, so that one image gives one result in whatever form it comes:

    - other modes as by Pillow's `convert("RGB")`; where an image is transparent, white paper shows through;
    - 16-bit grey (Pillow's `I;16`, and `I` with values over 255) and uint16 arrays from [0, 65535]; other integers
      have to be in [0, 255]; floats in [0, 1], or in [0, 255] with some value of at least 2;
    - turned as the EXIF orientation says; of a file with several frames the first.

    With a `tile_size`, as in the mode Gundam, there are besides, under the names of transformers' Unlimited-OCR:
    `pixel_values_local` [T, 3, tile_size, tile_size], the tiles of all images, T = 0 if none was cut;
    `num_local_patches`, the number of tiles of each image; and `patches_grid`, a list of [columns, rows].

    Args:
        preset: Which model's preprocessing, a key of `PRESETS`. `"deepseek-ocr-encoder"`: stretched to the page,
            CLIP's mean and standard deviation. `"deepseek-ocr"`: mean and standard deviation 0.5; stretched below
            1024 pixels, from there on fitted into the page with its aspect ratio kept, the rest (127, 127, 127).
        do_resize: Whether images are brought to `size`. If not, their sides have to be multiples of 64.
        size: Size of a page in pixels: a number for a square, `{"height": ..., "width": ...}`, or (height, width), in
            multiples of 64. Defaults to the mode's, or 1024.
        mode: One of the released model's resolutions, a key of `MODES`, for the preset `"deepseek-ocr"`. It stands for
            `size` and `tile_size`, which follow it; to give one of them as well is an error if it differs.
        tile_size: Side in pixels, a multiple of 64, of the tiles that an image with a longer side is cut into besides
            becoming a page. `None` for no tiles, unless the mode has some.
        max_patches: Tiles that an image is cut into at the most, at least 2; the released remote code has 9.
        resample: Filter that resizes, a `PIL.Image.Resampling`. Always antialiased.
        do_pad: Whether the aspect ratio is kept and the rest of the page filled. Defaults to what the preset does at
            this size.
        do_rescale: Whether values in [0, 255] are multiplied by `rescale_factor`; images that come in another range
            are brought to that one before. If not, floats in [0, 1] stay there, and all others are in [0, 255].
        rescale_factor: What to multiply by.
        do_normalize: Whether `image_mean` is subtracted and the result divided by `image_std`.
        image_mean: Mean of each channel, or of all, after rescaling. Defaults to the preset's.
        image_std: Standard deviation of each channel, or of all, after rescaling. Defaults to the preset's.
        do_convert_rgb: Whether other modes are converted. If not, they are errors.
        resize_backend: What resizes. `"pil"`: Pillow, as the released models' own code does. `"torchvision"`: several
            times as fast, on any device; about 0.5 % of a page's pixels differ by one or two of 256 levels, with
            Pillow 13 more, by up to 30 at the edges of letters. `"auto"`: torchvision, if installed, for tensors.

    All of these but `preset` can also be given for one call, as can `return_tensors` (`"pt"`, `"np"`, or `None` for a
    list of tensors), `data_format` and `input_data_format` (`"channels_first"`, `"channels_last"`) and `device`. What
    else transformers declares for image processors in general, such as `do_center_crop`, has no effect.

    Raises:
        TypeError: An unknown argument, or a value or an image of a wrong type.
        ValueError: A value that is not allowed, or an image that cannot be read, as with more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` (89 million); the message names the argument or the place in the batch.
        OSError: A file that is missing, broken, no image or of another format; the message names the path.
    """

    model_input_names = ["pixel_values", "pixel_values_local", "num_local_patches", "patches_grid"]  # noqa: RUF012
    valid_kwargs = DeepSeekOCRVisionImageProcessorKwargs
    code_entries: ClassVar = ("AutoImageProcessor", "AutoProcessor")

    def __init__(
        self,
        preset: str = "deepseek-ocr-encoder",
        *,
        do_resize: bool = True,
        size: int | Sequence[int] | dict[str, int] | None = None,
        mode: ModeName | None = None,
        tile_size: int | None = None,
        max_patches: int = MAX_PATCHES,
        resample: int = Image.Resampling.BICUBIC,
        do_pad: bool | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_rgb: bool = True,
        resize_backend: Backend = "auto",
        **kwargs,
    ):
        _refuse_unknown(kwargs.keys() - set(FILE_FIELDS) - WITHOUT_EFFECT, known=FIELDS)
        super().__init__()
        defaults = require_preset(preset)
        self.preset = preset
        self.do_resize = require_flag("do_resize", do_resize)
        self.size, self.tile_size = _sizes(preset=preset, mode=mode, size=size, tile_size=tile_size)
        self.max_patches = require_integer("max_patches", max_patches, at_least=MIN_TILES)
        filters = [int(filter_) for filter_ in Image.Resampling]
        self.resample = require_choice("resample", require_integer("resample", resample), filters)
        self.do_pad = None if do_pad is None else require_flag("do_pad", do_pad)
        self.do_rescale = require_flag("do_rescale", do_rescale)
        self.rescale_factor = require_number("rescale_factor", rescale_factor)
        self.do_normalize = require_flag("do_normalize", do_normalize)
        self.image_mean = _channels("image_mean", defaults.image_mean if image_mean is None else image_mean)
        self.image_std = _channels("image_std", defaults.image_std if image_std is None else image_std)
        self.do_convert_rgb = require_flag("do_convert_rgb", do_convert_rgb)
        self.resize_backend = require_choice("resize_backend", resize_backend, BACKENDS)
        if 0 in self.image_std:
            raise ValueError(f"`image_std` is {image_std!r}; pixels are divided by it, so it cannot be 0.")
        if not do_resize and (mode is not None or self.tile_size is not None):
            given = f"`mode` {mode!r}" if mode is not None else f"`tile_size` {tile_size}"
            raise ValueError(f"`do_resize` is False, but {given} needs images to be resized; leave out one of them.")

    @classmethod
    def from_deepseek_ocr(cls, source: str | os.PathLike, *, preset: str = "deepseek-ocr-encoder", **options) -> Self:
        """Make the image processor that goes with `DeepSeekOCRVisionModel.from_deepseek_ocr` of the same arguments.

        Args:
            source: A Hub id, a folder or a safetensors file. Only the configuration is read, for the size of a page.
            preset: Which model's preprocessing.
            options: Those of the Hub, such as `revision` or `token`, and fields of the image processor, such as
                `mode` or `size`.

        Raises:
            OSError: There is no such checkpoint, or its configuration cannot be fetched.
            TypeError, ValueError: The configuration is corrupt, or a field is unknown or has a wrong value.
        """
        require_preset(preset)
        try:
            from deepseek_ocr_vision.weights import image_size_of
        except ImportError as error:
            raise ImportError(NEEDS_PACKAGE) from error
        size = image_size_of(source, **{name: options.pop(name) for name in HUB_OPTIONS if name in options})
        return cls(preset, **({} if options.get("mode") is not None else {"size": size}) | options)

    @property
    def mode(self) -> str | None:
        """The name of the released model's resolution that `size` and `tile_size` are, if they are one."""
        for name in require_preset(self.preset).modes if self.do_resize else ():
            side, tile_size = MODES[name].size, MODES[name].tile_size
            if self.size in (side, {"height": side, "width": side}) and self.tile_size == tile_size:
                return name
        return None

    @mode.setter
    def mode(self, value: ModeName) -> None:
        self.size, self.tile_size = _sizes(preset=self.preset, mode=value)

    @property
    def crop_size(self) -> dict[str, int]:
        """The page's size under the name by which transformers' `LlavaProcessor` counts tokens ahead of time."""
        return self.size

    def num_image_tokens(self, height: int, width: int, *, feature_mode: FeatureMode | None = None) -> int:
        """How many tokens the model gives for an image of `height` x `width` pixels, tiles included.

        Args:
            height: The image's, in pixels.
            width: The image's, in pixels.
            feature_mode: The model's. `"sequence"` has one more token for each row, and one for the image; all
                others have one token for each square of 64 x 64 pixels, which is the default.

        Raises:
            TypeError, ValueError: A side is no positive integer, or no multiple of 64 though `do_resize` is false, or
                there is no such feature mode.
        """
        if feature_mode is not None:
            require_choice("feature_mode", feature_mode, FEATURE_MODES)
        height = require_integer("height", height, at_least=1)
        width = require_integer("width", width, at_least=1)
        if not self.do_resize:
            require_whole_tokens("height, width", height, width, token_size=TOKEN_SIZE)
        views = [tuple(_page_size(self.size).values()) if self.do_resize else (height, width)]
        columns, rows = self._grid(height, width)
        if self.tile_size is not None and columns * rows > 1:
            views.append((rows * self.tile_size, columns * self.tile_size))
        special = feature_mode == "sequence"
        return special + sum(side // TOKEN_SIZE * (other // TOKEN_SIZE + special) for side, other in views)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **overrides,
    ) -> BatchFeature:
        """Prepare images; what calling the image processor does. Arguments, result and errors: see the class."""
        settings = self._with({name: value for name, value in overrides.items() if value is not None})
        return_tensors = _optional_choice("return_tensors", return_tensors, ("pt", "np"))
        data_format = _optional_choice("data_format", data_format, CHANNEL_ORDERS)
        input_data_format = _optional_choice("input_data_format", input_data_format, CHANNEL_ORDERS)
        settings._require_backend()
        reading: dict[str, Any] = {"input_data_format": input_data_format, "device": device}
        views = [settings._views(image, name, **reading) for name, image in named_images(images, "images")]
        pages = settings._normalized([view.page for view in views], [view.scale for view in views], device)
        features = {"pixel_values": _packed(pages, return_tensors, data_format)}
        if settings.tile_size is not None:
            tiles = settings._normalized_tiles(views, device)
            features["pixel_values_local"] = _packed(tiles, return_tensors, data_format)
            features["num_local_patches"] = [len(view.tiles) for view in views]
            features["patches_grid"] = [list(view.grid) for view in views]
        return BatchFeature(features)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open what is a path and hand on the rest; transformers' processors with a tokenizer call this."""
        return fetch_images_of(image_url_or_urls, "images")

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """Build from a dictionary, as `transformers` does. Another `preset` brings its own geometry and colours,
        another `mode` its sizes. Unknown fields, which a file of another version may have, are kept as attributes.
        """
        replaced = {k for k, v in kwargs.items() if k in FIELDS and (v is not None or k == "tile_size")}
        if kwargs.get("preset") == image_processor_dict.get("preset"):
            replaced.discard("preset")
        known = _without_voided({k: v for k, v in image_processor_dict.items() if k in FIELDS}, replaced)
        result = super().from_dict(known, **kwargs)
        image_processor = result[0] if isinstance(result, tuple) else result
        for name in image_processor_dict.keys() - {*FIELDS, *FILE_FIELDS, "crop_size"}:
            setattr(image_processor, name, image_processor_dict[name])
        return result

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary. In a saved folder it also names the processor, for `AutoProcessor`."""
        fields = super().to_dict() | {"mode": self.mode}
        return fields | {"processor_class": "DeepSeekOCRVisionProcessor"} if "auto_map" in fields else fields

    def _with(self, overrides: dict[str, Any]) -> "DeepSeekOCRVisionImageProcessor":
        """This image processor with some fields replaced; all are validated again, as they may have been set since."""
        _refuse_unknown(overrides.keys() - WITHOUT_EFFECT, known=FIELDS[1:])
        overrides = {name: value for name, value in overrides.items() if name in FIELDS}
        return type(self)(**_without_voided({name: getattr(self, name) for name in FIELDS}, overrides) | overrides)

    def _require_backend(self) -> None:
        if self.resize_backend != "torchvision":
            return
        if torchvision_functional is None:
            raise ImportError("`resize_backend` is 'torchvision', which is not installed; install it or choose 'pil'.")
        if self.do_resize and self.resample not in _TORCHVISION_MODES:
            allowed = f"with `resize_backend` 'torchvision' it is one of {[*map(int, _TORCHVISION_MODES)]}"
            raise ValueError(f"`resample` is {self.resample}; {allowed}.")

    def _views(self, image: Any, name: str, *, input_data_format: str | None, device: Any) -> Views:
        """The page and the tiles of an image."""
        can_resize = torchvision_functional is not None and self.resample in _TORCHVISION_MODES
        is_chosen = self.resize_backend == "auto" and can_resize and isinstance(image, torch.Tensor)
        keeps_tensor = is_chosen or self.resize_backend == "torchvision"  # which resizes, and not Pillow
        options = {"do_convert_rgb": self.do_convert_rgb, "keeps_tensor": keeps_tensor}
        read, scale = read_image(image, name, input_data_format=input_data_format, **options)
        if not self.do_resize:
            require_whole_tokens(name, *_height_width(read), token_size=TOKEN_SIZE)
        if keeps_tensor:
            read = _as_tensor(read).to(device or getattr(image, "device", None))
        grid = self._grid(*_height_width(read))
        return Views(self._page(read), self._tiles(read, grid), grid, scale)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of the tiles that an image is cut into; 1 and 1 if it is not."""
        tile_size = self.tile_size or max(height, width)
        return tile_grid(height, width, tile_size=tile_size, max_tiles=self.max_patches)

    def placement(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Where on the page an image of `height` x `width` pixels comes to lie: top, left, height and width."""
        page_height, page_width = self.size["height"], self.size["width"]
        pads = PRESETS[self.preset].pads(page_height, page_width) if self.do_pad is None else self.do_pad
        if not pads:
            return 0, 0, page_height, page_width
        # Rounded as by Pillow's `ImageOps.pad`, which however gives a 1 x 4000 image no pixels at all.
        if width / height > page_width / page_height:
            fitted = max(1, round(height / width * page_width)), page_width
        else:
            fitted = page_height, max(1, round(width / height * page_height))
        return round((page_height - fitted[0]) * 0.5), round((page_width - fitted[1]) * 0.5), *fitted

    def _page(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """An image as a page, uint8 [3, H, W]."""
        if not self.do_resize:
            return _as_tensor(image)
        top, left, height, width = self.placement(*_height_width(image))
        resized = self._resized(image, height, width)
        if (height, width) == (self.size["height"], self.size["width"]):
            return resized
        margin = torch.tensor(MARGIN, dtype=torch.uint8, device=resized.device).view(3, 1, 1)
        page = margin.repeat(1, self.size["height"], self.size["width"])
        page[:, top : top + height, left : left + width] = resized
        return page

    def _tiles(self, image: Image.Image | torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The tiles of an image, uint8 [T, 3, S, S]."""
        (columns, rows), side = grid, self.tile_size or 0
        if columns * rows == 1:
            return torch.empty(0, 3, side, side, dtype=torch.uint8)
        return cut(self._resized(image, rows * side, columns * side)[None], side)[0]

    def _resized(self, image: Image.Image | torch.Tensor, height: int, width: int) -> torch.Tensor:
        """An image at another size, uint8 [3, height, width], by Pillow or torchvision."""
        if isinstance(image, Image.Image):
            return _as_tensor(image.resize((width, height), resample=self.resample))
        mode = InterpolationMode(_TORCHVISION_MODES[self.resample])
        return torchvision_functional.resize(image, [height, width], interpolation=mode, antialias=True)

    def _normalized(self, pages: list[torch.Tensor], scales: list[float], device: Any) -> Pixels:
        """Pages as float32, rescaled and normalised in one step: [B, 3, H, W], or a list if their sizes differ."""
        devices = {page.device for page in pages}
        device = device or (devices.pop() if len(devices) == 1 else "cpu")
        pixels: Pixels = [torch.empty(page.shape, device=device) for page in pages]
        if len({page.shape for page in pages}) == 1:
            pixels = torch.empty(len(pages), *pages[0].shape, device=device)
        steps = {scale: [part.to(device) for part in self.factor_and_shift(scale)] for scale in set(scales)}
        for target, page, scale in zip(pixels, pages, scales, strict=True):
            factor, shift = steps[scale]
            target.copy_(page.to(device)).mul_(factor).add_(shift)
        return pixels

    def _normalized_tiles(self, views: list[Views], device: Any) -> Pixels:
        """The tiles of all images, as `_normalized` gives pages: [T, 3, S, S]."""
        tiles = [tile for view in views for tile in view.tiles]
        if not tiles:
            return views[0].tiles.float().to(device or views[0].page.device)
        return self._normalized(tiles, [view.scale for view in views for _ in view.tiles], device)

    def factor_and_shift(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What the 256 levels are multiplied by, and what is added, per channel: both [3, 1, 1]."""
        factor = self.rescale_factor if self.do_rescale else scale
        statistics = (self.image_mean, self.image_std) if self.do_normalize else ([0.0] * 3, [1.0] * 3)
        mean, std = torch.tensor(statistics, dtype=torch.float64).view(2, 3, 1, 1)
        return (factor / std).float(), (-mean / std).float()


# Arguments


FIELDS = tuple(inspect.signature(DeepSeekOCRVisionImageProcessor.__init__).parameters)[1:-1]
# What transformers may hand to any image processor, in whatever version is installed: never an error.
WITHOUT_EFFECT = frozenset(ImagesKwargs.__annotations__) - set(FIELDS)


def _refuse_unknown(given: Iterable[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"The DeepSeek-OCR image processor has no {', '.join(unknown)}; it has {', '.join(known)}.")


def _without_voided(fields: dict[str, Any], replaced: Iterable[str]) -> dict[str, Any]:
    """Fields, less those that no longer hold when others are replaced."""
    voided = {name for other in replaced for name in _VOIDED_BY.get(other, ())}
    return {name: value for name, value in fields.items() if name not in voided}


def _optional_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    # transformers' enumerations of these are strings' too, but only by their `value`.
    value = getattr(value, "value", value)
    return None if value is None else require_choice(name, value, allowed)


def _channels(name: str, value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple | np.ndarray) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"`{name}` is {value!r}; it has to be a number, or three: red, green and blue.")
    return [require_number(name, channel) for channel in values]


def _page_size(size: Any) -> dict[str, int]:
    """`size` in any of its forms as {"height": ..., "width": ...}."""
    sides = dict(size) if hasattr(size, "get") else size
    if isinstance(sides, list | tuple) and len(sides) == 2:
        sides = {"height": sides[0], "width": sides[1]}
    elif not isinstance(sides, dict | list | tuple):
        sides = dict.fromkeys(("height", "width"), require_integer("size", sides))
    if not isinstance(sides, dict) or sides.keys() != {"height", "width"}:
        allowed = "an integer, {'height': integer, 'width': integer} or (height, width)"
        raise ValueError(f"`size` is {size!r}; it has to be {allowed}, in multiples of {TOKEN_SIZE} pixels.")
    height, width = (require_integer(f"size['{name}']", sides[name]) for name in ("height", "width"))
    require_whole_tokens("size", height, width, token_size=TOKEN_SIZE)
    return {"height": height, "width": width}


def _sizes(
    *, preset: str, mode: str | None, size: Any = None, tile_size: Any = None
) -> tuple[dict[str, int], int | None]:
    """Size of a page and side of a tile, checked; the mode's where there is one."""
    if mode is None:
        return _page_size(PAGE_SIZE if size is None else size), _tile_side(tile_size)
    chosen = require_mode(mode, preset)
    page, tile = _page_size(chosen.size), chosen.tile_size
    given = None if size is None else _page_size(size)
    for name, value, own in (("size", given, page), ("tile_size", _tile_side(tile_size), tile)):
        if value is not None and value != own:
            raise ValueError(f"`{name}` is {value!r}, but in mode {mode!r} it is {own!r}; give one of the two.")
    return page, tile


def _tile_side(tile_size: Any) -> int | None:
    if tile_size is not None:
        tile_size = require_integer("tile_size", tile_size)
        require_whole_tokens("tile_size", tile_size, tile_size, token_size=TOKEN_SIZE)
    return tile_size


# Tiles


def tile_grid(height: int, width: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The grid of tiles that an image is resized to, as the released code's `dynamic_preprocess` chooses it.

    Of all grids of 2 to `max_tiles` tiles, the one whose aspect ratio is nearest to that of the image of `height` x
    `width` pixels. Of two that are equally near, the one with more tiles, if the image has more than half as many
    pixels. Columns and rows; 1 and 1 for an image that is no larger than a tile, which is not cut.
    """
    if max(height, width) <= tile_size:
        return 1, 1
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides[: max_tiles // columns]]
    nearest, least_distance = (1, 1), float("inf")
    # Fewer tiles first, and never a single one.
    for columns, rows in sorted(grids, key=prod)[1:]:
        distance = abs(width / height - columns / rows)
        fills_more = height * width > 0.5 * tile_size * tile_size * columns * rows
        if distance < least_distance or (distance == least_distance and fills_more):
            nearest, least_distance = (columns, rows), distance
    return nearest


def cut(images: torch.Tensor, tile_size: int) -> torch.Tensor:
    """Cut images of one size into tiles, in reading order: [B, 3, R x S, C x S] -> [B, R x C, 3, S, S]."""
    grid = images.unflatten(3, (-1, tile_size)).unflatten(2, (-1, tile_size))  # [B, 3, R, S, C, S]
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


# Tensors


def _height_width(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])


def _as_tensor(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _packed(pixels: Pixels, return_tensors: str | None, data_format: str | None) -> Any:
    """`pixels` in the order and the kind of container that were asked for."""
    is_last = data_format == "channels_last"
    if return_tensors is None:
        return [page.permute(1, 2, 0).contiguous() if is_last else page for page in pixels]
    if not isinstance(pixels, torch.Tensor):
        shapes = [tuple(page.shape) for page in pixels]
        raise ValueError(f"`return_tensors` is {return_tensors!r}, but the pages differ in shape: {shapes}.")
    pixels = pixels.permute(0, 2, 3, 1).contiguous() if is_last else pixels
    return pixels if return_tensors == "pt" else pixels.cpu().numpy()
