"""Prepared images through an encoder, batch by batch, to rows of a table.

Letters in the shapes: B images of a batch, N tokens of an image, C channels.
"""

import hashlib
import inspect
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedConfig, PreTrainedModel

from deepseek_ocr_vision.encoding.processes import Failure
from deepseek_ocr_vision.encoding.table import STORED_TYPES, canonical, require_pyarrow, table_schema, token_columns
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import input_device


if TYPE_CHECKING:
    import pyarrow


Inputs = dict[str, Any]
"""What the model reads of one image, as the image processor gives it for a batch of one."""
_NOT_SETTINGS = ("auto_map", "processor_class")  # what a saved image processor says about its code


class Page(NamedTuple):
    """An image to encode.

    Attributes:
        id: SHA-256 of the image's file; of a page of a document that of the document, a colon, and the number.
        source: Path of the file, or name of the dataset.
        number: Page of the file or row of the dataset, counted from 0.
        index: Which of the images of a row.
    """

    id: str
    source: str
    number: int
    index: int = 0  # type: ignore[assignment]  # no use is made of the method of tuples


@dataclass(frozen=True)
class Encoder:
    """A model, which computes in its own dtype without autocast, its image processor, and how tokens are stored."""

    model: PreTrainedModel
    image_processor: Any
    stored: str
    batch_size: int = 1

    def settings(self, **others: Any) -> dict[str, Any]:
        """All that stored tokens depend on."""
        processor = self.image_processor.to_dict()
        return {
            "encoder": encoder_fingerprint(self.model),
            "feature_mode": self.model.config.feature_mode,
            "dtype": str(self.model.dtype),
            "tokens": self.stored,
            "image_processor": {name: value for name, value in processor.items() if name not in _NOT_SETTINGS},
            "mode": getattr(self.image_processor, "mode", None),
            **others,
        }

    def encode(self, prepared: Iterable[tuple[Page, Inputs | Failure]]) -> "Iterator[pyarrow.Table]":
        """Rows of a table, batch by batch; that of an image that could not be encoded has an `error` for tokens."""
        for shapes, alike in groupby(prepared, key=lambda pair: _shapes(pair[1])):
            while batch := list(islice(alike, self.batch_size)):
                yield self.failed(batch) if shapes is None else self._encoded(batch)

    def _encoded(self, batch: Sequence[tuple[Page, Any]]) -> "pyarrow.Table":
        started = time.perf_counter()
        tokens = self._tokens([inputs for _, inputs in batch])
        return self.rows_of(batch, tokens, seconds=(time.perf_counter() - started) / len(batch))

    def rows_of(
        self, batch: Sequence[tuple[Page, Any]], tokens: Sequence[torch.Tensor], *, seconds: float
    ) -> "pyarrow.Table":
        """The rows of a batch, of which each took some seconds. Tokens that are not finite are none."""
        rows, kept, failed = [], [], []
        for (page, inputs), each in zip(batch, tokens, strict=True):
            if not each.isfinite().all():
                failed.append((page, f"its tokens are not finite in {each.dtype}; another type may hold them."))
                continue
            sides = [side // self.model.config.patch_size for side in inputs["pixel_values"].shape[-2:]]
            tiles = inputs.get("patches_grid", [[1, 1]])[0]
            rows.append(_row(page) | {"grid": sides, "patches_grid": tiles, "seconds": seconds})
            kept.append(each)
        if not rows:
            return self.failed(failed)
        columns = {name: [row[name] for row in rows] for name in rows[0]} | token_columns(kept, self.stored)
        encoded = require_pyarrow().Table.from_pydict(columns, schema=_schema_in_flight(self.stored))
        return require_pyarrow().concat_tables([encoded, self.failed(failed)])

    def failed(self, failures: Iterable[tuple[Page, Any]]) -> "pyarrow.Table":
        """The rows of images that could not be encoded, each with why."""
        rows = [_row(page, str(error)) for page, error in failures]
        return require_pyarrow().Table.from_pylist(rows, schema=_schema_in_flight(self.stored))

    def _tokens(self, inputs: Sequence[Inputs]) -> list[torch.Tensor]:
        """The tokens of images that are alike, a tensor [N, C] each, on the CPU."""
        device, dtype = input_device(self.model), STORED_TYPES[self.stored]
        batch = {name: _joined([each[name] for each in inputs], device) for name in inputs[0]}
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            outputs = self.model(**batch, return_dict=True)
        tokens, mask = outputs.last_hidden_state, getattr(outputs, "attention_mask", None)  # [B, N, C]
        tokens = (tokens.to(dtype) if dtype is not None and dtype.is_floating_point else tokens).cpu()
        if mask is None:
            return list(tokens)
        return [row[is_token] for row, is_token in zip(tokens, mask.cpu(), strict=True)]


def _row(page: Page, error: str | None = None) -> dict[str, Any]:
    return {"id": page.id, "source": printable(page.source), "page": page.number, "error": error}


def printable(path: str) -> str:
    r"""A path as text that can be stored; bytes that are not UTF-8 as `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _schema_in_flight(stored: str) -> "pyarrow.Schema":
    pa = require_pyarrow()
    return table_schema(stored).append(pa.field("error", pa.string()))


def _shapes(inputs: Inputs | Failure) -> dict[str, Any] | None:
    """What images of one batch have in common: pages of one size, and tiles of one size, however many."""
    if isinstance(inputs, Failure):
        return None
    return {name: getattr(value, "shape", (0,))[1:] for name, value in inputs.items()}


def _joined(values: list[Any], device: torch.device) -> Any:
    """A value of each image as one of the batch: tensors behind each other, lists too."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values).to(device)
    return [entry for value in values for entry in value]


def encoder_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all that an encoder's tokens depend on: its weights, bit by bit, and its configuration.

    How attention is computed (`attn_implementation`) is left out: it changes nothing but rounding.

    Raises:
        ValueError: A weight is nowhere.
    """
    digest = hashlib.sha256(canonical(_fields(model.config)))
    for name in sorted(model.state_dict()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        with align_module_device(module):  # accelerate may keep it elsewhere until its module is called
            tensor = getattr(module, leaf).detach()
            if tensor.is_meta:
                raise ValueError(f"The model's {name} is on the meta device and has no values.")
            tensor = tensor.cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a configuration declares, and not what transformers notes beside them, such as versions."""
    names = [name for name in inspect.signature(type(config).__init__).parameters if name not in ("self", "kwargs")]
    values = {name: getattr(config, name) for name in names}
    return {k: _fields(v) if isinstance(v, PreTrainedConfig) else v for k, v in values.items()}
