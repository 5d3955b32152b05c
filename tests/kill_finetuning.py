"""Kill `examples/finetune.py` at random points, resume it each time, and compare it with a run that was not killed.

    python tests/kill_finetuning.py --kills 20 --seed 0

Each run is ended by SIGKILL after a random time, from its first line to the last file that it writes, and started
again with `--resume_from_checkpoint true`. One that comes to its end is compared: losses, gradient norms and learning
rates of every step, losses on held-out pages, and the weights of the encoder and of the composite have to be those of
an uninterrupted run, bit for bit, and nothing half written may be left. Then the next one begins in a new folder,
until there were so many kills. Runs are forked from a process that has imported everything, which Windows cannot.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import finetune


STEPS, DONE = 24, "after training"
ARGUMENTS = [
    *("--max_steps", str(STEPS), "--warmup_steps", "2", "--logging_steps", "1", "--save_steps", "4"),
    *("--eval_steps", "10", "--per_device_train_batch_size", "4", "--num_pages", "40", "--num_held_out_pages", "6"),
    *("--page_size", "128", "--disable_tqdm", "true", "--no_compare_frozen", "--resume_from_checkpoint", "true"),
]
KEPT = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
"""What is compared of `Trainer`'s log: all but what a clock says."""


def main() -> None:
    """Kill, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random times (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(f"{kill(Path(folder), options.kills, options.seed)}\n")


def kill(folder: Path, num_kills: int, seed: int) -> str:
    """Kill runs at random points until there were so many kills, each run resumed to its end and compared.

    Returns:
        What was done, in words.

    Raises:
        AssertionError: A resumed run failed, or is not the one that was never interrupted.
    """
    draw = random.Random(seed)
    started = time.time()
    if not finish(folder / "untouched", after=None):
        raise AssertionError((folder / "untouched.log").read_text())
    seconds = (folder / "untouched" / "trained" / "result.json").stat().st_mtime - started
    num_runs, found = 0, []
    while len(found) < num_kills or num_runs == 0:
        output, place = folder / f"killed-{num_runs}", None
        # Once there is nothing left to train, one kill is enough.
        while not finish(output, after=draw.uniform(0, seconds) if len(found) < num_kills and place != DONE else None):
            place = where(output)
            found.append(place)
            sys.stderr.write(f"kill {len(found)}: {place}\n")
        compare(output, folder / "untouched")
        num_runs += 1
    places = ", ".join(f"{found.count(place)} {place}" for place in dict.fromkeys(sorted(found)))
    return f"{len(found)} kills ({places}) of {num_runs} runs; all ended like the one without"


def finish(output: Path, *, after: float | None) -> bool:
    """Start or resume a run, and kill it after so many seconds, if it is not done by then.

    Returns:
        Whether it came to its end.

    Raises:
        AssertionError: It ended by itself, and failed.
    """
    process = os.fork()
    if process == 0:
        run_and_exit(output)
    deadline = None if after is None else time.monotonic() + after
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            deadline = None
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise AssertionError(output.with_suffix(".log").read_text())
    return code == 0


def run_and_exit(output: Path) -> None:
    """What the forked process does: the example, as its command does it, and nothing after."""
    os.setpgid(0, 0)
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        finetune.main(["--output_dir", str(output), *ARGUMENTS])
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


def where(output: Path) -> str:
    """How far a run had come when it was killed."""
    if (output / "trained" / "result.json").exists():
        return DONE
    steps = [int(path.name.rpartition("-")[2]) for path in output.glob("trained/checkpoint-*")]
    return f"after checkpoint {max(steps):2}" if steps else "before the first checkpoint"


def compare(output: Path, expected: Path) -> None:
    """See that a resumed run is the one that was never interrupted."""
    log, expected_log = (log_of(folder / "trained") for folder in (output, expected))
    if len(expected_log) < STEPS or log != expected_log:
        raise AssertionError(f"{output}: the log is\n{log}, expected\n{expected_log}")
    for part in ("encoder", "composite"):
        assert_same_tensors(output / part, expected / part)
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (output, expected)]
    if any(".tmp" in name or "-pending" in name or ".deepseek_ocr_vision-" in name for name in names[0]):
        raise AssertionError(f"{output}: half written files are left: {sorted(names[0] - names[1])}")


def log_of(run: Path) -> list[tuple]:
    history = json.loads((run / "result.json").read_text())["history"]
    return [tuple(entry.get(key) for key in KEPT) for entry in history if "loss" in entry or "eval_loss" in entry]


def assert_same_tensors(folder: Path, expected: Path) -> None:
    found, wanted = (load_file(path / "model.safetensors") for path in (folder, expected))
    if found.keys() != wanted.keys() or any(not torch.equal(found[name], wanted[name]) for name in wanted):
        raise AssertionError(f"{folder} holds other weights than {expected}.")


if __name__ == "__main__":
    main()
