"""The benchmark of compression: its texts and pages, what it measures, and runs with models that know nothing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image, features
from whole_model import needs_whole_model, tiny_whole_model, write_released

from deepseek_ocr_vision.composites import build_llava, save_llava


pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
pytest.importorskip("rapidfuzz", reason="the extra `train` is not installed")
if not features.check("freetype2"):
    pytest.skip("Pillow was built without FreeType", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import compression


FEW = ("--steps", "2", "--seeds", "1", "--num-pages", "2", "--ratios", "1", "3")


@pytest.fixture(scope="module")
def reader() -> compression.Reader:
    torch.manual_seed(0)
    return compression.Reader(*build_llava(page_size=128), "<image>")


def results_of(output: Path, *options: str) -> dict:
    compression.main([*options, "--output", str(output)])
    with Image.open(output.with_suffix(".png")) as figure:
        figure.verify()
    return json.loads(output.read_text())


def shares(results: dict, model: str, unit: str = "characters") -> dict[tuple[str, float], float]:
    points = [point for point in results["points"] if point["model"] == model]
    return {(point["kind"], point["ratio"]): point[unit][0] for point in points}


def test_all_kinds_of_text_look_alike():
    """Pins random text with other lengths of words, whose pages would be easier or harder to read."""
    words = ["Hold", "3", "words,", "not", "more."]
    kinds = {kind: compression.as_kind(words, kind, np.random.default_rng(0)) for kind in compression.KINDS}
    assert kinds[compression.ENGLISH] == words
    assert sorted(kinds[compression.SHUFFLED]) == sorted(words) != kinds[compression.SHUFFLED]
    for kind in (compression.LETTERS, compression.DIGITS):
        assert [len(word) for word in kinds[kind]] == [len(word) for word in words]
        assert kinds[kind][2].endswith(",")
    assert "".join(kinds[compression.DIGITS]).strip(",.").replace(",", "").isdigit()


def test_a_page_holds_the_tokens_asked_for_in_letters_as_large_as_fit(reader):
    """Pins a ratio that is not the one on the axis, and text cut off at the end of the page."""
    _, text = compression.english()
    heights = []
    for ratio in (1, 8):
        page = compression.draw_page(text, "English", ratio, reader=reader, rng=np.random.default_rng(0))
        assert abs(len(page.text) - ratio * reader.num_vision) <= 1  # a token is a byte; one at the end may be a space
        heights.append(compression.largest(page.text, 128).fonts[0].size)
        with pytest.raises(ValueError, match="do not fit a page of 128 pixels"):
            compression.largest(page.text * 500, 128)
    assert heights[0] > heights[1] >= 13


def test_no_paragraph_is_both_trained_on_and_held_out():
    """Pins paragraphs that Python's documentation has under several topics."""
    to_train_on, held_out = compression.english()
    parts = [part for part in held_out.split(". ") if len(part) > 120]
    assert len(parts) > 50
    assert sum(part in to_train_on for part in parts) / len(parts) < 0.02  # some sentences are in two paragraphs


def test_shares_are_of_what_is_written():
    """Pins a share below 0 for a model that writes on and on, and white space that counts."""
    assert compression.shares_read("one  two\nthree", "one two three") == (1.0, 1.0)
    assert compression.shares_read("one twx", "one two") == pytest.approx((6 / 7, 1 / 2))
    assert compression.shares_read("", "one two") == (0.0, 0.0)
    assert compression.shares_read("far too much " * 9, "one") == (0.0, 0.0)


def test_bands_shrink_with_the_number_of_pages():
    """Pins a standard deviation for a standard error."""
    assert compression.band([0.5, 0.5]) == (0.5, 0.0)
    mean, width = compression.band([0.0, 1.0] * 50)
    assert (mean, width) == pytest.approx((0.5, 1.96 * 0.5025 / 10), rel=1e-3)


@pytest.mark.parametrize("pool", [compression.MEAN, compression.CONVOLUTION])
def test_patches_become_as_many_tokens_as_the_encoder_makes(reader, pool):
    """Pins a comparison with more tokens, or with tokens that see more than their 64 x 64 pixels."""
    tower = compression.PatchTower(128, pool)
    pixels = torch.rand(1, 3, 128, 128)
    changed = pixels.clone()
    changed[..., :64, 64:] = 0.0  # the second token's square
    before, after = (tower(each).last_hidden_state for each in (pixels, changed))
    assert before.shape == (1, reader.num_vision, 128)
    moved = (before != after).any(dim=-1)[0].tolist()
    assert moved == [False, True, False, False]


def test_the_changed_digit_is_found_by_who_sees_it(reader, monkeypatch):
    """Pins a measure that finds the page whatever the tokens say, or never."""
    few = compression.parse(["--num-pages", "8", "--ratios", "3"])
    text = "some words to draw a page of " * 9
    monkeypatch.setattr(reader, "encode", lambda images: torch.tensor(np.array(images)).flatten(1, 2).float())
    found = compression.find_needle(reader, text, few)
    assert found["by token, noise 16"] == [1.0] * 8
    monkeypatch.setattr(reader, "encode", lambda images: torch.zeros(len(images), 4, 3))
    blind = compression.find_needle(reader, text, few)
    assert blind.keys() == found.keys()
    assert all(sum(each) < 5 for each in blind.values())


def test_a_whole_run_has_every_model_kind_and_ratio(tmp_path, capsys):
    """Pins a model left out, and truncation that loses what it has room for."""
    results = results_of(tmp_path / "out" / "compression.json", *FEW, "--num-pages", "1")
    expected = {(kind, ratio) for kind in compression.KINDS for ratio in (1.0, 3.0)}
    for model in (*compression.ARMS, *compression.BESIDES):
        assert shares(results, model).keys() == expected
    truncated = shares(results, compression.TRUNCATED)
    for kind in compression.KINDS:
        assert truncated[kind, 1.0] == 1.0
        assert 0.15 < truncated[kind, 3.0] < 0.45  # of 12 bytes the first 4, of which some are white space
    assert {row["model"] for row in results["needle"]} == set(compression.ARMS)
    assert results["vision_tokens"] == 4
    written = capsys.readouterr().out
    assert "| English | encoder trained |" in written
    assert "a changed digit found among ten" in written


def test_a_llava_reads_its_users_text_and_pages(tmp_path):
    """Pins `--text` and `--pages` that are read and not measured, and images without a text."""
    torch.manual_seed(0)
    save_llava(*build_llava(page_size=128), tmp_path / "llava")
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "scans").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (200, 100), "white").save(tmp_path / "scans" / f"{name}.png")
    (tmp_path / "scans" / "a.txt").write_text("eight by")  # 8 bytes on 4 vision tokens
    own = ("--text", str(tmp_path / "book.txt"), "--pages", str(tmp_path / "scans"))
    results = results_of(tmp_path / "llava.json", "--model", str(tmp_path / "llava"), *FEW, *own)
    found = shares(results, str(tmp_path / "llava"))
    assert {("book.txt", 1.0), ("book.txt", 3.0), ("scans", 2.0)} < found.keys()
    counted = {point["kind"]: point["pages"] for point in results["points"]}
    assert (counted["scans"], counted["book.txt"]) == (1, 2)


@needs_whole_model
def test_the_whole_deepseek_ocr_is_measured_in_a_mode_of_its_own(tmp_path):
    """Pins the processor's form of pages, which has an axis for tiles, and special tokens counted as page."""
    released = write_released(tmp_path / "released", tiny_whole_model())
    options = ("--model", str(released), "--mode", "tiny", "--num-pages", "1", "--ratios", "0.1")
    results = results_of(tmp_path / "whole.json", *options)
    assert results["page_size"] == 512
    assert results["vision_tokens"] == 73  # 64 tokens, a newline after each of 8 rows, a separator
    assert shares(results, str(released)).keys() == {(kind, 0.1) for kind in compression.KINDS}
