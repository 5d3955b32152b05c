"""What an encoder reads: pictures of any kind in, `pixel_values` out.

A picture is read to 8-bit RGB, brought to the size of a page, and normalised. Geometry, mean and standard deviation
come from a preset (`PRESETS`): those of the package `deepseek-ocr-encoder`, or of the released DeepSeek-OCR model
(arXiv 2510.18234, section 3.2, and its code). There are two ways to resize, Pillow and torchvision; torchvision need
not be installed.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from ..configuration.checkpoint_code_deepseek_ocr_vision import package_module
from ..configuration.presets_deepseek_ocr_vision import PRESETS, require_preset
from ..configuration.saving_deepseek_ocr_vision import save_whole
from .pictures_deepseek_ocr_vision import fetch_pictures, named_pictures, read_picture


try:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as torchvision_functional
except ImportError:
    torchvision_functional = None

if TYPE_CHECKING:
    # Never runs. transformers reads these lines to learn which files a checkpoint's image processor travels with, and
    # its older versions do not look for them in the files imported above.
    from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig  # noqa: F401
    from .processing_deepseek_ocr_vision import DeepSeekOCRVisionProcessor  # noqa: F401


Backend = Literal["auto", "pil", "torchvision"]
BACKENDS: tuple[str, ...] = get_args(Backend)
FIELDS = (
    "preset",
    "do_resize",
    "size",
    "resample",
    "do_pad",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "resize_backend",
)
# What a JSON file says about the class.
FILE_FIELDS = ("image_processor_type", "processor_class", "auto_map")
TENSOR_TYPES = ("pt", "np")
CHANNEL_ORDERS = ("channels_first", "channels_last")

TOKEN_SIZE = 64
"""Side in pixels of the square that one token stands for."""
PAGE_SIZE = 1024
"""Side in pixels of a page unless `size` says otherwise; what the released weights were trained at."""
MARGIN = (127, 127, 127)
"""Colour around a page that keeps its aspect ratio, as in the released code."""

_TORCHVISION_MODES = {
    Image.Resampling.NEAREST: "nearest-exact",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}


class DeepSeekOCRVisionImagesKwargs(ImagesKwargs, total=False):
    """What transformers' processors may hand on to the image processor, besides what every one of them knows."""

    preset: str | None
    resize_backend: str | None


class DeepSeekOCRVisionImageProcessor(BaseImageProcessor):
    """Turns pictures into the `pixel_values` that a `DeepSeekOCRVisionModel` reads.

    `processor(images, return_tensors="pt").pixel_values` is [B, 3, H, W], float32. `images` is a picture, a list of
    pictures (nested lists are flattened), or a 4-D array or tensor of them. A picture is any of:

    - a `PIL.Image.Image`, or the path of a picture file (`str` or `os.PathLike`; nothing is ever downloaded);
    - a numpy array or torch tensor, [H, W], [H, W, C] or [C, H, W] with 1 to 4 channels (grey, grey and alpha, RGB,
      RGBA). Where shape alone does not tell which axis is the channels, three or four channels win over one, and after
      that arrays are [H, W, C] and tensors [C, H, W]; `input_data_format` settles it.

    All are read to 8-bit RGB first, so that one picture gives one result in whatever form it comes:

    - other modes as by Pillow's `convert("RGB")`; where a picture is transparent, white paper shows through;
    - 16-bit grey (Pillow's `I;16`, and `I` with values over 255) and uint16 arrays from [0, 65535]; other integers
      have to be in [0, 255]; floats in [0, 1], or in [0, 255] with some value of at least 2;
    - turned as the EXIF orientation says; of a file with several frames the first, whichever one it is opened at;
    - over `PIL.Image.MAX_IMAGE_PIXELS` (89 megapixels) Pillow warns when it opens a file, over twice that it is an
      error, here for every kind of picture.

    Args:
        preset: Which model's preprocessing, a key of `PRESETS`. `"deepseek-ocr-encoder"`: stretched to the page,
            CLIP's mean and standard deviation. `"deepseek-ocr"`: mean and standard deviation 0.5; stretched below
            1024 pixels (the modes tiny, 512, and small, 640), from there on (base, 1024, and large, 1280) fitted into
            the page with its aspect ratio kept, the rest (127, 127, 127).
        do_resize: Whether pictures are brought to `size`. If not, their sides have to be multiples of 64.
        size: Size of a page in pixels: a number for a square, `{"height": ..., "width": ...}`, or (height, width), in
            multiples of 64. Defaults to 1024.
        resample: Filter that resizes, a `PIL.Image.Resampling`. Always antialiased.
        do_pad: Whether the aspect ratio is kept and the rest of the page filled. Defaults to what the preset does at
            this size.
        do_rescale: Whether values in [0, 255] are multiplied by `rescale_factor`; pictures that come in another range
            are brought to that one before. If not, floats in [0, 1] stay there, and all others are in [0, 255].
        rescale_factor: What to multiply by.
        do_normalize: Whether `image_mean` is subtracted and the result divided by `image_std`.
        image_mean: Mean of each channel, or of all, after rescaling. Defaults to the preset's.
        image_std: Standard deviation of each channel, or of all, after rescaling. Defaults to the preset's.
        do_convert_rgb: Whether other modes are converted. If not, they are errors.
        resize_backend: What resizes. `"pil"`: Pillow, as the released models' own code does. `"torchvision"`: its
            tensor kernels, several times as fast, on any device. Of a page's 256 levels some 0.5 % come out one or two
            off; more, and by up to 30 at the edges of sharp letters, where Pillow 13 shrinks a page's height before
            its width (both cut off what overshoots in between, and torchvision, as Pillow before, starts with the
            width). `"auto"`: torchvision for torch tensors if it is installed, Pillow for all else.

    All of these but `preset` can also be given for one call, as can `return_tensors` (`"pt"`, `"np"`, or `None` for a
    list of tensors), `data_format` and `input_data_format` (`"channels_first"`, `"channels_last"`), `device` and
    `disable_grouping` (tensors of one shape are resized together unless it is true).

    Raises:
        TypeError: A name that is not known, or a value or a picture of a type that is not.
        ValueError: A value that is not allowed, or a picture that cannot be read as it stands; the message names the
            argument or the picture's place in the batch.
        OSError: A file that is missing, truncated or no picture; the message names the path.
    """

    model_input_names: ClassVar = ["pixel_values"]
    valid_kwargs = DeepSeekOCRVisionImagesKwargs
    code_entries: ClassVar = ("AutoImageProcessor", "AutoProcessor")

    def __init__(
        self,
        preset: str = "deepseek-ocr-encoder",
        *,
        do_resize: bool = True,
        size: int | Sequence[int] | dict[str, int] | None = None,
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
        _refuse_unknown(kwargs.keys() - set(FILE_FIELDS), known=FIELDS)
        super().__init__()
        defaults = require_preset(preset)
        self.preset = preset
        self.do_resize = _flag("do_resize", do_resize)
        self.size = _page_size(PAGE_SIZE if size is None else size)
        self.resample = _resampling(resample)
        self.do_pad = None if do_pad is None else _flag("do_pad", do_pad)
        self.do_rescale = _flag("do_rescale", do_rescale)
        self.rescale_factor = _number("rescale_factor", rescale_factor)
        self.do_normalize = _flag("do_normalize", do_normalize)
        self.image_mean = _channels("image_mean", defaults.image_mean if image_mean is None else image_mean)
        self.image_std = _channels("image_std", defaults.image_std if image_std is None else image_std)
        self.do_convert_rgb = _flag("do_convert_rgb", do_convert_rgb)
        self.resize_backend = _choice("resize_backend", resize_backend, BACKENDS)
        if 0 in self.image_std:
            raise ValueError(f"`image_std` is {image_std!r}; it divides, so it cannot be 0.")

    @classmethod
    def from_deepseek_ocr(
        cls,
        source: str | os.PathLike,
        *,
        preset: str = "deepseek-ocr-encoder",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **fields,
    ) -> "DeepSeekOCRVisionImageProcessor":
        """Make the image processor that goes with `DeepSeekOCRVisionModel.from_deepseek_ocr` of the same arguments.

        Of the checkpoint only its configuration is read, for the size of a page; what is done with it says the preset.

        Args:
            source: A Hub id, a folder or a safetensors file.
            preset: Which model's preprocessing.
            revision: Branch, tag or commit on the Hub.
            token: The Hub's token; by default the one that is logged in.
            cache_dir: The Hub's cache; by default huggingface_hub's own.
            local_files_only: Whether to do without the Hub.
            fields: Further arguments of the image processor, such as `size`.

        Raises:
            OSError: There is no such checkpoint, or its configuration cannot be fetched.
            TypeError: A field is not known.
            ValueError: The configuration is corrupt, or a field has a value that is not allowed.
        """
        require_preset(preset)
        hub_options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        image_size_of = package_module("configuration.architecture").image_size_of
        size = image_size_of(source, local_files_only=local_files_only, **hub_options)
        return cls(preset, **({"size": size} | fields))

    @property
    def crop_size(self) -> dict[str, int]:
        """The page's size under the name by which transformers' `LlavaProcessor` counts tokens ahead of time."""
        return self.size

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many tokens the model gives for a picture of `height` x `width` pixels.

        Raises:
            ValueError: A side is no positive integer, or no multiple of 64 though `do_resize` is false.
        """
        for name, side in (("height", height), ("width", width)):
            if not _is_integer(side) or side < 1:
                raise ValueError(f"`{name}` is {side!r}; it has to be a positive integer.")
        if not self.do_resize:
            _require_token_multiple("height, width", height, width)
        page = _page_size(self.size) if self.do_resize else {"height": height, "width": width}
        return (page["height"] // TOKEN_SIZE) * (page["width"] // TOKEN_SIZE)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        disable_grouping: bool | None = None,
        **overrides,
    ) -> BatchFeature:
        """Prepare pictures; what calling the image processor does. Arguments, result and errors: see the class."""
        overrides = {name: value for name, value in overrides.items() if value is not None}
        settings = self._with(overrides)
        return_tensors = _optional_choice("return_tensors", return_tensors, TENSOR_TYPES)
        data_format = _optional_choice("data_format", data_format, CHANNEL_ORDERS)
        input_data_format = _optional_choice("input_data_format", input_data_format, CHANNEL_ORDERS)
        settings._require_backend()
        pages, units = settings._pages(images, input_data_format, device, bool(disable_grouping))
        pixels = settings._normalized(pages, units, device)
        return BatchFeature({"pixel_values": _packed(pixels, return_tensors, data_format)})

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open what is a path and hand on the rest; transformers' processors with a tokenizer call this.

        Raises:
            ValueError: A URL; nothing is downloaded.
            OSError: A file that is missing, truncated or no picture.
        """
        return fetch_pictures(image_url_or_urls, "images")

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """Build from a dictionary, as `transformers` does. With another `preset`, geometry and colours are that one's.

        Fields that are not known, as a file of another version may have, are kept as plain attributes.

        Raises:
            ValueError: A field has a value that is not allowed.
        """
        if kwargs.get("preset") not in (None, image_processor_dict.get("preset")):
            belonging = ("do_pad", "image_mean", "image_std")
            image_processor_dict = {k: v for k, v in image_processor_dict.items() if k not in belonging}
        known = {k: v for k, v in image_processor_dict.items() if k in FIELDS}
        result = super().from_dict(known, **kwargs)
        image_processor = result[0] if isinstance(result, tuple) else result
        for name in image_processor_dict.keys() - {*FIELDS, *FILE_FIELDS, "crop_size"}:
            setattr(image_processor, name, image_processor_dict[name])
        return result

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary. In a saved folder it also names the processor, for `AutoProcessor`."""
        fields = super().to_dict()
        return fields | {"processor_class": "DeepSeekOCRVisionProcessor"} if "auto_map" in fields else fields

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save as transformers does, with the code that loads the folder where this package is not installed.

        An interruption at any point is harmless: see `save_whole`.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to upload it as well.
            kwargs: As in transformers.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            OSError: The folder cannot be written to, or the disk is full.
        """
        save = super().save_pretrained
        return save_whole(self, save, save_directory, self, push_to_hub=push_to_hub, **kwargs)

    def _with(self, overrides: dict[str, Any]) -> "DeepSeekOCRVisionImageProcessor":
        """This image processor with some fields replaced; all are validated again, as they may have been set since."""
        _refuse_unknown(overrides, known=FIELDS[1:])
        return type(self)(**{name: getattr(self, name) for name in FIELDS} | overrides)

    def _require_backend(self) -> None:
        if self.resize_backend == "torchvision" and torchvision_functional is None:
            raise ImportError(
                "`resize_backend` is 'torchvision', which is not installed; install it, or choose 'pil'."
            )
        if self.resize_backend == "torchvision" and self.do_resize and self.resample not in _TORCHVISION_MODES:
            allowed = [int(mode) for mode in _TORCHVISION_MODES]
            raise ValueError(
                f"`resample` is {self.resample}; with `resize_backend` 'torchvision' it is one of {allowed}."
            )

    def _keeps_tensor(self, picture: Any) -> bool:
        """Whether torchvision resizes `picture`, and not Pillow."""
        by_choice = isinstance(picture, torch.Tensor) and self.resample in _TORCHVISION_MODES
        by_choice = by_choice and self.resize_backend == "auto" and torchvision_functional is not None
        return by_choice or self.resize_backend == "torchvision"

    def _pages(
        self, images: Any, input_data_format: str | None, device: Any, disable_grouping: bool
    ) -> tuple[list[torch.Tensor], list[float]]:
        """Every picture as a page, uint8 [3, H, W], and the value of one of its 256 levels before any rescaling."""
        pages, units, waiting = [], [], defaultdict(list)
        for name, picture in named_pictures(images, "images"):
            keeps_tensor = self._keeps_tensor(picture)
            read, unit = read_picture(picture, name, input_data_format, self.do_convert_rgb, keeps_tensor)
            if not self.do_resize:
                _require_token_multiple(name, *_height_width(read))
            if not keeps_tensor:
                read = _as_tensor(self._resized_picture(read))
            elif isinstance(picture, torch.Tensor):
                read = _as_tensor(read).to(device or picture.device)
                waiting[read.shape, read.device, disable_grouping and len(pages)].append(len(pages))
            else:
                read = self._resized_tensors(_as_tensor(read).to(device)[None])[0]
            pages.append(read)
            units.append(unit)
        for indexes in waiting.values():
            group = [pages[index] for index in indexes]
            # A large picture alone is not copied.
            group = torch.stack(group) if len(group) > 1 else group[0][None]
            for index, page in zip(indexes, self._resized_tensors(group), strict=True):
                pages[index] = page
        return pages, units

    def _geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the place on the page that a picture is resized to."""
        page_height, page_width = self.size["height"], self.size["width"]
        pads = PRESETS[self.preset].pads(page_height, page_width) if self.do_pad is None else self.do_pad
        if not pads:
            return 0, 0, page_height, page_width
        # Rounded as by Pillow's `ImageOps.pad`, which however gives a 1 x 4000 picture no pixels at all.
        if width / height > page_width / page_height:
            fitted = max(1, round(height / width * page_width)), page_width
        else:
            fitted = page_height, max(1, round(width / height * page_height))
        return round((page_height - fitted[0]) * 0.5), round((page_width - fitted[1]) * 0.5), *fitted

    def _resized_picture(self, picture: Image.Image) -> Image.Image:
        """A page made by Pillow."""
        if not self.do_resize:
            return picture
        top, left, height, width = self._geometry(picture.height, picture.width)
        resized = picture.resize((width, height), resample=self.resample)
        if (height, width) == (self.size["height"], self.size["width"]):
            return resized
        page = Image.new("RGB", (self.size["width"], self.size["height"]), MARGIN)
        page.paste(resized, (left, top))
        return page

    def _resized_tensors(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pages made by torchvision, of pictures of one shape: uint8 [B, 3, h, w] -> [B, 3, H, W]."""
        if not self.do_resize:
            return pictures
        top, left, height, width = self._geometry(*pictures.shape[-2:])
        mode = InterpolationMode(_TORCHVISION_MODES[self.resample])
        resized = torchvision_functional.resize(pictures, [height, width], interpolation=mode, antialias=True)
        if (height, width) == (self.size["height"], self.size["width"]):
            return resized
        margin = torch.tensor(MARGIN, dtype=torch.uint8, device=resized.device).view(1, 3, 1, 1)
        page = margin.repeat(len(resized), 1, self.size["height"], self.size["width"])
        page[..., top : top + height, left : left + width] = resized
        return page

    def _normalized(self, pages: list[torch.Tensor], units: list[float], device: Any) -> torch.Tensor | list:
        """Pages as float32, rescaled and normalised in one step: [B, 3, H, W], or a list if their sizes differ."""
        devices = {page.device for page in pages}
        device = device or (devices.pop() if len(devices) == 1 else "cpu")
        shapes = [page.shape for page in pages]
        if len(set(shapes)) == 1:
            pixels = torch.empty(len(pages), *shapes[0], device=device)
        else:
            pixels = [torch.empty(shape, device=device) for shape in shapes]
        steps = {unit: [part.to(device) for part in self._scale_and_shift(unit)] for unit in set(units)}
        for target, page, unit in zip(pixels, pages, units, strict=True):
            scale, shift = steps[unit]
            target.copy_(page.to(device)).mul_(scale).add_(shift)
        return pixels

    def _scale_and_shift(self, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What the 256 levels are multiplied by, and what is added, per channel: both [3, 1, 1]."""
        factor = self.rescale_factor if self.do_rescale else unit
        mean = torch.tensor(self.image_mean, dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor(self.image_std, dtype=torch.float64).view(3, 1, 1)
        if not self.do_normalize:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        return (factor / std).float(), (-mean / std).float()


# Arguments


def _refuse_unknown(given: Iterable[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"The DeepSeek-OCR image processor has no {', '.join(unknown)}; it has {', '.join(known)}.")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; it has to be one of {list(allowed)}.")
    return value


def _optional_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    # transformers' enumerations of these are strings' too, but only by their `value`.
    value = getattr(value, "value", value)
    return None if value is None else _choice(name, value, allowed)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}; it has to be True or False.")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}; it has to be a finite number.")
    return value.item() if isinstance(value, np.number) else value


def _channels(name: str, value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple | np.ndarray) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"`{name}` is {value!r}; it has to be a number, or three: red, green and blue.")
    return [_number(name, channel) for channel in values]


def _resampling(value: Any) -> int:
    allowed = {int(filter_): filter_.name for filter_ in Image.Resampling}
    if not _is_integer(value) or int(value) not in allowed:
        raise ValueError(f"`resample` is {value!r}; it has to be one of {allowed} (PIL.Image.Resampling).")
    return int(value)


def _page_size(size: Any) -> dict[str, int]:
    """`size` in any of its forms as {"height": ..., "width": ...}."""
    is_mapping = not _is_integer(size) and not isinstance(size, str) and hasattr(size, "get")
    sides = dict(size) if is_mapping else size
    if _is_integer(sides):
        sides = {"height": sides, "width": sides}
    elif isinstance(sides, list | tuple) and len(sides) == 2:
        sides = {"height": sides[0], "width": sides[1]}
    if not isinstance(sides, dict) or set(sides) != {"height", "width"} or not all(map(_is_integer, sides.values())):
        allowed = "an integer, {'height': integer, 'width': integer} or (height, width)"
        raise ValueError(f"`size` is {size!r}; it has to be {allowed}, in multiples of {TOKEN_SIZE} pixels.")
    height, width = int(sides["height"]), int(sides["width"])
    _require_token_multiple("size", height, width)
    return {"height": height, "width": width}


def _require_token_multiple(name: str, height: int, width: int) -> None:
    nearest = [max(1, round(side / TOKEN_SIZE)) * TOKEN_SIZE for side in (height, width)]
    if nearest != [height, width]:
        raise ValueError(
            f"{name}: {height} x {width} pixels (height x width); both have to be multiples of {TOKEN_SIZE}, the "
            f"pixels a token. The nearest size is {nearest[0]} x {nearest[1]}."
        )


# Tensors


def _height_width(picture: Image.Image | torch.Tensor) -> tuple[int, int]:
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else tuple(picture.shape[-2:])


def _as_tensor(picture: Image.Image | torch.Tensor) -> torch.Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    if isinstance(picture, torch.Tensor):
        return picture
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _packed(pixels: torch.Tensor | list[torch.Tensor], return_tensors: str | None, data_format: str | None) -> Any:
    """`pixels` in the order and the kind of container that were asked for."""
    if isinstance(pixels, list) and return_tensors is not None:
        shapes = [tuple(page.shape) for page in pixels]
        raise ValueError(f"`return_tensors` is {return_tensors!r}, but the pages differ in shape: {shapes}.")
    if data_format == "channels_last":
        pages = [page.permute(1, 2, 0).contiguous() for page in pixels]
        pixels = pages if isinstance(pixels, list) else torch.stack(pages)
    if return_tensors is None:
        return list(pixels)
    return pixels if return_tensors == "pt" else pixels.cpu().numpy()


__all__ = ["DeepSeekOCRVisionImageProcessor", "DeepSeekOCRVisionImagesKwargs"]
