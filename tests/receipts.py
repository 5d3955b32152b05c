"""Pages as people have them: small receipts in two scripts, drawn and described in a `metadata.jsonl`."""

import json
import random
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont


GOODS = ("milk", "bread", "coffee", "Straße", "café", "молоко", "хлеб", "кофе", "бумага", "чай")
SIZE = (200, 140)  # pixels, width and height


def text_of(index: int) -> str:
    """The text of a receipt, another for each index."""
    draw = random.Random(index)
    lines = [f"{draw.choice(GOODS)} {draw.randint(0, 99):02}.{draw.randint(0, 99):02}" for _ in range(3)]
    return "\n".join([f"No {index:03}", *lines])


def draw_receipt(text: str) -> Image.Image:
    """A receipt as an image."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 18)
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).multiline_text((8, 8), text, "black", font, spacing=8)
    return image


def write_receipts(folder: Path, number: int, *, names: tuple[str, ...] = ("scans/{}.png",)) -> Path:
    """A folder of receipts with a `metadata.jsonl`; the names are taken in turn."""
    rows = []
    for index in range(number):
        name = names[index % len(names)].format(index)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_receipt(text_of(index)).save(folder / name)
        rows.append({"file_name": name, "text": text_of(index)})
    write_metadata(folder, rows)
    return folder


def write_metadata(folder: Path, rows: list[dict | str]) -> None:
    """A `metadata.jsonl` of rows, or of lines as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def read_metadata(folder: Path) -> list[dict]:
    """The rows of a `metadata.jsonl`."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").split("\n") if line]
