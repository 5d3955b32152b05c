"""Every page looked at once, before anything is trained: what is wrong is found together, with its place."""

import hashlib
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from finetuning.own_pages import Finding, Table, decoded, image_bytes
from finetuning.page_size import line_height


logger = logging.getLogger("finetune")

NUM_SHOWN_PLACES = 20
NUM_MEASURED_PAGES = 64  # pages of each split whose lines are measured
NUM_TEXTS_AT_ONCE = 1000
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\u2028\u2029\ufeff]")


@dataclass
class Inspection:
    """What was seen of the pages of one split, row by row.

    Attributes:
        digests: Of each image's bytes.
        shapes: Height and width of each image, in pixels; 0 and 0 if it cannot be read.
        line_heights: Height of a line of text, in pixels, where it was measured.
        num_tokens: Tokens of each text.
        findings: What the user should know.
    """

    digests: list[str] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    line_heights: dict[int, float] = field(default_factory=dict)
    num_tokens: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def inspect(table: Table, *, name: str, processor: LlavaProcessor, show_progress: bool) -> Inspection:
    """Look at every image and every text of a split, once.

    Args:
        table: The rows.
        name: The split's, for the progress bar.
        processor: Its tokenizer has to know the texts.
        show_progress: Whether to show a bar.
    """
    found = Inspection()
    measured = measured_rows(len(table))
    with ThreadPoolExecutor() as threads:  # reading and decoding leave Python free
        looks = bounded_map(threads, lambda row: look(table, row, measure=row in measured), range(len(table)))
        for row, seen in enumerate(tqdm(looks, f"Checking {name} pages", len(table), disable=not show_progress)):
            digest, shape, height, error = seen
            found.digests.append(digest)
            found.shapes.append(shape)
            if height is not None:
                found.line_heights[row] = height
            if error:
                found.findings.append(Finding("images that cannot be read", table.places[row], error))
    inspect_texts(table, processor, found)
    return found


def measured_rows(num_rows: int) -> set[int]:
    """The rows whose lines are measured: at random, as pages of two kinds may take turns; the same in every run."""
    return set(random.Random(0).sample(range(num_rows), min(num_rows, NUM_MEASURED_PAGES)))


def bounded_map(threads: ThreadPoolExecutor, function: Any, items: Sequence[int]) -> Iterator[Any]:
    """As `threads.map`, but holding only some results at a time."""
    for start in range(0, len(items), 64):
        yield from threads.map(function, items[start : start + 64])


def look(table: Table, row: int, *, measure: bool) -> tuple[str, tuple[int, int], float | None, str]:
    """An image's digest, shape, height of a line, and why it cannot be read."""
    try:
        content = image_bytes(table.images[row])
        image = decoded(content, "the image" if isinstance(table.images[row], dict) else str(table.images[row]))
    except (OSError, ValueError) as error:
        return "", (0, 0), None, f"{type(error).__name__}: {error}"
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return digest, (image.height, image.width), line_height(image) if measure else None, ""


# Texts


def inspect_texts(table: Table, processor: LlavaProcessor, found: Inspection) -> None:
    """Look at every text, and count its tokens."""
    tokenizer = processor.tokenizer
    for start in range(0, len(table), NUM_TEXTS_AT_ONCE):
        rows = range(start, min(start + NUM_TEXTS_AT_ONCE, len(table)))
        texts = [table.texts[row] for row in rows]
        places = table.places[start : rows.stop]
        for text, place in zip(texts, places, strict=True):
            found.findings += text_findings(text, place, tokenizer)
        known = [text if isinstance(text, str) else "" for text in texts]
        token_ids = tokenizer(known, add_special_tokens=False)["input_ids"]
        found.num_tokens += [len(ids) for ids in token_ids]
        found.findings += unknown_characters(known, token_ids, places, tokenizer)


def text_findings(text: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """What is wrong or unusual with one text."""
    if text is None:
        yield Finding("texts that are missing", place)
    elif not isinstance(text, str):
        yield Finding("texts that are no strings; numbers have lost their leading zeros", place, repr(text))
    elif not text.strip():
        yield Finding("texts that are empty or blank", place, repr(text))
    else:
        specials = sorted(token for token in tokenizer.all_special_tokens if token in text)
        if specials:
            yield Finding("texts that hold a special token of the tokenizer", place, ", ".join(specials))
        invisible = sorted({f"U+{ord(character):04X}" for character in INVISIBLE.findall(text)})
        if invisible:
            yield Finding("texts with invisible characters", place, ", ".join(invisible), is_error=False)


def unknown_characters(
    texts: list[str], token_ids: list[list[int]], places: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Finding]:
    """Texts that the tokenizer does not give back, and the characters that are lost."""
    for text, ids, place in zip(texts, token_ids, places, strict=True):
        returned = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if returned.strip() != text.strip():
            lost = Counter(text) - Counter(returned)
            named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in list(lost)[:10])
            kind = "texts that the tokenizer does not give back"
            yield Finding(kind, place, f"lost: {named}" if lost else "in another order or spacing", is_error=False)


def too_long(table: Table, found: Inspection, *, image_tokens: int, positions: int | None) -> Iterator[Finding]:
    """Texts for which the language model has not enough positions, after the page's tokens and before its end."""
    for place, number in zip(table.places, found.num_tokens, strict=True):
        if positions is not None and image_tokens + number + 1 > positions:
            detail = f"{image_tokens} tokens of the page and {number} of the text"
            yield Finding(f"texts longer than the language model's {positions} positions", place, detail)


def overlaps(tables: dict[str, Table], inspections: dict[str, Inspection], held_out: str) -> Iterator[Finding]:
    """Held-out pages that are trained on too: the same image, or the same text on another."""
    images = first_places(tables["train"].places, inspections["train"].digests)
    texts = first_places(tables["train"].places, tables["train"].texts)
    rows = zip(inspections[held_out].digests, tables[held_out].texts, tables[held_out].places, strict=True)
    for digest, text, place in rows:
        if digest and digest in images:
            yield Finding("held-out pages whose image is trained on too", place, images[digest], is_error=False)
        elif isinstance(text, str) and text in texts:
            yield Finding("held-out pages whose text is trained on, on another image", place, texts[text], False)


def first_places(places: Iterable[str], values: Iterable[Any]) -> dict[Any, str]:
    """The first place of each value."""
    found: dict[Any, str] = {}
    for place, value in zip(places, values, strict=True):
        if isinstance(value, str) and value:
            found.setdefault(value, place)
    return found


def fingerprint(parts: dict[str, tuple[Sequence[str], Sequence[Any]]]) -> str:
    """A digest of all pages: of each split the images' digests and the texts, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, (images, texts) in parts.items():
        for image, text in zip(images, texts, strict=True):
            digest.update(repr((name, image, text)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# Saying it


def summarised(findings: Iterable[Finding]) -> list[str]:
    """A line for each kind of finding, with the first of its places."""
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
    lines = []
    for kind, found in kinds.items():
        shown = "; ".join(
            f"{one.place} ({one.detail})" if one.detail else one.place for one in found[:NUM_SHOWN_PLACES]
        )
        more = f"; and {len(found) - NUM_SHOWN_PLACES} more" if len(found) > NUM_SHOWN_PLACES else ""
        lines.append(f"{len(found)} {kind}: {shown}{more}")
    return lines


def raise_errors(findings: Iterable[Finding]) -> None:
    """Stop if anything was found that nothing can be trained with.

    Raises:
        ValueError: All of it, kind by kind.
    """
    lines = summarised(finding for finding in findings if finding.is_error)
    if lines:
        raise ValueError("The data cannot be trained on as it is.\n" + "\n".join(f"- {line}" for line in lines))
