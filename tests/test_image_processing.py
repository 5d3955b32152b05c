"""The image processor: exactness, kinds of images, faults, arguments."""

import copy
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from deepseek_ocr_vision.configuration import PRESETS
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor


GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "page.png").is_file(), reason=f"the golden values are not at {GOLDEN}; see design.md"
)
ROUNDING = 1e-6
"""Normalising in one step rounds differently from dividing, subtracting and dividing: under 1e-6."""
TORCHVISION_LEVELS = 2
"""torchvision's 8-bit kernels are off by at most two of 256 levels where both resize the width first, as for all pages
here (Pillow 13 starts with the height where that shrinks more),"""
TORCHVISION_SHARE = 0.02
"""and by any at no more than this share of values (measured on `page.png`: 0.5 %)."""
EVERY_PRESET = [("deepseek-ocr-encoder", 1024), *(("deepseek-ocr", size) for size in (512, 640, 1024, 1280))]


def levels_of(images, **kwargs) -> torch.Tensor:
    """The 256 levels of images, [B, 3, H, W], untouched by rescaling and normalising."""
    processor = DeepSeekOCRVisionImageProcessor(do_rescale=False, do_normalize=False, size=64)
    return processor(images, return_tensors="pt", **kwargs).pixel_values


def new_image(height: int = 48, width: int = 80, mode: str = "RGB") -> Image.Image:
    """A smooth image with noise on it, the same at every call."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 64, (height, width, 3))
    planes = np.stack([rows * 191 // height, columns * 191 // width, (rows + columns) % 192], axis=-1)
    return Image.fromarray((planes + noise).astype(np.uint8)).convert(mode)


def golden_crop(preset: str, size: int) -> torch.Tensor:
    name = "preproc_encoder_1024_crop" if preset == "deepseek-ocr-encoder" else f"preproc_deepseek_{size}_crop"
    return load_file(GOLDEN / "upstream_golden.safetensors")[name]


# Exactness


@needs_golden
@pytest.mark.parametrize(("preset", "size"), EVERY_PRESET)
def test_the_pil_path_equals_the_golden_values(preset, size):
    """A resize that is not antialiased, a wrong mean, or padding in the wrong mode, all look plausible."""
    processor = DeepSeekOCRVisionImageProcessor(preset, size=size, resize_backend="pil")
    pixels = processor(GOLDEN / "page.png", return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, size, size)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, ::16, ::16], golden_crop(preset, size), rtol=0, atol=ROUNDING)


@needs_golden
def test_mean_and_deviation_over_the_whole_page_equal_the_golden_ones():
    """The golden crop holds one value in 256; the rest could be anything."""
    pixels = DeepSeekOCRVisionImageProcessor()(GOLDEN / "page.png", return_tensors="pt").pixel_values
    expected = load_file(GOLDEN / "upstream_golden.safetensors")["preproc_encoder_1024_meanstd"]
    torch.testing.assert_close(torch.stack([pixels.mean(), pixels.std()]), expected, rtol=0, atol=1e-5)


@needs_golden
@pytest.mark.parametrize(("preset", "size"), EVERY_PRESET)
def test_the_tensor_path_is_within_its_documented_tolerance_of_the_golden_values(preset, size):
    """torchvision's default, without antialiasing or in float, is tens of levels off at the edges of letters."""
    pytest.importorskip("torchvision")
    page = torch.from_numpy(np.array(Image.open(GOLDEN / "page.png").convert("RGB"))).permute(2, 0, 1)
    processor = DeepSeekOCRVisionImageProcessor(preset, size=size, resize_backend="torchvision")
    pixels = processor(page, return_tensors="pt").pixel_values
    std = torch.tensor(PRESETS[preset].image_std).view(3, 1, 1)
    levels = (pixels[0, :, ::16, ::16] - golden_crop(preset, size)).abs() * std * 255
    assert levels.max() <= TORCHVISION_LEVELS + 0.01
    assert (levels > 0.01).float().mean() <= TORCHVISION_SHARE


@pytest.mark.parametrize(("preset", "size"), EVERY_PRESET)
@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (64, 64), (1, 1)])
def test_tokens_are_counted_as_the_pixels_say(preset, size, height, width):
    """A composite's text has as many placeholders as this says; one too many and the model refuses the batch."""
    processor = DeepSeekOCRVisionImageProcessor(preset, size=size)
    pixels = processor(new_image(height, width), return_tensors="pt").pixel_values
    tokens = (pixels.shape[2] // 64) * (pixels.shape[3] // 64)
    assert processor.num_image_tokens(height, width) == tokens


def test_tokens_of_an_image_that_is_not_resized_follow_its_own_size():
    """Counting the page's tokens then is wrong for every other image."""
    processor = DeepSeekOCRVisionImageProcessor(do_resize=False)
    assert processor.num_image_tokens(64, 192) == 3
    with pytest.raises(ValueError, match="64 x 192"):
        processor.num_image_tokens(64, 191)
    with pytest.raises(ValueError, match="`height` is 0"):
        DeepSeekOCRVisionImageProcessor().num_image_tokens(0, 10)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (47, 31), (1, 4000), (4000, 1)])
def test_a_padded_page_is_pillows_own_pad(backend, height, width):
    """Another rounding shifts the page by a pixel; `ImageOps.pad` itself fails on 1 x 4000."""
    if backend == "torchvision":
        pytest.importorskip("torchvision")
    page = new_image(height, width)
    levels = levels_of(page, do_pad=True, resize_backend=backend, size=(128, 192))[0].permute(1, 2, 0)
    if 1 in page.size:
        assert (levels[0, 0] == 127).all() or (levels[-1, -1] == 127).all()
        assert (levels != 127).any()
        return
    expected = torch.from_numpy(np.array(ImageOps.pad(page, (192, 128), color=(127, 127, 127)))).float()
    assert (levels - expected).abs().max() <= (0 if backend == "pil" else TORCHVISION_LEVELS)


def test_both_backends_agree_on_a_page_made_smaller():
    """The golden page is made larger; scans are made smaller, where antialiasing is what counts."""
    pytest.importorskip("torchvision")
    page = new_image(500, 700)
    difference = (levels_of(page, resize_backend="pil") - levels_of(page, resize_backend="torchvision")).abs()
    assert difference.max() <= TORCHVISION_LEVELS


# Kinds of images


def forms_of(page: Image.Image, folder: Path) -> dict:
    array = np.array(page)
    page.save(folder / "page.png")
    return {
        "PIL": page,
        "path": folder / "page.png",
        "str": str(folder / "page.png"),
        "HWC": array,
        "CHW": array.transpose(2, 0, 1),
        "Fortran": np.asfortranarray(array),
        "read-only": np.broadcast_to(array, array.shape),
        "float32": array.astype(np.float32) / 255,
        "float64 to 255": array.astype(np.float64),
        "int64": array.astype(np.int64),
        "uint16": array.astype(np.uint16) * 257,
        "big-endian": (array.astype(np.uint16) * 257).astype(">u2"),
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
        "tensor HWC": torch.from_numpy(array),
        "tensor float": torch.from_numpy(array).permute(2, 0, 1) / 255,
        "tensor float64": (torch.from_numpy(array) / 255).double(),
        "RGBA": page.convert("RGBA"),
        "RGBA array": np.array(page.convert("RGBA")),
    }


def test_one_image_gives_one_result_in_whatever_form_it_comes(tmp_path):
    """Floats rescaled twice come out black, channels taken for rows come out as stripes; neither raises."""
    page = new_image()
    expected = levels_of(page)
    for form, image in forms_of(page, tmp_path).items():
        torch.testing.assert_close(
            levels_of(image, resize_backend="pil", **unscaled(form)), expected, rtol=0, atol=0, msg=form
        )


def unscaled(form: str) -> dict:
    # Floats in [0, 1] stay there unless they are rescaled, by 1 so that the levels remain.
    return {"do_rescale": True, "rescale_factor": 1.0} if "float" in form else {}


def test_a_mixed_batch_equals_its_images_one_by_one(tmp_path):
    """Grouped by shape, the pages must not come out in the order of the groups."""
    pages = [new_image(48, 80), new_image(30, 30), new_image(48, 80).rotate(180), new_image(30, 31)]
    pages[1].save(tmp_path / "1.png")
    images = [
        torch.from_numpy(np.array(pages[0])).permute(2, 0, 1),
        tmp_path / "1.png",
        torch.from_numpy(np.array(pages[2])).permute(2, 0, 1),
        np.array(pages[3]),
    ]
    batch = levels_of(images)
    assert batch.shape == (4, 3, 64, 64)
    for row, image in zip(batch, images, strict=True):
        torch.testing.assert_close(row, levels_of(image)[0], rtol=0, atol=0)
    torch.testing.assert_close(levels_of(images, disable_grouping=True), batch, rtol=0, atol=0)


def test_batches_are_flattened_in_order():
    """transformers' processors hand images on as a list of lists, one for each text."""
    pages = [new_image(48, 80), new_image(48, 80).rotate(180)]
    expected = levels_of(pages)
    arrays = np.stack([np.array(page) for page in pages])
    for images in ([[pages[0]], [pages[1]]], tuple(pages), arrays, arrays.transpose(0, 3, 1, 2), [arrays]):
        torch.testing.assert_close(levels_of(images), expected, rtol=0, atol=0)
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    assert levels_of(tensors).shape == expected.shape


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_an_opaque_mode_is_converted_as_by_pillow(mode):
    """CMYK read as RGBA, or a palette's indexes as grey levels, give an image of the right shape."""
    page = new_image(64, 64, mode)
    expected = torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1).float()
    torch.testing.assert_close(levels_of(page, do_resize=False)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_an_opaque_image_with_alpha_equals_the_one_without(mode):
    """Blending with rounding errors changes pages that have nothing transparent on them."""
    page = new_image(64, 64, "L" if mode in ("LA", "La") else "RGB")
    with_alpha = page.convert("RGBA" if page.mode == "RGB" else "LA")
    with_alpha = page.convert("P").convert("PA") if mode == "PA" else with_alpha.convert(mode)
    page = page.convert("P") if mode == "PA" else page
    expected = torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1).float()
    torch.testing.assert_close(levels_of(with_alpha, do_resize=False)[0], expected, rtol=0, atol=0)


def transparent_images(folder: Path) -> dict:
    rgba = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(folder / "palette.png", transparency=0)
    Image.new("L", (64, 64), 0).save(folder / "grey.png", transparency=0)
    Image.new("RGB", (64, 64), (0, 0, 0)).save(folder / "rgb.png", transparency=(0, 0, 0))
    rgba.save(folder / "rgba.webp", lossless=True)
    return {
        "RGBA": rgba,
        "LA": Image.new("LA", (64, 64), (0, 0)),
        "array": np.zeros((64, 64, 4), dtype=np.uint8),
        "tensor": torch.zeros(4, 64, 64, dtype=torch.uint8),
        "grey array": np.zeros((64, 64, 2), dtype=np.uint8),
        **{path.name: path for path in sorted(folder.iterdir())},
    }


def test_paper_shows_through_what_is_transparent(tmp_path):
    """Pillow's `convert("RGB")` drops alpha: black letters on a transparent page become a black page."""
    for kind, image in transparent_images(tmp_path).items():
        assert (levels_of(image) == 255).all(), kind


def test_half_transparent_ink_is_blended_with_the_paper():
    """Alpha taken for a mask of all or nothing gives jagged letters."""
    ink = Image.new("RGBA", (64, 64), (0, 100, 255, 51))
    assert levels_of(ink)[0, :, 0, 0].tolist() == [204, 224, 255]


@pytest.mark.parametrize("kind", ["array", "I;16", "I", "file", "tensor"])
def test_16_bits_are_scaled_to_8(kind, tmp_path):
    """Pillow's own conversion of a 16-bit scan saturates: all that is not nearly black becomes white."""
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    images = {
        "array": lambda: deep,
        "I;16": lambda: Image.fromarray(deep),
        "I": lambda: Image.fromarray(deep.astype(np.int32)),
        "tensor": lambda: torch.from_numpy(deep.astype(np.int32)).to(torch.uint16),
        "file": lambda: (Image.fromarray(deep).save(tmp_path / "deep.png"), tmp_path / "deep.png")[1],
    }
    expected = torch.from_numpy(np.rint(deep / 257)).float()
    torch.testing.assert_close(levels_of(images[kind](), do_resize=False)[0, 1], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), 300, dtype=np.int32), r"int32 with values from 300 to 300; .* \[0, 255\]"),
        (np.full((8, 8, 3), -1, dtype=np.int64), r"int64 with values from -1 to -1"),
        (np.full((8, 8, 3), 1.3, dtype=np.float32), r"float32 with values from 1.3 to 1.3; .* \[0, 1\] or \[0, 255\]"),
        (np.full((8, 8, 3), -0.1), r"float64 with values from -0.1"),
        (np.full((8, 8, 3), 256.0), r"float64 with values from 256 to 256"),
        (torch.full((3, 8, 8), -2.0), r"float32 with values from -2 to -2"),
        (Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)), r"int32 with values from 70000"),
        (Image.fromarray(np.full((8, 8), 200, dtype=np.int32)), r"int32 with values from 200 .* at least 256"),
        (Image.fromarray(np.full((8, 8), 1.5, dtype=np.float32)), r"float32 with values from 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused_with_dtype_and_range(image, message):
    """Clipped, wrapped or rescaled on a guess, they would make a wrong image in silence."""
    with pytest.raises(ValueError, match=message):
        levels_of([new_image(), image])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("container", [np.asarray, torch.from_numpy, Image.fromarray])
def test_nan_and_infinity_are_refused(value, container):
    """Cast to 8 bits they become an arbitrary colour."""
    page = np.full((8, 8), 0.5, dtype=np.float32)
    page[3, 4] = value
    with pytest.raises(ValueError, match=r"images\[1\] holds NaN or infinity"):
        levels_of([new_image(), container(page)])


def test_floats_a_rounding_error_past_the_end_are_that_end():
    """A float resize overshoots a little: refusing that refuses what every augmentation gives."""
    for top in (1, 255):
        page = np.linspace(-1e-6 * top, 1.000001 * top, 64 * 64, dtype=np.float32).reshape(64, 64)
        levels = levels_of(page, do_resize=False, do_rescale=True, rescale_factor=1.0)
        assert (levels.min(), levels.max()) == (0, 255)


def test_floats_that_are_not_rescaled_stay_where_they_are():
    """`do_rescale=False` is how transformers' users say that their floats are in [0, 1] already."""
    page = new_image(64, 64)
    processor = DeepSeekOCRVisionImageProcessor(size=64)
    array = np.array(page, dtype=np.float32) / 255
    expected = processor(page, return_tensors="pt").pixel_values
    for options in ({}, {"do_rescale": False}):
        pixels = processor(array, return_tensors="pt", **options).pixel_values
        torch.testing.assert_close(pixels, expected, rtol=0, atol=ROUNDING)


def test_a_tensor_that_requires_a_gradient_is_refused():
    """Detached in silence, the renderer that drew it would never learn."""
    with pytest.raises(ValueError, match=r"images\[0\] requires a gradient"):
        levels_of([torch.rand(3, 8, 8, requires_grad=True)])


def test_the_channel_axis_is_found_where_shape_alone_does_not_tell():
    """A page one pixel high is not a grey page three pixels wide."""
    red = np.zeros((1, 40, 3), dtype=np.uint8)
    red[..., 0] = 255
    for image in (red, red.transpose(2, 0, 1), torch.from_numpy(red), torch.from_numpy(red[:, :1].transpose(2, 0, 1))):
        assert levels_of(image)[0, :, 5, 5].tolist() == [255, 0, 0]
    striped = np.zeros((3, 3, 3), dtype=np.uint8)
    striped[0] = 255
    assert levels_of(striped)[0, :, 5, 5].tolist() == [255, 255, 255]
    assert levels_of(torch.from_numpy(striped))[0, :, 5, 5].tolist() == [255, 0, 0]
    assert levels_of(striped, input_data_format="channels_first")[0, :, 5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_followed_for_a_path_and_an_opened_image_alike(orientation, tmp_path):
    """A page scanned with a phone lies on its side, and the text on it cannot be read."""
    page, exif = new_image(), Image.Exif()
    exif[0x0112] = orientation
    page.save(tmp_path / "page.png", exif=exif)
    with Image.open(tmp_path / "page.png") as opened:
        expected = levels_of(ImageOps.exif_transpose(opened))
        assert not torch.equal(expected, levels_of(page))
        torch.testing.assert_close(levels_of(opened), expected, rtol=0, atol=0)
    torch.testing.assert_close(levels_of(tmp_path / "page.png"), expected, rtol=0, atol=0)
    fetched = DeepSeekOCRVisionImageProcessor().fetch_images([tmp_path / "page.png"])
    torch.testing.assert_close(levels_of(fetched), expected, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png"])
def test_of_several_frames_the_first_is_read_and_the_callers_image_stays_where_it_was(suffix, tmp_path):
    """Read where it stands, an image means something else after every loop over its frames."""
    frames = [Image.new("L", (64, 64), grey) for grey in (40, 120, 200)]
    frames[0].save(tmp_path / f"frames.{suffix}", save_all=True, append_images=frames[1:])
    assert (levels_of(tmp_path / f"frames.{suffix}") == 40).all()
    with Image.open(tmp_path / f"frames.{suffix}") as opened:
        opened.seek(2)
        assert (levels_of(opened) == 40).all()
        assert opened.tell() == 2
        assert opened.convert("L").getpixel((5, 5)) == 200


# Faults


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images is empty"),
        ([[]], ValueError, r"images\[0\] is empty"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), ValueError, "images is empty"),
        (None, TypeError, "images is of type NoneType"),
        ([new_image(), None], TypeError, r"images\[1\] is of type NoneType"),
        ([[new_image()], [new_image(), 3]], TypeError, r"images\[1\]\[1\] is of type int"),
        ([b"\x89PNG"], TypeError, r"images\[0\] is of type bytes"),
        (Image.new("RGB", (0, 5)), ValueError, "no pixels: it is 5 x 0"),
        ([new_image(), np.zeros((0, 5, 3), dtype=np.uint8)], ValueError, r"images\[1\] has no pixels.*\(0, 5, 3\)"),
        (torch.zeros(3, 0, 4), ValueError, r"no pixels.*\(3, 0, 4\)"),
        (np.zeros(7, dtype=np.uint8), ValueError, r"shape \(7,\)"),
        (np.zeros((1, 1, 1, 1, 3), dtype=np.uint8), ValueError, r"shape \(1, 1, 1, 1, 3\)"),
        (np.zeros((8, 9, 7), dtype=np.uint8), ValueError, r"shape \(8, 9, 7\)"),
        (np.zeros((8, 8, 3), dtype=np.complex64), TypeError, "complex64"),
        (np.array([["a"]]), TypeError, "dtype <U1"),
        ([new_image(), torch.zeros(3, 4, 4).to_sparse()], TypeError, r"images\[1\] is a tensor of the kind .*coo"),
        (torch.zeros(1, 3, 4, 4).to_sparse(), TypeError, "images is a tensor of the kind torch.sparse_coo"),
        ([torch.zeros(3, 4, 4, device="meta")], TypeError, r"images\[0\] is a tensor of the kind meta"),
        (torch.nested.nested_tensor([torch.zeros(3, 4, 4)]), TypeError, "images is a tensor of the kind nested"),
        ("https://example.com/page.png", ValueError, "is a URL; nothing is downloaded"),
        ("data:image/png;base64,AAAA", ValueError, "is a URL"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place_in_the_batch(images, error, message):
    """In a batch of thousands, `NoneType has no attribute shape` leaves the user searching."""
    with pytest.raises(error, match=message):
        levels_of(images)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1)])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_thinnest_images_are_valid(preset, height, width, backend):
    """Resized with its aspect ratio kept, 1 x 4000 rounds to a height of 0, and Pillow raises."""
    if backend == "torchvision":
        pytest.importorskip("torchvision")
    processor = DeepSeekOCRVisionImageProcessor(
        preset, do_pad=preset == "deepseek-ocr", size=64, resize_backend=backend
    )
    for page in (new_image(height, width), np.array(new_image(height, width))):
        assert processor(page, return_tensors="pt").pixel_values.isfinite().all()


def test_faulty_files_are_refused_with_their_paths(tmp_path):
    """Pillow's messages name no file, and a truncated one is only found while it is read."""
    new_image(200, 200).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.html").write_text("<html>404</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("truncated.jpg", "page.html", "empty.png", "missing.png", "folder"):
        with pytest.raises(OSError, match=rf"images\[1\] \(.*{re.escape(name)}\)"):
            levels_of([new_image(), str(tmp_path / name)])
        with pytest.raises(OSError, match=r"images\[0\] \("):
            DeepSeekOCRVisionImageProcessor().fetch_images([tmp_path / name])
    with pytest.raises(FileNotFoundError):
        levels_of(tmp_path / "missing.png")
    with Image.open(tmp_path / "truncated.jpg") as opened, pytest.raises(OSError, match=r"images\[0\].*truncated"):
        levels_of([opened])


def test_too_many_pixels_are_refused_as_by_pillow(monkeypatch, tmp_path):
    """400 megapixels take the machine's memory; Pillow's own error is no ValueError and names no file."""
    new_image(40, 50).save(tmp_path / "page.png")
    images = {"path": tmp_path / "page.png", "PIL": new_image(40, 50), "array": np.array(new_image(40, 50))}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)
    for kind, image in images.items():
        for error in (Image.DecompressionBombError, ValueError):
            with pytest.raises(error, match=r"images\[0\]"):
                levels_of([image])
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            assert levels_of([image]).shape == (1, 3, 64, 64), kind
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)
    huge = np.broadcast_to(np.uint8(0), (20000, 20000, 3))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="20000 x 20000"):
        levels_of(huge)


# Arguments


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1000, "1000 x 1000 .* nearest size is 1024 x 1024"),
        ({"height": 64, "width": 100}, "64 x 100 .* nearest size is 64 x 128"),
        (10, "nearest size is 64 x 64"),
        (0, "nearest size is 64 x 64"),
        (-64, "nearest size is 64 x 64"),
        ({"shortest_edge": 64}, "`size` is {'shortest_edge': 64}"),
        ((64, 64, 64), r"`size` is \(64, 64, 64\)"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused_with_the_nearest_one(size, message):
    """Found by the processor it costs nothing; found by the model it costs the run."""
    with pytest.raises(ValueError, match=message):
        DeepSeekOCRVisionImageProcessor(size=size)
    with pytest.raises(ValueError, match=message):
        DeepSeekOCRVisionImageProcessor()(new_image(), size=size)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("preset", "clip", ValueError),
        ("preset", None, TypeError),
        ("resample", 17, ValueError),
        ("resample", "bicubic", TypeError),
        ("resize_backend", "opencv", ValueError),
        ("rescale_factor", float("nan"), ValueError),
        ("image_mean", [0.5, 0.5], ValueError),
        ("image_mean", "0.5", TypeError),
        ("image_std", [0.5, 0.0, 0.5], ValueError),
        ("do_resize", "yes", TypeError),
        ("do_pad", 1, TypeError),
        ("size", "64", TypeError),
        ("size", 64.0, TypeError),
        ("size", True, TypeError),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_name(field, value, error):
    """A zero deviation makes infinities, and a misspelled preset must not become the default."""
    with pytest.raises(error, match=f"`{field}` is "):
        DeepSeekOCRVisionImageProcessor(**{field: value})


def test_an_unknown_preset_is_refused_with_the_list():
    """The names are no words that anybody guesses."""
    with pytest.raises(ValueError, match="'deepseek-ocr-encoder', 'deepseek-ocr'"):
        DeepSeekOCRVisionImageProcessor("deepseek")


@pytest.mark.parametrize("name", ["sise", "do_centre_crop", "max_length", "preset"])
def test_an_unknown_argument_of_a_call_is_refused_by_its_name(name):
    """Swallowed, a misspelled `size` trains on pages of another size."""
    with pytest.raises(TypeError, match=f"has no {name}; it has do_resize, size"):
        DeepSeekOCRVisionImageProcessor()(new_image(), **{name: 3})
    if name != "preset":
        with pytest.raises(TypeError, match=f"has no {name}"):
            DeepSeekOCRVisionImageProcessor(**{name: 3})


def test_arguments_of_a_call_replace_the_fields_for_that_call_alone():
    """An override that sticks changes every page after it."""
    processor = DeepSeekOCRVisionImageProcessor(size=64)
    before = processor.to_dict()
    replaced = {"size": 128, "image_mean": 0, "image_std": 1, "rescale_factor": 1.0, "do_pad": True, "resample": 0}
    built = DeepSeekOCRVisionImageProcessor(**replaced)(new_image(), return_tensors="pt").pixel_values
    torch.testing.assert_close(processor(new_image(), return_tensors="pt", **replaced).pixel_values, built)
    assert processor.to_dict() == before


def test_a_field_set_later_is_validated_when_used():
    """`processor.size = 1000` is an ordinary thing to write in a notebook."""
    processor = DeepSeekOCRVisionImageProcessor()
    processor.size = 128
    assert processor(new_image(), return_tensors="pt").pixel_values.shape == (1, 3, 128, 128)
    processor.size = 100
    with pytest.raises(ValueError, match="100 x 100"):
        processor(new_image())


def test_images_that_are_not_resized_need_a_size_that_the_model_can_take():
    """The model would say so too, after the batch has travelled to it."""
    processor = DeepSeekOCRVisionImageProcessor(do_resize=False)
    assert processor(new_image(64, 128), return_tensors="pt").pixel_values.shape == (1, 3, 64, 128)
    with pytest.raises(ValueError, match=r"images\[1\] is 48 x 80 .* nearest size is 64 x 64"):
        processor([new_image(64, 64), new_image(48, 80)])
    with pytest.raises(ValueError, match=r"differ in shape: \[\(3, 64, 64\), \(3, 64, 128\)\]"):
        processor([new_image(64, 64), new_image(64, 128)], return_tensors="pt")
    assert [page.shape[-1] for page in processor([new_image(64, 64), new_image(64, 128)]).pixel_values] == [64, 128]


def test_results_come_in_the_container_and_order_that_were_asked_for():
    """A silent default would hand channels-last numbers to a channels-first model."""
    processor = DeepSeekOCRVisionImageProcessor(size=(64, 128))
    pixels = processor([new_image()] * 2, return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 64, 128)
    assert pixels.is_contiguous()
    array = processor([new_image()] * 2, return_tensors="np", data_format="channels_last").pixel_values
    np.testing.assert_array_equal(array, pixels.permute(0, 2, 3, 1).numpy())
    assert [tuple(page.shape) for page in processor([new_image()] * 2).pixel_values] == [(3, 64, 128)] * 2
    with pytest.raises(ValueError, match="`return_tensors` is 'tf'"):
        processor(new_image(), return_tensors="tf")
    with pytest.raises(ValueError, match="`data_format` is 'HWC'"):
        processor(new_image(), data_format="HWC")
    assert processor(new_image(), return_tensors="pt").to(torch.bfloat16).pixel_values.dtype == torch.bfloat16


def test_do_convert_rgb_false_refuses_other_modes():
    """The model takes three channels; what it gets then must not be a guess."""
    processor = DeepSeekOCRVisionImageProcessor(size=64, do_convert_rgb=False)
    assert processor(new_image(), return_tensors="pt").pixel_values.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="images is of mode L"):
        processor(new_image(mode="L"))


def test_the_callers_images_are_left_as_they_were():
    """Normalising in place would darken the user's own array at every call."""
    page = new_image()
    array = np.array(page, dtype=np.float32) / 255
    tensor = torch.from_numpy(np.array(page)).permute(2, 0, 1).clone()
    copies = page.copy(), array.copy(), tensor.clone()
    levels_of([page, array, tensor])
    assert page == copies[0]
    np.testing.assert_array_equal(array, copies[1])
    assert torch.equal(tensor, copies[2])


# JSON


EVERY_FIELD = {
    "preset": "deepseek-ocr",
    "do_resize": False,
    "size": {"height": 128, "width": 64},
    "max_patches": 4,
    "resample": 2,
    "do_pad": False,
    "do_rescale": False,
    "rescale_factor": 0.25,
    "do_normalize": False,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "do_convert_rgb": False,
    "resize_backend": "pil",
}


def test_every_field_survives_json_and_a_folder(tmp_path):
    """A field that is not written comes back as its default, and the pages of a fine-tuned model change."""
    default = DeepSeekOCRVisionImageProcessor().to_dict()
    processor = DeepSeekOCRVisionImageProcessor(**EVERY_FIELD)
    fields = json.loads(processor.to_json_string())
    for name, value in EVERY_FIELD.items():
        assert fields[name] == value
        assert getattr(processor, name) == value
        assert default.get(name) != value, f"{name} is tested with its default"
    # A mode and tiles need images that are resized; they have tests of their own.
    assert set(default) <= set(EVERY_FIELD) | {"image_processor_type", "mode", "tile_size"}
    processor.to_json_file(tmp_path / "fields.json")
    assert DeepSeekOCRVisionImageProcessor.from_json_file(tmp_path / "fields.json").to_dict() == processor.to_dict()
    saved = processor.save_pretrained(tmp_path / "folder")
    assert saved == [str(tmp_path / "folder" / "preprocessor_config.json")]
    loaded = DeepSeekOCRVisionImageProcessor.from_pretrained(tmp_path / "folder")
    assert loaded.to_dict() == processor.to_dict()
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert other.to_dict() == processor.to_dict()


def test_fields_can_be_replaced_while_loading(tmp_path):
    """With another preset, the colours of the one that was saved would make a mixture that nobody trained."""
    DeepSeekOCRVisionImageProcessor(size=64).save_pretrained(tmp_path)
    loaded = DeepSeekOCRVisionImageProcessor.from_pretrained(tmp_path, size=128, do_normalize=False)
    assert loaded.size == {"height": 128, "width": 128}
    assert loaded.do_normalize is False
    other = DeepSeekOCRVisionImageProcessor.from_pretrained(tmp_path, preset="deepseek-ocr")
    assert other.to_dict() == DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=64).to_dict()
    kept = DeepSeekOCRVisionImageProcessor.from_dict(other.to_dict(), preset="deepseek-ocr", image_std=0.25)
    assert kept.image_std == [0.25] * 3


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    """transformers logs that and saves nothing."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file"):
        DeepSeekOCRVisionImageProcessor().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# In another process


ALONE = """
import json, resource, sys
sys.modules["torchvision"] = None
import numpy as np, torch
from PIL import Image
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor

processor = DeepSeekOCRVisionImageProcessor(size=64)
page = Image.open(sys.argv[1])
tensor = torch.from_numpy(np.array(page)).permute(2, 0, 1)
pixels = processor([page, tensor, tensor / 255], return_tensors="pt").pixel_values
report = {"shape": list(pixels.shape), "equal": bool((pixels == pixels[0]).all())}
try:
    processor(page, resize_backend="torchvision")
except ImportError as error:
    report["error"] = str(error)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = np.broadcast_to(np.float32(0.5), (10000, 10000, 3))
report["finite"] = bool(processor(large, return_tensors="pt").pixel_values.isfinite().all())
report["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report_without_torchvision(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("alone") / "page.png"
    new_image().save(path)
    run = subprocess.run([sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_it_works_without_torchvision(report_without_torchvision):
    """torchvision is no dependency: an import of it that is not guarded breaks every installation without."""
    assert report_without_torchvision["shape"] == [3, 3, 64, 64]
    assert report_without_torchvision["equal"]
    assert "`resize_backend` is 'torchvision', which is not installed" in report_without_torchvision["error"]


def test_a_hundred_megapixels_are_read_within_bounded_memory(report_without_torchvision):
    """A float copy of such a page is 1.2 GB, and every step that makes one more can end the process."""
    assert report_without_torchvision["finite"]
    assert report_without_torchvision["megabytes"] < 1100
