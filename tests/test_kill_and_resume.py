"""Runs that are killed, again and again, and give the losses of a run that was not."""

import os
import signal
from pathlib import Path

import pytest
import torch
import training_job
import transformers
from packaging import version
from training_job import Job, needs_fsdp_on_cpu, result_of, tensors_of
from transformers.trainer_utils import get_last_checkpoint

from deepseek_ocr_vision.training.resuming import last_complete_checkpoint, why_incomplete


KILLED = -signal.SIGKILL
STEPS = 6
# Dropout, so that a random state that is lost shows in the losses.
ARGUMENTS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}


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
            marks=pytest.mark.skipif(
                version.parse(transformers.__version__) < version.parse("5.23"),
                reason="transformers 5.0 cannot load an optimizer's state onto the device `cpu:0`, 5.23 can",
            ),
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
