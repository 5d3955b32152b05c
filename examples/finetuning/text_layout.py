"""Text in many scripts on lines: fonts that have its characters, and where the lines are broken."""

import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont
from rapidfuzz.distance import Levenshtein


logger = logging.getLogger("finetune")

FONT_SIZE = 19  # pixels
FONT_PACKAGES = {
    "CJK": "fonts-noto-cjk",
    "HIRAGANA": "fonts-noto-cjk",
    "KATAKANA": "fonts-noto-cjk",
    "HANGUL": "fonts-noto-cjk",
}
OTHER_FONT_PACKAGE = "fonts-noto-core"


class Piece(NamedTuple):
    """Some text, and whether it is one of the differences."""

    text: str
    differs: bool


def compared(written: str, read: str) -> tuple[list[Piece], list[Piece]]:
    """What is written and what was read, in pieces that agree and pieces that do not."""
    left, right = [], []
    for step in Levenshtein.opcodes(written, read):
        differs = step.tag != "equal"
        left.append(Piece(written[step.src_start : step.src_end], differs))
        right.append(Piece(read[step.dest_start : step.dest_end], differs))
    return [piece for piece in left if piece.text], [piece for piece in right if piece.text]


# Fonts


@lru_cache
def default_font() -> str:
    """DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic, Arabic, Hebrew and more."""
    return font_manager.findfont("DejaVu Sans")


@lru_cache
def characters_of(font: str) -> frozenset[int]:
    """The characters that a font has; none if it cannot be read."""
    try:
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def fonts_for(texts: Iterable[str]) -> list[str]:
    """Font files that have all characters between them, as far as such are installed; says what to install else."""
    needed = {ord(character) for text in texts for character in text if not character.isspace()}
    fonts = [default_font()]
    needed -= characters_of(fonts[0])
    for font in sorted(font_manager.findSystemFonts()) if needed else []:
        found = needed & characters_of(font)
        if found:
            fonts.append(font)
            needed -= found
        if not needed:
            break
    if needed:
        packages = sorted({package_for(chr(character)) for character in needed})
        shown = " ".join(chr(character) for character in sorted(needed)[:10])
        logger.warning(
            "No font here has %s and %d more characters; predictions.png shows boxes for them, report.html what the "
            "browser has. On Debian and Ubuntu: apt install %s",
            shown,
            max(0, len(needed) - 10),
            " ".join(packages),
        )
    return fonts


def package_for(character: str) -> str:
    """The package whose fonts have a character."""
    script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return FONT_PACKAGES.get(script, OTHER_FONT_PACKAGE)


# Text on lines


class Span(NamedTuple):
    """Some characters on a line, in one font."""

    text: str
    font: ImageFont.FreeTypeFont
    differs: bool
    left: float
    width: float


class Writer:
    """Wraps text in as many fonts as it needs.

    Args:
        fonts: Font files; a character is drawn with the first that has it.
        width: Pixels of a line.
    """

    def __init__(self, fonts: Sequence[str], width: int):
        self.fonts = [(characters_of(font), ImageFont.truetype(font, FONT_SIZE)) for font in fonts]
        self.width = width

    def lines(self, pieces: Sequence[Piece]) -> list[list[Span]]:
        """Break pieces into lines: at newlines, behind spaces, and within what is longer than a line."""
        lines: list[list[Span]] = [[]]
        used = 0.0
        for text, font, differs in self.chunks(pieces):
            width = font.getlength(text.rstrip("\n"))
            if used and used + width > self.width:
                lines.append([])
                used = 0.0
            lines[-1].append(Span(text, font, differs, used, width))
            used += width
            if text.endswith("\n"):
                lines.append([])
                used = 0.0
        return lines

    def chunks(self, pieces: Sequence[Piece]) -> Iterator[tuple[str, ImageFont.FreeTypeFont, bool]]:
        """What stays together: characters of one font and one kind, up to a space, a newline or a line's width."""
        for piece in pieces:
            chunk, chosen = "", self.fonts[0][1]
            for character in piece.text.replace("\t", "    "):
                font = self.font_of(character)
                is_wide = unicodedata.east_asian_width(character) in "WF"
                if chunk and (font is not chosen or chunk[-1] in " \n" or is_wide or self.is_full(chunk, font)):
                    yield chunk, chosen, piece.differs
                    chunk = ""
                chunk, chosen = chunk + character, font
            if chunk:
                yield chunk, chosen, piece.differs

    def is_full(self, chunk: str, font: ImageFont.FreeTypeFont) -> bool:
        """Whether one more character might not fit on a line."""
        return len(chunk) > 20 and font.getlength(chunk) > self.width - 2 * FONT_SIZE

    def font_of(self, character: str) -> ImageFont.FreeTypeFont:
        """The first font that has a character, or else the first."""
        return next((font for characters, font in self.fonts if ord(character) in characters), self.fonts[0][1])
