"""A frozen encoder's tokens, computed once into a table, and training from them in place of images.

    pages = precompute_features(pages, llava.model.vision_tower, processor, cache_dir="features")
    with precomputed_features(llava, pages):
        Trainer(llava, arguments, data_collator=FeatureCollator(processor), train_dataset=pages).train()

Letters in the shapes: P images, N tokens of an image, C channels.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import list_some, require_choice, require_integer
from deepseek_ocr_vision.configuration.extras import require
from deepseek_ocr_vision.encoding.encode_pages import encode_locally, write_parts
from deepseek_ocr_vision.encoding.encoder import Encoder, Page, encoder_fingerprint
from deepseek_ocr_vision.encoding.processes import Failure
from deepseek_ocr_vision.encoding.sources import Column, Prepare
from deepseek_ocr_vision.encoding.table import STORED_TYPES, TokenTable, canonical
from deepseek_ocr_vision.training.collator import ImageTextCollator, PaddingSide


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

BadImage = Literal["raise", "skip"]


class UnreadableImageError(OSError, ValueError):
    """An image of a dataset cannot be read or encoded."""


# Computing them


def precompute_features(
    dataset: "datasets.Dataset",
    model: PreTrainedModel,
    processor: Any,
    *,
    cache_dir: str | os.PathLike,
    image_column: str = "image",
    features_column: str = "features",
    dtype: torch.dtype | None = None,
    batch_size: int = 1,
    pages_per_file: int = 128,
    num_workers: int = 0,
    on_bad_image: BadImage = "raise",
    show_progress: bool = True,
) -> "datasets.Dataset":
    """Compute the tokens of every image of a dataset, once, and store them where the next call finds them.

    Tokens are stored under the SHA-256 of the image's file, so an image that occurs twice, in another row, under
    another name or in another dataset, is computed once. What was interrupted goes on after the last part that was
    finished. An encoder with other weights, another image processor or another `dtype` computes everything anew, into
    a table of its own, which `load_pages` and every reader of Parquet read.

    The result has the dataset's columns and one more. That one holds the `id` of the tokens in the table, and a
    transform of the dataset turns ids into tokens whenever rows are read. `select`, `shuffle`, `train_test_split` and
    `remove_columns` keep the transform; `with_format` replaces it, and exports have the ids. Remove the column of
    images before training, or each is decoded for nothing. `datasets` copies a dataset that is shuffled or split
    already when a column is added, so do that afterwards.

    Args:
        dataset: One split. A transform of its own is refused: it would change images after their tokens were
            computed. For the same reason nothing random can be done to images whose tokens are stored.
        model: The encoder. It computes in its own dtype, without autocast.
        processor: Its processor, a `LlavaProcessor` around its image processor, or the image processor itself.
        cache_dir: Folder for the tables. A page of 256 tokens, 1024 wide, takes 0.4 MB in bfloat16, 0.5 in float16
            and 1 in float32.
        image_column: Column of the images: of type `datasets.Image`, or paths of files; one a row, or a list. A row
            may have none.
        features_column: Name of the column to add.
        dtype: What to store: float64, float32, float16 or bfloat16. Defaults to the model's, which is exact.
        batch_size: Images that pass through the model at once, as far as they are of one size.
        pages_per_file: Images of a part, which is the most that is lost when the process is killed.
        num_workers: Processes that read and prepare images while the model computes.
        on_bad_image: Whether an image that cannot be read is an error, or its row is left out, with a warning.
        show_progress: Whether to draw bars.

    Returns:
        The dataset with tokens [N, model.config.hidden_size], on the CPU, in `features_column`; `None` where a row has
        no image; of a column of lists, a list of such.

    Raises:
        ImportError: `datasets` is not installed.
        TypeError: `dataset`, `model`, `processor` or the column is of none of the types above.
        ValueError: An argument has a value that is not allowed, or a stored part is damaged.
        UnreadableImageError: An `OSError` and `ValueError` that names its row: an image cannot be read, or its tokens
            are not finite in `dtype`.
        OSError: The disk is full: then what is finished stays, and the next call goes on.
    """
    _check_dataset(dataset, features_column)
    # By its configuration, and not its class: one loaded by `trust_remote_code` has a class of its own.
    if getattr(getattr(model, "config", None), "model_type", None) != DeepSeekOCRVisionConfig.model_type:
        raise TypeError(
            f"`model` is a {type(model).__name__}; it has to be the encoder, a DeepSeekOCRVisionModel. Inside a LLaVA "
            "that is `llava.model.vision_tower`."
        )
    types = {of: name for name, of in STORED_TYPES.items() if of is not None and of.is_floating_point}
    stored = types[require_choice("dtype", model.dtype if dtype is None else dtype, types)]
    require_choice("on_bad_image", on_bad_image, get_args(BadImage))
    require_integer("batch_size", batch_size, at_least=1)
    require_integer("pages_per_file", pages_per_file, at_least=1)
    require_integer("num_workers", num_workers, at_least=0)
    encoder = Encoder(model, _image_processor_of(processor), stored, batch_size)
    column = Column.of(dataset, "dataset", image_column)

    def refuse(page: Page, error: str) -> None:
        which = f", image {page.index}" if column.is_list else ""
        refused.append(f"Row {page.number}, column {image_column!r}{which}: {error}")
        if on_bad_image == "raise":
            raise UnreadableImageError(refused[-1])

    refused: list[str] = []
    ids, found = _find_images(column, refuse, show_progress)
    settings = encoder.settings(image_mode=column.mode)
    folder = hashlib.sha256(canonical(settings)).hexdigest()[:32]
    table = TokenTable(os.path.join(cache_dir, folder), settings)
    missing = {id: page for id, page in found.items() if id not in table and not isinstance(id, Failure)}
    prepare = Prepare({column.name: column}, encoder.image_processor, model.dtype)
    batches = encode_locally(encoder, prepare, missing.values(), num_workers=num_workers, timeout=None)
    with tqdm(total=len(missing), desc="Computing features", disable=not show_progress) as bar:
        for rows in write_parts(table, batches, pages_per_file):
            for row in rows.select(["id", "error"]).to_pylist():
                if row["error"] is not None:
                    refuse(missing[row["id"]], row["error"])
            bar.update(len(rows))
    if refused:
        logger.warning("Left out the rows of %d images:\n%s", len(refused), list_some(refused, separator="\n"))
    return _with_column(dataset, ids, ReadFeatures(features_column, table), column.is_list)


def _find_images(
    column: Column, refuse: Callable[[Page, str], None], show_progress: bool
) -> tuple[list[list[str]], dict[str, Page]]:
    """The ids of each row's images, and where each image is found first."""
    ids: list[list[str]] = []
    found: dict[str, Page] = {}
    for row in tqdm(column.pages(), total=len(column.rows), desc="Reading images", disable=not show_progress):
        ids.append([page.id for page in row])
        for page in row:
            if isinstance(page.id, Failure):
                refuse(page, page.id)
            found.setdefault(page.id, page)
    return ids, found


def _check_dataset(dataset: Any, features_column: str) -> None:
    datasets = require("datasets", "Storing features", extra="train")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; it has to be a datasets.Dataset, one split that is no stream. "
            "Dataset.from_list and Dataset.from_generator make one of other data."
        )
    if features_column in dataset.column_names:
        raise ValueError(
            f"`features_column` is {features_column!r}, but the dataset has a column of that name already."
        )
    if dataset.format["type"] == "custom":
        raise ValueError(
            "`dataset` has a transform, so that images in training would not be those whose tokens are stored. Make "
            "it part of the data by `map`, or take it off by `reset_format`."
        )


def _image_processor_of(processor: Any) -> Any:
    image_processor = getattr(processor, "image_processor", processor)
    if not callable(image_processor) or not hasattr(image_processor, "to_dict"):
        raise TypeError(
            f"`processor` is a {type(processor).__name__}; it has to be an image processor, or a processor with one."
        )
    return image_processor


@dataclass(frozen=True, eq=False)
class ReadFeatures:
    """Puts tokens in the place of their ids whenever rows of a dataset are read: what `with_transform` takes.

    Two of one column and one table are equal, so that `datasets` keeps the transform where it joins datasets.

    Attributes:
        column: Column of the dataset with the ids: one a row, `None`, or a list.
        table: What is stored.
    """

    column: str
    table: TokenTable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReadFeatures) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((self.column, self.table.location))

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Rows as columns, with tokens [N, C] where there was an id."""
        if self.column not in rows:
            return rows
        return rows | {self.column: [self._tokens(ids) for ids in rows[self.column]]}

    def _tokens(self, ids: str | list[str] | None) -> Any:
        if isinstance(ids, list):
            return [self._tokens(each) for each in ids]
        return None if ids is None else self.table.read(ids)


def _with_column(
    dataset: "datasets.Dataset", ids: list[list[str]], transform: ReadFeatures, is_list: bool
) -> "datasets.Dataset":
    """The dataset with the column of features, less the rows whose images could not be read."""
    import datasets

    complete = [number for number, row in enumerate(ids) if all(id in transform.table for id in row)]
    column = ids if is_list else [row[0] if row else None for row in ids]
    feature = datasets.List(datasets.Value("string")) if is_list else datasets.Value("string")
    dataset = dataset.with_format(None).add_column(transform.column, column, feature=feature)
    if len(complete) < len(ids):
        dataset = dataset.select(complete)
    return dataset.with_transform(transform)


# Training from them


@contextmanager
def precomputed_features(model: nn.Module, *pages: "datasets.Dataset") -> Iterator[nn.Module]:
    """Let the encoder inside a composite take its own tokens, computed before, in place of images.

    Inside, `pixel_values` may be tokens [P, N, C], which the encoder hands on as its result; images [P, 3, H, W] are
    encoded as ever. Nothing else changes: the encoder stays where it is, so that what `Trainer` or `save_pretrained`
    write is the whole composite, and it does not compute. Losses are those of training with images as far as the
    stored dtype and the sums of a batch of another size round alike; with mixed precision, the stored tokens are those
    of an encoder outside of it.

    Args:
        model: A LLaVA, or any other module with one encoder of this package in it.
        pages: The datasets to train and evaluate on, as `precompute_features` gave them, at least one.

    Yields:
        The model itself.

    Raises:
        TypeError: No dataset was given, or one has no features.
        ValueError: There is no encoder in the model, or more than one; it is not frozen; it is not the one that
            computed the features; or the composite reads another layer than its last.
    """
    encoder = _encoder_of(model)
    _check_encoder(encoder, pages)
    layer = getattr(getattr(model, "config", None), "vision_feature_layer", -1)
    if layer not in (-1, [-1]):
        raise ValueError(f"`vision_feature_layer` of the model is {layer}; only the last layer, -1, is stored.")
    replaced = vars(encoder).get("forward")
    # As accelerate's hooks do it: the module stays the one that optimizers, checkpoints and wrappers know.
    encoder.forward = _replaying(encoder, encoder.forward)
    try:
        yield model
    finally:
        del encoder.forward
        if replaced is not None:
            encoder.forward = replaced


def _replaying(encoder: PreTrainedModel, encode: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` that hands tokens on and gives everything else to the one that encodes."""
    width = encoder.config.hidden_size

    def forward(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 3:
            return encode(pixel_values, **kwargs)
        if pixel_values.shape[-1] != width or not pixel_values.is_floating_point():
            given = f"{pixel_values.dtype} {list(pixel_values.shape)}"
            raise ValueError(f"Features have to be floating-point numbers [images, tokens, {width}], got {given}.")
        if kwargs.get("output_attentions"):
            raise ValueError("`output_attentions` is true, but stored features come without attention weights.")
        tokens = pixel_values.to(encoder.dtype)  # [P, N, C]
        outputs = BaseModelOutputWithPooling(tokens, tokens.mean(dim=1), hidden_states=(tokens,))
        return_dict = kwargs.get("return_dict")
        return_dict = encoder.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    return forward


def _encoder_of(model: nn.Module) -> PreTrainedModel:
    """The one encoder inside a model."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type == DeepSeekOCRVisionConfig.model_type
    }
    if len(found) != 1:
        places = f"{len(found)} of them, at {list(found)}" if found else "none"
        raise ValueError(f"`model` has to hold one DeepSeek-OCR encoder; a {type(model).__name__} has {places}.")
    return next(iter(found.values()))


def _check_encoder(encoder: PreTrainedModel, pages: Sequence[Any]) -> None:
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"{len(trained)} tensors of the encoder are trainable, such as {trained[0]!r}, and stored features would "
            "not follow them. Freeze it with `encoder.freeze()`, in a LLaVA `llava.model.vision_tower.freeze()`."
        )
    if not pages:
        raise TypeError("Give the datasets that `precompute_features` returned: precomputed_features(model, pages).")
    fingerprint = encoder_fingerprint(encoder)
    for index, dataset in enumerate(pages):
        transform = getattr(dataset, "format", {}).get("format_kwargs", {}).get("transform")
        if not isinstance(transform, ReadFeatures):
            raise TypeError(
                f"Dataset {index}, a {type(dataset).__name__}, is none that `precompute_features` returned, or lost "
                "its transform since, as by `with_format`."
            )
        if transform.table.settings["encoder"] != fingerprint:
            raise ValueError(
                f"Dataset {index} has features of another encoder than the one in the model, by weights, dtype or "
                "configuration. Compute them by the model's own, in a LLaVA `llava.model.vision_tower`."
            )


class FeatureCollator(ImageTextCollator):
    """`ImageTextCollator` for rows with features: `pixel_values` are tokens, and images are passed over.

    Images of one number of tokens give `pixel_values` [P, N, C]; of several, as tiles make them, [1, N in all, C],
    which is the same to a LLaVA. A batch without any image gets a blank one in pixels, for `touch_encoder`.

    Args:
        processor: As for `ImageTextCollator`.
        features_column: Name of the column that `precompute_features` added.
        padding_side: As for `ImageTextCollator`.
        touch_encoder: As for `ImageTextCollator`.

    Raises:
        TypeError: As for `ImageTextCollator`.
        ValueError: As for `ImageTextCollator`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        features_column: str = "features",
        padding_side: PaddingSide = "right",
        touch_encoder: bool = True,
    ):
        super().__init__(processor, padding_side=padding_side, touch_encoder=touch_encoder)
        self.features_column = features_column

    def __call__(self, samples: Sequence[Mapping[str, Any]], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Make a batch of rows that `precompute_features` returned, as `ImageTextCollator` does of others.

        Raises:
            TypeError: What a row has for features are no tokens.
            ValueError: As for `ImageTextCollator`, or a row has no column of features.
        """
        return super().__call__([self._with_features(sample, index) for index, sample in enumerate(samples)])

    def _with_features(self, sample: Mapping[str, Any], index: int) -> dict[str, Any]:
        """A row with its features where `ImageTextCollator` looks for images."""
        if self.features_column not in sample:
            raise ValueError(f"Sample {index} of the batch has no {self.features_column!r}; it has {sorted(sample)}.")
        features = sample[self.features_column]
        features = [] if features is None else features if isinstance(features, list) else [features]
        for each in features:
            if not isinstance(each, torch.Tensor) or each.ndim != 2 or not each.is_floating_point():
                raise TypeError(
                    f"Sample {index} of the batch has a {type(each).__name__} under {self.features_column!r} that is "
                    "no floating-point tensor [tokens, channels]. The transform that reads features gets lost by "
                    "`with_format`; remove the column and call `precompute_features` again: it finds what is stored."
                )
        others = {name: value for name, value in sample.items() if name not in ("image", "images")}
        return others | {"images": features}

    def _encode(
        self, texts: list[str], images: list[Any], **options: Any
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        if not images or not isinstance(images[0], torch.Tensor):  # the blank image
            return super()._encode(texts, images, **options)
        dropped = getattr(self.processor, "vision_feature_select_strategy", "full") == "default"
        count = getattr(self.processor, "num_placeholders", lambda num_tokens: num_tokens - dropped)
        counts = iter([count(len(tokens)) for tokens in images])
        expanded = []
        for text in texts:
            first, *others = text.split(self.processor.image_token)
            expanded.append(first + "".join(self.processor.image_token * next(counts) + other for other in others))
        token_ids = self.processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        is_even = len({len(tokens) for tokens in images}) == 1
        tokens = torch.stack(images) if is_even else torch.cat(images)[None]
        return [torch.tensor(ids, dtype=torch.long) for ids in token_ids], {"pixel_values": tokens}
