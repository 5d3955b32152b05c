"""Measure how much of a text is read back from its page, by tokens of text for each vision token.

    python -m benchmarks.compression                     # small models, trained here
    python -m benchmarks.compression --quick             # the same with few steps and one seed
    python -m benchmarks.compression --model deepseek-ai/DeepSeek-OCR --mode base --device cuda
    python -m benchmarks.compression --model outputs/my_llava --text book.txt --pages scans/

A text of so many tokens is drawn on one page, in the largest letters with which it fits, and a model reads it. Kinds
of text: English, the same words shuffled, and its letters replaced by random letters or digits, so that all look alike
on the page; --text has a file of yours, --pages a folder of images with a .txt beside each. Without --model, small
models are trained alike, on small letters and digits: with this encoder, with it frozen as it was initialised, and
with patches of 16 x 16 pixels brought to as many tokens by their mean or by a convolution. Truncation keeps as many
tokens of text as the page has vision tokens, and "another page" compares what was read with the text of the page after
it, which is the share that comes without reading. Then one digit of a page is changed, and the changed page, with
noise on it, is looked for among ten: by the distance of the token that differs most, and by that of the mean over
tokens.
"""

import argparse
import json
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.environment import environment, load
from deepseek_ocr_vision import ImageTextCollator
from deepseek_ocr_vision.composites import IMAGE_TOKEN, build_llava
from deepseek_ocr_vision.processing.text_pages import TextRenderer


KINDS = ENGLISH, SHUFFLED, LETTERS, DIGITS = "English", "words shuffled", "random letters", "digits"
ARMS = TRAINED, FROZEN, MEAN, CONVOLUTION = "encoder trained", "encoder frozen", "mean of patches", "convolution"
BESIDES = TRUNCATED, ANOTHERS = "truncated text", "another page"
COLORS = dict(zip((*ARMS, *BESIDES), ("#1f5fa8", "#7fa9d6", "#d9822b", "#5b8c5a", "#888888", "#bbbbbb"), strict=True))
UNITS = ("characters", "words")
SMALL_RATIOS, RATIOS = (1, 2, 3, 4, 6, 8), (2.5, 5, 7.5, 10, 12.5, 15, 20)
SMALLEST_FONT, CHARACTERS_A_TOKEN = 4, 16
BATCH_SIZE, LEARNING_RATE, SHARE_UNTIL_ALL, READ_AT_ONCE = 32, 1e-3, 0.5, 100
NOISES = 16, 64, 160  # standard deviations, of 255 levels
QUICK, FULL = (250, 1, 16), (800, 3, 50)  # steps, seeds, pages of each kind and ratio


class Page(NamedTuple):
    """A page, what stands on it, and how many tokens of text that is for each vision token."""

    image: Image.Image
    text: str
    ratio: float


# Texts and their pages


@cache
def renderer(page_size: int, font_size: int) -> TextRenderer:
    """What draws pages of a size in letters of a size."""
    font = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    margin = page_size // 32
    return TextRenderer(size=page_size, font=font, font_size=font_size, margin=margin, replacement="?")


def largest(text: str, page_size: int) -> TextRenderer:
    """The renderer with the largest letters in which a text fits a page.

    Raises:
        ValueError: It does not fit in any.
    """

    def is_too_large(font_size: int) -> bool:
        return sum(1 for _ in islice(renderer(page_size, font_size).pages(text), 2)) > 1

    sizes = range(SMALLEST_FONT, page_size // 2 + 1)
    number = bisect_left(sizes, True, key=is_too_large)
    if number == 0:
        raise ValueError(f"{len(text)} characters do not fit a page of {page_size} pixels; lower --ratios.")
    return renderer(page_size, sizes[number - 1])


def draw_page(source: str, kind: str, ratio: float, *, reader: "Reader", rng: np.random.Generator) -> Page:
    """A page with `ratio` tokens for each vision token, from a random word of a text on."""
    number = round(ratio * reader.num_vision)
    length = CHARACTERS_A_TOKEN * number
    start = source.find(" ", int(rng.integers(max(1, len(source) - length)))) + 1
    words = as_kind(first_tokens(reader.tokenizer, source[start : start + length], number).split(), kind, rng)
    text = first_tokens(reader.tokenizer, " ".join(words), number).strip()
    return Page(*next(largest(text, reader.page_size).pages(text)), ratio)


def first_tokens(tokenizer: Any, text: str, number: int) -> str:
    """A text's first tokens."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:number])


def as_kind(words: list[str], kind: str, rng: np.random.Generator) -> list[str]:
    """Words as they are, in another order, or with other characters in the place of letters and digits."""
    if kind == SHUFFLED:
        return [words[index] for index in rng.permutation(len(words))]
    if kind not in (LETTERS, DIGITS):
        return words
    alphabet = list("0123456789" if kind == DIGITS else "abcdefghijklmnopqrstuvwxyz")
    return ["".join(str(rng.choice(alphabet)) if c.isalnum() else c for c in word) for word in words]


def plain(text: str) -> str:
    """Its small letters and digits alone, which are as many signs as a small model learns to read in minutes."""
    return " ".join(re.findall("[a-z0-9]+", text.lower()))


def english() -> tuple[str, str]:
    """Text to train on and text held out, of the topics of Python's documentation; no paragraph is in both."""
    paragraphs = sorted({" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")})
    shuffled = [paragraphs[index] for index in np.random.default_rng(0).permutation(len(paragraphs))]
    number = len(shuffled) // 10
    return " ".join(shuffled[number:]), " ".join(shuffled[:number])


def own_pages(folder: Path, reader: "Reader") -> Iterator[Page]:
    """Images of a folder that have a text beside them, with their ratio as a whole number."""
    for path in sorted(file for file in folder.iterdir() if file.suffix.lower() in Image.registered_extensions()):
        if path.with_suffix(".txt").is_file():
            text = path.with_suffix(".txt").read_text("utf-8")
            number = len(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
            yield Page(Image.open(path).convert("RGB"), text, max(1, round(number / reader.num_vision)))


# Models


class PatchTower(nn.Module):
    """Patches of 16 x 16 pixels, each by itself through two layers, and 4 x 4 of them to a token by `pool`."""

    def __init__(self, width: int, pool: str):
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, width, 16, stride=16), nn.Conv2d(width, width, 1)
        self.position = nn.Parameter(torch.randn(width, 4, 4) * 0.05)
        self.pool = nn.AvgPool2d(4) if pool == MEAN else nn.Conv2d(width, width, 4, stride=4)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Give the tokens [B, N, C] of pixels [B, 3, H, W] in LLaVA's form."""
        patches = self.patches(pixel_values)  # [B, C, H / 16, W / 16]
        repeats = (1, patches.shape[-2] // 4, patches.shape[-1] // 4)
        hidden = self.mix(nn.functional.gelu(patches + self.position.repeat(repeats)))
        tokens = self.pool(hidden).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


class Reader:
    """A composite with its processor and the prompt after which it reads a page."""

    def __init__(self, model: Any, processor: Any, prompt: str):
        self.model, self.processor, self.prompt = model.eval(), processor, prompt
        self.tokenizer = processor.tokenizer
        self.page_size: int = processor.image_processor.size["height"]
        blank = Image.new("RGB", (self.page_size, self.page_size), "white")
        ids = processor(images=[blank], text=[prompt], return_tensors="pt")["input_ids"]
        self.num_vision = int((ids == processor.image_token_id).sum())

    @torch.no_grad()
    def read(self, pages: Sequence[Page]) -> list[str]:
        """What it writes, greedily, for each page."""
        limits = [len(self.tokenizer(page.text, add_special_tokens=False)["input_ids"]) + 8 for page in pages]
        if not isinstance(self.processor, LlavaProcessor):
            from deepseek_ocr_vision.composites.read_pages import read_page

            parts = {"model": self.model, "processor": self.processor, "prompt": self.prompt}
            return [read_page(page=p.image, max_new_tokens=n, **parts) for p, n in zip(pages, limits, strict=True)]
        read: list[str] = []
        for first in range(0, len(pages), READ_AT_ONCE):
            images = [page.image for page in pages[first : first + READ_AT_ONCE]]
            inputs = self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt")
            longest = max(limits[first : first + READ_AT_ONCE])
            output = self.model.generate(**inputs.to(self.model.device), do_sample=False, max_new_tokens=longest)
            read += self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return read

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> torch.Tensor:
        """The vision tower's tokens of each page, [B, N, C]."""
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        pixels = torch.stack([one[-1] if one.ndim == 4 else one for one in pixels])  # the page, where tiles come first
        tower = self.model.model.vision_tower
        return tower(pixels.to(self.model.device, self.model.dtype)).last_hidden_state.float().cpu()


def load_model(options: argparse.Namespace) -> Reader:
    """The model to measure: a LLaVA, or the whole DeepSeek-OCR in one of its modes of one view."""
    fields, _ = PreTrainedConfig.get_config_dict(options.model)
    if fields.get("model_type") == "llava":
        model = LlavaForConditionalGeneration.from_pretrained(options.model).to(options.device)
        return Reader(model, LlavaProcessor.from_pretrained(options.model), options.prompt or IMAGE_TOKEN)
    from deepseek_ocr_vision.composites.read_pages import load_reader, prompt_of

    parts = load_reader(options.model, mode=options.mode, device=options.device)
    return Reader(*parts, prompt_of(options.prompt or "text"))


def build(arm: str, options: argparse.Namespace, *, seed: int) -> Reader:
    """A small model that knows nothing yet."""
    torch.manual_seed(seed)
    model, processor = build_llava(page_size=options.page_size)
    if arm in (MEAN, CONVOLUTION):
        model.model.vision_tower = PatchTower(model.config.vision_config.hidden_size, arm)
    elif arm == FROZEN:
        model.model.vision_tower.freeze()
    return Reader(model.to(options.device), processor, IMAGE_TOKEN)


def train(text: str, options: argparse.Namespace, *, seed: int) -> dict[str, Reader]:
    """Train a small model of each sort, all on the same pages, which are of all kinds and ratios."""
    readers = {arm: build(arm, options, seed=seed) for arm in ARMS}
    reader, rng = readers[TRAINED], np.random.default_rng([seed, 0])
    collator = ImageTextCollator(reader.processor)
    learners = [learner(reader.model, options.steps) for reader in readers.values()]
    ratios = sorted(options.ratios)
    for step in range(options.steps):
        # Short texts first: what a letter looks like is learned sooner where few stand on a page.
        number = 1 + int(len(ratios) * step / (options.steps * SHARE_UNTIL_ALL))
        chosen = [(str(rng.choice(KINDS)), float(rng.choice(ratios[:number]))) for _ in range(BATCH_SIZE)]
        pages = [draw_page(text, kind, ratio, reader=reader, rng=rng) for kind, ratio in chosen]
        batch = collator([{"image": page.image, "prompt": IMAGE_TOKEN, "answer": page.text} for page in pages])
        on_device = {name: value.to(options.device) for name, value in batch.items()}
        for model, optimizer, schedule in learners:
            model(**on_device).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for model, *_ in learners:
        model.eval()
    return readers


def learner(model: Any, steps: int) -> tuple[Any, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """A model that is ready to be trained, with its optimizer and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, (0.9, 0.98))
    rates = {"max_lr": LEARNING_RATE, "total_steps": steps, "pct_start": 0.2, "cycle_momentum": False}
    return model.train(), optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, **rates)


# Measures


def shares_read(read: str, written: str) -> tuple[float, ...]:
    """The parts of the characters and of the words that were read back.

    1 without edits, 0 with as many as there is text; white space of any kind and length counts as one space.
    """
    texts = [(" ".join(text.split()), text.split()) for text in (read, written)]
    return tuple(1 - min(1.0, Levenshtein.distance(a, b) / max(1, len(b))) for a, b in zip(*texts, strict=True))


def held_out_pages(reader: Reader, text: str, options: argparse.Namespace) -> dict[str, list[Page]]:
    """The pages of each kind; the same for all models with one tokenizer and page size."""
    sources = dict.fromkeys(KINDS, text)
    if options.text:
        own = options.text.read_text("utf-8")
        sources[options.text.name] = " ".join(own.split()) if options.model else plain(own)
    ratios = [ratio for ratio in options.ratios for _ in range(options.num_pages)]
    pages: dict[str, list[Page]] = {}
    for number, (kind, source) in enumerate(sources.items()):
        rng = np.random.default_rng([1, number])
        pages[kind] = [draw_page(source, kind, ratio, reader=reader, rng=rng) for ratio in ratios]
    if options.pages:
        pages[options.pages.name] = list(own_pages(options.pages, reader))
    return pages


def find_needle(reader: Reader, text: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Whether a page with one changed digit and noise is found among the ten digits that could stand there.

    A page has the same noise at each of `NOISES`, only stronger.
    """
    rng, ratio = np.random.default_rng(2), options.ratios[len(options.ratios) // 2]
    found: dict[str, list[float]] = {}
    for _ in range(options.num_pages):
        flat = draw_page(text, DIGITS, ratio, reader=reader, rng=rng).text.replace("\n", " ")
        place = int(rng.choice([index for index, character in enumerate(flat) if character.isdigit()]))
        pages = largest(flat, reader.page_size).pages
        changed = [next(pages(f"{flat[:place]}{digit}{flat[place + 1 :]}")).image for digit in range(10)]
        wanted = int(rng.integers(10))
        page = np.asarray(changed[wanted])
        noise = rng.normal(size=page.shape)
        queries = [Image.fromarray(np.clip(page + level * noise, 0, 255).astype(np.uint8)) for level in NOISES]
        tokens = torch.cat([reader.encode([image.convert("RGB")]) for image in (*changed, *queries)])  # [10 + L, N, C]
        for level, query in zip(NOISES, tokens[10:], strict=True):
            difference = tokens[:10] - query
            by = {"token": difference.norm(dim=-1).amax(dim=1), "mean": difference.mean(dim=1).norm(dim=-1)}
            for name, distance in by.items():
                found.setdefault(f"by {name}, noise {level}", []).append(float(distance.argmin() == wanted))
    return found


def band(values: Sequence[float]) -> tuple[float, float]:
    """Mean over pages, and half of its 95 % band by the normal approximation."""
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(1.96 * spread / len(values) ** 0.5)


# Results


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train or load, read, and give what JSON holds after the models of each seed; shares are pooled over seeds."""
    to_train_on, held_out = english() if options.model else map(plain, english())
    shares: dict[tuple[str, str, float], list[tuple[float, ...]]] = {}
    needles: dict[str, dict[str, list[float]]] = {}
    kinds: dict[str, list[Page]] = {}
    start = time.process_time()

    def add(arm: str, kind: str, read: list[str], pages: list[Page]) -> None:
        for text, page in zip(read, pages, strict=True):
            shares.setdefault((arm, kind, page.ratio), []).append(shares_read(text, page.text))

    for seed in range(1 if options.model else options.seeds):
        readers = {options.model: load_model(options)} if options.model else train(to_train_on, options, seed=seed)
        for arm, reader in readers.items():
            kinds = kinds or held_out_pages(reader, held_out, options)
            for kind, pages in kinds.items():
                read = reader.read(pages)
                add(arm, kind, read, pages)
                if arm in (TRAINED, options.model) and seed == 0:
                    add(ANOTHERS, kind, read[-1:] + read[:-1], pages)
                    texts = [first_tokens(reader.tokenizer, page.text, reader.num_vision) for page in pages]
                    add(TRUNCATED, kind, texts, pages)
            for name, found in find_needle(reader, held_out, options).items():
                needles.setdefault(arm, {}).setdefault(name, []).extend(found)
        seconds = round(time.process_time() - start)
        sys.stderr.write(f"seed {seed}: {seconds} s of processor time so far\n")
        facts = {"vision_tokens": reader.num_vision, "page_size": reader.page_size, "processor_seconds": seconds}
        found = [{"model": one} | {how: band(each) for how, each in hows.items()} for one, hows in needles.items()]
        yield facts | {"seeds": seed + 1, "points": points_of(shares), "needle": found}


def points_of(shares: dict[tuple[str, str, float], list[tuple[float, ...]]]) -> list[dict[str, Any]]:
    """What each point of a curve stands for, and its mean and band for characters and words."""
    return [
        {"model": arm, "kind": kind, "ratio": ratio, "pages": len(pairs)}
        | {unit: band(each) for unit, each in zip(UNITS, zip(*pairs, strict=True), strict=True)}
        for (arm, kind, ratio), pairs in shares.items()
    ]


def tables(results: dict[str, Any]) -> str:
    """The shares read back, with a column for each ratio, and the changed digits that were found."""

    def percent(value: tuple[float, float]) -> str:
        return f"{100 * value[0]:.0f} ± {100 * value[1]:.0f} %"

    ratios = sorted({point["ratio"] for point in results["points"]})
    lines = []
    for unit in UNITS:
        rows: dict[tuple[str, str], dict[float, str]] = {}
        for point in results["points"]:
            rows.setdefault((point["kind"], point["model"]), {})[point["ratio"]] = percent(point[unit])
        lines += [("", f"{unit} read back", *(f"{ratio:g}" for ratio in ratios)), ("---",) * (len(ratios) + 2)]
        lines += [(*names, *(row.get(ratio, "") for ratio in ratios)) for names, row in rows.items()] + [()]
    _, *hows = results["needle"][0]
    lines += [("a changed digit found among ten", *hows), ("---",) * (1 + len(hows))]
    lines += [(row["model"], *(percent(row[how]) for how in hows)) for row in results["needle"]]
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """The curves, a panel for each kind of text."""
    kinds = list(dict.fromkeys(point["kind"] for point in results["points"]))
    figure = Figure(figsize=(3.1 * len(kinds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, axes in zip(kinds, panels, strict=True):
        for arm in dict.fromkeys(point["model"] for point in results["points"]):
            points = [point for point in results["points"] if (point["kind"], point["model"]) == (kind, arm)]
            points.sort(key=lambda point: point["ratio"])
            ratios, means, bands = ([p["ratio"] for p in points], *np.array([p["characters"] for p in points]).T)
            color, style = COLORS.get(arm, "#1f5fa8"), "--" if arm in BESIDES else "o-"
            axes.plot(ratios, means, style, ms=3, color=color, label=arm)
            axes.fill_between(ratios, means - bands, means + bands, color=color, alpha=0.15, linewidth=0)
        axes.set(title=kind, xlabel="text tokens a vision token", ylim=(0, 1.02))
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("characters read back")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=130)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--quick", action="store_true", help="{} steps, {} seed, {} pages of each kind and ratio".format(*QUICK))
    add("--model", help="a LLaVA (folder or Hub id) or a whole DeepSeek-OCR to measure; nothing is trained then")
    add("--mode", choices=["tiny", "small", "base", "large"], default="base", help="DeepSeek-OCR's resolution")
    add("--prompt", help=f"default: {IMAGE_TOKEN} for a LLaVA, DeepSeek-OCR's own for plain text")
    add("--text", type=Path, help="a text file of yours, as a further kind")
    add("--pages", type=Path, help="a folder of images with a .txt beside each, as a further kind")
    add("--ratios", type=float, nargs="+", help=f"default: {SMALL_RATIOS}, with --model {RATIOS}")
    add("--num-pages", type=int, help=f"of each kind and ratio; default: {FULL[2]}")
    add("--steps", type=int, help=f"of {BATCH_SIZE} pages to train small models for; default: {FULL[0]}")
    add("--seeds", type=int, help=f"small models of each sort; default: {FULL[1]}")
    add("--page-size", type=int, default=128, help="of small models, in pixels; default: 128")
    add("--device", default="cpu", help="what computes; default: cpu")
    add("--output", type=Path, default=Path("outputs/compression.json"), help="the figure goes beside it, as .png")
    options = parser.parse_args(argv)
    defaults = dict(zip(("steps", "seeds", "num_pages"), QUICK if options.quick else FULL, strict=True))
    for name, value in (defaults | {"ratios": RATIOS if options.model else SMALL_RATIOS}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.steps, options.seeds, options.num_pages, *options.ratios) <= 0:
        parser.error("--steps, --seeds, --num-pages and --ratios have to be positive")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write tables, a JSON file and a figure."""
    options = parse(argv)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    around = environment({"threads": torch.get_num_threads(), "device": options.device}, load())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for results in measure(options):
        text = json.dumps({"settings": settings, "environment": around} | results, indent=1)
        options.output.write_text(text, "utf-8")
        draw(results, options.output.with_suffix(".png"))
    sys.stdout.write(f"{tables(results)}\n")


if __name__ == "__main__":
    main()
