"""What the world hands `encode`: forms, faxes, animations, odd names, links, files that hang or crash a decoder."""

import io
import os
import signal
import time
import zipfile
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding_helpers import IMAGE_PROCESSOR, encode, errors, image, png, stored, write_pdf
from image_files import exif, tiff
from image_files import png as png_file
from PIL import Image, TiffImagePlugin

from deepseek_ocr_vision.encoding import load_pages
from deepseek_ocr_vision.encoding.encoder import Page
from deepseek_ocr_vision.encoding.processes import Failure, map_in_processes
from deepseek_ocr_vision.encoding.sources import Column, digest_of, find_pages_in, open_page, page_of


pypdfium2 = pytest.importorskip("pypdfium2")


def form_pdf() -> bytes:
    """A page with a text field whose value has no appearance of its own, so that a viewer has to draw it."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] /NeedAppearances true /DR << /Font << /F 5 0 R "
        b">> >> /DA (/F 40 Tf 0 g) >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Annots [4 0 R] >>",
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (MMMM) /Rect [10 10 190 90] /F 4 /P 3 0 R "
        b"/DA (/F 40 Tf 0 g) >>",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    return pdf_of(objects)


def pdf_of(objects: list[bytes]) -> bytes:
    """A PDF of objects, numbered from 1; the first is the catalogue."""
    parts, offsets = [b"%PDF-1.7\n"], []
    for number, each in enumerate(objects, start=1):
        offsets.append(sum(map(len, parts)))
        parts.append(b"%d 0 obj\n%s\nendobj\n" % (number, each))
    start = sum(map(len, parts))
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    parts.append(b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(offsets) + 1, table))
    parts.append(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(offsets) + 1, start))
    return b"".join(parts)


def first_page(pdf: bytes, *, dpi: float) -> Image.Image:
    pages, _ = find_pages_in(pdf, "a PDF")
    return open_page(pages[0], {"a PDF": pdf}, dpi=dpi).convert("L")


def test_what_is_filled_into_a_form_is_on_the_page():
    """Pins PDFium's form environment, without which filled fields come out empty and nothing says so."""
    rendered = first_page(form_pdf(), dpi=144)
    assert sum(count for level, count in enumerate(rendered.histogram()) if level < 128) > 1000


def test_a_stamp_is_on_the_page():
    """Pins annotations, which are no part of what a page draws itself."""
    drawing = b"0 0 100 50 re f"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Annots [4 0 R] >>",
        b"<< /Type /Annot /Subtype /Stamp /Rect [0 0 100 50] /F 4 /P 3 0 R /AP << /N 5 0 R >> >>",
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 100 50] /Length %d >>\nstream\n%s\nendstream"
        % (len(drawing), drawing),
    ]
    page = np.asarray(first_page(pdf_of(objects), dpi=72))
    assert page[50:, :100].max() < 64
    assert page[:50].min() > 192


MANUAL = Path("/usr/share/doc/gnuplot/gnuplot.pdf")


@pytest.mark.skipif(not MANUAL.exists(), reason="Debian's gnuplot-doc, with a manual of 311 pages, is not installed")
def test_a_manual_of_over_200_pages_is_encoded_page_by_page(tiny_model, tmp_path):
    """Pins a document as the world has them, whose pages are as PDFium alone renders them."""
    summary = encode([MANUAL], tiny_model, tmp_path / "out", num_workers=2, dpi=18, tokens="none", pages_per_file=99)
    with closing(pypdfium2.PdfDocument(MANUAL)) as manual:
        num_pages, last = len(manual), manual[len(manual) - 1].render(scale=0.25).to_pil()
    assert (summary.num_pages, summary.problems) == (num_pages, [])
    assert num_pages > 200
    (row,) = (row for row in load_pages(tmp_path / "out") if row["page"] == num_pages - 1)
    (expected,) = tiny_model.encode([last], image_processor=IMAGE_PROCESSOR)
    assert torch.equal(row["pooled"], expected.mean(dim=0))


def test_two_broken_files_of_the_same_content_are_both_named(tiny_model, tmp_path):
    """Pins the one of them that was in no list, so that counts did not add up."""
    for name, content in (("a", png(1)[:900]), ("b", png(1)[:900]), ("good", png(1)), ("same", png(1))):
        (tmp_path / f"{name}.png").write_bytes(content)
    progress = []
    summary = encode(tmp_path, tiny_model, tmp_path / "out", on_progress=progress.append)
    assert sorted(os.path.basename(each.source) for each in summary.problems) == ["a.png", "b.png"]
    assert (summary.num_pages, summary.num_new) == (2, 1)
    assert (progress[-1]["pages"], progress[-1]["errors"], progress[-1]["total"]) == (2, 2, 4)


def test_images_of_a_dataset_may_lie_in_an_archive(tiny_model, tmp_path):
    """Pins `imagefolder` over a zip, whose paths are `zip://...::...`: no row could be read."""
    datasets = pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "pages.zip", "w") as archive:
        archive.writestr("pages/0.png", png(0))
    pages = datasets.load_dataset(
        "imagefolder", data_files=str(tmp_path / "pages.zip"), split="train", cache_dir=str(tmp_path / "cache")
    )
    column = Column.of(pages, "pages", "image")
    ((page,),) = column.pages()
    assert np.array_equal(np.asarray(column.read(page)), np.asarray(image(0)))


def test_each_frame_of_a_tiff_is_a_page_as_it_is_alone(tiny_model, tmp_path):
    """Pins faxes and scans, of which the first page alone was encoded; these lie on their sides."""
    frames = [image(1), image(2, 60, 90).convert("L"), image(3).convert("1")]
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(tmp_path / "fax.tif", save_all=True, append_images=frames[1:], exif=exif)
    summary = encode([tmp_path / "fax.tif"], tiny_model, tmp_path / "out", num_workers=1)
    assert (summary.num_pages, summary.left_out) == (3, {})
    tokens = stored(tmp_path / "out")
    upright = [frame.transpose(Image.Transpose.ROTATE_270) for frame in frames]
    expected = tiny_model.encode(upright, image_processor=IMAGE_PROCESSOR)
    assert all(torch.equal(tokens["fax.tif", page], each) for page, each in enumerate(expected))


def test_a_thumbnail_in_a_tiff_is_no_page(tiny_model, tmp_path):
    """Pins previews that scanners put between pages, and the smaller copies that viewers of maps read."""
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "scan.tif", new=True) as file:
        for seed, kind in ((1, 2), (2, 1), (3, 2)):
            image(seed).save(file, "TIFF", tiffinfo={254: kind})
            file.newFrame()
    summary = encode([tmp_path / "scan.tif"], tiny_model, tmp_path / "out")
    assert stored(tmp_path / "out").keys() == {("scan.tif", 0), ("scan.tif", 2)}
    assert summary.left_out == {"smaller copies in a TIFF": [str(tmp_path / "scan.tif")]}


def test_a_page_of_a_file_is_the_one_that_encode_reads(tmp_path, monkeypatch):
    """Pins `show` of a PDF, which took image files alone, and of a TIFF, of which it took the first page."""
    frames = [image(1), image(2, 60, 90).convert("L")]
    frames[0].save(tmp_path / "fax.tif", save_all=True, append_images=frames[1:])
    (tmp_path / "form.pdf").write_bytes(form_pdf())
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=[image(2)])
    for number, frame in enumerate(frames, start=1):
        assert page_of(tmp_path / "fax.tif", number, dpi=72).tobytes() == frame.convert("RGB").tobytes()
    assert page_of(tmp_path / "form.pdf", 1, dpi=72).size == (200, 100)
    (tmp_path / "form.pdf").rename(tmp_path / "~form.pdf")
    monkeypatch.chdir(tmp_path)
    assert page_of("~form.pdf", 1, dpi=72).size == (200, 100)  # pypdfium2 takes a tilde for somebody's home
    for name, number, expected in (("fax.tif", 3, "pages go from 1 to 2"), ("moves.gif", 2, "pages go from 1 to 1")):
        with pytest.raises(ValueError, match=rf"{name}: there is no page {number}; {expected}"):
            page_of(tmp_path / name, number, dpi=72)


@pytest.mark.parametrize(("name", "expected"), [("claims.pdf", ValueError), ("cut.tif", OSError)])
def test_a_page_that_cannot_be_read_is_an_error_of_ours(tmp_path, name, expected):
    """Pins PdfiumError, which `read` and `show` passed on as a traceback, and errors without the file's name."""
    image(1).save(tmp_path / "fax.tif", save_all=True, append_images=[image(2)])
    contents = {"claims.pdf": form_pdf().replace(b"/Count 1 ", b"/Count 50")}
    contents["cut.tif"] = (tmp_path / "fax.tif").read_bytes()[:-9000]
    (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(expected, match=name):
        page_of(tmp_path / name, 2, dpi=72)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "I;16", "F", None])
def test_images_that_a_dataset_converts_are_read_as_all_others(mode):
    """Pins a column with `Image(mode=...)`, by which an odd tag, transparency and 16 bits went another way."""
    datasets = pytest.importorskip("datasets")
    odd = exif(6, (282, 2, 3, b"72\0"))  # the resolution as text
    turned, grey = io.BytesIO(), np.linspace(0, 65535, 96 * 64, dtype=np.uint16).reshape(64, 96)
    image(1).convert("L").save(turned, "JPEG", exif=odd, quality=95)
    contents = [turned.getvalue(), tiff(grey, photometric=0), png_file(grey, bits=16, transparent=0)]
    cells = [{"bytes": content, "path": None} for content in contents]
    dataset = datasets.Dataset.from_dict({"image": cells}, datasets.Features(image=datasets.Image(mode=mode)))
    column = Column.of(dataset, "a dataset", "image")
    for row, content in enumerate(contents):
        (expected,) = IMAGE_PROCESSOR(Image.open(io.BytesIO(content)))["pixel_values"]
        (found,) = IMAGE_PROCESSOR(column.read(Page(digest_of(content), "a dataset", row)))["pixel_values"]
        # CMYK has no exact way back.
        np.testing.assert_allclose(found, expected, atol=0.02 if mode == "CMYK" else 1e-6)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_encoded_and_the_file_is_named(tiny_model, tmp_path, suffix):
    """Pins frames that were passed over without a word."""
    image(1).save(tmp_path / f"moves.{suffix}", save_all=True, append_images=[image(2)])
    summary = encode(tmp_path, tiny_model, tmp_path / "out")
    assert summary.num_pages == 1
    assert summary.left_out == {"frames after the first": [str(tmp_path / f"moves.{suffix}")]}
    assert "moves" in str(summary)


def test_every_file_of_a_folder_is_encoded_or_named(tiny_model, tmp_path):
    """Pins images of ten suffixes of which two were stored, and folders behind links."""
    folder = tmp_path / "scans"
    folder.mkdir()
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "JPEG", ".tga": "TGA", ".j2k": "JPEG2000", ".jpx": "JPEG2000"}
    for seed, (suffix, kind) in enumerate((kinds | {"": "PNG", ".png": "PNG"}).items()):
        image(seed).save(folder / f"page{suffix}", kind)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.png").write_bytes(png(20))
    (folder / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (folder / "around").symlink_to(folder)
    (folder / "gone.png").symlink_to("/nowhere.png")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "notes.txt").write_text("no page")
    (folder / ".DS_Store").write_text("no page")
    (folder / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(folder / "pipe")
    summary = encode(folder, tiny_model, tmp_path / "out", num_workers=1, timeout=60)
    assert summary.num_pages == 9
    assert summary.left_out.keys() == {"hidden", ".txt", ".eps"}
    assert errors(tmp_path / "out").keys() == {"gone.png", "photo.heic", "pipe"}


def test_names_that_are_not_utf8_are_stored_escaped(tiny_model, tmp_path):
    r"""Pins a name that ended the whole run, and each run after it."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, content in ((b"caf\xe9.png", png(0)), (b"br\xfcchig.png", b"no image")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    assert encode(folder, tiny_model, tmp_path / "out").num_pages == 1
    assert stored(tmp_path / "out").keys() == {(r"caf\xe9.png", 0)}
    assert errors(tmp_path / "out").keys() == {r"br\xfcchig.png"}


def test_pages_that_a_document_only_claims_are_lines_of_one_file(tiny_model, tmp_path):
    """Pins a PDF of 300 bytes that wrote 1,999 files."""
    claims = form_pdf().replace(b"/Count 1 ", b"/Count 50")
    (tmp_path / "claims.pdf").write_bytes(claims)
    summary = encode([tmp_path / "claims.pdf"], tiny_model, tmp_path / "out")
    assert summary.num_pages == 1
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert len(lines) == len(summary.problems) == 49
    assert {path.name.split("-")[0] for path in (tmp_path / "out").iterdir()} == {
        "settings.json",
        "errors.jsonl",
        "part",
    }


# Decoders that hang or crash


def work(item: str) -> str:
    """A worker's work: what the item says."""
    if item == "hang":
        time.sleep(600)
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "fail":
        raise zlib.error("broken")
    return item.upper()


def test_a_worker_that_hangs_or_dies_costs_its_item_alone():
    """Pins a file whose decoder never ends, and one that takes the process with it."""
    items = ["a", "hang", "b", "die", "c", "fail", "d"]
    results = dict(map_in_processes(work, items, num_workers=2, timeout=2))
    assert [results[item] for item in "abcd"] == list("ABCD")
    assert results["hang"] == Failure("TimeoutError: it took longer than 2 seconds.")
    assert results["die"] == Failure("the process that read it died twice.")
    assert results["fail"] == Failure("error: broken")


def test_a_page_that_takes_too_long_is_named_and_the_run_goes_on(tiny_model, tmp_path):
    """Pins `timeout` from end to end, on an image whose preparing never comes to its end."""
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))

    class Slow(type(IMAGE_PROCESSOR)):
        def __call__(self, images, **options):
            if images.convert("RGB").tobytes() == image(1).tobytes():
                time.sleep(600)
            return super().__call__(images, **options)

    processor = Slow(size=128)
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    summary = encode(paths, tiny_model, tmp_path / "out", image_processor=processor, num_workers=1, timeout=3)
    assert summary.num_pages == 2
    assert errors(tmp_path / "out") == {"1.png": "TimeoutError: it took longer than 3 seconds."}


def test_a_worker_that_is_killed_loses_nothing(tiny_model, tmp_path):
    """Pins the system's killer of processes that take memory: the page is read once more by another one."""
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    mark = tmp_path / "killed"

    class Dying(type(IMAGE_PROCESSOR)):
        def __call__(self, images, **options):
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(images, **options)

    paths = [tmp_path / f"{seed}.png" for seed in range(6)]
    summary = encode(paths, tiny_model, tmp_path / "out", image_processor=Dying(size=128), num_workers=2)
    assert (summary.num_pages, summary.problems) == (6, [])


def test_a_document_that_changes_meanwhile_is_named(tiny_model, tmp_path):
    """Pins tokens that are stored under the id of another document."""
    write_pdf(tmp_path / "book.pdf", 1, 2, 3)
    tiny_model.register_forward_hook(lambda *_: write_pdf(tmp_path / "book.pdf", 4, 5, 6) and None)
    (tmp_path / "a.png").write_bytes(png(0))
    encode(tmp_path, tiny_model, tmp_path / "out")
    assert stored(tmp_path / "out").keys() == {("a.png", 0)}
    assert "changed" in errors(tmp_path / "out")["book.pdf"]
