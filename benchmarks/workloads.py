"""What runs in a process that measures: `python -m benchmarks.workloads '{"subject": "encoder", ...}'`.

It builds what the job names, writes one line of JSON about itself, and then answers each line of JSON on its standard
input with one on its standard output, until the input is closed.
"""

import ctypes
import json
import os
import re
import resource
import statistics
import sys
import time
from contextlib import suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from benchmarks.models import MODELS, encoder_config, prepare_training
from benchmarks.operations import forward_operations
from benchmarks.preprocessing import compare_ways, random_page
from benchmarks.processes import Job
from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import is_emulated


PROJECTOR_WIDTH = 1280
NUM_TEXT_TOKENS = 128
NUM_PRODUCTS, PRODUCT_SECONDS = 15, 10  # the most of both; a processor that emulates the dtype takes seconds for one
WARM_UP_SIZE = 128
HALVES = ("bfloat16", "float16")


class Workload:
    """What a process measures, and what it can be asked: every public method is a command.

    Args:
        job: What to build.
    """

    def __init__(self, job: Job):
        self.job = job
        self.dtype = getattr(torch, job.dtype)
        self.model: Any = None
        self.projector: nn.Module | None = None
        self.imported = self.built = resident_memory()

    def build(self) -> dict[str, Any]:
        """Build the subject; return threads, device, what it emulates, and how many parameters get a gradient."""
        job = self.job
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        emulated = [name for name in HALVES if is_emulated(getattr(torch, name), torch.device(job.device))]
        about: dict[str, Any] = {"threads": torch.get_num_threads(), "emulated": emulated}
        if job.subject != "preprocessing":
            self.model = MODELS[job.subject](job)
        if isinstance(self.model, nn.Module):
            about["trained"] = self._prepare_training()
        if job.compiled:
            self.model = torch.compile(self.model)
        self.pixel_values = self._random_pixels(job.size)
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.built = torch.cuda.memory_allocated()
            return about | {"device": torch.cuda.get_device_name()}
        self.built = resident_memory()
        return about | {"device": torch.backends.cpu.get_cpu_capability()}

    def _prepare_training(self) -> int:
        job, model = self.job, self.model
        prepare_training(model, job.training)
        model.train(job.training != "nothing")
        if job.training == "frozen" and job.subject == "encoder":
            width = model.config.hidden_size
            self.projector = nn.Linear(width, PROJECTOR_WIDTH, dtype=self.dtype, device=job.device)
        if job.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def _random_pixels(self, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.job.seed)
        pixels = torch.randn(self.job.batch_size, 3, size, size, generator=generator)
        return pixels.to(self.job.device, self.dtype)

    def step(self, *, warm_up: bool = False) -> dict[str, float]:
        """Compute one step and return its seconds; a warm-up uses a small page, which takes little memory."""
        pixel_values = self._random_pixels(WARM_UP_SIZE) if warm_up else self.pixel_values
        synchronize(self.job.device)
        start = time.perf_counter()
        if self.job.training == "nothing":
            with torch.no_grad():
                self.model(pixel_values)
        else:
            self.loss(pixel_values).backward()
        synchronize(self.job.device)
        seconds = time.perf_counter() - start
        if self.job.training != "nothing":
            self._free_gradients()
        return {"seconds": seconds}

    def loss(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The scalar that a step differentiates: the composite's own loss, or the mean square of the tokens."""
        if self.job.subject == "composite":
            input_ids = self._page_and_text(pixel_values)
            return self.model(pixel_values=pixel_values, input_ids=input_ids, labels=input_ids).loss
        tokens = self.model(pixel_values).last_hidden_state
        if self.projector is not None:
            tokens = self.projector(tokens)
        return tokens.float().square().mean()

    def _page_and_text(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What a composite reads: the image tokens of a page, and text after them."""
        image_token = self.model.config.image_token_id
        num_image_tokens = pixel_values.shape[-1] // 64 * (pixel_values.shape[-2] // 64)
        text = torch.arange(NUM_TEXT_TOKENS, device=pixel_values.device) % image_token
        page = torch.full((num_image_tokens,), image_token, device=pixel_values.device)
        return torch.cat([page, text]).repeat(len(pixel_values), 1)

    def _free_gradients(self) -> None:
        """Return the gradients' memory to the system, for the process that computes next."""
        for module in (self.model, self.projector):
            if module is not None:
                module.zero_grad(set_to_none=True)
        return_freed_memory()

    def product(self) -> dict[str, float]:
        """The speed of a plain matrix product, that of the first linear layer of SAM's MLP at this size.

        With it come the operations that the encoder takes for a page (`page_operations`).
        """
        config = encoder_config(tiny=self.job.tiny)
        sam = config.sam_config
        num_patches = (self.job.size // sam.patch_size) ** 2
        left = torch.ones(num_patches, sam.hidden_size, dtype=self.dtype, device=self.job.device)
        right = torch.ones(sam.mlp_dim, sam.hidden_size, dtype=self.dtype, device=self.job.device)
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) <= NUM_PRODUCTS and sum(seconds) < PRODUCT_SECONDS):
            synchronize(self.job.device)
            start = time.perf_counter()
            _ = nn.functional.linear(left, right)
            synchronize(self.job.device)
            seconds.append(time.perf_counter() - start)
        operations = 2 * num_patches * sam.hidden_size * sam.mlp_dim
        page_operations = sum(forward_operations(config, self.job.size).values())
        speed = operations / statistics.median(seconds[1:])
        return {"operations_per_second": speed, "page_operations": page_operations}

    def memory(self) -> dict[str, int]:
        """Bytes after importing, with the model and the pixels, and at the peak so far."""
        peak = torch.cuda.max_memory_allocated() if self.job.device == "cuda" else peak_memory()
        return {"imported": self.imported, "built": self.built, "peak": peak}

    def profile(self) -> dict[str, dict[str, float]]:
        """Seconds of each part in a step, forward and backward, and the operations of its forward pass."""
        operations = forward_operations(self.model.config, self.job.size)
        return profile_by_part(self.model, self.pixel_values) | {"operations": operations}

    def preprocess(self, *, pages: int, rounds: int) -> dict[str, dict[str, Any]]:
        """Images per second of each way to prepare a page, and why a way failed."""
        return compare_ways(self.job.size, random_page(self.job.seed), pages=pages, rounds=rounds)


def synchronize(device: str) -> None:
    """Wait until a GPU has computed what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def return_freed_memory() -> None:
    """Give the system what this process has freed and its allocator keeps; only glibc can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Bytes of memory that this process holds now."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The most memory that this process has held, in bytes.

    On Linux it is `VmHWM`, since `ru_maxrss` starts at what the parent process held when it started this one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Profile


def profile_by_part(model: DeepSeekOCRVisionModel, pixel_values: torch.Tensor) -> dict[str, dict[str, float]]:
    """Seconds of each part of the encoder in a forward and a backward pass of all parameters.

    A part lasts from the arrival of its input, or in the backward pass of its output's gradient, to the arrival at the
    next part; what lies between two parts, such as the position table, counts to the first of them.
    """
    arrivals: list[tuple[str, float]] = []

    def arrive(part: str) -> None:
        synchronize(pixel_values.device.type)
        arrivals.append((part, time.perf_counter()))

    def watch(part: str, module: nn.Module) -> list[RemovableHandle]:
        def watch_gradient(module: nn.Module, arguments: tuple, output: Any) -> None:
            tensor = getattr(output, "last_hidden_state", output)
            tensor.register_hook(lambda gradient: arrive(part))

        before = module.register_forward_pre_hook(lambda module, arguments: arrive(part))
        return [before, module.register_forward_hook(watch_gradient)]

    handles = [handle for part, module in _modules_by_part(model) for handle in watch(part, module)]
    tokens = model(pixel_values).last_hidden_state
    arrive("")
    forward = _durations(arrivals)
    arrivals.clear()
    tokens.float().square().mean().backward()
    arrive("")
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": _durations(arrivals)}


def _modules_by_part(model: DeepSeekOCRVisionModel) -> list[tuple[str, nn.Module]]:
    """The modules of the encoder in the order of the data, each with the part that it belongs to."""
    sam = model.sam_model
    global_blocks = model.config.sam_config.global_attn_indexes
    return [
        ("patch embedding", sam.patch_embed),
        *(("global blocks" if i in global_blocks else "windowed blocks", block) for i, block in enumerate(sam.blocks)),
        ("neck", sam.neck),
        ("compressor", sam.net_2),
        ("compressor", sam.net_3),
        ("CLIP", model.vision_model),
    ]


def _durations(arrivals: list[tuple[str, float]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for (part, start), (_, end) in pairwise(arrivals):
        seconds[part] = seconds.get(part, 0.0) + end - start
    return seconds


# The process


def main() -> None:
    """Build the job, and answer until the input is closed."""
    # If memory runs out, Linux should kill this process and no other one of the user's.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # What libraries write to the standard output must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    workload = Workload(Job(**json.loads(sys.argv[1])))
    for line in chain(['{"command": "build"}'], sys.stdin):
        arguments = json.loads(line)
        try:
            answer = getattr(workload, arguments.pop("command"))(**arguments)
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
