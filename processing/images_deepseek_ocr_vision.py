"""Images of any kind, read to RGB of 256 levels: files, Pillow's images, arrays, tensors."""

import math
import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError


PAPER = (255, 255, 255)  # what shows through where an image is transparent
# The formats that are read, by Pillow's names. Of EPS, Pillow would have another program read it.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF", "TGA")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", flags=re.IGNORECASE)
_STRIP_PIXELS = 1 << 20
# By the EXIF orientation.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, start=2)}
# Tags of a TIFF file.
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284
# By how a PNG file stores its pixels: its transparent colour in the 8 bits that Pillow makes of them.
_IN_8_BITS = {"L;2": lambda k: k * 85, "L;4": lambda k: k * 17, "RGB;16B": lambda k: tuple(v >> 8 for v in k)}


class ImageTooLargeError(Image.DecompressionBombError, ValueError):
    """An image has more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels, where Pillow refuses it."""


def named_images(images: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every image of `images`, in order, with the expression by which the caller finds it."""
    if isinstance(images, torch.Tensor):
        _require_values(images, name)
    is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4)
    if not is_batch:
        return iter([(name, images)])
    if len(images) == 0:
        raise ValueError(f"{name} is empty; at least one image is needed.")
    return chain.from_iterable(named_images(image, f"{name}[{index}]") for index, image in enumerate(images))


def _require_values(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor that has no number for each place: of another layout than the usual, or on the meta device."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = next((kind for kind in ("meta", "nested", "quantized") if getattr(tensor, f"is_{kind}")), tensor.layout)
        raise TypeError(f"{name} is a tensor of the kind {kind}; an image has to be a dense tensor with values.")


def read_image(
    image: Any, name: str, *, input_data_format: str | None, do_convert_rgb: bool, keeps_tensor: bool
) -> tuple[Image.Image | torch.Tensor, float]:
    """Any image as RGB with 256 levels, and the value of one level: 1/255 if it came in [0, 1], else 1.

    What `keeps_tensor` and needs no conversion stays a tensor, uint8 [3, H, W], on its device.
    """
    if isinstance(image, str | os.PathLike):
        with open_image(image, name) as opened:
            return _read_pillow(opened, f"{name} ({os.fspath(image)})", do_convert_rgb=do_convert_rgb)
    if isinstance(image, Image.Image):
        return _read_pillow(image, name, do_convert_rgb=do_convert_rgb)
    if not isinstance(image, np.ndarray | torch.Tensor):
        kinds = "a PIL.Image.Image, a path, a numpy array or a torch tensor"
        raise TypeError(f"{name} is of type {type(image).__name__}; an image has to be {kinds}.")
    channels_last = _is_channels_last(image, name, input_data_format)
    if keeps_tensor and isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        planes = image.permute(2, 0, 1) if channels_last else image
        if len(planes) == 3:
            return planes, 1.0
    drawn, scale = _drawn(_as_array(image, name), name, channels_last=channels_last)
    return _rgb(drawn, name, do_convert_rgb=do_convert_rgb)[0], scale


# Files


def open_image(file: str | os.PathLike | IO[bytes], name: str) -> Image.Image:
    """Open an image file of one of `IMAGE_FORMATS`, and no other, whatever its suffix says. `name` is for the errors.

    Raises:
        ValueError: A URL, or more pixels than Pillow allows.
        OSError: A file that is missing, broken, no image, or of another format.
    """
    if isinstance(file, str | os.PathLike):
        name = f"{name} ({os.fspath(file)})"
        if isinstance(file, str) and _URL.match(file):
            raise ValueError(f"{name} is a URL; nothing is downloaded here. Fetch it first and give its path.")
        if not os.path.exists(file):
            raise FileNotFoundError(f"{name}: there is no such file.")
        if not os.path.isfile(file):
            raise OSError(f"{name} is no file.")
    Image.init()
    try:
        return Image.open(file, formats=[each for each in IMAGE_FORMATS if each in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise OSError(f"{name}: {_what_it_is(file)}; allowed are {', '.join(IMAGE_FORMATS)}.") from error
    except Exception as error:
        raise _unreadable(name, error) from error


def fetch_images_of(images: Any, name: str) -> Any:
    """`images` with what is a path opened and read to its end."""
    if isinstance(images, list | tuple):
        return [fetch_images_of(image, f"{name}[{index}]") for index, image in enumerate(images)]
    if not isinstance(images, str | os.PathLike):
        return images
    opened = open_image(images, name)
    _load(opened, f"{name} ({os.fspath(images)})")
    return opened


def _what_it_is(file: str | os.PathLike | IO[bytes]) -> str:
    """What a file that was not identified looks like, by its first bytes."""
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return _what_it_is(opened)
    file.seek(0)
    start = file.read(64).ljust(64, b"\0")
    if start.startswith(b"%PDF"):
        return "this is a PDF; `deepseek-ocr-vision encode` reads its pages"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "this is a HEIC image; install pillow-heif and call `pillow_heif.register_heif_opener()`"
    others = (key for key, (_, accept) in Image.OPEN.items() if key not in IMAGE_FORMATS and accept and accept(start))
    kind = next(others, None)
    return f"this is of format {kind}, which is not read" if kind else "cannot identify an image in it"


def _unreadable(name: str, error: Exception) -> OSError:
    # Pillow's decoders raise whatever the broken bytes lead them to: SyntaxError, struct.error, EOFError, ...
    return OSError(f"{name}: the image cannot be read: {type(error).__name__}: {error}")


# Pillow's images


def _read_pillow(image: Image.Image, name: str, *, do_convert_rgb: bool) -> tuple[Image.Image, float]:
    """The first frame of an image, upright, as RGB, and the value of one level. The caller's stays at its frame."""
    frame = image.tell()
    try:
        if frame != 0:
            image.seek(0)
    except Exception as error:
        raise _unreadable(name, error) from error
    try:
        _load(image, name)
        rgb, scale = _rgb(image, name, do_convert_rgb=do_convert_rgb)
        rgb = _upright(rgb, image)
        # An opened file has other pixels after the way back to its frame.
        return (rgb.copy() if frame != 0 and rgb is image else rgb), scale
    finally:
        if frame != 0:
            image.seek(frame)


def _load(image: Image.Image, name: str) -> None:
    """Read the pixels of an opened file, if its format and size are allowed."""
    _require_pixels(image.height, image.width, name)
    if isinstance(image, ImageFile.ImageFile):
        _require_format(image, name)
    filename = getattr(image, "filename", "")
    try:
        _mend_transparent_colour(image)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Or Pillow would map it into memory, where it takes the turned size for that of the rows.
            image.filename = ""
        image.load()
    except Exception as error:
        raise _unreadable(name, error) from error
    finally:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            image.filename = filename


def _require_format(image: ImageFile.ImageFile, name: str) -> None:
    if image.format not in IMAGE_FORMATS:
        advice = "Convert it yourself, by `image.convert('RGB')`, if you trust it"
        raise OSError(f"{name} is of format {image.format}; allowed are {', '.join(IMAGE_FORMATS)}. {advice}.")
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    bits = max(image.tag_v2.get(_BITS, (1,)))
    if image.tag_v2.get(_PLANAR) == 2 and bits > 8 and len(image.getbands()) > 1:
        # Pillow takes every other byte of a plane for a pixel.
        raise OSError(f"{name} has planes of {bits} bits; store its channels together, or in 8 bits.")
    boxes = [tile[1] or (0, 0, 0, 0) for tile in image.tile]
    if boxes and sum((right - left) * (lower - upper) for left, upper, right, lower in boxes) < math.prod(image.size):
        # Pillow leaves them black.
        raise OSError(f"{name} lacks pixels: it has {image.height} rows (by its header), and strips for fewer.")


def _mend_transparent_colour(image: Image.Image) -> None:
    """Bring a PNG file's transparent colour to the 8 bits that its pixels are read to."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    stored_as = tiles[0][3] if tiles and image.format == "PNG" else None
    if stored_as in _IN_8_BITS and not isinstance(key, bytes | None):
        image.info["transparency"] = _IN_8_BITS[stored_as](key)


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Turn `rgb` as the EXIF of `image` says. Where that cannot be read there is none, as for any viewer."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return rgb
    method = next((turn for number, turn in _UPRIGHT.items() if number == orientation), None)
    if method is None:
        return rgb
    turned = rgb.transpose(method)
    turned.info = {}  # or EXIF would be there to turn it once more
    return turned


def _rgb(image: Image.Image, name: str, *, do_convert_rgb: bool) -> tuple[Image.Image, float]:
    """An image of any mode as RGB over white paper, and the value of one level."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, 1.0
    if not do_convert_rgb:
        raise ValueError(f"{name} is of mode {image.mode}; with `do_convert_rgb` false it has to be RGB.")
    scale = 1.0
    if image.mode.startswith("I") or image.mode == "F":
        image, scale = _grey(image, name)
    try:
        return (_over_paper(image) if image.has_transparency_data else image.convert("RGB")), scale
    except Exception as error:
        raise ValueError(f"{name} is of mode {image.mode}, which Pillow cannot convert to RGB: {error}") from error


def _grey(image: Image.Image, name: str) -> tuple[Image.Image, float]:
    """An image of 16-bit or float grey as one of 256 levels, and the value of one level."""
    tags, array = getattr(image, "tag_v2", {}), np.asarray(image)
    if tags.get(_BITS) == (12,):
        array = (array * np.float32(65535 / 4095)).astype(np.uint16)
    levels, scale = _levels(array, name, is_16_bit=image.mode != "F")
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0, and Pillow only knows that of 8 bits or less
        levels = 255 - levels
    if "transparency" in image.info:
        levels[np.asarray(image) == image.info["transparency"]] = 255
    return Image.fromarray(levels), scale


def _over_paper(image: Image.Image) -> Image.Image:
    # Pillow knows no other way from premultiplied grey to RGBA.
    image = image.convert("LA") if image.mode == "La" else image
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    page = Image.new("RGB", image.size, PAPER)
    page.paste(image, mask=image)
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


def _is_channels_last(array: np.ndarray | torch.Tensor, name: str, input_data_format: str | None) -> bool:
    """Whether the last axis is the channels."""
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; an image is [H, W], [H, W, C] or [C, H, W].")
    if 0 in array.shape:
        raise ValueError(f"{name} has no pixels: its shape is {tuple(array.shape)}.")
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


def _as_array(image: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """An image as a numpy array, without a copy where that can be."""
    if isinstance(image, np.ndarray):
        return image
    if image.requires_grad:
        advice = "give the model its `pixel_values` yourself, or detach the image"
        raise ValueError(f"{name} requires a gradient, and reading an image passes none on; {advice}.")
    image = image.cpu()
    return (image.float() if image.dtype == torch.bfloat16 else image).numpy()


def _drawn(array: np.ndarray, name: str, *, channels_last: bool) -> tuple[Image.Image, float]:
    """An array as a Pillow image of its channels' mode, and the value of one level."""
    if array.ndim == 3:
        array = array if channels_last else np.moveaxis(array, 0, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    _require_pixels(array.shape[0], array.shape[1], name)
    levels, scale = _levels(array, name, is_16_bit=array.dtype.kind == "u" and array.dtype.itemsize == 2)
    return Image.fromarray(np.ascontiguousarray(levels)), scale


def _levels(array: np.ndarray, name: str, *, is_16_bit: bool) -> tuple[np.ndarray, float]:
    """Numbers of any type as 256 levels, and the value of one: 1/255 if the numbers are floats in [0, 1], else 1."""
    if array.dtype == np.uint8:
        return array, 1.0
    if array.dtype == bool:
        return np.multiply(array, 255, dtype=np.uint8), 1.0
    if array.dtype.kind not in "uif":
        raise TypeError(f"{name} is of dtype {array.dtype}; an image's numbers are booleans, integers or floats.")
    top = _top_of_range(array, name, is_16_bit=is_16_bit)
    levels = np.empty(array.shape, dtype=np.uint8)
    # Strip by strip: a float32 copy of a large image would be four times the image.
    rows = max(1, _STRIP_PIXELS // array.shape[1])
    for start in range(0, len(array), rows):
        strip = array[start : start + rows].astype(np.float32)
        np.rint(strip * np.float32(255 / top), out=levels[start : start + rows], casting="unsafe")
    return levels, 1 / 255 if top == 1 else 1.0


def _top_of_range(array: np.ndarray, name: str, *, is_16_bit: bool) -> int:
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
    found = f"dtype {array.dtype} with values from {low:.6g} to {high:.6g}"
    raise ValueError(
        f"{name} is of {found}; they have to be in {allowed}. Scale them, or convert them to uint8, before."
    )
