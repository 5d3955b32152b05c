"""Broken image files and PDFs, many of them: each is read, or refused with an error that names it.

    python tests/fuzz_images.py --number 2000
    python tests/fuzz_images.py --number 200 --pdf

The files are of every format that is read, and of the kinds that Pillow does not write; bytes of them are changed,
left out, doubled or cut off. The same seed gives the same files.
"""

import argparse
import io
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from image_files import exif, png, tiff
from PIL import Image

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.encoding import encode_pages, load_pages
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import IMAGE_FORMATS


SLOW = 2.0
"""Seconds of the processor from which on a file counts as one that hangs."""
MAX_PIXELS = 4_000_000
"""Above this, files that only claim to be large are refused, which Pillow otherwise does at 179 million."""


AS_PAGES = DeepSeekOCRVisionImageProcessor(size=64)


def sound_files() -> dict[str, bytes]:
    """A page of 96 x 64 pixels in every format and kind."""
    grey = np.full((64, 96), 255, dtype=np.uint8)
    grey[8:16, 8:56] = np.arange(48)
    images = {"L": Image.fromarray(grey)}
    images |= {mode: images["L"].convert(mode) for mode in ("RGB", "RGBA", "P", "1", "CMYK")}
    images["I;16"] = Image.fromarray(grey.astype(np.uint16) * 257)
    files = {}
    Image.init()
    for kind in IMAGE_FORMATS:
        for mode, image in images.items() if kind in Image.SAVE and (kind in Image.OPEN or kind == "MPO") else ():
            file = io.BytesIO()
            options = {"exif": exif(6)} if kind in ("PNG", "JPEG", "WEBP", "MPO") else {}
            try:
                image.save(file, kind, **options)
            except (OSError, ValueError):  # this format has no such mode
                continue
            files[f"{kind}-{mode}"] = file.getvalue()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "group4", "jpeg"):
        file = io.BytesIO()
        images["1" if compression == "group4" else "L"].save(file, "TIFF", compression=compression)
        files[compression] = file.getvalue()
    sixteen = grey.astype(np.uint16) * 257
    files |= {f"grey-{order}": tiff(sixteen, photometric=1, order=order) for order in "<>"}
    files["white-is-zero"] = tiff(sixteen, photometric=0)
    files["planar"] = tiff(np.stack([grey] * 3, axis=-1), photometric=2, planar=True)
    files["planar-16"] = tiff(np.stack([sixteen] * 3, axis=-1), photometric=2, planar=True)
    return files | {f"key-{bits}": png(grey >> 8 - bits, bits=bits, transparent=1) for bits in (1, 2, 4, 8)}


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with one to four faults, half of them in its first 100 bytes."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(len(changed), draw.choice([100, len(changed)])) or 1)
        fault = draw.choice(["flip", "byte", "number", "drop", "double", "cut"])
        if fault == "flip":
            changed[place : place + 1] = bytes([b ^ 1 << draw.randrange(8) for b in changed[place : place + 1]])
        elif fault == "byte":
            changed[place : place + 1] = bytes([draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])])
        elif fault == "number":
            changed[place : place + 4] = draw.choice(
                [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"]
            )
        elif fault == "drop":
            del changed[place : place + draw.randint(1, 16)]
        elif fault == "double":
            changed[place:place] = changed[place : place + draw.randint(1, 64)]
        else:
            del changed[max(1, place) :]
    return bytes(changed)


def broken_files(number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of broken files, the same for the same seed."""
    draw = random.Random(seed)
    sound = sound_files()
    for index in range(number):
        kind = draw.choice(sorted(sound))
        yield f"{index:05}-{kind.replace(';', '')}.dat", mutated(sound[kind], draw)


def outcome_of(path: Path) -> str:
    """What reading a file came to: "read", "refused", or what should not happen."""
    start = time.process_time()
    try:
        pixel_values = AS_PAGES([path], return_tensors="np").pixel_values
        outcome = "read" if np.isfinite(pixel_values).all() else "NaN"
    except (OSError, ValueError) as error:
        outcome = "refused" if f"images[0] ({path})" in str(error) else f"no name in {error!r}"
    except Exception as error:
        outcome = f"raw {error!r}"
    seconds = time.process_time() - start
    return outcome if seconds < SLOW else f"{seconds:.1f} s, then {outcome}"


def fuzz(number: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Read that many broken files; how often each outcome was, and the files that should not have it.

    Args:
        number: How many.
        seed: Which.
        folder: Where they are written; those that are fine are removed again.
    """
    outcomes: Counter = Counter()
    faults = []
    for name, content in broken_files(number, seed):
        path = folder / name
        path.write_bytes(content)
        with warnings.catch_warnings(), mock.patch.object(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS // 2):
            warnings.simplefilter("ignore")
            outcome = outcome_of(path)
        if outcome in ("read", "refused"):
            outcomes[outcome] += 1
            path.unlink()
        else:
            outcomes["fault"] += 1
            faults.append(f"{path}: {outcome}")
    return outcomes, faults


def fuzz_pdfs(number: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Encode that many broken PDFs, as `deepseek-ocr-vision encode` does; every file has a page or a problem.

    Args:
        number: How many.
        seed: Which.
        folder: Where they are written, and the tokens beside them.
    """
    draw, file = random.Random(seed), io.BytesIO()
    page = Image.new("RGB", (64, 96), "white")
    page.save(file, "PDF", save_all=True, append_images=[page.convert("L"), page.convert("1")])
    (folder / "pdfs").mkdir()
    names = [str(folder / "pdfs" / f"{index:05}.pdf") for index in range(number)]
    for name in names:
        Path(name).write_bytes(mutated(file.getvalue(), draw))
    model = DeepSeekOCRVisionModel(DeepSeekOCRVisionConfig.tiny()).eval()
    options = {"num_workers": 1, "timeout": 10, "show_progress": False, "dpi": 72}
    summary = encode_pages([folder / "pdfs"], model, AS_PAGES, out=folder / "tokens", **options)
    refused = {problem.source for problem in summary.problems}
    read = set(load_pages(folder / "tokens")["source"])
    outcomes = Counter({"pages read": summary.num_pages, "files refused": len(refused), "files read": len(read)})
    return outcomes, [f"{name}: neither read nor refused" for name in names if name not in refused | read]


def main() -> int:
    """Read broken files and say what became of them. The exit code is 1 if one was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=2000, help="how many files (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="which files (default: 0)")
    parser.add_argument("--pdf", action="store_true", help="PDFs in place of images")
    parser.add_argument("--folder", type=Path, help="where files that are faults stay; a new one by default")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    outcomes, faults = (fuzz_pdfs if options.pdf else fuzz)(options.number, options.seed, folder)
    sys.stdout.write("\n".join([*faults, ", ".join(f"{count} {name}" for name, count in outcomes.items()), ""]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
