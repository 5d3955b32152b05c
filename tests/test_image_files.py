"""Image files as the world has them: which are read, how they look, and what is said of those that are refused."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from fuzz_images import fuzz, fuzz_pdfs
from helpers import ROOT
from image_files import TIFF_TYPES, exif, png, tiff
from PIL import EpsImagePlugin, Image, ImageOps

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import IMAGE_FORMATS, open_image, read_image


FIELD = ROOT.parent / "shared" / "field"
needs_field = pytest.mark.skipif(not FIELD.is_dir(), reason=f"the files of the field are not at {FIELD}")
AS_LEVELS = DeepSeekOCRVisionImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)


def levels(image) -> np.ndarray:
    """The 256 levels that an image of 64 x 64 pixels is read to, [64, 64, 3]."""
    (page,) = AS_LEVELS(image, return_tensors="np", data_format="channels_last").pixel_values
    return page


def page(*, top: int = 255) -> np.ndarray:
    """A grey page of 64 x 64: white with two dark bars of unequal length, and a ramp below them."""
    grey = np.full((64, 64), top)
    grey[8:16, 8:56] = grey[24:32, 8:32] = top // 16
    grey[48:] = np.arange(64) * top // 63
    return grey


def ways(path):
    """A file by its path, opened, and as a table of images has it."""
    yield path
    with Image.open(path) as opened:
        yield opened
    yield Image.open(io.BytesIO(path.read_bytes()))


# Which formats are read


def test_every_format_of_the_list_is_read_whatever_the_file_is_called(tmp_path):
    """Pins a list that leaves out what scanners write, and one that goes by the suffix."""
    Image.init()
    photo = Image.fromarray(page().astype(np.uint8)).convert("RGB")
    read = {each for each in IMAGE_FORMATS if each in Image.SAVE and (each in Image.OPEN or each == "MPO")}
    assert {"PNG", "JPEG", "MPO", "TIFF", "WEBP", "GIF", "BMP", "PPM", "TGA"} <= read
    for each in sorted(read):
        path = tmp_path / f"{each}.dat"
        photo.save(path, each, **({"append_images": [photo], "save_all": True} if each == "MPO" else {}))
        for way in ways(path):
            assert np.abs(levels(way) - np.asarray(photo)).mean() < 2, each


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A Ghostscript that only notes that it was started."""
    program = tmp_path / "programs" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return tmp_path / "started"


@pytest.mark.parametrize("name", ["page.eps", "page.png"])
def test_eps_is_refused_by_name_and_no_program_is_started(tmp_path, ghostscript, name):
    """Pins a file that chooses its decoder: of EPS, Pillow has Ghostscript read it, whatever the suffix."""
    path = tmp_path / name
    path.write_bytes(EPS)
    with pytest.raises(OSError, match=rf"images\[0\] \(.*{name}\): this is of format EPS.*allowed are PNG"):
        levels([path])
    for opened in (Image.open(path), Image.open(io.BytesIO(EPS))):
        with pytest.raises(OSError, match=r"images\[0\] is of format EPS"):
            levels([opened])
    assert not ghostscript.exists()
    # That Pillow would have started it.
    with pytest.raises(OSError, match="image file"):
        Image.open(path).load()
    assert ghostscript.exists()


@pytest.mark.parametrize("format_", ["PCX", "SGI", "ICO", "DDS"])
def test_other_formats_are_refused_by_name(tmp_path, format_):
    """Pins decoders that nobody needs for a page."""
    Image.new("RGB", (64, 64)).save(tmp_path / "page.png", format_)
    with pytest.raises(OSError, match=rf"page\.png\): this is of format {format_}"):
        levels(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as opened, pytest.raises(OSError, match=f"images is of format {format_}"):
        levels(opened)
    with Image.open(tmp_path / "page.png") as opened:
        assert levels(opened.convert("RGB")).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"%PDF-1.7", "a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "pillow-heif"),
        (b"<html>", "cannot identify"),
        (b"", ""),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, words):
    """Pins photographs of a telephone, of which Pillow only says that it cannot identify them."""
    (tmp_path / "page.jpg").write_bytes(content)
    with pytest.raises(OSError, match=rf"images\[0\] \(.*page\.jpg\): .*{words}"):
        levels([tmp_path / "page.jpg"])


def test_a_folder_and_a_device_are_no_files(tmp_path):
    """Pins a read of /dev/zero that never ends."""
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match=rf"images\[0\] \({path}\) is no file"):
            levels([path])


# EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_whatever_else_exif_holds(tmp_path, orientation):
    """Pins an odd tag beside an orientation: all of EXIF was written anew, and what cannot be was an error."""
    stored = Image.fromarray(page().astype(np.uint8))
    stored.save(tmp_path / "plain.jpg", quality=95, exif=exif(orientation))
    with Image.open(tmp_path / "plain.jpg") as plain:
        expected = levels(ImageOps.exif_transpose(plain))
    for number in (271, 282, 283, 296, 305, 306, 34665, 34853, 40965):
        for kind, form in TIFF_TYPES.items():
            value = struct.pack(f"<{form}", *([b"7"] if form == "s" else [7] * len(form)))
            stored.save(tmp_path / "odd.jpg", quality=95, exif=exif(orientation, (number, kind, 1, value)))
            for way in ways(tmp_path / "odd.jpg"):
                np.testing.assert_array_equal(levels(way), expected, err_msg=f"tag {number} of type {kind}")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_was_turned_once_is_not_turned_again(kind):
    """Pins photographs in one's own pages: read to check them, and turned a second time when they were prepared."""
    file = io.BytesIO()
    Image.fromarray(page().astype(np.uint8)).save(file, kind, exif=exif(6))
    options = {"input_data_format": None, "do_convert_rgb": True, "keeps_tensor": False}
    read, _ = read_image(open_image(file, "the file"), "the file", **options)
    np.testing.assert_array_equal(levels(read), np.asarray(read))
    np.testing.assert_array_equal(levels(read), levels(open_image(file, "the file")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_uncompressed_tiff_is_turned_as_its_pixels_are(tmp_path, orientation):
    """Pins rows of the wrong length: Pillow maps such a file into memory and takes the turned size for its rows."""
    levels = np.random.default_rng(0).integers(0, 256, (64, 128), dtype=np.uint8)
    plain, tags = Image.fromarray(levels), Image.Exif()
    tags[0x0112] = orientation
    plain.save(tmp_path / "page.tif", exif=tags)
    image_processor = DeepSeekOCRVisionImageProcessor(do_resize=False, do_normalize=False)
    with_tags = Image.open(io.BytesIO((tmp_path / "page.tif").read_bytes()))
    expected = image_processor(ImageOps.exif_transpose(with_tags).convert("RGB"), return_tensors="np")["pixel_values"]
    for image in (tmp_path / "page.tif", Image.open(tmp_path / "page.tif")):
        assert np.array_equal(image_processor(image, return_tensors="np")["pixel_values"], expected)


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    """Pins garbage in EXIF, which spoiled the page around it."""
    stored = Image.fromarray(page().astype(np.uint8))
    stored.save(tmp_path / "plain.png")
    for garbage in (b"Exif\0\0nonsense", exif(6)[:20], exif(6)[:-8], b"Exif\0\0II*\0\xff\xff\xff\xff"):
        stored.save(tmp_path / "odd.png", exif=garbage)
        np.testing.assert_array_equal(levels(tmp_path / "odd.png"), levels(tmp_path / "plain.png"))


# More than eight bits


def assert_is_page(path, *, expected: np.ndarray | None = None) -> None:
    expected = page() if expected is None else expected
    for way in ways(path):
        read = levels(way)
        assert np.abs(read - expected.reshape(64, 64, -1)).max() <= 1, path


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_tiff_looks_the_same_in_any_number_of_bits(tmp_path, bits, photometric):
    """Pins 16 bits with white as 0, which came out as a negative, and 12 bits, which came out black."""
    top = 2**bits - 1
    grey = page(top=top)
    pixels = (top - grey if photometric == 0 else grey).astype(np.uint8 if bits == 8 else np.uint16)
    (tmp_path / "page.tif").write_bytes(tiff(pixels, photometric=photometric, bits=bits))
    if (bits, photometric) == (12, 0):
        with pytest.raises(OSError, match=r"page\.tif"):  # Pillow does not know it
            levels(tmp_path / "page.tif")
    else:
        assert_is_page(tmp_path / "page.tif")


def test_grey_tiff_of_floats_and_of_the_other_byte_order_looks_right(tmp_path):
    """Pins white as 0 in floats, the sibling of the same in 16 bits."""
    (tmp_path / "big.tif").write_bytes(tiff(page(top=65535).astype(np.uint16), photometric=1, order=">"))
    assert_is_page(tmp_path / "big.tif")
    for photometric in (0, 1):
        light = (page() / 255).astype(np.float32)
        pixels = 1 - light if photometric == 0 else light
        (tmp_path / "float.tif").write_bytes(tiff(pixels, photometric=photometric))
        for way in ways(tmp_path / "float.tif"):
            assert np.abs(255 * levels(way) - page()[..., None]).max() <= 1


def test_a_frame_of_sixteen_bits_looks_the_same_wherever_the_file_is_opened(tmp_path):
    """Pins the first frame, taken from a copy that no longer knows that white is 0."""
    first = Image.fromarray((65535 - page(top=65535)).astype(np.uint16))
    tags = {262: 0}
    first.save(tmp_path / "page.tif", save_all=True, append_images=[Image.new("I;16", (64, 64))], tiffinfo=tags)
    with Image.open(tmp_path / "page.tif") as opened:
        assert opened.tag_v2[262] == 0
        opened.seek(1)
        assert np.abs(levels(opened) - page()[..., None]).max() <= 1
        assert opened.tell() == 1


@pytest.mark.parametrize(("bits", "planar"), [(8, False), (8, True), (16, False), (16, True)])
def test_rgb_tiff_is_right_or_refused(tmp_path, bits, planar):
    """Pins 16-bit channels that lie one after the other, of which Pillow takes every other byte for a pixel."""
    scale = 257 if bits == 16 else 1
    colours = np.stack([page(), 255 - page(), page()[::-1]], axis=-1)
    pixels = (colours * scale).astype(np.uint16 if bits == 16 else np.uint8)
    (tmp_path / "page.tif").write_bytes(tiff(pixels, photometric=2, planar=planar))
    if planar and bits == 16:
        for way in ways(tmp_path / "page.tif"):
            with pytest.raises(OSError, match=r"images\[0\].* has planes of 16 bits"):
                levels([way])
    else:
        assert_is_page(tmp_path / "page.tif", expected=colours)


def test_a_tiff_without_its_last_strips_is_refused(tmp_path):
    """Pins rows that Pillow leaves black: the page claims 100 rows, and has 64."""
    content = tiff(page().astype(np.uint8), photometric=1)
    height = struct.pack("<HHII", 257, 4, 1, 64)
    assert content.count(height) == 1
    (tmp_path / "page.tif").write_bytes(content.replace(height, struct.pack("<HHII", 257, 4, 1, 100)))
    for way in ways(tmp_path / "page.tif"):
        with pytest.raises(OSError, match=r"images\[0\].* lacks pixels: it has 100 rows"):
            levels([way])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_level_of_grey_is_paper_in_any_number_of_bits(tmp_path, bits):
    """Pins a 16-bit page that came out black, and levels of 2 and 4 bits, scaled without the transparent one."""
    top = 2**bits - 1
    grey = page(top=15) * top // 15
    transparent = top if bits == 1 else int(grey[50, 32])
    (tmp_path / "page.png").write_bytes(png(grey, bits=bits, transparent=transparent))
    assert_is_page(tmp_path / "page.png", expected=np.where(grey == transparent, 255, grey * 255 // top))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_paper_in_any_number_of_bits(tmp_path, bits):
    """Pins a 16-bit colour looked for among 8-bit pixels."""
    scale = 257 if bits == 16 else 1
    colours = np.stack([page(), 255 - page(), page()[::-1]], axis=-1)
    transparent = tuple(int(level) * scale for level in colours[12, 12])
    (tmp_path / "page.png").write_bytes(png(colours * scale, bits=bits, transparent=transparent))
    is_paper = (colours == colours[12, 12]).all(axis=-1, keepdims=True)
    assert is_paper.any()
    assert_is_page(tmp_path / "page.png", expected=np.where(is_paper, 255, colours))


# What was found in the field


@needs_field
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("exif6.jpg", 0.882),
        ("exif_x_XRes_as_ASCII.jpg", 0.882),
        ("g8trns.png", 0.882),
        ("g16trns.png", 0.882),
        ("g4_miniswhite.tif", 0.868),
        ("g16_miniswhite.tif", 0.882),
    ],
)
def test_files_of_the_field_look_as_in_a_viewer(name, right):
    """Pins the values that the folder's README gives for what people reported."""
    processor = DeepSeekOCRVisionImageProcessor(size=64, do_normalize=False)
    for way in ways(FIELD / name):
        assert processor(way, return_tensors="np").pixel_values.mean() == pytest.approx(right, abs=6e-4)


@needs_field
def test_an_odd_tag_changes_no_pixel():
    """Pins the same photograph with its resolution stored as text."""
    processor = DeepSeekOCRVisionImageProcessor(size=64)
    plain, odd = (processor(FIELD / name) for name in ("exif6.jpg", "exif_x_XRes_as_ASCII.jpg"))
    np.testing.assert_array_equal(plain.pixel_values[0], odd.pixel_values[0])


def test_whatever_a_decoder_raises_names_the_file(tmp_path):
    """Pins errors of Pillow's that only say what is wrong, in a folder of ten thousand pages."""
    text = png(page(top=1), bits=1, transparent=0)
    too_long = b"words\0\0" + zlib.compress(bytes(2_000_000))
    chunk = struct.pack(">I", len(too_long)) + b"zTXt" + too_long
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + too_long))
    cases = {
        "bigtext.png": text[:33] + chunk + text[33:],
        "header.ppm": b"P6 64 x 255\n" + bytes(64 * 64 * 3),
        "token.ppm": b"P6 " + b"9" * 5000,
        "maximum.pgm": b"P5 64 64 99999999\n" + bytes(64 * 64),
        "plain.pgm": b"P2 64 64 255\n" + b"1 x " * 64 * 64,
        "cut.tif": tiff(page().astype(np.uint8), photometric=1)[:3000],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=rf"images\[1\] \(.*{re.escape(name)}\)"):
            levels([Image.new("RGB", (64, 64)), tmp_path / name])


def test_broken_files_are_read_or_refused_by_name(tmp_path):
    """Pins whatever else broken bytes lead a decoder to; `tests/fuzz_images.py` tries as many as one likes."""
    outcomes, faults = fuzz(250, 1, tmp_path)
    assert faults == []
    assert min(outcomes["read"], outcomes["refused"]) > 20


def test_broken_pdfs_are_encoded_or_named(tmp_path):
    """Pins a document that is neither among the pages nor among the problems, or that ends the run."""
    pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed: pip install 'deepseek-ocr-vision[encode]'")
    outcomes, faults = fuzz_pdfs(20, 1, tmp_path)
    assert faults == []
    assert min(outcomes["files read"], outcomes["files refused"]) > 2
