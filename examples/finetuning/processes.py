"""Several processes that train together: one of them writes, the others wait, and all end with one exit code."""

import os
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


T = TypeVar("T")


def require_processes_that_meet(arguments: TrainingArguments) -> None:
    """Refuse processes that a launcher started together and that would each train alone, into one folder.

    Raises:
        ValueError: They have no way to each other: there is no GPU, and nothing says that they are to use the CPU.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        raise ValueError(
            f"{started} processes were started, and this one sees {arguments.world_size}: they would train apart and "
            "write to one folder. Without GPUs add `--use_cpu true`, or set ACCELERATE_USE_CPU=true."
        )


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function in the main process alone, while the others wait, and give all of them what it returns.

    Raises:
        SystemExit: In a process that waited, because the function failed; it ends with the exit code of the main
            process, which raises the error itself.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    outcome, error = [None, False], None
    if state.is_main_process:
        try:
            outcome = [function(), True]
        except BaseException as caught:  # whatever it is, the others must not wait for ever
            error = caught
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if not outcome[1]:
        raise SystemExit(1)
    return outcome[0]
