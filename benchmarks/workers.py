"""The measuring processes, seen from the one that asks them: one contestant in each, and only one computing at a time.

A contestant gets its job on its command line, builds, and then answers one line of JSON for each line it is sent.
Nothing here imports torch.
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

# Of blocks mapped one by one, and of what is free at the end of the heap.
MALLOC_THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

Contestant = Literal["project", "unlimited-ocr", "deepseek-ocr-encoder", "composite", "preprocessing"]
Training = Literal["nothing", "projector", "frozen", "clip", "lora", "full"]


@dataclass(frozen=True)
class Job:
    """What a process builds, and what a step of it is.

    Attributes:
        contestant: Whose encoder; `"composite"`: ours in a LLaVA; `"preprocessing"` builds none.
        training: `"nothing"`: a forward pass under `no_grad`. Otherwise forward and backward, with gradients for a
            projector behind the frozen encoder, for CLIP, for adapters of rank 8, or for all parameters. In a
            composite, also for all behind the encoder; `"projector"` freezes the language model as well.
        size: Side of the page in pixels, a multiple of 64.
        batch_size: Pages a step.
        dtype: Of weights and pixels.
        checkpointing: Whether gradient checkpointing is on.
        compiled: Whether the encoder goes through `torch.compile`.
        malloc_threshold: From how many bytes on glibc gives freed memory back to the system at once; by default it
            begins small and learns, up to 32 MiB.
        allocator: The library that takes glibc's place as allocator, as the loader finds it.
        gives_back: Whether a step ends with freed memory given back all the same, for the process that is next.
        device: `"cpu"` or `"cuda"`.
        threads: PyTorch's threads; by default as many as it takes.
        seed: Of weights and pixels.
        tiny: Whether the encoder has 2 + 2 layers of width 32, for tests.
    """

    contestant: Contestant = "project"
    training: Training = "nothing"
    size: int = 1024
    batch_size: int = 1
    dtype: str = "float32"
    checkpointing: bool = False
    compiled: bool = False
    malloc_threshold: int | None = None
    allocator: str | None = None
    gives_back: bool = True
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    tiny: bool = False

    @property
    def allocation(self) -> dict[str, str]:
        """The variables that decide in its process where memory comes from."""
        thresholds = MALLOC_THRESHOLDS if self.malloc_threshold is not None else ()
        variables = dict.fromkeys(thresholds, str(self.malloc_threshold))
        return variables | ({"LD_PRELOAD": self.allocator} if self.allocator is not None else {})


class JobError(Exception):
    """A process could not do what it was asked; the message says why."""


class Worker:
    """A process with one contestant in it. Used in a `with`, it ends there."""

    def __init__(self, job: Job):
        self.job = job
        environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workloads", json.dumps(asdict(job))],
            cwd=ROOT,
            env=os.environ | environment | job.allocation,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # An interruption is for the process that asks; it ends the others in an orderly way.
            start_new_session=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ready(self) -> dict[str, Any]:
        """Wait until it is built, and say what it is."""
        return self._answer()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something and wait for the answer.

        Raises:
            JobError: It failed or was killed.
        """
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # The answer says more.
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise JobError(self._obituary(self._process.wait()))
        answer = json.loads(line)
        if "error" in answer:
            raise JobError(f"{self.job.contestant}: {answer['error']}")
        return answer

    def _obituary(self, status: int) -> str:
        if status == -9:
            return f"{self.job.contestant}: killed, most likely because memory ran out"
        self._log.seek(0)
        last_line = (self._log.read().strip().splitlines() or ["it left no message"])[-1]
        return f"{self.job.contestant}: ended with status {status}: {last_line}"


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
