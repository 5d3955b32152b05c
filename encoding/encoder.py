"""Prepared images through an encoder, batch by batch, to rows of a table.

Letters in the shapes: B images of a batch, N tokens of an image, C channels.
"""

import hashlib
import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
        source: Name of the file or dataset.
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
        batch: list[tuple[Page, Inputs]] = []
        for page, inputs in prepared:
            if isinstance(inputs, Failure):
                yield self._failed(page, inputs)
                continue
            if batch and not _are_alike(batch[0][1], inputs):
                yield from self._rows(batch)
                batch = []
            batch.append((page, inputs))
            if len(batch) == self.batch_size:
                yield from self._rows(batch)
                batch = []
        if batch:
            yield from self._rows(batch)

    def _rows(self, batch: Sequence[tuple[Page, Inputs]]) -> "Iterator[pyarrow.Table]":
        started = time.perf_counter()
        tokens = self._tokens([inputs for _, inputs in batch])
        yield from self.rows_of(batch, tokens, seconds=(time.perf_counter() - started) / len(batch))

    def rows_of(
        self, batch: Sequence[tuple[Page, Inputs]], tokens: Sequence[torch.Tensor], *, seconds: float
    ) -> "Iterator[pyarrow.Table]":
        """The rows of a batch, of which each took some seconds."""
        rows, kept = [], []
        for (page, inputs), each in zip(batch, tokens, strict=True):
            if not each.isfinite().all():
                yield self._failed(page, f"its tokens are not finite in {each.dtype}; another type may hold them.")
                continue
            sides = [side // self.model.config.patch_size for side in inputs["pixel_values"].shape[-2:]]
            row = {"id": page.id, "source": page.source, "page": page.number, "grid": sides, "seconds": seconds}
            rows.append(row | {"patches_grid": inputs.get("patches_grid", [[1, 1]])[0], "error": None})
            kept.append(each)
        if rows:
            columns = {name: [row[name] for row in rows] for name in rows[0]} | token_columns(kept, self.stored)
            yield require_pyarrow().Table.from_pydict(columns, schema=_schema_in_flight(self.stored))

    def _failed(self, page: Page, error: str) -> "pyarrow.Table":
        row = {"id": page.id, "source": page.source, "page": page.number, "error": str(error)}
        return require_pyarrow().Table.from_pylist([row], schema=_schema_in_flight(self.stored))

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


def _schema_in_flight(stored: str) -> "pyarrow.Schema":
    pa = require_pyarrow()
    return table_schema(stored).append(pa.field("error", pa.string()))


def _are_alike(first: Inputs, second: Inputs) -> bool:
    """Whether two images fit into one batch: pages of one size, and tiles of one size, however many."""
    shapes = [{name: getattr(value, "shape", (0,))[1:] for name, value in each.items()} for each in (first, second)]
    return shapes[0] == shapes[1]


def _joined(values: list[Any], device: torch.device) -> Any:
    """A value of each image as one of the batch: tensors behind each other, lists too."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values).to(device)
    return [entry for value in values for entry in value]


def encoder_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all that an encoder's tokens depend on: its weights, bit by bit, and its configuration.

    How attention is computed (`attn_implementation`) is left out: it changes nothing but rounding.
    """
    digest = hashlib.sha256(canonical(_fields(model.config)))
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            tensor = _offloaded(model, name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _offloaded(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A weight that accelerate keeps elsewhere until its module is called.

    Raises:
        ValueError: It is nowhere.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        tensor = getattr(module, leaf).detach()
    if tensor.is_meta:
        raise ValueError(f"The model's {name} is on the meta device and has no values.")
    return tensor


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a configuration declares, and not what transformers notes beside them, such as versions."""
    names = [name for name in inspect.signature(type(config).__init__).parameters if name not in ("self", "kwargs")]
    values = {name: getattr(config, name) for name in names}
    return {k: _fields(v) if isinstance(v, PreTrainedConfig) else v for k, v in values.items()}
