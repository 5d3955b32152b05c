"""Pictures of any kind, read to RGB of 256 levels: files, Pillow's pictures, arrays, tensors."""

import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps


PAPER = (255, 255, 255)
"""What shows through where a picture is transparent: white, as paper is."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", flags=re.IGNORECASE)
_STRIP_PIXELS = 1 << 20


class ImageTooLargeError(Image.DecompressionBombError, ValueError):
    """A picture has more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels, where Pillow refuses it."""


def named_images(images: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every picture of `images`, in order, with the expression by which the caller finds it."""
    is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4)
    if not is_batch:
        return iter([(name, images)])
    if len(images) == 0:
        raise ValueError(f"{name} is empty; at least one picture is needed.")
    return chain.from_iterable(named_images(image, f"{name}[{index}]") for index, image in enumerate(images))


def read_image(
    picture: Any, name: str, input_data_format: str | None, do_convert_rgb: bool, keeps_tensor: bool
) -> tuple[Image.Image | torch.Tensor, float]:
    """Any picture as RGB with 256 levels, and the value of one level: 1/255 if it came in [0, 1], else 1.

    What `keeps_tensor` and needs no conversion stays a tensor, uint8 [3, H, W], on its device.
    """
    if isinstance(picture, str | os.PathLike):
        return _rgb(_opened(picture, name), f"{name} ({os.fspath(picture)})", do_convert_rgb)
    if isinstance(picture, Image.Image):
        return _rgb(_loaded(picture, name), name, do_convert_rgb)
    if not isinstance(picture, np.ndarray | torch.Tensor):
        kinds = "a PIL.Image.Image, a path, a numpy array or a torch tensor"
        raise TypeError(f"{name} is of type {type(picture).__name__}; a picture has to be {kinds}.")
    _require_layout(picture, name)
    channels_last = _is_channels_last(picture, name, input_data_format)
    if keeps_tensor and isinstance(picture, torch.Tensor) and picture.dtype == torch.uint8 and picture.ndim == 3:
        planes = picture.permute(2, 0, 1) if channels_last else picture
        if len(planes) == 3:
            return planes, 1.0
    drawn, unit = _drawn(_as_array(picture, name), name, channels_last)
    return _rgb(drawn, name, do_convert_rgb)[0], unit


def _opened(path: str | os.PathLike, name: str) -> Image.Image:
    """The picture in a file, read to its end, upright, the first frame."""
    path = os.fspath(path)
    name = f"{name} ({path})"
    if isinstance(path, str) and _URL.match(path):
        raise ValueError(f"{name} is a URL; nothing is downloaded here. Fetch it first and give its path.")
    try:
        picture = Image.open(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no such file.") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{name}: {error}") from error
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    with picture:
        return _loaded(picture, name)


def fetch_images_of(images: Any, name: str) -> Any:
    if isinstance(images, list | tuple):
        return [fetch_images_of(image, f"{name}[{index}]") for index, image in enumerate(images)]
    return _opened(images, name) if isinstance(images, str | os.PathLike) else images


def _loaded(picture: Image.Image, name: str) -> Image.Image:
    """An opened picture, read to its end, upright, the first frame. The caller's object stays at its frame."""
    _require_pixels(picture.height, picture.width, name)
    try:
        picture = _first_frame(picture)
        picture.load()
        is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(picture) if is_turned else picture
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever the broken bytes lead them to: SyntaxError, struct.error, EOFError, ...
        raise OSError(f"{name}: the picture cannot be read: {error}") from error


def _first_frame(picture: Image.Image) -> Image.Image:
    position = picture.tell()
    if position == 0:
        return picture
    picture.seek(0)
    try:
        return picture.copy()
    finally:
        picture.seek(position)


def _rgb(picture: Image.Image, name: str, do_convert_rgb: bool) -> tuple[Image.Image, float]:
    """A picture of any mode as RGB over white paper, and the value of one level."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture, 1.0
    if not do_convert_rgb:
        raise ValueError(f"{name} is of mode {picture.mode}; with `do_convert_rgb` false it has to be RGB.")
    unit = 1.0
    if picture.mode.startswith("I") or picture.mode == "F":
        levels, unit = _levels(np.asarray(picture), name, is_16_bit=picture.mode != "F")
        picture = Image.fromarray(levels)
    if _is_transparent(picture):
        return _over_paper(picture), unit
    try:
        return picture.convert("RGB"), unit
    except ValueError as error:
        raise ValueError(f"{name} is of mode {picture.mode}, which Pillow cannot convert to RGB: {error}") from error


def _is_transparent(picture: Image.Image) -> bool:
    has_alpha_palette = picture.mode == "P" and picture.palette is not None and picture.palette.mode.endswith("A")
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info or has_alpha_palette


def _over_paper(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":
        # Pillow knows no other way from premultiplied grey to RGBA.
        picture = picture.convert("LA")
    if picture.mode != "RGBA":
        picture = picture.convert("RGBA")
    page = Image.new("RGB", picture.size, PAPER)
    page.paste(picture, mask=picture)
    return page


# Arrays


def _require_pixels(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"{name} has no pixels: it is {height} x {width} (height x width).")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise ImageTooLargeError(
            f"{name} has {height} x {width} pixels (height x width); the limit is {2 * limit} in all, twice "
            "PIL.Image.MAX_IMAGE_PIXELS."
        )


def _require_layout(array: np.ndarray | torch.Tensor, name: str) -> None:
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; a picture is [H, W], [H, W, C] or [C, H, W].")
    if 0 in array.shape:
        raise ValueError(f"{name} has no pixels: its shape is {tuple(array.shape)}.")


def _is_channels_last(array: np.ndarray | torch.Tensor, name: str, input_data_format: str | None) -> bool:
    """Whether the last axis is the channels."""
    if array.ndim == 2:
        return False
    first, last = array.shape[0], array.shape[-1]
    if input_data_format is not None:
        channels = last if input_data_format == "channels_last" else first
        if channels > 4:
            raise ValueError(f"{name} has {channels} channels by `input_data_format`; allowed are 1 to 4.")
        return input_data_format == "channels_last"
    for likely in ((3, 4), (1,), (2,)):
        if first in likely or last in likely:
            return last in likely and (first not in likely or isinstance(array, np.ndarray))
    raise ValueError(f"{name} has shape {tuple(array.shape)}; neither its first nor its last axis is 1 to 4 channels.")


def _as_array(picture: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """A picture as a numpy array, without a copy where that can be."""
    if isinstance(picture, np.ndarray):
        return picture
    if picture.requires_grad:
        advice = "give the model its `pixel_values` yourself, or detach the picture"
        raise ValueError(f"{name} requires a gradient, and reading a picture passes none on; {advice}.")
    picture = picture.cpu()
    return (picture.float() if picture.dtype == torch.bfloat16 else picture).numpy()


def _drawn(array: np.ndarray, name: str, channels_last: bool) -> tuple[Image.Image, float]:
    """An array as a Pillow picture of its channels' mode, and the value of one level."""
    if array.ndim == 3:
        array = array if channels_last else np.moveaxis(array, 0, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    _require_pixels(*array.shape[:2], name)
    levels, unit = _levels(array, name, is_16_bit=array.dtype.kind == "u" and array.dtype.itemsize == 2)
    return Image.fromarray(np.ascontiguousarray(levels)), unit


def _levels(array: np.ndarray, name: str, is_16_bit: bool) -> tuple[np.ndarray, float]:
    """Numbers of any type as 256 levels, and the value of one: 1/255 if the numbers are floats in [0, 1], else 1."""
    if array.dtype == np.uint8:
        return array, 1.0
    if array.dtype == bool:
        return np.multiply(array, 255, dtype=np.uint8), 1.0
    if array.dtype.kind not in "uif":
        raise TypeError(f"{name} is of dtype {array.dtype}; a picture's numbers are booleans, integers or floats.")
    top = _top_of_range(array, name, is_16_bit)
    levels = np.empty(array.shape, dtype=np.uint8)
    # Strip by strip: a float32 copy of a large picture would be four times the picture.
    rows = max(1, _STRIP_PIXELS // array.shape[1])
    for start in range(0, len(array), rows):
        strip = array[start : start + rows].astype(np.float32)
        np.rint(strip * np.float32(255 / top), out=levels[start : start + rows], casting="unsafe")
    return levels, 1 / 255 if top == 1 else 1.0


def _top_of_range(array: np.ndarray, name: str, is_16_bit: bool) -> int:
    """The value that is full brightness: 1, 255 or 65535."""
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinity (dtype {array.dtype}).")
    ranges = {
        "u": {65535: (0, 65535)} if is_16_bit else {255: (0, 255)},
        "i": {65535: (256, 65535)} if is_16_bit else {255: (0, 255)},
        "f": {1: (0, 1), 255: (2, 255)},
    }[array.dtype.kind]
    for top, (least, most) in ranges.items():
        # Less than half a level past an end is that end, as after a float resize; it is what rounding does anyway.
        slack = 0.499 * top / 255 if array.dtype.kind == "f" else 0
        if low >= -slack and (least - slack <= high <= most + slack or high == 0):
            return top
    allowed = " or ".join(
        f"[0, {top}]" + f" with some value of at least {least}" * (least > 0) for top, (least, _) in ranges.items()
    )
    raise ValueError(
        f"{name} is of dtype {array.dtype} with values from {low:.6g} to {high:.6g}; they have to be in {allowed}. "
        "Scale them, or convert them to uint8, before."
    )


__all__ = ["PAPER", "ImageTooLargeError", "fetch_images_of", "named_images", "read_image"]
