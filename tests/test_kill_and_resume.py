"""Runs that are killed, again and again, and give the losses of a run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import training_job
import transformers
from helpers import assert_same_weights, free_port
from packaging import version
from training_job import Job, needs_fsdp_on_cpu, result_of, tensors_of
from transformers import AutoModel, LlavaForConditionalGeneration
from transformers.trainer_utils import get_last_checkpoint

from deepseek_ocr_vision.training.resuming import last_complete_checkpoint, why_incomplete


KILLED = -signal.SIGKILL
STEPS = 6
# Dropout, so that a random state that is lost shows in the losses.
ARGUMENTS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}


resumes_in_two_processes = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="transformers 5.0 cannot load an optimizer's state onto the device `cpu:0`, 5.23 can",
)


def job(folder: Path, *, num_processes: int, kill: tuple[int, int | str] | None = None, fsdp: bool = False) -> Job:
    arguments = ARGUMENTS | {"per_device_train_batch_size": 2 // num_processes}
    sharded = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    environment = sharded if fsdp else {}
    return Job(str(folder), arguments=arguments, dropout=0.1, kill=kill, fsdp=fsdp, environment=environment)


def assert_same_run(actual: Job, expected: Job) -> None:
    """Losses, gradient norms and learning rates of every step, and the weights at the end, to the last bit."""
    assert len(result_of(expected)["log"]) == STEPS
    assert result_of(actual)["log"] == result_of(expected)["log"]
    weights, expected_weights = (tensors_of(job, "weights") for job in (actual, expected))
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []


@pytest.mark.parametrize(
    ("num_processes", "fsdp", "kills"),
    [
        (
            1,
            False,
            [
                (0, "checkpoint-2/model.safetensors"),
                (0, 3),
                (0, "checkpoint-4/optimizer.pt"),
                (0, "checkpoint-6/trainer_state.json"),
                (0, f"after checkpoint-{STEPS}"),
            ],
        ),
        pytest.param(
            2,
            False,
            [(1, 3), (1, "checkpoint-4/rng_state_1.pth"), (0, "checkpoint-6/optimizer.pt")],
            marks=resumes_in_two_processes,
        ),
        pytest.param(2, True, [(0, 5)], marks=needs_fsdp_on_cpu),
    ],
    ids=["one process", "two processes", "FSDP"],
)
def test_a_run_that_was_killed_gives_the_losses_of_one_that_was_not(num_processes, fsdp, kills, tmp_path):
    """Pins a start from half a checkpoint, and weights, moments, schedule, order or random state that are lost."""
    untouched = job(tmp_path / "untouched", num_processes=num_processes, fsdp=fsdp)
    assert training_job.start(untouched, num_processes=num_processes) == [0] * num_processes
    for kill in kills:
        killed = job(tmp_path / "killed", num_processes=num_processes, fsdp=fsdp, kill=kill)
        assert training_job.start(killed, num_processes=num_processes)[kill[0]] == KILLED
    last = job(tmp_path / "killed", num_processes=num_processes, fsdp=fsdp)
    assert training_job.start(last, num_processes=num_processes) == [0] * num_processes
    assert_same_run(last, untouched)


def test_a_process_that_dies_while_it_saves_its_random_state_leaves_an_incomplete_checkpoint(tmp_path):
    """Pins a checkpoint that process 0 has finished, so that it looks whole, while another's part of it is cut off."""
    killed = job(tmp_path, num_processes=2, kill=(1, "checkpoint-4/rng_state_1.pth"))
    assert training_job.start(killed, num_processes=2)[1] == KILLED
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert "rng_state_1.pth is cut off" in why_incomplete(tmp_path / "checkpoint-4", num_processes=2)
    assert last_complete_checkpoint(tmp_path, num_processes=2) == str(tmp_path / "checkpoint-2")
    os.remove(tmp_path / "checkpoint-4" / "rng_state_1.pth")
    assert "rng_state_1.pth is missing" in why_incomplete(tmp_path / "checkpoint-4", num_processes=2)


# The example, by two processes


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIME_LIMIT = 600  # seconds


@contextmanager
def finetuning(folder: Path, output: Path, *options: str) -> Iterator[subprocess.Popen]:
    """`examples/finetune.py` started by accelerate in two processes, as its documents say."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    launcher += ["--config_file", str(EXAMPLES / "accelerate" / "two_cpus.yaml"), str(EXAMPLES / "finetune.py")]
    few = ["--max_steps", str(STEPS), "--save_steps", "2", "--eval_steps", "2", "--logging_steps", "1"]
    few += [
        "--per_device_train_batch_size",
        "2",
        "--page_size",
        "128",
        "--no_compare_frozen",
        "--disable_tqdm",
        "true",
    ]
    command = [*launcher, "--data", str(folder), "--output_dir", str(output), *few, *options]
    variables = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=variables, text=True, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def finetune(folder: Path, output: Path, *options: str) -> tuple[int, str]:
    """Run the example to its end; exit code and what it wrote."""
    with finetuning(folder, output, *options) as process:
        written, _ = process.communicate(timeout=TIME_LIMIT)
        return process.returncode, written


def kill_one_of_two(folder: Path, output: Path) -> int:
    """Kill the process that does not write as soon as there is a checkpoint; gives the launcher's exit code."""
    with finetuning(folder, output) as process:
        deadline = time.monotonic() + TIME_LIMIT
        while not (output / "trained" / "checkpoint-2" / "trainer_state.json").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process_of_rank(1, [int(child) for child in children]), signal.SIGKILL)
        process.communicate(timeout=TIME_LIMIT)
        return process.returncode


def process_of_rank(rank: int, processes: list[int]) -> int:
    """The one that the launcher gave a rank."""
    return next(pid for pid in processes if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


@resumes_in_two_processes
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc")
def test_two_processes_leave_one_whole_model_also_where_one_was_killed(tmp_path):
    """Pins models without weights: both processes wrote them, and one of them had none."""
    receipts = pytest.importorskip("receipts", reason="the extra `train` is not installed")
    folder = receipts.write_receipts(tmp_path / "pages", 10)
    outputs = {name: tmp_path / name for name in ("whole", "killed")}
    code, written = finetune(folder, outputs["whole"])
    assert code == 0, written
    assert written.count("Everything is in") == 1
    assert kill_one_of_two(folder, outputs["killed"]) != 0
    assert not (outputs["killed"] / "composite").exists()
    code, written = finetune(folder, outputs["killed"], "--resume_from_checkpoint", "true")
    assert code == 0, written
    results = [json.loads((output / "trained" / "result.json").read_text()) for output in outputs.values()]
    logs = [[(e["step"], e.get("loss"), e.get("eval_loss")) for e in r["history"][:-1]] for r in results]
    assert logs[0] == logs[1]
    assert [len(result["read"]) for result in results] == [1, 1]
    composites = [LlavaForConditionalGeneration.from_pretrained(output / "composite") for output in outputs.values()]
    assert_same_weights(*composites)
    encoder = AutoModel.from_pretrained(outputs["killed"] / "encoder")
    assert_same_weights(encoder, composites[0].model.vision_tower)
    assert "2 processes" in (outputs["killed"] / "report.md").read_text()


def test_an_error_of_the_process_that_writes_ends_both_with_one_exit_code(tmp_path):
    """Pins a process that waits for ever for one that has given up."""
    receipts = pytest.importorskip("receipts", reason="the extra `train` is not installed")
    folder = receipts.write_receipts(tmp_path / "pages", 2)
    receipts.write_metadata(folder, [{"file_name": "scans/0.png", "text": ""}] * 3)
    code, written = finetune(folder, tmp_path / "output")
    assert code == 1
    assert written.count("3 texts that are empty or blank") == 1
    assert not (tmp_path / "output").exists()
