"""What is measured, row by row, and the marks that it is measured by.

Times are those of contestants that take turns in one run, each in a process of its own; the ratio is the median of the
ratios pair by pair, since a machine's speed drifts. Memory is the peak of a fresh process: its resident memory at the
most, interpreter, libraries and weights included, or on a GPU what PyTorch has allocated there.
"""

import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from ctypes.util import find_library
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.memory import logits_memory, step_memory
from benchmarks.operations import forward_operations, step_operations
from benchmarks.workers import Job, JobError, Worker, available_memory
from benchmarks.workloads import LORA_RANK, WAYS, encoder_config


OURS, THEIRS = "this package", "Unlimited-OCR"
MATRIX_SIZES = (512, 640, 1024, 1280)
MATRIX_TRAINING = ("frozen", "clip", "lora", "full")
COMPOSITE_SIZES = (512, 640, 1024)
COMPOSITE_TRAINING = ("projector", "frozen", "clip", "full")
# What a process holds before there is a model, as long as none has been measured.
TYPICAL_PROCESS = 800_000_000
SPARE_MEMORY = 500_000_000
# glibc gives back what is freed, or keeps it: all but the smallest blocks, and whatever a step frees.
GIVEN_BACK, KEPT = 1 << 20, 4 << 30
# Debian's packages libtcmalloc-minimal4 and libjemalloc2.
ALLOCATORS = ("tcmalloc_minimal", "jemalloc")


@dataclass
class Line:
    """One comparison.

    Attributes:
        what: What is compared.
        ours: What this package takes, in `unit`.
        beside: What it is compared with.
        theirs: What that takes.
        unit: `"s"` or `"GB"`.
        value: The result, in `value_unit`.
        value_unit: `"x"` for a ratio, `"GB"` for a difference, `"%"` for a share.
        spread: The lowest and the highest of the pairs.
        at_most: The mark that the value should not exceed, stated for 1024 x 1024 pixels.
        at_least: The mark that it should reach.
        own_modules: The ratio that DeepSeek's own modules have to Unlimited-OCR, measured once elsewhere.
        floor: The ratio below which the arithmetic, or the weights and gradients alone, would be.
        note: What else there is to say.
        skipped: Why it was not measured.
    """

    what: str
    ours: float | None = None
    beside: str = THEIRS
    theirs: float | None = None
    unit: str = "s"
    value: float | None = None
    value_unit: str = "x"
    spread: tuple[float, float] | None = None
    at_most: float | None = None
    at_least: float | None = None
    own_modules: float | None = None
    floor: float | None = None
    note: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Settings:
    """How everything is measured; the same for all rows."""

    size: int = 1024
    pairs: int = 3
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"
    tiny: bool = False
    largest_measured: int = 1280


@dataclass
class Rounds:
    """What contestants that took turns have said: one dictionary, name to seconds, for each round."""

    seconds: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(one[name] for one in self.seconds)

    def line(self, what: str, ours: str, theirs: str, *, beside: str, **marks: Any) -> Line:
        """Compare two contestants by the median of their ratios."""
        if theirs in self.failures:
            return Line(what, beside=beside, skipped=self.failures[theirs])
        ratios = [one[ours] / one[theirs] for one in self.seconds]
        spread = (min(ratios), max(ratios))
        medians = {"ours": self.median(ours), "theirs": self.median(theirs)}
        return Line(what, beside=beside, value=statistics.median(ratios), spread=spread, **medians, **marks)


class Bench:
    """Makes measurements, and remembers those of memory, which several rows need.

    Args:
        settings: How to measure.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.config = encoder_config(tiny=settings.tiny)
        self.about: dict[str, Any] = {}
        self._peaks: dict[Job, dict[str, float]] = {}

    def job(self, **fields: Any) -> Job:
        """A job at these settings."""
        settings = self.settings
        shared = {"threads": settings.threads, "seed": settings.seed, "device": settings.device, "tiny": settings.tiny}
        return Job(**({"size": settings.size} | shared | fields))

    def in_turn(self, jobs: dict[str, Job], *, products: bool = False) -> Rounds:
        """Have contestants compute in turn, once each a round, after a round that does not count.

        Args:
            jobs: Name to job. The first has to succeed; another that fails is left out from then on.
            products: Whether the first one's process multiplies plain matrices in every round as well; its speeds are
                in the rounds as `"product"` and `"in place"`, in operations per second.

        Raises:
            JobError: The first one failed, or memory does not suffice.
        """
        self._require_memory(jobs.values())
        rounds = Rounds()
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(job)) for name, job in jobs.items()}
            first = next(iter(workers))
            for name, worker in list(workers.items()):
                self._try(rounds, workers, name, worker.ready, required=name == first)
            for index in range(self.settings.pairs + 1):
                one = {}
                if products:
                    answer = workers[first].ask("product")
                    one |= {"product": answer["operations_per_second"], "in place": answer["in_place_per_second"]}
                for name, worker in list(workers.items()):
                    answer = self._try(rounds, workers, name, lambda w=worker: w.ask("step"), required=name == first)
                    one |= {name: answer["seconds"]} if answer else {}
                seconds = ", ".join(f"{name} {one[name]:.2f} s" for name in workers)
                tell(f"  {'warm-up' if index == 0 else f'round {index}'}: {seconds}")
                rounds.seconds.append(one)
        del rounds.seconds[0]
        return rounds

    def _try(
        self, rounds: Rounds, workers: dict[str, Worker], name: str, ask: Callable[[], dict], *, required: bool
    ) -> dict[str, Any] | None:
        try:
            answer = ask()
        except JobError as error:
            if required:
                raise
            rounds.failures[name] = str(error)
            del workers[name]
            return None
        if "threads" in answer:
            self.about = {"threads": answer["threads"], "device": answer["device"]}
        return answer

    def peak(self, job: Job) -> dict[str, float]:
        """Memory and time of one step in a fresh process, after a warm-up on a small page.

        Returns:
            Bytes that the process held when it had imported its libraries (`imported`), when it had built the model
            (`built`), and at the most (`peak`); `seconds` of the step; `trained` parameters.

        Raises:
            JobError: It failed, or memory does not suffice.
        """
        if job not in self._peaks:
            self._require_memory([job])
            with Worker(job) as worker:
                built = worker.ready()
                self.about = {"threads": built["threads"], "device": built["device"]}
                worker.ask("step", warm_up=True)
                step = worker.ask("step")
                self._peaks[job] = built | step | worker.ask("memory")
            peak, seconds = self._peaks[job]["peak"], step["seconds"]
            tell(f"  {job.contestant}, {describe(job)}: {peak / 1e9:.2f} GB, {seconds:.2f} s")
        return self._peaks[job]

    def _require_memory(self, jobs: Any) -> None:
        """Refuse what the formula says does not fit: the largest step while all others hold their weights."""
        available = available_memory() if self.settings.device == "cpu" else None
        models = [job for job in jobs if job.contestant != "preprocessing"]
        if available is None or not models:
            return
        resting = {job: TYPICAL_PROCESS + self.estimate(replace(job, training="nothing")).parameters for job in models}
        needed = max(
            TYPICAL_PROCESS + self.estimated_peak(job) + sum(resting.values()) - resting[job] for job in models
        )
        if needed + SPARE_MEMORY > available:
            raise JobError(f"needs about {needed / 1e9:.0f} GB, of which {available / 1e9:.0f} are available")

    def estimate(self, job: Job) -> Any:
        """What the formula says of a job's memory, the process aside, for this package's encoder."""
        return step_memory(
            self.config,
            job.size,
            training="frozen" if job.training == "projector" else job.training,
            checkpointing=job.checkpointing,
            value_size=2 if job.dtype in ("bfloat16", "float16") else 4,
            batch_size=job.batch_size,
        )

    def estimated_peak(self, job: Job) -> int:
        """The formula's peak, and what an attention that keeps its logits takes on top of it."""
        peak = self.estimate(job).peak
        if job.contestant in ("project", "composite") and not job.compiled:
            return peak
        kept = logits_memory(self.config, job.size) * job.batch_size
        # Without gradients only one block's are there at a time.
        return peak + (kept if job.training == "full" else kept // 4)


def describe(job: Job) -> str:
    """What a job's step is, in words."""
    steps = {
        "projector": "only the projector trained",
        "nothing": "forward under no_grad",
        "frozen": "frozen encoder and trained projector",
        "clip": "CLIP trained",
        "lora": f"adapters of rank {LORA_RANK} trained",
        "full": "all parameters trained",
    }
    words = [steps[job.training], f"{job.size} x {job.size}", job.dtype]
    words += ["checkpointing"] if job.checkpointing else []
    words += [f"batch of {job.batch_size}"] if job.batch_size > 1 else []
    return ", ".join(words)


def tell(text: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# Rows: each fills in a dictionary as it goes, so that what was measured remains if it is interrupted.


def forward(bench: Bench, result: dict[str, Any]) -> None:
    """Forward pass in float32: time beside the peers, speed beside a plain matrix product."""
    marks = {"at_most": 0.64, "own_modules": 0.76, "floor": 0.55}
    _forward(bench, result, "float32", share_at_least=85.0, **marks)


def forward_bf16(bench: Bench, result: dict[str, Any]) -> None:
    """Forward pass in bfloat16: the same."""
    _forward(bench, result, "bfloat16", at_most=0.60, own_modules=0.91, floor=0.43)


def _forward(
    bench: Bench, result: dict[str, Any], dtype: str, *, share_at_least: float | None = None, **marks: float
) -> None:
    job = bench.job(dtype=dtype)
    jobs = {
        OURS: job,
        THEIRS: replace(job, contestant="unlimited-ocr"),
        "deepseek-ocr-encoder": replace(job, contestant="deepseek-ocr-encoder"),
    }
    rounds = bench.in_turn(jobs, products=True)
    result["rounds"] = rounds.seconds
    operations, needed = (
        sum(part.total for part in forward_operations(bench.config, job.size, padding=padding).values())
        for padding in (True, False)
    )
    shares = [100 * operations / (one[OURS] * one["product"]) for one in rounds.seconds]
    share, product = statistics.median(shares), rounds.median("product")
    speed = operations / rounds.median(OURS)
    in_place = rounds.median("in place")
    note = (
        f"{operations / 1e9:,.0f} GFLOP; {share * needed / operations:.0f} % without the padding of windows; "
        f"{100 * speed / in_place:.0f} % of the {in_place / 1e9:.0f} GFLOP/s of the same product into memory that is "
        "there already"
    )
    what = f"forward, {dtype}"
    result["lines"] = [
        rounds.line(f"{what}: time", OURS, THEIRS, beside=THEIRS, **marks),
        rounds.line(f"{what}: time", OURS, "deepseek-ocr-encoder", beside="deepseek-ocr-encoder"),
        Line(
            f"{what}: speed",
            ours=speed / 1e9,
            beside="matrix product",
            theirs=product / 1e9,
            unit="GFLOP/s",
            value=share,
            value_unit="%",
            spread=(min(shares), max(shares)),
            at_least=share_at_least,
            note=note,
        ),
    ]


def train(bench: Bench, result: dict[str, Any]) -> None:
    """Forward and backward pass of all parameters: time beside Unlimited-OCR, and with gradient checkpointing."""
    job = bench.job(training="full")
    jobs = {OURS: job, THEIRS: replace(job, contestant="unlimited-ocr")}
    rounds = bench.in_turn(jobs | {"checkpointing": replace(job, checkpointing=True)})
    result["rounds"] = rounds.seconds
    what = "forward + backward, float32"
    result["lines"] = [
        rounds.line(f"{what}: time", OURS, THEIRS, beside=THEIRS, at_most=0.68, own_modules=0.81, floor=0.48),
        rounds.line(
            f"{what}, checkpointing: time",
            "checkpointing",
            OURS,
            beside="this package without it",
            at_most=1.3,
        ),
    ]


def memory(bench: Bench, result: dict[str, Any]) -> None:
    """Peak memory of that step, without and with gradient checkpointing, and as glibc can be told to give it back."""
    job = bench.job(training="full")
    result["peaks"] = {}
    result["lines"] = []
    cases = (
        (job, "", {"at_most": 0.57, "own_modules": 1.01, "floor": 0.30}),
        (replace(job, checkpointing=True), ", checkpointing", {"at_most": 0.38}),
        (
            replace(job, checkpointing=True, malloc_threshold=GIVEN_BACK),
            ", checkpointing, freed memory given back",
            {"at_most": 0.38},
        ),
    )
    for case, name, marks in cases:
        theirs = bench.peak(replace(case, contestant="unlimited-ocr", checkpointing=False))
        ours = bench.peak(case)
        result["peaks"] |= {f"{THEIRS}{name}": theirs, f"{OURS}{name}": ours}
        line = _memory_line(f"forward + backward, float32{name}: peak memory", ours, theirs, THEIRS, **marks)
        if case.malloc_threshold is not None:
            line.note += f"; both with {_variables(case)}"
        result["lines"].append(line)


def malloc(bench: Bench, result: dict[str, Any]) -> None:
    """What it costs and saves that glibc keeps freed memory, or gives it back; beside what it does by default."""
    thresholds = {"freed memory kept": KEPT, "freed memory given back": GIVEN_BACK}
    changes = {name: {"malloc_threshold": threshold} for name, threshold in thresholds.items()}
    _beside_default(bench, result, changes, beside="glibc's default")


def allocators(bench: Bench, result: dict[str, Any]) -> None:
    """The same step with another allocator in glibc's place, and its memory with gradient checkpointing."""
    libraries = {name: find_library(name) for name in ALLOCATORS}
    changes = {name: {"allocator": library} for name, library in libraries.items() if library}
    beside = "glibc's allocator"
    _beside_default(bench, result, changes, beside=beside, checkpointing=(False, True))
    for name, library in libraries.items():
        if not library:
            what = f"forward + backward, float32, {name}: time"
            result["lines"].append(Line(what, beside=beside, skipped=f"lib{name} is not installed"))


def _beside_default(
    bench: Bench,
    result: dict[str, Any],
    changes: dict[str, dict[str, Any]],
    *,
    beside: str,
    checkpointing: tuple[bool, ...] = (False,),
) -> None:
    """Time and memory of a training step that gets its memory in another way, beside the same step by default."""
    default = bench.job(training="full", gives_back=False)
    jobs = {name: replace(default, **change) for name, change in changes.items()}
    rounds = bench.in_turn({"default": default} | jobs)
    result["rounds"] = rounds.seconds
    result["peaks"], result["lines"] = {}, []
    for name, job in jobs.items():
        what = f"forward + backward, float32, {name}"
        time = rounds.line(f"{what}: time", name, "default", beside=beside)
        time.note = f"{_variables(job)}; no memory is given back between the steps"
        result["lines"].append(time)
        for flag in checkpointing:
            suffix = ", checkpointing" if flag else ""
            theirs, ours = (bench.peak(replace(one, checkpointing=flag)) for one in (default, job))
            result["peaks"] |= {f"default{suffix}": theirs, f"{name}{suffix}": ours}
            result["lines"].append(_memory_line(f"{what}{suffix}: peak memory", ours, theirs, beside))


def _variables(job: Job) -> str:
    return " ".join(f"{name}={value}" for name, value in job.allocation.items())


def _memory_line(what: str, ours: dict, theirs: dict, beside: str, **marks: float) -> Line:
    above = (ours["peak"] - ours["imported"]) / (theirs["peak"] - theirs["imported"])
    return Line(
        what,
        ours=ours["peak"] / 1e9,
        beside=beside,
        theirs=theirs["peak"] / 1e9,
        unit="GB",
        value=ours["peak"] / theirs["peak"],
        note=f"{above:.2f} x without the {ours['imported'] / 1e9:.2f} GB of a process that has only imported",
        **marks,
    )


def frozen(bench: Bench, result: dict[str, Any]) -> None:
    """Peak memory of a trained projector behind the frozen encoder, and of training CLIP alone."""
    without_gradients, projector = bench.peak(bench.job()), bench.peak(bench.job(training="frozen"))
    result["peaks"] = {"forward under no_grad": without_gradients, "frozen": projector}
    what = "frozen encoder + trainable projector: peak memory"
    beside = "this package's forward under no_grad"
    result["lines"] = [_memory_line(what, projector, without_gradients, beside, at_most=1.05, floor=1.0)]
    clip = bench.peak(bench.job(training="clip"))
    result["peaks"]["clip"] = clip
    gradients = 4 * clip["trained"] / 1e9
    result["lines"].append(
        Line(
            "only CLIP trainable: peak memory over that",
            ours=clip["peak"] / 1e9,
            beside="frozen encoder + projector",
            theirs=projector["peak"] / 1e9,
            unit="GB",
            value=(clip["peak"] - projector["peak"]) / 1e9,
            value_unit="GB",
            at_most=0.6 + gradients,
            note=f"the mark is 0.6 GB and the {gradients:.2f} GB of its parameters' gradients",
        )
    )


def batch(bench: Bench, result: dict[str, Any]) -> None:
    """Four pages at once beside one: time, and memory beyond the weights."""
    one, four = bench.job(), bench.job(batch_size=4)
    rounds = bench.in_turn({"4 pages": four, "1 page": one})
    result["rounds"] = rounds.seconds
    what = "forward of a batch of 4, float32"
    marks = {"at_most": 4.1, "floor": 4.0}
    result["lines"] = [rounds.line(f"{what}: time", "4 pages", "1 page", beside="a batch of 1", **marks)]
    result["peaks"] = {"4 pages": bench.peak(four), "1 page": bench.peak(one)}
    # The pixels that are there before belong to the batch.
    ours, theirs = ((peak["peak"] - peak["built"]) / 1e9 for peak in result["peaks"].values())
    line = Line(
        f"{what}: memory beyond weights and pixels", ours=ours, beside="a batch of 1", theirs=theirs, unit="GB"
    )
    result["lines"].append(replace(line, value=ours / max(theirs, 1e-9), at_most=marks["at_most"]))


def preprocessing(bench: Bench, result: dict[str, Any]) -> None:
    """Pages of 1,000 x 1,400 pixels to `pixel_values`: pictures a second of several ways."""
    seconds: dict[str, list[float]] = {}
    with Worker(bench.job(contestant="preprocessing")) as worker:
        worker.ready()
        for _ in range(bench.settings.pairs):
            for way in WAYS:
                pages = 2 if bench.settings.pairs == 1 else 8
                try:
                    seconds.setdefault(way, []).append(
                        worker.ask("preprocess", way=way, pages=pages)["seconds"] / pages
                    )
                except JobError as error:
                    result.setdefault("failures", {})[way] = str(error)
    result["pictures_per_second"] = {way: 1 / statistics.median(values) for way, values in seconds.items() if values}


def compile_(bench: Bench, result: dict[str, Any]) -> None:
    """Whether `torch.compile` helps a forward pass; compiling it takes minutes."""
    result["lines"] = []
    for dtype in ("float32", "bfloat16"):
        plain = bench.job(dtype=dtype)
        what = f"forward under torch.compile, {dtype}: time"
        try:
            rounds = bench.in_turn({"plain": plain, "compiled": replace(plain, compiled=True)})
        except JobError as error:
            result["lines"].append(Line(what, beside="this package without it", skipped=str(error)))
            continue
        if "compiled" in rounds.failures:
            line = Line(what, beside="this package without it", skipped=rounds.failures["compiled"])
        else:
            line = rounds.line(what, "compiled", "plain", beside="this package without it")
        result["lines"].append(line)


def profile(bench: Bench, result: dict[str, Any]) -> None:
    """Seconds and speed of each part, forward and backward."""
    job = bench.job(training="full")
    bench._require_memory([job])
    with Worker(job) as worker:
        bench.about = {key: value for key, value in worker.ready().items() if key in ("threads", "device")}
        worker.ask("step", warm_up=True)
        profiles = [worker.ask("profile") for _ in range(bench.settings.pairs)]
        result["operations_per_second"] = worker.ask("product")["operations_per_second"]
    operations = forward_operations(bench.config, job.size)
    result["operations"] = {part: count.total for part, count in operations.items()}
    for direction in ("forward", "backward"):
        result[direction] = {part: statistics.median(one[direction][part] for one in profiles) for part in operations}


def matrix(bench: Bench, result: dict[str, Any]) -> None:
    """Memory and time of a step at four sizes, by what is trained, with and without gradient checkpointing."""
    jobs = [
        bench.job(size=size, training=training, checkpointing=checkpointing)
        for size in ((128, 256) if bench.settings.tiny else MATRIX_SIZES)
        for training in MATRIX_TRAINING
        for checkpointing in (False, True)
        # Nothing is kept for a frozen encoder, so that there is nothing to compute again either.
        if not (checkpointing and training == "frozen")
    ]
    cells = result["cells"] = [_computed_cell(bench, job) for job in jobs]
    try:
        for cell, job in zip(cells, jobs, strict=True):
            if job.size > bench.settings.largest_measured:
                continue
            try:
                peak = bench.peak(job)
            except JobError as error:
                cell["not_measured"] = str(error)
                tell(f"  {describe(job)}: not measured: {error}")
                continue
            cell |= {key: peak[key] for key in ("seconds", "peak", "imported")}
    finally:
        _compute_times(cells)


def composite(bench: Bench, result: dict[str, Any]) -> None:
    """Memory and time of a step of a LLaVA around the encoder, by what is frozen."""
    cells = result["cells"] = []
    for size in (128, 256) if bench.settings.tiny else COMPOSITE_SIZES:
        for training in COMPOSITE_TRAINING:
            peak = bench.peak(bench.job(contestant="composite", size=size, training=training))
            kept = {key: peak[key] for key in ("seconds", "peak", "imported", "trained")}
            cells.append({"size": size, "training": training} | kept)


def _computed_cell(bench: Bench, job: Job) -> dict[str, Any]:
    cell = {key: value for key, value in asdict(job).items() if key in ("size", "training", "checkpointing")}
    cell["operations"] = step_operations(
        bench.config, job.size, training=job.training, checkpointing=job.checkpointing
    )
    return cell | {"computed_memory": bench.estimate(job).peak}


def _compute_times(cells: list[dict[str, Any]]) -> None:
    """The time of what was not measured: its operations, at the speed of the largest page measured of the same kind,
    or if there is none of the same training.
    """
    for cell in cells:
        alike = [one for one in cells if "seconds" in one and one["training"] == cell["training"]]
        if alike and "seconds" not in cell:
            nearest = max(alike, key=lambda one: (one["checkpointing"] == cell["checkpointing"], one["size"]))
            cell["computed_seconds"] = cell["operations"] * nearest["seconds"] / nearest["operations"]


ROWS: dict[str, Callable[[Bench, dict[str, Any]], None]] = {
    "forward": forward,
    "forward-bf16": forward_bf16,
    "train": train,
    "memory": memory,
    "frozen": frozen,
    "batch": batch,
    "preprocessing": preprocessing,
    "malloc": malloc,
    "allocators": allocators,
    "compile": compile_,
    "profile": profile,
    "matrix": matrix,
    "composite": composite,
}
