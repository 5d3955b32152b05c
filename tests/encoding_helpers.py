"""Pages to encode, and what tests of encoding look at."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.encoding import Summary, encode_pages
from deepseek_ocr_vision.encoding.table import TokenTable


IMAGE_PROCESSOR = DeepSeekOCRVisionImageProcessor(size=128)


def image(seed: int, height: int = 90, width: int = 70) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_pdf(path: Path, *seeds: int) -> Path:
    first, *others = map(image, seeds)
    first.save(path, save_all=True, append_images=others)
    return path


def encode(inputs: Path | list, model: DeepSeekOCRVisionModel, out: Path | str, **options) -> Summary:
    options = {"image_processor": IMAGE_PROCESSOR, "pages_per_file": 2, "show_progress": False} | options
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return encode_pages(inputs, model, options.pop("image_processor"), out=out, **options)


def stored(out: Path | str) -> dict[tuple[str, int], torch.Tensor]:
    """The tokens in a table by the source's own name and the page; none is there twice."""
    import pyarrow.parquet as pq

    table = TokenTable(out)
    rows = []
    for part in sorted(table.parts):
        with table.fs.open(table.path(part)) as file:
            rows += pq.read_table(file, columns=["id", "source", "page"]).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {(Path(row["source"]).name, row["page"]): table.read(row["id"]) for row in rows}


def assert_same(actual: Path | str, expected: Path | str) -> None:
    """Two tables have the same tokens, bit for bit."""
    actual, expected = stored(actual), stored(expected)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[page], expected[page]) for page in expected)


def errors(out: Path) -> dict[str, str]:
    """What `errors.jsonl` says, by the source's own name."""
    if not (out / "errors.jsonl").exists():
        return {}
    lines = map(json.loads, (out / "errors.jsonl").read_text().splitlines())
    return {Path(line["source"]).name: line["error"] for line in lines}
