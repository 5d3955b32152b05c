"""What is measured, row by row.

Times are those of processes that take turns in one run, one subject in each; a ratio is the median of the ratios round
by round, since a machine's speed drifts. Memory is the peak of a new process: its resident memory, with interpreter,
libraries and weights, or on a GPU what PyTorch has allocated there.
"""

import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.processes import Job, JobError, Worker


OURS, UNLIMITED_OCR, DEEPSEEK_OCR_ENCODER = "this package", "Unlimited-OCR", "deepseek-ocr-encoder"
MATRIX_SIZES = (512, 640, 1024, 1280)
MATRIX_TRAINING = ("frozen", "clip", "lora", "full")
COMPOSITE_SIZES = (512, 640, 1024)
COMPOSITE_TRAINING = ("projector", "frozen", "clip", "full")
TINY_SIZES = (128, 256)


@dataclass
class Comparison:
    """One measurement beside another.

    Attributes:
        what: What is compared.
        baseline: What it is compared with.
        unit: Of both values: `"s"`, `"GB"` or `"GFLOP/s"`.
        value, baseline_value: What was measured.
        ratio: Of the value to the baseline's.
        spread: The lowest and the highest ratio of a round.
        skipped: Why it was not measured.
    """

    what: str
    baseline: str
    unit: str = "s"
    value: float | None = None
    baseline_value: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Settings:
    """How everything is measured; the same for all rows."""

    size: int = 1024
    pairs: int = 3
    largest_measured: int = 1280
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"
    tiny: bool = False


@dataclass
class Rounds:
    """Seconds of subjects that took turns: one dictionary for each round, and why a subject is not in them."""

    seconds: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def compare(self, what: str, name: str, other: str, *, baseline: str | None = None) -> Comparison:
        """Compare the times of two subjects; `baseline` is the other one's description, by default its name."""
        baseline = baseline or other
        failure = self.failures.get(name) or self.failures.get(other)
        if failure:
            return Comparison(what, baseline, skipped=failure)
        value, baseline_value = (statistics.median(one[each] for one in self.seconds) for each in (name, other))
        ratios = [one[name] / one[other] for one in self.seconds]
        return Comparison(what, baseline, "s", value, baseline_value, **summary(ratios))


def summary(ratios: list[float]) -> dict[str, Any]:
    """The median of ratios, the lowest and the highest."""
    return {"ratio": statistics.median(ratios), "spread": (min(ratios), max(ratios))}


class Bench:
    """Makes measurements, and remembers those of memory, which several rows use.

    Args:
        settings: How to measure.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.machine: dict[str, Any] = {}
        self._peaks: dict[Job, dict[str, float]] = {}

    def job(self, **fields: Any) -> Job:
        """A job with these settings."""
        names = ("size", "threads", "seed", "device", "tiny")
        return Job(**({name: getattr(self.settings, name) for name in names} | fields))

    def in_turn(self, jobs: dict[str, Job], *, products: bool = False) -> Rounds:
        """Let subjects compute in turn, once in each round, after a round that does not count.

        Args:
            jobs: Name to job. The first one has to succeed; another one that fails is left out from then on.
            products: Whether the first one's process measures a plain matrix product in every round as well; its
                speed and the operations of a page are then in the rounds.
        """
        rounds = Rounds()
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(job)) for name, job in jobs.items()}
            self._ask(workers, rounds, self.ready)
            for index in range(self.settings.pairs + 1):
                product = next(iter(workers.values())).ask("product") if products else {}
                answers = self._ask(workers, rounds, lambda worker: worker.ask("step"))
                seconds = {name: answer["seconds"] for name, answer in answers.items()}
                told = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
                progress(f"  {f'round {index}' if index else 'warm-up'}: {told}")
                rounds.seconds.append(product | seconds)
        del rounds.seconds[0]
        return rounds

    def _ask(self, workers: dict[str, Worker], rounds: Rounds, ask: Callable[[Worker], dict]) -> dict[str, dict]:
        """One answer of each worker; one that fails is taken out, but for the first."""
        answers: dict[str, dict] = {}
        for place, (name, worker) in enumerate(list(workers.items())):
            try:
                answers[name] = ask(worker)
            except JobError as error:
                if place == 0:
                    raise
                rounds.failures[name] = str(error)
                del workers[name]
        return answers

    def ready(self, worker: Worker) -> dict[str, Any]:
        """Wait until a process is ready, and remember the machine that it runs on."""
        about = worker.ready()
        self.machine = {name: about[name] for name in ("threads", "device", "emulated")}
        return about

    def peak(self, job: Job) -> dict[str, float]:
        """Memory and time of one step in a new process, after a warm-up on a small page.

        Returns:
            Bytes that the process held when it had imported its libraries (`imported`), when it had built the model
            (`built`), and at the peak (`peak`); `seconds` of the step; number of `trained` parameters.
        """
        if job not in self._peaks:
            with Worker(job) as worker:
                about = self.ready(worker)
                worker.ask("step", warm_up=True)
                self._peaks[job] = about | worker.ask("step") | worker.ask("memory")
            peak = self._peaks[job]
            progress(f"  {describe(job)}: {peak['peak'] / 1e9:.2f} GB, {peak['seconds']:.2f} s")
        return self._peaks[job]

    def compare_peaks(self, what: str, job: Job, baseline_job: Job, baseline: str) -> Comparison:
        """Compare the peak memory of two jobs."""
        other, one = (self.peak(each)["peak"] / 1e9 for each in (baseline_job, job))
        return Comparison(what, baseline, "GB", one, other, one / other)


def describe(job: Job) -> str:
    """A job in words."""
    words = [job.subject, f"training {job.training}", f"{job.size} x {job.size}", job.dtype]
    words += ["checkpointing"] * job.checkpointing + [f"batch of {job.batch_size}"] * (job.batch_size > 1)
    return ", ".join(words)


def progress(text: str) -> None:
    """Tell whoever waits."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# Rows: each fills a dictionary as it goes, so that an interrupted row keeps what it has measured.

Result = dict[str, Any]


def forward(bench: Bench, result: Result) -> None:
    """Forward pass in float32: time beside the peers, speed beside a plain matrix product."""
    _forward(bench, result, "float32")


def forward_bf16(bench: Bench, result: Result) -> None:
    """Forward pass in bfloat16: the same."""
    _forward(bench, result, "bfloat16")


def _forward(bench: Bench, result: Result, dtype: str) -> None:
    job = bench.job(dtype=dtype)
    peers = {UNLIMITED_OCR: "unlimited-ocr", DEEPSEEK_OCR_ENCODER: "deepseek-ocr-encoder"}
    jobs = {OURS: job} | {name: replace(job, subject=subject) for name, subject in peers.items()}
    rounds = bench.in_turn(jobs, products=True)
    result["rounds"] = rounds.seconds
    speeds = [one["page_operations"] / one[OURS] for one in rounds.seconds]
    products = [one["operations_per_second"] for one in rounds.seconds]
    medians = [statistics.median(values) / 1e9 for values in (speeds, products)]
    ratios = [speed / product for speed, product in zip(speeds, products, strict=True)]
    result["comparisons"] = [
        *(rounds.compare(f"forward, {dtype}: time", OURS, peer) for peer in peers),
        Comparison(f"forward, {dtype}: speed", "matrix product", "GFLOP/s", *medians, **summary(ratios)),
    ]


def train(bench: Bench, result: Result) -> None:
    """Forward and backward pass of all parameters: time beside Unlimited-OCR, and with gradient checkpointing."""
    job = bench.job(training="full")
    jobs = {OURS: job, UNLIMITED_OCR: replace(job, subject="unlimited-ocr")}
    rounds = bench.in_turn(jobs | {"checkpointing": replace(job, checkpointing=True)})
    result["rounds"] = rounds.seconds
    what = "forward + backward, float32"
    without = f"{OURS} without it"
    result["comparisons"] = [
        rounds.compare(f"{what}: time", OURS, UNLIMITED_OCR),
        rounds.compare(f"{what}, checkpointing: time", "checkpointing", OURS, baseline=without),
    ]


def memory(bench: Bench, result: Result) -> None:
    """Peak memory of that step beside Unlimited-OCR, without and with gradient checkpointing."""
    job = bench.job(training="full")
    peer = replace(job, subject="unlimited-ocr")
    comparisons = result["comparisons"] = []
    for suffix, case in {"": job, ", checkpointing": replace(job, checkpointing=True)}.items():
        what = f"forward + backward, float32{suffix}: peak memory"
        comparisons.append(bench.compare_peaks(what, case, peer, UNLIMITED_OCR))


def frozen(bench: Bench, result: Result) -> None:
    """Peak memory of training a projector behind the frozen encoder, beside a forward pass alone."""
    what = "frozen encoder, trained projector: peak memory"
    comparison = bench.compare_peaks(what, bench.job(training="frozen"), bench.job(), "forward under no_grad")
    result["comparisons"] = [comparison]


def batch(bench: Bench, result: Result) -> None:
    """Four pages at once beside one: time, and memory beyond weights and pixels."""
    jobs = {"batch of 4": bench.job(batch_size=4), "batch of 1": bench.job()}
    rounds = bench.in_turn(jobs)
    result["rounds"] = rounds.seconds
    what = "forward of a batch of 4, float32"
    result["comparisons"] = [rounds.compare(f"{what}: time", *jobs)]
    peaks = [bench.peak(job) for job in jobs.values()]
    four, one = ((peak["peak"] - peak["built"]) / 1e9 for peak in peaks)
    ratio = four / one if one else None
    what = f"{what}: memory beyond weights and pixels"
    result["comparisons"].append(Comparison(what, "batch of 1", "GB", four, one, ratio))


def preprocessing(bench: Bench, result: Result) -> None:
    """Pages of 1,000 x 1,400 pixels to `pixel_values`: images per second in several ways."""
    pairs = bench.settings.pairs
    with Worker(bench.job(subject="preprocessing")) as worker:
        bench.ready(worker)
        result |= worker.ask("preprocess", pages=2 if pairs == 1 else 8, rounds=pairs)


def compile_(bench: Bench, result: Result) -> None:
    """Whether `torch.compile` helps a forward pass; compiling it takes minutes."""
    comparisons = result["comparisons"] = []
    for dtype in ("float32", "bfloat16"):
        plain = bench.job(dtype=dtype)
        rounds = bench.in_turn({OURS: plain, "compiled": replace(plain, compiled=True)})
        what = f"forward under torch.compile, {dtype}: time"
        comparisons.append(rounds.compare(what, "compiled", OURS, baseline=f"{OURS} without it"))


def profile(bench: Bench, result: Result) -> None:
    """Seconds and speed of each part, forward and backward."""
    with Worker(bench.job(training="full")) as worker:
        bench.ready(worker)
        worker.ask("step", warm_up=True)
        profiles = [worker.ask("profile") for _ in range(bench.settings.pairs)]
        result["operations_per_second"] = worker.ask("product")["operations_per_second"]
    result["operations"] = profiles[0]["operations"]
    for direction in ("forward", "backward"):
        parts = {part: [one[direction][part] for one in profiles] for part in result["operations"]}
        result[direction] = {part: statistics.median(seconds) for part, seconds in parts.items()}


def matrix(bench: Bench, result: Result) -> None:
    """Memory and time of a step at four sizes, by what is trained, with and without gradient checkpointing."""
    jobs = (
        bench.job(size=size, training=training, checkpointing=checkpointing)
        for size in _sizes(bench, MATRIX_SIZES)
        for training in MATRIX_TRAINING
        # A frozen encoder keeps nothing, so that checkpointing has nothing to save.
        for checkpointing in ((False,) if training == "frozen" else (False, True))
    )
    _measure_cells(bench, result, jobs)


def composite(bench: Bench, result: Result) -> None:
    """Memory and time of a step of a LLaVA around the encoder, by what is frozen."""
    jobs = (
        bench.job(subject="composite", size=size, training=training)
        for size in _sizes(bench, COMPOSITE_SIZES)
        for training in COMPOSITE_TRAINING
    )
    _measure_cells(bench, result, jobs)


def _sizes(bench: Bench, sizes: tuple[int, ...]) -> list[int]:
    settings = bench.settings
    return [size for size in (TINY_SIZES if settings.tiny else sizes) if size <= settings.largest_measured]


def _measure_cells(bench: Bench, result: Result, jobs: Iterable[Job]) -> None:
    """Measure the peak of each job; one that fails keeps its place in the table, with the reason."""
    cells = result["cells"] = []
    for job in jobs:
        cell = {"size": job.size, "training": job.training, "checkpointing": job.checkpointing}
        try:
            peak = bench.peak(job)
            cell |= {name: peak[name] for name in ("seconds", "peak", "imported", "trained")}
        except JobError as error:
            progress(f"  {describe(job)}: not measured: {error}")
            cell["skipped"] = str(error)
        cells.append(cell)


ROWS: dict[str, Callable[[Bench, Result], None]] = {
    "forward": forward,
    "forward-bf16": forward_bf16,
    "train": train,
    "memory": memory,
    "frozen": frozen,
    "batch": batch,
    "preprocessing": preprocessing,
    "compile": compile_,
    "profile": profile,
    "matrix": matrix,
    "composite": composite,
}
