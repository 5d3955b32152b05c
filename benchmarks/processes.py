"""The processes that measure, seen from the one that asks them. Nothing here imports torch.

A process gets a job on its command line, builds what the job names, and then answers one line of JSON for each line
that it is sent. It computes only while it is asked.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


ROOT = Path(__file__).resolve().parent.parent

Subject = Literal["encoder", "unlimited-ocr", "deepseek-ocr-encoder", "composite", "preprocessing"]
Training = Literal["nothing", "projector", "frozen", "clip", "lora", "full"]


@dataclass(frozen=True)
class Job:
    """What a process builds, and what a step of it is.

    Attributes:
        subject: What is measured: this package's encoder, that of a peer, a LLaVA around this package's encoder, or
            preprocessing, which builds no model.
        training: `"nothing"`: a forward pass under `no_grad`. Otherwise forward and backward, with gradients for a
            projector behind the frozen encoder (`"frozen"`), for CLIP, for LoRA adapters, or for all parameters. In a
            composite the projector and the language model get gradients as well; `"projector"` freezes the latter.
        size: Side of the page in pixels, a multiple of 64.
        batch_size: Pages per step.
        dtype: Of weights and pixels.
        checkpointing: Whether gradient checkpointing is on.
        compiled: Whether the model is compiled with `torch.compile`.
        device: `"cpu"` or `"cuda"`.
        threads: PyTorch's threads; `None` for PyTorch's own number.
        seed: Of weights and pixels.
        tiny: Whether the encoder has the tiny size, for tests of the benchmarks.
    """

    subject: Subject = "encoder"
    training: Training = "nothing"
    size: int = 1024
    batch_size: int = 1
    dtype: str = "float32"
    checkpointing: bool = False
    compiled: bool = False
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    tiny: bool = False


class JobError(Exception):
    """A process could not do what it was asked; the message says why."""


class Worker:
    """A process with one job, used in a `with` statement, at whose end the process ends."""

    def __init__(self, job: Job):
        self.job = job
        environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workloads", json.dumps(asdict(job))],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Ctrl-C is for the process that asks, which then ends this one.
            start_new_session=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ready(self) -> dict[str, Any]:
        """Wait for the answer to `build`, which comes first without being asked for; raises as `ask` does."""
        return self._answer()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of `Workload` in the process and wait for the result.

        Raises:
            JobError: It failed, or the process was killed.
        """
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; `_answer` says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise JobError(f"{self.job.subject}: {self._reason_of_its_end()}")
        answer = json.loads(line)
        if "error" in answer:
            raise JobError(f"{self.job.subject}: {answer['error']}")
        return answer

    def _reason_of_its_end(self) -> str:
        status = self._process.wait()
        if status == -9:
            return "killed, most likely because memory ran out"
        self._log.seek(0)
        last_line = (self._log.read().strip().splitlines() or ["no message"])[-1]
        return f"ended with status {status}: {last_line}"
