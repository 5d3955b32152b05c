"""Text drawn on pages, `processing/text_pages.py`: all of it is drawn, in its place, and nothing wrongly."""

import re
import unicodedata
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from PIL import Image, ImageFont, features

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor
from deepseek_ocr_vision.processing import text_pages
from deepseek_ocr_vision.processing.text_pages import TextRenderer, text_to_pages


pytestmark = pytest.mark.skipif(not features.check("freetype2"), reason="Pillow was built without FreeType")

TOPIC = topics["lambda"]  # real text with paragraphs, quotes and indented lines
SMALL = {"size": 128, "font_size": 12, "margin": 8}


def matplotlib_font(name: str) -> Path:
    """A font with more than Latin letters; the package itself brings none."""
    matplotlib = pytest.importorskip("matplotlib")
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


@pytest.fixture
def wide_font() -> Path:
    """A font that seems to have every character, Chinese ones too: it draws a frame with the block's name."""
    font = matplotlib_font("LastResortHE-Regular.ttf")
    if not font.is_file():
        pytest.skip("this version of matplotlib has no font with every character")
    return font


def texts(text: str, **options) -> list[str]:
    return [page.text for page in TextRenderer(**(SMALL | options)).pages(text)]


def lines(text: str, **options) -> list[str]:
    return "\n".join(texts(text, **options)).split("\n")


def ink(image: Image.Image) -> np.ndarray:
    """Where a page is not white, [height, width]."""
    return np.asarray(image) < 255


# What is drawn


def test_every_character_of_a_long_text_is_on_some_page_in_order():
    """Pins a word lost at a line's end, at a page's end, or when it is broken."""
    pages = texts(TOPIC)
    assert len(pages) > 5
    assert "".join("".join(pages).split()) == "".join(TOPIC.split())


def test_what_a_page_says_is_on_it_is_what_is_drawn():
    """Pins a text beside the image that is not the image's, as one to train on would be wrong in silence."""
    for page in TextRenderer(**SMALL).pages(TOPIC):
        (alone,) = text_to_pages(page.text, **SMALL)
        assert ink(page.image).any()
        assert page.image.tobytes() == alone.tobytes()


@pytest.mark.parametrize("name", [None, "DejaVuSerif-Italic.ttf", "STIXGeneralItalic.ttf"])
def test_no_ink_is_in_the_margins(name):
    """Pins letters that stand out beyond their advance, and kerning that makes a line longer than its letters."""
    font = None if name is None else matplotlib_font(name)
    margin = 16
    for image in text_to_pages(
        f"{TOPIC} " + "ffjfj fjjf VAVA " * 40, font=font, font_size=20, margin=margin, size=256
    ):
        margins = ink(image)
        margins[margin:-margin, margin:-margin] = False
        assert not margins.any()


def test_lines_do_not_overlap():
    """Pins a line pitch of the font's size, in which the p of one line runs into the b of the next."""
    upper, lower = (ink(text_to_pages(text, **SMALL)[0]) for text in ("pgjy|", "\nbdfT|"))
    (both,) = text_to_pages("pgjy|\nbdfT|", **SMALL)
    assert upper.any(axis=1).nonzero()[0].max() < lower.any(axis=1).nonzero()[0].min()
    assert (ink(both) == upper | lower).all()


def test_the_same_text_gives_the_same_pixels():
    """Pins state carried from text to text, such as a cache of widths that is filled differently."""
    renderer = TextRenderer(**SMALL)
    first = [page.image.tobytes() for page in renderer.pages(TOPIC)]
    list(renderer.pages("other characters: {|}~"))
    assert [page.image.tobytes() for page in renderer.pages(TOPIC)] == first
    assert [image.tobytes() for image in text_to_pages(TOPIC, **SMALL)] == first


def test_pages_are_what_the_image_processor_reads():
    """Pins a mode or size that the encoder's image processor refuses or scales."""
    pages = text_to_pages(TOPIC[:100], size=(64, 128), margin=4, font_size=12)
    assert {(page.mode, page.size) for page in pages} == {("L", (128, 64))}
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr-encoder", size=(64, 128))
    assert processor(pages, return_tensors="pt")["pixel_values"].shape == (len(pages), 3, 64, 128)


def test_pages_are_drawn_one_at_a_time():
    """Pins a book held in memory as images: a million pages are asked for here, and one is drawn."""
    pages = TextRenderer(**SMALL).pages("a\f" * 1_000_000)
    assert next(iter(pages)).text == "a"


# Lines and pages


def test_lines_break_at_spaces_which_are_not_drawn_there():
    """Pins words cut in two where they would fit on the next line, and lines that begin with a space."""
    broken = lines("the quick brown fox jumps over the lazy dog " * 3)
    assert all(line == line.strip() for line in broken)
    assert " ".join(broken).split() == ("the quick brown fox jumps over the lazy dog " * 3).split()


def test_no_line_could_have_taken_the_next_word():
    """Pins lines broken too early, which make pages emptier than they need be."""
    renderer = TextRenderer(**SMALL)
    words = " ".join(TOPIC.split())
    broken = lines(words)
    for line, following in pairwise(broken):
        left, right = renderer._extent(f"{line} {following.split()[0]}")
        assert right - left > renderer.line_width


def test_a_word_longer_than_a_line_is_broken_to_fill_lines():
    """Pins a long word that runs out of the page, or an endless loop."""
    word = "".join(chr(ord("a") + index % 26) for index in range(200))
    broken = lines(f"so {word} it is")
    assert broken[0].startswith("so")
    assert "".join("".join(broken).split()) == f"so{word}itis"
    assert len({len(line) for line in broken[1:-1]}) <= 6


def test_a_word_too_long_for_the_rest_of_a_line_begins_a_new_one():
    """Pins a long word whose first letters are squeezed behind the one before."""
    broken = lines(f"so {'m' * 30}")
    assert broken[0] == "so"
    assert set("".join(broken[1:])) == {"m"}


def test_paragraphs_indentation_and_empty_lines_stay():
    """Pins source code and lists whose structure is lost."""
    assert lines("def f():\n    return 1\n\n* a  b") == ["def f():", "    return 1", "", "* a  b"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\v", "\x85", "\u2028", "\u2029"])
def test_line_ends_of_any_kind_end_a_line_once(end):
    """Pins CRLF drawn as two line ends, or its half as a character that no font has."""
    assert lines(f"a{end}b{end}{end}c{end}") == ["a", "b", "", "c"]


def test_a_tab_reaches_the_next_multiple_of_four_characters():
    """Pins a tab drawn as the sign for a missing character."""
    assert lines("a\tb\tc\n\td") == ["a   b   c", "    d"]


def test_a_form_feed_begins_a_new_page_and_one_at_the_end_none():
    """Pins text from `pdftotext`, which ends each page so, with a blank page at its end."""
    assert texts("one\ntwo\f\nthree\f") == ["one\ntwo", "\nthree"]
    assert texts("one\n\f\ftwo") == ["one", "", "two"]


@pytest.mark.parametrize("text", ["", "\n", "\f", "   "])
def test_a_text_without_ink_is_one_blank_page(text):
    """Pins no page at all, which stops an image processor far from the cause."""
    (page,) = TextRenderer(**SMALL).pages(text)
    assert page.text == ""
    assert not ink(page.image).any()


def test_chinese_breaks_anywhere_but_before_closing_punctuation(wide_font):
    """Pins a paragraph without spaces taken for one long word, and lines that begin with a full stop."""
    text = "光學記憶以圖像保存文字。「頁面」變為標記，" * 4  # noqa: RUF001
    broken = lines(text, font=wide_font)
    assert len(broken) > 4
    assert "".join(broken) == text
    assert not [line for line in broken if line[0] in "。，」"]  # noqa: RUF001
    assert not [line for line in broken if line[-1] == "「"]


def test_marks_stay_with_their_letter_when_a_word_is_broken():
    """Pins an accent alone at the beginning of a line."""
    font = matplotlib_font("DejaVuSansMono.ttf")  # in which marks are as wide as letters
    letter = "x\u0323"  # no single character is both
    broken = lines(letter * 60, font=font, margin=4)
    assert len(broken) > 2
    assert all(len(line) % 2 == 0 and line[0] == "x" for line in broken)


# Characters that fonts have and have not


def test_characters_that_no_font_has_are_named_with_their_places():
    """Pins the empty frames that a font draws instead, which nobody notices among a thousand pages."""
    with pytest.raises(ValueError, match=re.escape("'漢' (U+6F22 CJK UNIFIED IDEOGRAPH-6F22) at 3")) as caught:
        TextRenderer(**SMALL).pages("abc漢字\x07")
    assert "U+5B57" in str(caught.value)
    assert "U+0007" in str(caught.value)


def test_a_long_list_of_missing_characters_is_cut():
    """Pins an error message of thousands of lines for a Chinese book."""
    with pytest.raises(ValueError, match="and 190 more") as caught:
        text_to_pages("".join(map(chr, range(0x4E00, 0x4E00 + 200))))
    assert len(str(caught.value)) < 1000


def test_a_replacement_is_drawn_where_asked_for():
    """Pins a replacement that takes no place, or that replaces more than what is missing."""
    assert texts("a漢\x07b\tc", replacement="?") == ["a??b    c"]


@pytest.mark.parametrize("name", ["DejaVuSans.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf", "cmr10.ttf"])
def test_a_font_has_what_its_own_table_says(name):
    """Pins the guess by pixels: Pillow does not tell what a font has, fontTools does."""
    font_tools = pytest.importorskip("fontTools.ttLib")
    path = matplotlib_font(name)
    font = text_pages._open_font(path, 12)
    inside = font_tools.TTFont(path).getBestCmap().keys()
    invisible = {0x34F, 0x2028, 0x2029, 0x2800}  # drawn as nothing, and so refused although they are in some fonts
    wrong = {
        hex(code)
        for code in set(range(0x20, 0x2C00, 3)) - invisible
        if unicodedata.category(chr(code)) not in ("Cc", "Cf", "Zs")
        and text_pages._has_glyph(font, chr(code)) != (code in inside)
    }
    assert not wrong


def test_a_second_font_helps_out():
    """Pins fallback fonts that are opened and never asked."""
    mono, math = matplotlib_font("DejaVuSansMono.ttf"), matplotlib_font("STIXNonUni.ttf")
    missing = "\ue0f2"  # private, in the second font alone
    with pytest.raises(ValueError, match="U\\+E0F2"):
        text_to_pages(missing, font=mono)
    (page,) = text_to_pages(f"a{missing}", font=(mono, math), **SMALL)
    (without,) = text_to_pages("a", font=(mono, math), **SMALL)
    assert ink(page).sum() > ink(without).sum()
    assert (ink(page) >= ink(without)).all()


@pytest.mark.parametrize("text", ["שלום", "مرحبا", "\u202eabc", "कि", "\u200f"])
def test_writing_that_needs_shaping_is_refused_even_if_the_font_has_it(text, wide_font):
    """Pins Hebrew drawn backwards and Arabic in single letters, which Pillow's basic layout does without a word."""
    with pytest.raises(ValueError, match="needs shaping"):
        text_to_pages(text, font=wide_font)


def test_text_is_normalised_and_ignorable_characters_are_passed_over():
    """Pins an accent drawn beside its letter, and frames for soft hyphens and byte order marks."""
    font = matplotlib_font("DejaVuSans.ttf")
    assert texts("\ufeffcafe\u0301 co\u00adop\u200d\ufe0f", font=font) == ["caf\u00e9 coop"]


def test_a_missing_space_of_another_width_is_drawn_blank():
    """Pins a no-break space, which many texts have, refused because it has no ink."""
    font = matplotlib_font("DejaVuSans.ttf")
    assert texts("a\u00a0b\u2003c", font=font) == ["a\u00a0b\u2003c"]


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 100}, ValueError, "`size` is 100"),
        ({"size": 0}, ValueError, "at least 64"),
        ({"size": (64, 100)}, ValueError, "multiples of 64"),
        ({"size": 128.0}, TypeError, "`size` is 128.0"),
        ({"size": (64,)}, TypeError, "pair"),
        ({"size": True}, TypeError, "`size` is True"),
        ({"font_size": 0}, ValueError, "`font_size` is 0"),
        ({"font_size": float("nan")}, ValueError, "`font_size` is nan"),
        ({"font_size": "16"}, TypeError, "`font_size` is '16'"),
        ({"margin": -1}, ValueError, "`margin` is -1"),
        ({"margin": 1.5}, TypeError, "`margin` is 1.5"),
        ({"margin": 64}, ValueError, "no room"),
        ({"margin": 58, "font_size": 20}, ValueError, "no room"),
        ({"line_spacing": 0}, ValueError, "`line_spacing` is 0"),
        ({"replacement": ""}, ValueError, "one character"),
        ({"replacement": "漢"}, ValueError, "`replacement`: .* U\\+6F22|U\\+6F22"),
        ({"font": 7}, TypeError, "`font` is of type int"),
        ({"font": [7]}, TypeError, "`font` holds 7"),
        ({"font": []}, ValueError, "`font` is empty"),
        ({"font": "nowhere.ttf"}, FileNotFoundError, "nowhere.ttf"),
        ({"font": __file__}, OSError, "test_text_pages.py"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(options, error, message):
    """Pins errors from within FreeType, and pages without a line."""
    with pytest.raises(error, match=message):
        text_to_pages("text", **({"size": 128} | options))


def test_a_text_that_is_no_string_is_refused():
    """Pins bytes, which would be iterated over as numbers."""
    with pytest.raises(TypeError, match="bytes"):
        text_to_pages(b"text")


def test_a_character_wider_than_a_line_is_refused():
    """Pins an endless loop over a character that fits nowhere."""
    with pytest.raises(ValueError, match=r"'m' \(U\+006D LATIN SMALL LETTER M\) is wider than a line of 12 pixels"):
        text_to_pages("m", size=(128, 64), font_size=24, margin=26)


def test_an_old_pillow_is_named(monkeypatch):
    """Pins a TypeError about `load_default` from Pillow before 10.1, whose default font has one small size."""

    def load_default() -> None:
        """As in Pillow 10.0."""

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    with pytest.raises(ImportError, match=r"Pillow 10\.1"):
        text_to_pages("text")
