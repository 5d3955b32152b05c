"""What `examples/finetune.py` reports: scores, the table, report.html, predictions.png and loss.png."""

import logging
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from receipts import draw_receipt, text_of


pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
pytest.importorskip("rapidfuzz", reason="the extra `train` is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import report
from finetuning import drawings, html_report, page_view, scores, text_layout


LONG = "\n".join(f"{index}: " + "a long line of an invoice, " * 6 for index in range(9)) + "\nthe end"


def result(read: list[str], written: list[str], **fields) -> scores.RunResult:
    """A result of a run of four steps."""
    history = [{"step": step, "loss": 16.0 / step**2, "learning_rate": 1e-3 / step} for step in range(1, 5)]
    facts = {"name": "trained", "history": history, "trainable_parameters": 7, "changed_encoder_tensors": 3}
    facts |= {"encoder_tensors": 3, "step": 4, "loss": 1.0, "seconds_per_page": 0.25}
    facts |= {"text_tokens_per_vision_token": 6.5}
    return scores.RunResult(read=read, written=written, **(facts | fields))


def pages_of(texts: list[str]) -> list[dict]:
    return [{"image": draw_receipt(text[:20]), "text": text} for text in texts]


HOW = scores.Circumstances("my pages", ["3 pages."], "python finetune.py", seed=0, seconds=1.0, is_resumed=False)


# Scores


def test_scores_count_what_they_say():
    """A score that is right for perfect readings only, as most wrong ones are."""
    read, written = ["12\n3", "45", "6789"], ["12\n4", "55", "678"]
    assert report.page_accuracy(read, written) == 0
    assert report.character_error_rate(read, written) == 3 / 9
    assert [report.edits([a], [b]) for a, b in (("", "ab"), ("kitten", "sitting"), ("ab", "ba"))] == [2, 3, 2]
    assert scores.word_error_rate(["a b  d", ""], ["a b c", "d"]) == 2 / 4


def test_one_inserted_letter_is_one_error():
    """Pins a score by position, which was 0 % once a letter was inserted at the start."""
    text = "a receipt of many words"
    assert report.character_error_rate(["x" + text], [text]) == 1 / len(text)


def test_reports_say_how_fast_pages_are_read_and_how_full_they_are():
    """Pins a reader that would be judged by its error rate alone."""
    rows = dict(scores.score_rows([result(["a"], ["a"])]))
    assert rows["seconds to read a page"] == "0.25"
    assert rows["text tokens for each vision token"] == "6.50"


def test_the_error_rates_lead_and_one_run_does_not_speak_of_two():
    """Pins a report that begins with another number, and one that compares a run with nothing."""
    one, two = result(["ab"], ["ac"]), result(["ab"], ["ac"], name="frozen")
    assert [row[0] for row in scores.score_rows([one])][1:3] == ["character error rate", "word error rate"]
    alone, both = (scores.format_report(results, HOW, None) for results in ([one], [one, two]))
    for text in (alone, "".join(map(str, scores.score_rows([one])))):
        assert "oth runs" not in text
        assert "frozen" not in text
    assert "Both runs start from the same weights" in both


# Pages


def test_differences_are_the_fewest_and_nothing_is_left_out():
    """Pins captions that were cut, and marks that begin at the first difference and never end."""
    left, right = text_layout.compared("total 12.50", "toal 12.60")
    assert "".join(piece.text for piece in left) == "total 12.50"
    assert "".join(piece.text for piece in right) == "toal 12.60"
    assert [piece.text for piece in left if piece.differs] == ["t", "5"]
    assert [piece.text for piece in right if piece.differs] == ["6"]


def test_long_text_is_wrapped_in_full():
    """Pins captions of 24 characters that overlapped each other."""
    writer = text_layout.Writer(text_layout.fonts_for([LONG]), 400)
    lines = writer.lines([text_layout.Piece(LONG, True)])
    assert "".join(span.text for line in lines for span in line) == LONG
    assert all(line[-1].left + line[-1].width <= 400 + text_layout.FONT_SIZE for line in lines if line)
    unbroken = "x" * 500
    lines = writer.lines([text_layout.Piece(unbroken, False)])
    assert len(lines) > 5
    assert all(span.left + span.width <= 400 for line in lines for span in line)


def test_predictions_are_drawn_as_high_as_their_text_is(tmp_path):
    """Pins rows of a fixed height, in which long texts lay over each other."""
    heights = []
    for text in ("short", LONG):
        page_view.draw_predictions(result([text[:-3]], [text]), pages_of([text]), tmp_path / "predictions.png")
        with Image.open(tmp_path / "predictions.png") as image:
            heights.append(image.height)
    assert heights[1] > heights[0] + 2 * 9 * page_view.LINE_PITCH


def test_characters_that_no_font_has_are_named_with_the_package_that_has_them(monkeypatch, caplog):
    """Pins boxes in place of Chinese, without a word."""
    monkeypatch.setattr(text_layout.font_manager, "findSystemFonts", lambda: [text_layout.default_font()])
    with caplog.at_level(logging.WARNING):
        text_layout.fonts_for(["итого", "漢字"])
    assert "漢" in caplog.text
    assert "fonts-noto-cjk" in caplog.text
    assert "и" not in caplog.text.split("predictions.png")[0].replace("No font here has", "")


def test_a_character_is_drawn_in_the_font_that_has_it():
    """Pins boxes where a font that is installed has the character."""
    latin = text_layout.font_manager.findfont("cmr10")  # of TeX, which matplotlib brings
    writer = text_layout.Writer([latin, text_layout.default_font()], 400)
    spans = writer.lines([text_layout.Piece("ab итого", False)])[0]
    drawn = ["".join(span.text for span in spans if span.font is font).strip() for _, font in writer.fonts]
    assert drawn == ["ab", "итого"]


def test_the_html_report_is_one_file_with_whole_texts(tmp_path):
    """Pins a report that refers to other files, or takes what was read for HTML."""
    texts = [text_of(index) for index in range(30)]
    read = [*texts[:28], "<b>bold</b>", texts[29].replace("\n", " ", 1)]
    drawings.draw_losses([result(read, texts)], tmp_path / "loss.png")
    html_report.write_html([result(read, texts)], pages_of(texts), HOW, None, tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{,30})', page)
    assert len(sources) == 1 + 20 + 2
    assert all(source.startswith("data:image/") for source in sources)
    assert texts[0] in page
    assert "<b>" not in page
    assert "<ins>&lt;b&gt;" in page
    assert "<del>↵" in page
    assert "Both runs" not in page


def test_the_loss_has_ticks_and_no_empty_panel(tmp_path, monkeypatch):
    """Pins an axis without numbers, and a panel for rates that were not logged."""
    figures = []
    monkeypatch.setattr(drawings, "save_figure", lambda figure, path: figures.append(figure))
    no_rates = [{"step": step, "loss": 5 - step / 10, "eval_loss": 5.0} for step in range(1, 5)]
    for history in (result([], []).history, no_rates):
        drawings.draw_losses([result([], [], history=history, loss=history[-1]["loss"])], tmp_path / "loss.png")
    with_rates, without = figures
    assert [len(figure.axes) for figure in figures] == [2, 1]
    for figure in figures:
        figure.canvas.draw()
        for axes in figure.axes:
            low, high = axes.get_ylim()
            ticks = [t for t in axes.get_yticks() if low <= t <= high]
            assert len(ticks) >= 3
            assert any(len(line.get_xdata()) for line in axes.lines)
    assert with_rates.axes[0].get_yscale() == "log"
    assert without.axes[0].get_yscale() == "linear"
