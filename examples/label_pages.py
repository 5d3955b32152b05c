"""Read scans that have no labels, so that `finetune.py --data` can train on them.

    pip install '.[label]'
    python examples/label_pages.py my_scans/          # writes my_scans/metadata.jsonl
    python examples/finetune.py --data my_scans/

RapidOCR reads every image in the folder; its models are inside the package, so nothing is downloaded. Lines are put in
the order of reading, row by row from the top: pages of several columns need another teacher. What it reads is not
always right, and a student learns its mistakes too. So a page is left out where RapidOCR is unsure of a line, and
where it finds none; look through metadata.jsonl before you train for long.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from files import write_text
from PIL import Image

from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import read_image


logger = logging.getLogger("label_pages")

METADATA = "metadata.jsonl"


class Line(NamedTuple):
    """A piece of text on a page: what it says, how sure its reader is (0 to 1), and its box in pixels."""

    text: str
    score: float
    left: float
    top: float
    bottom: float


def open_reader() -> Callable[[Image.Image], list[Line]]:
    """RapidOCR as a function from an image to its lines.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("Reading pages needs RapidOCR: pip install 'deepseek-ocr-vision[label]'") from error
    # It would leave out lines that it is unsure of, and the page would be labelled without them.
    engine = RapidOCR(params={"Global.text_score": 0.0, "Global.log_level": "warning"})

    def read(image: Image.Image) -> list[Line]:
        result = engine(np.asarray(image)[..., ::-1])  # it takes blue, green, red
        if result.txts is None:
            return []
        return [
            Line(text, float(score), float(box[:, 0].min()), float(box[:, 1].min()), float(box[:, 1].max()))
            for text, score, box in zip(result.txts, result.scores, result.boxes, strict=True)
        ]

    return read


def in_reading_order(lines: list[Line]) -> str:
    """The text of a page: rows from top to bottom, and what stands side by side from left to right."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.top + line.bottom):
        middle = (line.top + line.bottom) / 2
        if rows and middle < max(other.bottom for other in rows[-1]) and middle > min(other.top for other in rows[-1]):
            rows[-1].append(line)
        else:
            rows.append([line])
    return "\n".join(" ".join(line.text for line in sorted(row, key=lambda line: line.left)) for row in rows)


def label(folder: Path, read: Callable[[Image.Image], list[Line]], *, min_score: float) -> Iterator[dict[str, str]]:
    """A row for each image of a folder that was read well enough; `read` gets it upright and in RGB."""
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions()):
        try:
            image = read_image(path, "the page", input_data_format=None, do_convert_rgb=True, keeps_tensor=False)[0]
        except (OSError, ValueError) as error:
            logger.warning("Left out: %s", error)
            continue
        lines = [line for line in read(image) if line.text.strip()]
        if not lines:
            logger.warning("%s is left out: nothing was read on it.", path)
        elif (worst := min(lines, key=lambda line: line.score)).score < min_score:
            logger.warning("%s is left out: %r has a score of %.2f.", path, worst.text, worst.score)
        else:
            yield {"file_name": path.name, "text": in_reading_order(lines)}


def main(argv: list[str] | None = None) -> None:
    """Label a folder.

    Raises:
        FileExistsError: It has labels.
        ValueError: `--min_score` is out of range, or no page of the folder could be labelled.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder of images.")
    parser.add_argument("--min_score", type=float, default=0.7, help="Lowest score of a line, 0 to 1; default: 0.7.")
    arguments = parser.parse_args(argv)
    metadata = arguments.folder / METADATA
    if metadata.exists():
        raise FileExistsError(f"{metadata} is there already; labels are not written over.")
    if not 0 <= arguments.min_score <= 1:
        raise ValueError(f"--min_score is {arguments.min_score}; it has to be between 0 and 1.")
    rows = list(label(arguments.folder, open_reader(), min_score=arguments.min_score))
    if not rows:
        raise ValueError(f"{arguments.folder} has no image that could be labelled.")
    # Names that are not UTF-8 can be written escaped alone.
    lines = (json.dumps(row, ensure_ascii=not row["file_name"].isprintable()) for row in rows)
    write_text(metadata, "".join(f"{line}\n" for line in lines))
    logger.info("%d pages are in %s.", len(rows), metadata)


if __name__ == "__main__":
    main()
