"""Measure the table of tokens: what it takes, and how fast either engine fills it.

    python -m benchmarks.token_table --storage               # seconds
    python -m benchmarks.token_table --pages 20000           # the local loop
    python -m benchmarks.token_table --pages 20000 --ray 2   # Ray with two encoders
    python -m benchmarks.token_table --pages 400 --ray 1 2   # Ray with one encoder, then with two

Pages are small images and the encoder is tiny, so that what is measured is the engine; where numbers of encoders are
compared, which are to be the bottleneck, it has more and wider layers. Pages a second are those between the first
report, which comes some seconds after the first page, and the last one, without Ray's start. Memory is that of the
process that asks, at the first report, the last, and two between. Each line is a row of a table in docs/encoding.md.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.encoding import encode_pages
from deepseek_ocr_vision.encoding.encoder import Encoder, Page
from deepseek_ocr_vision.encoding.table import TokenTable


SIZES = {
    "256 x 1024": (256, 1024),
    "64 x 2048": (64, 2048),
    "100 x 2048": (100, 2048),
    "256 x 2048": (256, 2048),
    "400 x 2048": (400, 2048),
    "856 x 2048": (856, 2048),
}
WIDE = {"hidden_size": 512, "mlp_dim": 2048, "num_attention_heads": 8, "num_hidden_layers": 24}
TYPES = ("float32", "float16", "bfloat16", "int8", "none")


def main() -> None:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", action="store_true")
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", type=int, nargs="*", default=[], metavar="ENCODERS")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.storage:
            measure_storage(Path(folder))
            return
        write_pages(Path(folder, "pages"), options.pages)
        write("| engine | pages | pages a second | encoder at work | MB in memory, over time |")
        write("| --- | --- | --- | --- | --- |")
        if not options.ray:
            measure_engine(Path(folder), num_workers=options.workers)
        for number in options.ray:
            engine = {"num_workers": options.workers, "ray": "local", "num_encoders": number}
            measure_engine(Path(folder), is_wide=len(options.ray) > 1, **engine)


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def measure_storage(folder: Path) -> None:
    """MB a page by size and type, and how far int8 is off, as a share of the standard deviation."""
    torch.manual_seed(0)
    model = DeepSeekOCRVisionModel(DeepSeekOCRVisionConfig.tiny())
    write(f"| tokens of a page | {' | '.join(TYPES)} | int8 off by (root mean square, at most) |")
    write("| --- " * (len(TYPES) + 2) + "|")
    for name, (num_tokens, width) in SIZES.items():
        tokens = [torch.randn(num_tokens, width) for _ in range(16)]
        sizes = []
        for stored in TYPES:
            inputs = {"pixel_values": torch.zeros(1, 3, 64, 64)}
            batch = [(Page(f"{index:064}", "scans/page.png", index), inputs) for index in range(16)]
            table = TokenTable(folder / name / stored, {"tokens": stored})
            table.write(Encoder(model, None, stored).rows_of(batch, tokens, seconds=0.1))
            sizes.append(sum(os.path.getsize(table.path(part)) for part in table.parts) / 16e6)
            if stored == "int8":
                difference = (table.read(batch[0][0].id) - tokens[0]) / tokens[0].std()
        off = f"{difference.pow(2).mean().sqrt():.2%}, {difference.abs().max():.1%}"
        write(f"| {name} | {' | '.join(f'{size:.3f}' for size in sizes)} | {off} |")


def write_pages(folder: Path, number: int) -> None:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(number):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        (folder / f"{index:06}.png").write_bytes(buffer.getvalue())


def measure_engine(folder: Path, *, is_wide: bool = False, **engine: Any) -> None:
    """Pages a second and memory over time."""
    torch.manual_seed(0)
    model = DeepSeekOCRVisionModel(DeepSeekOCRVisionConfig.tiny(**({"sam_config": WIDE} if is_wide else {})))
    memory: list[int] = []
    reports: list[tuple[float, int]] = []

    def report(progress: dict[str, Any]) -> None:
        memory.append(resident())
        reports.append((time.perf_counter(), progress["pages"]))

    summary = encode_pages(
        [folder / "pages"],
        model,
        DeepSeekOCRVisionImageProcessor(size=128),
        out=folder / f"tokens-{engine.get('num_encoders', 0)}",
        batch_size=1 if is_wide else 32,
        show_progress=False,
        on_progress=report,
        **engine,
    )
    points = [memory[index * (len(memory) - 1) // 3] for index in range(4)]
    name = f"Ray, {engine['num_encoders']} encoders" if "ray" in engine else "local loop"
    (first, pages), (last, all_pages) = reports[0], reports[-1]
    rate = f"{(all_pages - pages) / (last - first):.1f}"
    write(f"| {name} | {summary.num_new:,} | {rate} | {summary.busy:.0%} | {', '.join(map(str, points))} |")


def resident() -> int:
    """MB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000


if __name__ == "__main__":
    main()
