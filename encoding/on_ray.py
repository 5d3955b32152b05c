"""The same pages by the actors of Ray Data: reading and preparing, encoding and writing stream side by side.

Back-pressure, retries, autoscaling, nodes that die and the dashboard are Ray's. What is in the table is left out
before anything is sent, and parts are written by the process that asks, so that nothing else has to survive a kill.
"""

import math
import os
import pickle
from collections.abc import Collection, Generator, Iterator
from typing import TYPE_CHECKING, Any

from deepseek_ocr_vision.configuration.extras import require
from deepseek_ocr_vision.encoding.encoder import Encoder, Page
from deepseek_ocr_vision.encoding.processes import Worker
from deepseek_ocr_vision.encoding.sources import Prepare


if TYPE_CHECKING:
    import pyarrow


_PAGES_A_BLOCK = 16


def encode_on_ray(
    encoder: Encoder,
    prepare: Prepare,
    pages: Collection[Page],
    *,
    address: str,
    num_encoders: int,
    gpus_per_encoder: float,
    num_workers: int,
    timeout: float | None,
) -> "Generator[pyarrow.Table, None, None]":
    """Encode pages, as `encode_locally` does. Files have to be there on every node."""
    if not pages:
        return
    ray = require("ray", "encode --ray", extra="ray")
    was_there = ray.is_initialized()
    _start(ray, address, num_encoders if gpus_per_encoder == 0 else 0, num_workers)
    items = [{"page": pickle.dumps(page)} for page in pages]
    actors = ray.data.ActorPoolStrategy
    try:
        rows = (
            ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / _PAGES_A_BLOCK))
            .map_batches(
                _Preparing,
                fn_constructor_args=(prepare, timeout),
                batch_size=_PAGES_A_BLOCK,
                compute=actors(min_size=1, max_size=num_workers),
                num_cpus=1,
            )
            .map_batches(
                _Encoding,
                fn_constructor_args=(ray.put(encoder), gpus_per_encoder > 0),
                batch_size=max(_PAGES_A_BLOCK, encoder.batch_size),
                compute=actors(size=num_encoders),
                num_cpus=0 if gpus_per_encoder else 1,
                num_gpus=gpus_per_encoder,
            )
        )
        # As many at once as an encoder gives, and not all that Ray has together, so that parts are as asked for.
        yield from rows.iter_batches(batch_size=encoder.batch_size, batch_format="pyarrow")
    finally:
        if not was_there:
            ray.shutdown()


def _start(ray: Any, address: str, num_encoder_cpus: int, num_workers: int) -> None:
    require("ray.data", "encode --ray", extra="ray")
    # On this machine Ray may take as many as are needed, of processors that share the work; elsewhere what is there.
    num_cpus = max(num_encoder_cpus + num_workers, os.cpu_count() or 1) if address == "local" else None
    ray.init(address, num_cpus=num_cpus, log_to_driver=False, ignore_reinit_error=True)
    there = ray.cluster_resources().get("CPU", 0)
    if there < num_encoder_cpus + 1:
        raise ValueError(f"Ray has {there:g} processors; {num_encoder_cpus} encoders and the reading need one each.")
    ray.data.DataContext.get_current().enable_progress_bars = False


class _Preparing:
    def __init__(self, prepare: Prepare, timeout: float | None):
        # A process beside Ray's own: one that hangs or dies costs its page, and not a job that Ray gives up.
        self.worker = Worker(prepare)
        self.timeout = timeout

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        pages = [pickle.loads(page) for page in batch["page"]]
        return {"prepared": [pickle.dumps((page, self.worker.call(page, self.timeout))) for page in pages]}


class _Encoding:
    def __init__(self, encoder: Any, is_on_gpu: bool):
        import ray

        self.encoder: Encoder = ray.get(encoder)
        self.encoder.model.to("cuda" if is_on_gpu else "cpu")

    def __call__(self, batch: dict[str, Any]) -> "Iterator[pyarrow.Table]":
        yield from self.encoder.encode(pickle.loads(prepared) for prepared in batch["prepared"])
