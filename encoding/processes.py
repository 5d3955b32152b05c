"""`map` in processes that may hang or die: the item is named and lost then, and the rest goes on."""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import torch.multiprocessing  # tensors go from process to process in shared memory


Item = TypeVar("Item")
_CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class Failure(str):
    """Why there is no result."""


def attempt(function: Callable[[Item], Any], item: Item) -> Any:
    """What a function returns, or a `Failure` for what it raises."""
    try:
        return function(item)
    except MemoryError:
        raise
    except Exception as error:
        # Decoders raise whatever the broken bytes lead them to: SyntaxError, struct.error, PdfiumError, ...
        return Failure(f"{type(error).__name__}: {error}")


def map_in_processes(
    function: Callable[[Item], Any],
    items: Iterable[Item],
    *,
    num_workers: int,
    ahead: int = 0,
    timeout: float | None = None,
) -> Generator[tuple[Item, Any], None, None]:
    """Each item with what a function makes of it, or the `Failure` to do so, in order.

    Args:
        function: What to call.
        items: What to call it with; read as far ahead as there is work.
        num_workers: Processes. With 0 this one works, item by item, and no time limit holds.
        ahead: How many results may wait, if more than one for each process.
        timeout: Seconds that an item may take. Then its process is killed, whatever it is doing.
    """
    if num_workers == 0:
        yield from ((item, attempt(function, item)) for item in items)
        return
    workers = [Worker(function) for _ in range(num_workers)]
    free = deque(workers)
    pending: deque[tuple[Item, Future]] = deque()
    threads = ThreadPoolExecutor(num_workers)

    def call(item: Item) -> Any:
        worker = free.popleft()
        try:
            return worker.call(item, timeout)
        finally:
            free.append(worker)

    try:
        for item in items:
            pending.append((item, threads.submit(call, item)))
            if len(pending) > num_workers + max(num_workers, ahead):
                first, future = pending.popleft()
                yield first, future.result()
        for item, future in pending:
            yield item, future.result()
    finally:
        for worker in workers:
            worker.stop()
        threads.shutdown(cancel_futures=True)


class Worker:
    """A process that calls a function, and another one in its place when it is killed."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self.is_stopped = False
        self._start()

    def _start(self) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(self.function, theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, item: Any, timeout: float | None) -> Any:
        for _ in range(2):
            try:
                self.connection.send(item)
                if self.connection.poll(timeout):
                    return self.connection.recv()
                self._restart()
                return Failure(f"TimeoutError: it took longer than {timeout:g} seconds.")
            except (EOFError, OSError):
                # It was killed, perhaps by the system for its memory, or the item made a decoder crash.
                if self.is_stopped:
                    break
                self._restart()
        return Failure("the process that read it died twice.")

    def _restart(self) -> None:
        self.stop(is_last=False)
        self.connection.close()
        if not self.is_stopped:
            self._start()

    def stop(self, *, is_last: bool = True) -> None:
        self.is_stopped |= is_last
        self.process.kill()
        self.process.join()


def _serve(function: Callable[[Any], Any], connection: Any, other_end: Any) -> None:
    other_end.close()  # or it would stay open when the process that asks is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; it ends this one
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):  # nobody asks any more
        while True:
            connection.send(attempt(function, connection.recv()))
