"""Text drawn on pages that the encoder can read, by Pillow alone: wrapped, page after page, black on white.

Text flows from characters to lines to pages. What would be drawn wrongly is not drawn: a character that no font has
is an error that names it, and so is writing that has to be shaped or runs from right to left, which Pillow's basic
layout cannot do. That layout is used even where Pillow has another one, so that the same text gives the same pixels
with the same Pillow on every machine.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from numbers import Integral
from typing import Any, NamedTuple, cast

from PIL import Image, ImageDraw, ImageFont, features

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import (
    list_some,
    require_integer,
    require_number,
    require_whole_tokens,
)
from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import TOKEN_SIZE


TAB_STOP = 4  # characters
PAPER, INK = 255, 0
NO_CHARACTER = "\uffff"  # no font can have it

FontFile = str | os.PathLike

_LINE_END = re.compile("\r\n|[\n\v\r\x85\u2028\u2029]")
_LAYOUT_CHARACTERS = frozenset("\n\v\r\x85\u2028\u2029\t\f ")
_VARIATION_SELECTOR = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
# Kana, Han, Hangul and full-width forms: written without spaces, so that a line may end after any of them.
_CJK = "\u2e80-\u2fff\u3000-\u312f\u3190-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_OPENING = "「『（［｛〈《【〔"  # noqa: RUF001
_CLOSING = "」』）］｝〉》】〕、。，．！？：；・ー々"  # noqa: RUF001
_PIECE = re.compile(rf" +|[{_OPENING}]*[{_CJK}][{_CLOSING}]*|[^ {_CJK}]+")


class TextPage(NamedTuple):
    """One page."""

    image: Image.Image  # of mode L, black on white
    text: str  # what is drawn on it: its lines as they were wrapped, separated by newlines


class TextRenderer:
    """Draws text on pages. Reading the fonts and measuring their characters happens once for all texts.

    Args:
        size: Height and width of a page in pixels, or its side if it is square; multiples of 64, one token for each
            64 x 64 pixels.
        font: A TrueType or OpenType file, or several: a character is drawn with the first that has it. By default the
            font that comes with Pillow, which has the characters of ASCII and a few more.
        font_size: Pixels of an em, at least 4.
        margin: Pixels left blank on each side.
        line_spacing: Distance between two baselines, as a multiple of the fonts' height (ascent and descent); at
            least 0.5, and from 1 on lines never overlap.
        replacement: A character to draw for each one that cannot be drawn. By default such text is refused.

    Raises:
        ImportError: Pillow is older than 10.1 or was built without FreeType.
        OSError: A font file is missing, is no font, or does not have this size.
        TypeError: An argument is of another type.
        ValueError: A number is out of range, the page has no room for a line, or no font has the replacement.
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 1024,
        font: FontFile | Iterable[FontFile] | None = None,
        font_size: float = 16,
        margin: int = 32,
        line_spacing: float = 1.0,
        replacement: str | None = None,
    ):
        self.height, self.width = _page_sides(size)
        self.margin = require_integer("margin", margin, at_least=0)
        self.fonts = _open_fonts(font, require_number("font_size", font_size, at_least=4))
        self._ascent, descent = (max(heights) for heights in zip(*(f.getmetrics() for f in self.fonts), strict=True))
        self._font_height = self._ascent + descent
        self._line_pitch = require_number("line_spacing", line_spacing, at_least=0.5) * self._font_height
        self._glyphs = {" ": _Glyph(0, self.fonts[0].getlength(" "))}
        self._missing: set[str] = set()
        if self.line_width < 1 or self.lines_per_page < 1:
            raise ValueError(
                f"`size` {self.height} x {self.width} (height x width) with `margin` {self.margin} has no room for a "
                f"line, which is {self._font_height} pixels high."
            )
        self._replacement = self._checked_replacement(replacement)

    # From text to pages

    def pages(self, text: str) -> Iterator[TextPage]:
        """Draw a text of any length, page by page, so that a long one needs the memory of one page.

        Lines are broken at spaces, between any two Chinese, Japanese or Korean characters, and within a word that is
        longer than a line. Spaces at such a break are not drawn; all others are, and so are line ends of any kind and
        empty lines. A tab is spaces up to the next multiple of 4 characters, a form feed begins a new page. A line
        end or form feed at the very end begins nothing, and an empty text is one blank page. Text is normalised (NFC),
        and characters that Unicode calls ignorable, such as a soft hyphen, are passed over.

        Args:
            text: What to draw.

        Returns:
            An iterator of pages. The text has been checked by the time it is returned.

        Raises:
            TypeError: `text` is no string.
            ValueError: Characters cannot be drawn and there is no `replacement`, or one is wider than a line; the
                message names them and where they are.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` is of type {type(text).__name__}; it has to be a string.")
        drawable = self._drawable(text)
        return (TextPage(self._draw(lines), "\n".join(lines)) for lines in self._paginate(drawable))

    def _paginate(self, text: str) -> Iterator[list[str]]:
        """Divide a text into the lines of each page."""
        for section in text.removesuffix("\f").split("\f"):
            lines = (line for paragraph in _paragraphs(section) for line in self._wrap(paragraph))
            while page := list(islice(lines, self.lines_per_page)):
                yield page

    def _wrap(self, paragraph: str) -> Iterator[str]:
        """Break a paragraph into lines that fit."""
        line, length = "", 0.0
        for piece in self._pieces(paragraph):
            piece_length = self._advance(piece)
            is_blank = piece.isspace()
            if line and not is_blank and not self._fits(line + piece, length + piece_length):
                yield line.rstrip(" ")
                line, length = "", 0.0
            line, length = line + piece, length + piece_length
        yield line.rstrip(" ")

    def _pieces(self, paragraph: str) -> Iterator[str]:
        """What stays together on a line: words, single CJK characters with their punctuation, spaces between them."""
        for piece in _PIECE.findall(paragraph):
            while not piece.isspace() and not self._fits(piece, self._advance(piece)):
                end = self._longest_start(piece)
                yield piece[:end]
                piece = piece[end:]
            yield piece

    def _longest_start(self, word: str) -> int:
        """How many of a long word's characters fit on a line of their own. Marks stay with their letter."""
        ends = [index for index in range(1, len(word)) if not unicodedata.combining(word[index])]
        fitting = 0
        for end in ends:
            if not self._fits(word[:end], self._advance(word[:end])):
                break
            fitting = end
        if not fitting:
            raise ValueError(
                f"{_named(word[0])} is wider than a line of {self.line_width} pixels; `font_size` is too large for "
                f"`size` {self.height} x {self.width} (height x width) with `margin` {self.margin}."
            )
        return fitting

    # What a line measures

    @property
    def line_width(self) -> int:
        """Pixels from margin to margin."""
        return self.width - 2 * self.margin

    @property
    def lines_per_page(self) -> int:
        """Lines from the upper to the lower margin."""
        return 1 + int((self.height - 2 * self.margin - self._font_height) // self._line_pitch)

    def _advance(self, text: str) -> float:
        """Pixels that a text takes, but for kerning."""
        return sum(self._glyphs[character].advance for character in text)

    def _fits(self, line: str, length: float) -> bool:
        """Whether a line has room, all of its ink included. `length` is what its characters take one by one."""
        # Measuring a line exactly takes long. One far from its end needs no look at kerning and overhang.
        if length + 2 * self._font_height < self.line_width:
            return True
        left, right = self._extent(line)
        return right - left <= self.line_width

    def _extent(self, line: str) -> tuple[float, float]:
        """Where a line's ink begins, at most 0, and where ink and advance end, in pixels from its origin."""
        left = right = 0.0
        for font, run, position in self._runs(line):
            box = font.getbbox(run, anchor="ls")  # its right end is that of the advance if the ink ends before
            left, right = min(left, position + box[0]), max(right, position + box[2])
        return left, right

    def _runs(self, line: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str, float]]:
        """Divide a line where the font changes: font, text, and where it begins in pixels from the line's origin."""
        if len(self.fonts) == 1:
            yield self.fonts[0], line, 0.0
            return
        position = 0.0
        for index, characters in groupby(line, key=lambda character: self._glyphs[character].font_index):
            font, run = self.fonts[index], "".join(characters)
            yield font, run, position
            position += font.getlength(run)

    # Ink

    def _draw(self, lines: list[str]) -> Image.Image:
        """Draw the lines of one page."""
        page = Image.new("L", (self.width, self.height), color=PAPER)
        canvas = ImageDraw.Draw(page)
        for index, line in enumerate(lines):
            baseline = self.margin + self._ascent + int(index * self._line_pitch)
            origin = self.margin - self._extent(line)[0]
            for font, run, position in self._runs(line) if line else ():
                canvas.text((origin + position, baseline), run, fill=INK, font=font, anchor="ls")
        return page

    # Characters

    def _drawable(self, text: str) -> str:
        """A text with nothing in it that cannot be drawn, or an error that says what is."""
        normal = unicodedata.normalize("NFC", text)
        replaced: dict[int, str | None] = {}
        refused = []
        for character in sorted(set(normal) - _LAYOUT_CHARACTERS):
            if _is_ignorable(character):
                replaced[ord(character)] = None
            elif not self._can_draw(character):
                replaced[ord(character)] = self._replacement
                refused.append(character)
        if refused and self._replacement is None:
            raise ValueError(_why_refused(refused, text))
        return normal.translate(replaced) if replaced else normal

    def _can_draw(self, character: str) -> bool:
        """Whether some font has a character, and the basic layout gets it right."""
        if character not in self._glyphs and character not in self._missing:
            fonts = () if _needs_shaping(character) else enumerate(self.fonts)
            found = (_Glyph(index, font.getlength(character)) for index, font in fonts if _has_glyph(font, character))
            glyph = next(found, None)
            if glyph is None:
                self._missing.add(character)
            else:
                self._glyphs[character] = glyph
        return character in self._glyphs

    def _checked_replacement(self, replacement: str | None) -> str | None:
        if replacement is None:
            return None
        if not isinstance(replacement, str):
            raise TypeError(f"`replacement` is {replacement!r}; it has to be one character, or None.")
        if len(replacement) != 1:
            raise ValueError(f"`replacement` is {replacement!r}; it has to be one character, or None.")
        if not self._can_draw(replacement):
            raise ValueError(f"`replacement`: {_why_refused([replacement], replacement)}")
        return replacement


def text_to_pages(text: str, **options: Any) -> list[Image.Image]:
    """Draw a text on as many pages as it takes.

    Args:
        text: What to draw.
        options: As `TextRenderer` takes them, such as `size` and `font_size`. That class is also for many texts, for a
            long one page by page, and for the text that is on each page.

    Returns:
        The pages in order, at least one, of mode L: black on white.

    Raises:
        ImportError, OSError, TypeError, ValueError: As by `TextRenderer` and its `pages`.
    """
    return [page.image for page in TextRenderer(**options).pages(text)]


# Text


def _paragraphs(section: str) -> list[str]:
    """What stands between line ends, tabs made spaces."""
    paragraphs = _LINE_END.split(section)
    if len(paragraphs) > 1 and not paragraphs[-1]:
        del paragraphs[-1]
    return [paragraph.expandtabs(TAB_STOP) for paragraph in paragraphs]


def _is_ignorable(character: str) -> bool:
    """Whether a character is drawn as nothing by what Unicode says of it: format controls, variation selectors."""
    is_control = unicodedata.category(character) == "Cf" and not _needs_shaping(character)
    return is_control or _VARIATION_SELECTOR.match(character) is not None


def _needs_shaping(character: str) -> bool:
    """Whether a character runs from right to left, or joins or changes places with its neighbours."""
    runs_left = unicodedata.bidirectional(character) in ("R", "AL", "AN", "RLE", "RLO", "RLI")
    virama = 9  # the combining class of the signs that join Indic consonants
    return runs_left or unicodedata.category(character) == "Mc" or unicodedata.combining(character) == virama


def _named(character: str) -> str:
    """A character for people: itself, its code point and its name."""
    name = unicodedata.name(character, "")
    return f"{character!r} (U+{ord(character):04X}{' ' * bool(name)}{name})"


def _why_refused(characters: list[str], text: str) -> str:
    """What cannot be drawn, where it first is, and what can be done."""

    def described(character: str) -> str:
        position = text.find(character)
        where = f" at {position}" if position >= 0 else ""
        return f"{_named(character)}{where}{', which needs shaping' * _needs_shaping(character)}"

    listed = list_some([described(character) for character in sorted(characters, key=text.find)], separator="; ")
    return (
        f"These characters cannot be drawn: {listed}. Give a `font` that has them, or a `replacement`; scripts "
        "that need shaping or run from right to left are not supported."
    )


# Fonts


class _Glyph(NamedTuple):
    """Which of the fonts has a character, and the pixels that it takes on a line."""

    font_index: int
    advance: float


def _open_fonts(font: FontFile | Iterable[FontFile] | None, size: float) -> list[ImageFont.FreeTypeFont]:
    if not features.check("freetype2"):
        raise ImportError("Drawing text needs Pillow with FreeType, and this one was built without it.")
    if font is None:
        try:
            return [cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))]
        except TypeError as error:
            raise ImportError(
                "The font that comes with Pillow needs Pillow 10.1 or newer; or name a `font`."
            ) from error
    files = [font] if isinstance(font, FontFile) else font
    if not isinstance(files, Iterable):
        raise TypeError(f"`font` is of type {type(font).__name__}; it has to be a path, several paths, or None.")
    fonts = [_open_font(file, size) for file in files]
    if not fonts:
        raise ValueError("`font` is empty; it has to name at least one file, or be None.")
    return fonts


def _open_font(file: FontFile, size: float) -> ImageFont.FreeTypeFont:
    if not isinstance(file, FontFile):
        raise TypeError(f"`font` holds {file!r} of type {type(file).__name__}; it has to be a path.")
    if not os.path.isfile(file):
        # Pillow would look for a font of that name in the system's folders, and find another one on each machine.
        raise FileNotFoundError(f"`font`: there is no file {os.fspath(file)!r}.")
    try:
        return ImageFont.truetype(os.fspath(file), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise OSError(f"`font`: {os.fspath(file)!r} cannot be used at size {size}: {error}.") from error


def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether a font has a character. Pillow does not say, but draws the same sign for all that it has not."""
    category = unicodedata.category(character)
    if category in ("Cc", "Cs"):
        return False
    pixels, *measures = _ink(font, character)
    is_blank = not any(pixels)
    return is_blank if category == "Zs" else not is_blank and (pixels, *measures) != _ink(font, NO_CHARACTER)


def _ink(font: ImageFont.FreeTypeFont, character: str) -> tuple[bytes, tuple[int, int], float]:
    """The pixels that a font draws for a character, their width and height, and what it takes on a line."""
    mask = font.getmask(character, mode="L")
    return bytes(mask), mask.size, font.getlength(character)


# Arguments


def _page_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    sides = (size, size) if isinstance(size, Integral) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise TypeError(f"`size` is {size!r}; it has to be an integer or a pair (height, width).")
    for side in sides:
        require_integer("size", side, at_least=TOKEN_SIZE)
    require_whole_tokens("`size`", *sides, token_size=TOKEN_SIZE)
    return int(sides[0]), int(sides[1])
