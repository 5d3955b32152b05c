"""A demo in the browser: a page in, what the encoder sees on it out; a click on a token asks about that one.

    python app.py --model outputs/seeing/encoder
    python app.py --help

It needs Gradio: `pip install 'deepseek-ocr-vision[demo]'`. The same file is a Hub Space, see docs/demo.md. Nothing is
fetched before a page is shown, and nothing at all if the encoder is on this machine.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import TextIteratorStreamer

from deepseek_ocr_vision import MODES, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, text_to_pages
from deepseek_ocr_vision.composites import PROMPTS
from deepseek_ocr_vision.modeling.device import default_device
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import open_image
from deepseek_ocr_vision.visualize import PageView, draw_sheet, view_page
from deepseek_ocr_vision.visualize.pages import draw_frame
from deepseek_ocr_vision.weights import is_encoder, load_encoder


try:
    import gradio as gr
    from gradio.data_classes import ImageData
    from gradio.utils import get_upload_folder
except ImportError as error:
    raise ImportError("The demo needs Gradio: pip install 'deepseek-ocr-vision[demo]'") from error


DEFAULT_MODEL = "deepseek-ai/DeepSeek-OCR"
"""What is shown unless `--model` says otherwise: a Hub id, of which the encoder's 0.8 GB are fetched."""

AS_SAVED = "as saved"  # the resolution of the checkpoint's own image processor
MAX_PIXELS = 36_000_000  # of an upload: A4 at 600 dots an inch, read in some seconds
LONGEST_SIDE = 1600  # pixels of a drawn page; the encoder reads it as it came
NUM_NEIGHBOURS = 4

# One page at a time: a second one beside it would take twice the memory and be no faster.
QUEUE: dict[str, Any] = {"concurrency_id": "encoder", "concurrency_limit": 1, "api_visibility": "private"}
# A page's tokens, attention and pixels are some 100 MB at 1024 x 1024, and each visitor keeps one.
KEPT_PAGES, KEPT_SECONDS = 16, 1800
LAUNCH: dict[str, Any] = {"share": False, "ssr_mode": False, "show_error": True, "max_file_size": "50mb"}
# No font and no script from elsewhere, so that it works offline.
LAUNCH |= {"theme": gr.themes.Base(primary_hue="blue", font="sans-serif", font_mono="monospace")}
LAUNCH |= {"css": ".titled {gap: 2px} #counts :is(td, th) {padding: 3px 8px; white-space: nowrap}"}
LAUNCH |= {"state_session_capacity": KEPT_PAGES, "footer_links": []}

INTRODUCTION = """# What the DeepSeek-OCR encoder sees
Give it a page. **Click on any of the images** to choose a token: which tokens are like it, and which pixels it
depends on, by the gradient through the whole encoder."""


# The encoder


@dataclass
class Encoder:
    """An encoder and its image processor, loaded when they are first asked for.

    Attributes:
        source: Folder or Hub id, of an encoder of its own or of a released checkpoint that has one in it.
    """

    source: str

    @cached_property
    def _loaded(self) -> tuple[DeepSeekOCRVisionModel, DeepSeekOCRVisionImageProcessor]:
        return load_encoder(self.source)

    @cached_property
    def model(self) -> DeepSeekOCRVisionModel:
        """The encoder, frozen, on the accelerator if there is one."""
        return self._loaded[0].to(default_device()).requires_grad_(False)  # type: ignore[arg-type]

    @property
    def image_processor(self) -> DeepSeekOCRVisionImageProcessor:
        """What prepares pages for it."""
        return self._loaded[1]

    def processor_in(self, mode: str) -> DeepSeekOCRVisionImageProcessor:
        """The image processor at the resolution of a mode, with the preset's means, or as it was saved."""
        return in_mode(self.image_processor, mode)


@dataclass
class Reader:
    """A whole DeepSeek-OCR, which gives the text of a page, loaded when it is first asked for.

    Attributes:
        source: Folder or Hub id.
    """

    source: str

    @property
    def is_there(self) -> bool:
        """Whether there can be one: not in a folder with an encoder alone. Of a Hub id loading tells."""
        return not Path(self.source).is_dir() or not is_encoder(self.source)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its processor."""
        from deepseek_ocr_vision.composites.read_pages import load_reader

        return load_reader(self.source)


def in_mode(image_processor: DeepSeekOCRVisionImageProcessor, mode: str) -> DeepSeekOCRVisionImageProcessor:
    """An image processor at the resolution of a mode, or as it is for `AS_SAVED`."""
    if mode == AS_SAVED:
        return image_processor
    sizes = {"size": MODES[mode].size, "tile_size": MODES[mode].tile_size}
    return type(image_processor).from_dict(image_processor.to_dict(), **sizes)


# Uploads


def uploaded_file(upload: ImageData | None) -> str | None:
    """The path of an uploaded file, in place of Gradio's own check, which accepts any path that a request names.

    Raises:
        gr.Error: It is no file in Gradio's folder of uploads.
    """
    if upload is None:
        return None
    try:
        path = Path(upload.path or "").resolve()
        is_uploaded = path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, with a zero in it, or a link to itself
        is_uploaded = False
    if not is_uploaded:
        raise gr.Error("The page has to be an uploaded file.", print_exception=False)
    return str(path)


# What is answered


@contextmanager
def in_words() -> Iterator[None]:
    """Show what goes wrong in the browser, in the words of the package, instead of as a bare "Error"."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def show(encoder: Encoder, image: str | None, mode: str) -> tuple:
    """Read a page.

    Returns:
        The view, the token with the most on its square, the page, its tokens as colours, the token's neighbours, its
        gradient, the caption, and the table of token counts.
    """
    with in_words():
        image = _require_image(image)
        view = view_page(encoder.model, image, image_processor=encoder.processor_in(mode))
        table = count_tokens(encoder, view.page.size, mode)
        view = _drawable(view)
        token = view.richest_token()
        page, neighbours, gradient, caption = images_of(view, token)
        return view, token, page, view.pca().draw(), neighbours, gradient, caption, table


def read(reader: Reader, image: str | None, mode: str, prompt: str) -> Iterator[str]:
    """Read a page: its text so far, whenever there is more of it. The mode `AS_SAVED` is gundam here."""
    with in_words():
        image = _require_image(image)
        from deepseek_ocr_vision.composites.read_pages import read_page

        model, processor = reader.loaded
        processor = type(processor)(in_mode(processor.image_processor, mode), processor.tokenizer)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(max_workers=1) as thread:
            reading = thread.submit(read_page, model, processor, image, prompt=prompt, streamer=streamer)
            reading.add_done_callback(lambda _: streamer.end())  # also where it failed
            text = ""
            for piece in streamer:
                text += piece
                yield text
            yield reading.result()


def choose(view: PageView | None, click: gr.SelectData) -> tuple:
    """Ask about the token that was clicked on; `index` is [x, y], in pixels of the image.

    Returns:
        The token, the page, the token's neighbours, its gradient, and the caption.
    """
    with in_words():
        page = _require_page(view)
        token = page.token_at(*click.index)
        return token, *images_of(page, token)


def sheet_of(view: PageView | None, token: tuple[int, int]) -> Image.Image:
    """Draw the sheet of a token, as `deepseek-ocr-vision show` does."""
    with in_words():
        return draw_sheet(_require_page(view), (token[0], token[1]))


def images_of(view: PageView, token: tuple[int, int]) -> tuple[Image.Image, Image.Image, Image.Image, str]:
    """The page with a token's frame, the token's neighbours, the pixels that it depends on, and the caption."""
    page = view.page.copy()
    draw_frame(page, view.box(token))
    similarity = view.similarity(token)
    caption = describe(token, torch.from_numpy(similarity.values), view.on_page)
    return page, similarity.draw(), view.pixel_gradient(token).draw(), caption


def describe(token: tuple[int, int], similarity: torch.Tensor, on_page: torch.Tensor) -> str:
    """A token's place, and its nearest neighbours among those on the page by its cosine to all, [H, W], in words."""
    (rows, columns), (row, column) = similarity.shape, token
    others = on_page.clone()
    others[token] = False
    order = similarity.masked_fill(~others, -torch.inf).flatten().argsort(descending=True)
    nearest = [divmod(place, columns) for place in order[: min(NUM_NEIGHBOURS, int(others.sum()))].tolist()]
    words = ", ".join(f"({row}, {column}) {similarity[row, column]:.2f}" for row, column in nearest)
    place = f"**Row {row}, column {column}** of {rows} x {columns} tokens, counted from 0."
    return f"{place} Most like it: {words}." if nearest else place


def count_tokens(encoder: Encoder, size: tuple[int, int], shown: str) -> str:
    """How many tokens an image of a width and height becomes in each mode, as a table in Markdown."""
    width, height = size
    lines = ["| mode | the encoder reads | tokens |", "|---|---|---:|"]
    for mode in (AS_SAVED, *MODES):
        processor = encoder.processor_in(mode)
        tokens = processor.num_image_tokens(height, width, feature_mode=encoder.model.config.feature_mode)
        pixels = f"{processor.size['width']} x {processor.size['height']}" + " + tiles" * bool(processor.tile_size)
        bold = "**" if mode == shown else ""
        lines.append("| " + " | ".join(f"{bold}{cell}{bold}" for cell in (mode, pixels, tokens)) + " |")
    return f"Your image, {width} x {height} pixels, becomes\n\n" + "\n".join(lines)


def _require_image(image: str | None) -> str:
    """The path of an image that is there, and by its header has no more pixels than is allowed: small files can."""
    if image is None:
        raise ValueError("There is no page yet: upload an image, paste one, or take an example.")
    with open_image(image, "page") as opened:
        width, height = opened.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"The page has {width} x {height} pixels; up to {MAX_PIXELS / 1e6:g} million are read here.")
    return image


def _require_page(view: PageView | None) -> PageView:
    if view is None:
        raise ValueError(
            f"There is no page, or it was shown more than {KEPT_SECONDS // 60} minutes ago: show it again."
        )
    return view


def _drawable(view: PageView) -> PageView:
    """The same page, drawn no larger than a screen; what the encoder read stays as it was."""
    scale = LONGEST_SIDE / max(view.page.size)
    if scale >= 1:
        return view
    size = [max(1, round(side * scale)) for side in view.page.size]
    width, height = view.page.size
    gr.Info(f"The page of {width} x {height} pixels is drawn at {size[0]} x {size[1]}; the encoder read all of it.")
    return replace(view, page=view.page.resize(size, Image.Resampling.LANCZOS))


# The examples


def _letter() -> Image.Image:
    text = (
        "To whom it may concern,\n\na page of text is an image, and an image can be read. An encoder turns this one "
        "into a few hundred tokens, each of which stands for a square of 64 x 64 pixels.\n\nWhat does a token know? "
        "Click on a word: the bright pixels are those that would change its token most if they were changed "
        "themselves. In a trained encoder some of them are far away.\n\nThen look at its neighbours, the tokens that "
        "are most like it. Paper is like paper, and a margin is like a margin.\n\nYours sincerely,\n\n    the encoder"
    )
    return text_to_pages(text, size=(1024, 768), font_size=34, margin=72, line_spacing=1.25)[0].convert("RGB")


def _receipt() -> Image.Image:
    page = Image.new("RGB", (640, 960), "#fffdf5")
    draw = ImageDraw.Draw(page)
    draw.text((320, 90), "THE PAPER SHOP", fill="black", font_size=52, anchor="mm")
    draw.line((60, 150, 580, 150), fill="black", width=3)
    goods = {"Paper, A4": 450, "Ink, black": 1295, "Envelopes": 380, "Pencil HB": 90, "Ruler, 30 cm": 215}
    for index, (name, cents) in enumerate(goods.items()):
        draw.text((60, 210 + 90 * index), name, fill="black", font_size=38)
        draw.text((580, 210 + 90 * index), f"{cents / 100:.2f}", fill="black", font_size=38, anchor="ra")
    draw.line((60, 690, 580, 690), fill="black", width=3)
    draw.text((60, 730), "TOTAL", fill="black", font_size=52)
    draw.text((580, 730), f"{sum(goods.values()) / 100:.2f}", fill="black", font_size=52, anchor="ra")
    return page


def _slide() -> Image.Image:
    page = Image.new("RGB", (1280, 720), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 1280, 120), fill="#1f5fa8")
    draw.text((60, 60), "Tokens a page", fill="white", font_size=64, anchor="lm")
    for index, (name, tokens) in enumerate({"tiny": 64, "small": 100, "base": 256, "large": 400}.items()):
        left = 150 + 270 * index
        draw.rectangle((left, 620 - tokens, left + 160, 620), fill="#d9822b")
        draw.text((left + 80, 600 - tokens), str(tokens), fill="black", font_size=44, anchor="ms")
        draw.text((left + 80, 670), name, fill="black", font_size=40, anchor="mm")
    draw.line((80, 620, 1200, 620), fill="black", width=4)
    return page


# The page in the browser


def build_demo(encoder: Encoder) -> gr.Blocks:
    """Lay out the demo and connect it to an encoder, which is not loaded for this."""
    with gr.Blocks(title="DeepSeek-OCR vision", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(INTRODUCTION)
        view, token = gr.State(time_to_live=KEPT_SECONDS), gr.State(time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                image, mode, examples, button, table = _lay_out_input()
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("What the encoder sees"):
                    *images, caption = _lay_out_images()
                    again = gr.Button("Draw the sheet of this token", elem_id="draw-sheet")
                    settings: dict[str, Any] = {"format": "png", "buttons": ["download", "fullscreen"]}
                    sheet = gr.Image(label="The sheet", interactive=False, elem_id="sheet", **settings)
                reader = Reader(encoder.source)
                with gr.Tab("What is written there", visible=reader.is_there):
                    _lay_out_reading(reader, image, mode)
        page, colors, neighbours, gradient = images
        draw: dict[str, Any] = {"fn": sheet_of, "inputs": [view, token], "outputs": sheet, **QUEUE}
        shown = [view, token, page, colors, neighbours, gradient, caption, table]
        for event in (button.click, image.upload, examples.load_input_event.then):
            event(partial(show, encoder), [image, mode], shown, show_progress_on=page, **QUEUE).success(**draw)
        chosen = [token, page, neighbours, gradient, caption]
        for clicked in images:
            clicked.select(choose, view, chosen, show_progress_on=gradient, **QUEUE)
        again.click(**draw)
    return blocks.queue(max_size=32)


def _lay_out_input() -> tuple[Any, ...]:
    """The column on the left: the image, the mode, the examples, the button, and the table of token counts."""
    # As a file, so that the package reads it, with its EXIF orientation and transparency, and not Gradio.
    settings: dict[str, Any] = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
    image = gr.Image(label="Page", height=300, elem_id="image", **settings)
    # In place of the method, as Gradio writes a file beside this one for each class of components.
    image.preprocess = uploaded_file
    mode = gr.Radio([AS_SAVED, *MODES], value=AS_SAVED, label="Mode", elem_id="mode")
    button = gr.Button("Show", variant="primary", elem_id="show")
    examples = gr.Examples([_letter(), _receipt(), _slide()], image, cache_examples=False, elem_id="examples")
    table = gr.Markdown(elem_id="counts")
    return image, mode, examples, button, table


def _lay_out_reading(reader: Reader, image: Any, mode: Any) -> None:
    """The text of the page: what to ask for, the button, and what was read."""
    prompt = gr.Radio([*PROMPTS], value="text", label="Prompt", elem_id="prompt")
    button = gr.Button("Read", variant="primary", elem_id="read")
    text = gr.Textbox(label="Text", lines=20, buttons=["copy"], elem_id="text")
    button.click(partial(read, reader), [image, mode, prompt], text, **QUEUE)


def _lay_out_images() -> list[Any]:
    """The four images, two in a row and each below its title, and the caption over them."""
    caption = gr.Markdown("Upload a page, or take an example.", elem_id="caption")
    rows = (
        {"page": "The page, and the token", "colors": "All tokens: alike colours, alike tokens"},
        {"neighbours": "Its neighbours: the brighter, the more alike", "gradient": "The pixels that it depends on"},
    )
    settings: dict[str, Any] = {"format": "png", "interactive": False, "show_label": False, "height": 400}
    images = []
    for row in rows:
        with gr.Row():
            for name, title in row.items():
                with gr.Column(min_width=240, elem_classes="titled"):
                    gr.Markdown(title)
                    images.append(gr.Image(elem_id=name, buttons=["fullscreen"], **settings))
    return [*images, caption]


demo = build_demo(Encoder(DEFAULT_MODEL))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo until it is interrupted.

    Returns:
        The exit code: 0, or 1 with a message if the encoder cannot be loaded.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="python app.py --model outputs/seeing/encoder"
    )
    parser.add_argument(
        "--model",
        help="the encoder, or a released checkpoint: folder or Hub id. It is loaded at once; the default, "
        f"{DEFAULT_MODEL}, when the first page is shown.",
    )
    options = parser.parse_args(arguments)
    if options.model is None:
        demo.launch(**LAUNCH)
        return 0
    encoder = Encoder(options.model)
    try:
        _ = encoder.model, encoder.image_processor
    except (OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    build_demo(encoder).launch(**LAUNCH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
