"""Kill an encoding at random points and see that nothing is lost, twice or left over.

    python tests/kill_encoding.py --points 20                  # the process that asks, and its workers
    python tests/kill_encoding.py --points 20 --ray            # the same, and the encoders, of Ray; under an hour

At each point a run of `encode_pages` is started, and after a random time the driver, a preparing worker or an encoder
is ended by SIGKILL, and all parts but six are removed. A run without kills ends each round; then every page has to be
there once, with the tokens of a run that was never interrupted, bit for bit, and the folder has to hold nothing but
the table.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parent))

from encoding_helpers import assert_same, encode, png, write_pdf
from helpers import tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionModel


# A process that is forked has imported everything already.
_CONTEXT = multiprocessing.get_context("fork")


def main() -> None:
    """Kill, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20, help="kills of each kind (default: %(default)s)")
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    kinds = ("driver", "worker", "encoder") if options.ray else ("driver", "worker")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            num_hits = kill(Path(folder, kind), kind, options.points, options.pages, options.seed, is_ray=options.ray)
            sys.stdout.write(f"{kind}: {options.points} kills, {num_hits} while pages were computed; nothing lost\n")


def kill(folder: Path, kind: str, num_points: int, num_pages: int, seed: int, *, is_ray: bool = False) -> int:
    """Kill one kind of process at random points of one encoding, then see what is there.

    Returns:
        How many of the kills hit an encoding that had begun and was not done.
    """
    draw = random.Random(f"{seed} {kind}")
    scans, out = folder / "scans", folder / "out"
    scans.mkdir(parents=True)
    for number in range(num_pages - 4):
        (scans / f"{number}.png").write_bytes(png(number))
    write_pdf(scans / "book.pdf", *range(1000, 1004))
    torch.manual_seed(0)
    model = DeepSeekOCRVisionModel(tiny_config())
    encode(scans, model, folder / "whole")
    engine = {"num_workers": 2, "timeout": 600.0, "pages_per_file": 3}
    engine |= {"ray": "local", "num_encoders": 2} if is_ray else {}
    num_hits = 0
    for _ in range(num_points):
        process = _CONTEXT.Process(target=encode_slowly, args=(scans, model, out, engine))
        process.start()
        num_hits += strike(process, kind, draw, out, is_ray=is_ray)
        process.kill()
        process.join()
        for part in parts(out)[6:]:
            part.unlink()  # so that there is something to compute at the next point
    last = _CONTEXT.Process(target=encode, args=(scans, model, out), kwargs=engine)
    last.start()
    last.join()
    if last.exitcode != 0:
        raise AssertionError(f"The last run ended with {last.exitcode}.")
    assert_same(out, folder / "whole")
    rest = [path.name for path in out.iterdir() if path.name != "settings.json" and path.suffix != ".parquet"]
    if rest:
        raise AssertionError(f"left over: {rest}")
    return num_hits


def encode_slowly(scans: Path, model: DeepSeekOCRVisionModel, out: Path, engine: dict) -> None:
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    if encode(scans, model, out, **engine).problems:
        raise AssertionError("A page was given up.")


def strike(process: Any, kind: str, draw: random.Random, out: Path, *, is_ray: bool) -> bool:
    """Kill after a random time; a driver that lost a helper has to come to its end."""
    # Ray takes a while to begin: there the time is from some new part on.
    num_parts = len(parts(out)) + draw.randrange(1, 8) if is_ray else 0
    started = time.monotonic()
    while process.is_alive() and time.monotonic() - started < 600:
        if (out / "settings.json").exists() and len(parts(out)) >= num_parts:
            break
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 1 if is_ray else 2.5))
    is_running = process.is_alive()
    if kind == "driver":
        process.kill()
        return is_running
    # On Ray the actor that prepares, or the process that it calls.
    name = b"_Encoding" if kind == "encoder" else b"_Preparing" if is_ray else None
    helpers = processes_of(process.pid, name)
    if is_running and helpers:
        os.kill(draw.choice(helpers), signal.SIGKILL)
    process.join(timeout=600)
    if process.exitcode != 0:
        raise AssertionError(f"The encoding ended with {process.exitcode} after its {kind} was killed.")
    return is_running and bool(helpers)


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("*.parquet"))


def processes_of(ancestor: int, name: bytes | None) -> list[int]:
    """Children of a process, or those of Ray's workers below it that have a name."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, titles[int(folder.name)] = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])

    def is_below(process: int) -> bool:
        parent = parents.get(process)
        return parent == ancestor or (parent in parents and is_below(parent))

    if name is None:
        return [process for process, parent in parents.items() if parent == ancestor and b"ray" not in titles[process]]
    return [process for process in parents if name in titles[process] and is_below(process)]


if __name__ == "__main__":
    main()
