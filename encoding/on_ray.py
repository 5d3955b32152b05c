"""The same pages by the actors of Ray Data: reading and preparing, encoding and writing stream side by side.

Back-pressure, retries, autoscaling, nodes that die and the dashboard are Ray's. What is in the table is left out
before anything is sent, and parts are written as everywhere, so that nothing but the table has to survive a kill.
"""

import math
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from deepseek_ocr_vision.encoding.encoder import Encoder, Page
from deepseek_ocr_vision.encoding.processes import Worker
from deepseek_ocr_vision.encoding.sources import Column, File, Prepare
from deepseek_ocr_vision.encoding.table import TokenTable


if TYPE_CHECKING:
    import pyarrow


LOCAL = "local"
_PAGES_A_BLOCK = 16


def encode_on_ray(
    table: TokenTable,
    encoder: Encoder,
    sources: Mapping[str, File | Column],
    pages: Mapping[str, Page],
    *,
    address: str,
    num_encoders: int,
    gpus_per_encoder: float,
    num_workers: int,
    timeout: float | None,
    pages_per_file: int,
) -> "Iterator[pyarrow.Table]":
    """Encode pages that a table lacks, as `encode_locally` does. Files have to be there on every node."""
    ray = _started(address, num_encoders if gpus_per_encoder == 0 else 0, num_workers)
    prepare = ray.put(Prepare(sources, encoder.image_processor, encoder.model.dtype))
    items = [{"page": pickle.dumps(page)} for page in pages.values()]
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
            .map_batches(
                _Writing,
                fn_constructor_args=(table.location,),
                batch_size=pages_per_file,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=actors(size=1),
                num_cpus=0,
            )
        )
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")
    finally:
        ray.shutdown()


def _started(address: str, num_encoder_cpus: int, num_workers: int) -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("encode --ray needs Ray: pip install 'deepseek-ocr-vision[ray]'") from error
    # On this machine Ray may take as many as are needed, of processors that share the work; elsewhere what is there.
    num_cpus = max(num_encoder_cpus + num_workers, os.cpu_count() or 1) if address == LOCAL else None
    ray.init(address, num_cpus=num_cpus, log_to_driver=False, ignore_reinit_error=True)
    there = ray.cluster_resources().get("CPU", 0)
    if there < num_encoder_cpus + 1:
        raise ValueError(f"Ray has {there:g} processors; {num_encoder_cpus} encoders and the reading need one each.")
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


class _Preparing:
    def __init__(self, prepare: Any, timeout: float | None):
        import ray

        # A process beside Ray's own: one that hangs or dies costs its page, and not a job that Ray gives up.
        self.worker = Worker(ray.get(prepare))
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


class _Writing:
    def __init__(self, location: str):
        self.table = TokenTable(location)

    def __call__(self, rows: "pyarrow.Table") -> "pyarrow.Table":
        self.table.write(rows)
        return rows.select(["source", "page", "seconds", "error"])
