"""The example `examples/label_pages.py`: pages without labels, read by RapidOCR into what `finetune.py` takes."""

import sys

import pytest
from helpers import ROOT
from PIL import Image, features


matplotlib = pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "examples"))

import label_pages  # noqa: E402
from label_pages import Line  # noqa: E402


def test_lines_are_put_in_the_order_of_reading():
    """Pins the order of detection, in which the right half of a row can come before the left one."""
    lines = [
        Line("12.50", 1.0, 300, 52, 68),
        Line("Total", 1.0, 10, 50, 70),
        Line("Receipt", 1.0, 10, 10, 40),
        Line("Thank you", 1.0, 10, 80, 100),
    ]
    assert label_pages.in_reading_order(lines) == "Receipt\nTotal 12.50\nThank you"


def test_pages_that_are_read_badly_or_not_at_all_are_left_out(tmp_path, caplog):
    """Pins a student that learns a teacher's guesses, empty texts, which stop the training, and files that do."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("L", (10, 10)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "d.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "e.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    answers = iter([[Line("good", 0.9, 0, 0, 1)], [Line("good", 0.9, 0, 0, 1), Line("bad", 0.3, 0, 2, 3)], []])
    rows = list(label_pages.label(tmp_path, lambda image: next(answers), min_score=0.5))
    assert rows == [{"file_name": "a.png", "text": "good"}]
    assert "'bad' has a score of 0.30" in caplog.text
    assert "c.png is left out: nothing" in caplog.text
    assert "d.pdf): this is a PDF" in caplog.text
    assert "e.png): this is of format EPS" in caplog.text


def test_labels_are_not_written_over(tmp_path):
    """Pins labels that a person corrected by hand."""
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(FileExistsError, match="not written over"):
        label_pages.main([str(tmp_path)])


def test_without_rapidocr_the_extra_is_named(monkeypatch):
    """Pins a ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"pip install 'deepseek-ocr-vision\[label\]'"):
        label_pages.open_reader()


@pytest.mark.skipif(not features.check("freetype2"), reason="Pillow was built without FreeType")
def test_drawn_pages_are_read_into_what_finetune_takes(tmp_path):
    """Pins a table that `finetune.py --data` does not open, and colours or lines in the wrong order."""
    pytest.importorskip("rapidocr", reason="the extra `label` is not installed")
    pytest.importorskip("datasets", reason="the extra `train` is not installed")
    from finetuning.own_pages import open_tables

    from deepseek_ocr_vision.processing.text_pages import TextRenderer

    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    renderer = TextRenderer(size=(192, 512), font=font, font_size=28, margin=16)
    texts = ["Invoice number 4711\nTotal 12.50", "The quick brown fox\njumps over the dog"]
    for index, text in enumerate(texts):
        next(renderer.pages(text)).image.save(tmp_path / f"{index}.png")
    label_pages.main([str(tmp_path)])
    tables, findings = open_tables(str(tmp_path), image_column="image", text_column="text")
    assert not findings
    assert tables["train"].texts == texts
