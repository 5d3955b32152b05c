"""Measure whether workers keep an encoder busy that computes elsewhere, as a GPU does.

    python -m benchmarks.encoding          # about 2 minutes on two cores

Pages of 1216 x 1728 pixels with text, in a PDF of A4 and as PNG, go through `encode_pages` as they go to the released
model in mode base. The encoder waits a given time for each page of a batch, so that the processor is free meanwhile,
and hands on zeros, as many and as wide as the released model's tokens. "At work" is what `encode` itself reports: the
share of its time in which the encoder computed.
"""

import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.encoding import encode_pages
from deepseek_ocr_vision.encoding.encode_pages import PreparedPages
from deepseek_ocr_vision.encoding.page_store import Page
from deepseek_ocr_vision.encoding.sources import find_sources
from deepseek_ocr_vision.processing.text_pages import text_to_pages


NUM_PAGES = 64
SECONDS = (0.05, 0.2)
WORKERS = (0, 1, 2)
BATCH_SIZE = 4
NUM_TOKENS, WIDTH = 256, 2048


def main() -> None:
    """Measure, and write what came out."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_pages(Path(folder))
        for name, given in inputs.items():
            write(f"{name}: {1000 * seconds_to_prepare(given):.0f} ms to read and prepare a page")
        write("| pages | a page takes the encoder | workers | pages a second | encoder at work |")
        write("| --- | --- | --- | --- | --- |")
        for name, given in inputs.items():
            for seconds in SECONDS:
                for num_workers in WORKERS:
                    write(measure(name, given, Path(folder), seconds=seconds, num_workers=num_workers))


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def write_pages(folder: Path) -> dict[str, Path]:
    """The same pages as a PDF and as pictures."""
    text = "\n\n".join(topics.values())
    pages = text_to_pages(text[:400_000], size=(1728, 1216), font_size=20, replacement="?")[:NUM_PAGES]
    if len(pages) < NUM_PAGES:
        raise ValueError(f"The text is on {len(pages)} pages; {NUM_PAGES} are needed.")
    (folder / "pictures").mkdir()
    for index, page in enumerate(pages):
        page.save(folder / "pictures" / f"{index:03}.png")
    pages[0].save(folder / "pages.pdf", save_all=True, append_images=pages[1:], resolution=147)
    return {"PDF": folder / "pages.pdf", "PNG": folder / "pictures"}


def image_processor() -> DeepSeekOCRVisionImageProcessor:
    return DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="base")


def seconds_to_prepare(given: Path) -> float:
    """Seconds of the processor that a page takes, the first one aside."""
    sources, _ = find_sources([given], dpi=144, split="train", image_column="image")
    pages = [Page(name, number) for name, source in sources.items() for number in range(source.num_pages)]
    prepared = PreparedPages(sources, image_processor(), torch.bfloat16)
    prepared[pages[0]]
    started = time.process_time()
    for page in pages[1:17]:
        prepared[page]
    return (time.process_time() - started) / 16


def measure(name: str, given: Path, folder: Path, *, seconds: float, num_workers: int) -> str:
    """One row of the table."""
    summary = encode_pages(
        [given],
        waiting_encoder(seconds),
        image_processor(),
        out=folder / f"{name}-{seconds}-{num_workers}",
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
        show_progress=False,
    )
    rate = summary.num_new / summary.seconds
    return f"| {name} | {seconds} s | {num_workers} | {rate:.1f} | {summary.busy:.0%} |"


class WaitingEncoder(DeepSeekOCRVisionModel):
    """An encoder whose time passes without the processor; its tokens are zeros."""

    seconds: float

    def forward(self, pixel_values: torch.Tensor, return_dict: bool | None = None) -> BaseModelOutputWithPooling:
        time.sleep(self.seconds * len(pixel_values))
        shape = len(pixel_values), NUM_TOKENS, self.config.hidden_size
        return BaseModelOutputWithPooling(torch.zeros(shape, dtype=self.dtype))


def waiting_encoder(seconds: float) -> WaitingEncoder:
    """One of few weights, whose tokens are as wide as the released model's."""
    sam = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 64}
    sam |= {"output_channels": 16, "downsample_channels": [24, 32], "global_attn_indexes": [0]}
    clip = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = DeepSeekOCRVisionConfig(sam, clip, feature_mode="projected", projection_dim=WIDTH)
    model = WaitingEncoder(config).to(torch.bfloat16)
    model.seconds = seconds
    return model


if __name__ == "__main__":
    main()
