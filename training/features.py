"""A frozen encoder's tokens, computed once: `precompute_features`.

A frozen encoder gives the same tokens for a page in every epoch, and computing them is most of what a training step
costs. Here they are computed into a table; `deepseek_ocr_vision.training.precomputed` trains from them.

Letters in the shapes: N tokens of an image, C channels.
"""

import hashlib
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import list_some, require_choice, require_integer
from deepseek_ocr_vision.encoding.encode_pages import encode_locally
from deepseek_ocr_vision.encoding.encoder import Encoder, Page
from deepseek_ocr_vision.encoding.sources import Column, content_of, digest_of
from deepseek_ocr_vision.encoding.table import STORED_TYPES, TokenTable, canonical


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

BadImage = Literal["raise", "skip"]


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
        cache_dir: Folder for the tables. A page of 256 tokens, 1024 wide, takes 0.4 MB in 16 bits, 1 MB in 32.
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
        ValueError: An argument has a value that is not allowed; an image cannot be read, which names its row; tokens
            are not finite in `dtype`; a stored part is damaged.
        OSError: The file of an image cannot be read, which names its row; or the disk is full: then what is finished
            stays, and the next call goes on.
    """
    _require_datasets()
    _check_model(model)
    stored = _stored_type(model.dtype if dtype is None else dtype)
    require_choice("on_bad_image", on_bad_image, get_args(BadImage))
    require_integer("batch_size", batch_size, at_least=1)
    require_integer("pages_per_file", pages_per_file, at_least=1)
    require_integer("num_workers", num_workers, at_least=0)
    encoder = Encoder(model, _image_processor_of(processor), stored, batch_size)
    _check_dataset(dataset, features_column)
    images = Images(Column.of(dataset, "dataset", image_column), raises=on_bad_image == "raise")

    settings = encoder.settings(image_mode=images.column.mode)
    name = hashlib.sha256(canonical(settings)).hexdigest()[:32]
    table = TokenTable(os.path.join(cache_dir, name), settings)
    ids = images.read_ids(show_progress)
    missing = {id: page for id, page in images.pages.items() if id not in table}
    work = {"num_workers": num_workers, "timeout": None, "pages_per_file": pages_per_file}
    with tqdm(total=len(missing), desc="Computing features", disable=not show_progress) as bar:
        for rows in encode_locally(table, encoder, {images.column.name: images.column}, missing, **work):
            images.note(rows.select(["id", "error", "is_os_error"]).to_pylist())
            bar.update(len(rows))
    images.warn()
    return _with_column(dataset, ids, ReadFeatures(features_column, TokenTable(table.location)), images.column.is_list)


# Arguments


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError("Storing features needs datasets: pip install 'deepseek-ocr-vision[train]'") from error


def _check_model(model: Any) -> None:
    # By its configuration, and not its class: one loaded by `trust_remote_code` has a class of its own.
    if getattr(getattr(model, "config", None), "model_type", None) != DeepSeekOCRVisionConfig.model_type:
        raise TypeError(
            f"`model` is a {type(model).__name__}; it has to be the encoder, a DeepSeekOCRVisionModel. Inside a LLaVA "
            "that is `llava.model.vision_tower`."
        )


def _stored_type(dtype: Any) -> str:
    names = {of: name for name, of in STORED_TYPES.items() if of is not None and of.is_floating_point}
    if dtype not in names:
        raise ValueError(f"`dtype` is {dtype!r}; it has to be one of {list(names)}.")
    return names[dtype]


def _image_processor_of(processor: Any) -> Any:
    image_processor = getattr(processor, "image_processor", processor)
    if not callable(image_processor) or not hasattr(image_processor, "to_dict"):
        raise TypeError(
            f"`processor` is a {type(processor).__name__}; it has to be an image processor, or a processor with one."
        )
    return image_processor


def _check_dataset(dataset: Any, features_column: str) -> None:
    import datasets

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


# Images


@dataclass
class Images:
    """The images of a column, each with the place where it is found first.

    Attributes:
        column: The column.
        raises: Whether one that cannot be read is an error, or kept for a warning at the end.
        pages: By id.
        bad: Those that cannot be read, as the warning names them.
    """

    column: Column
    raises: bool
    pages: dict[str, Page] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def read_ids(self, show_progress: bool) -> list[list[str | None]]:
        """The ids of each row's images, `None` for one that cannot be read."""
        cells = tqdm(self.column.cells(), total=len(self.column), desc="Reading images", disable=not show_progress)
        return [
            [self._read_id(image, row, index) for index, image in enumerate(images)]
            for row, images in enumerate(cells)
        ]

    def _read_id(self, image: Any, row: int, index: int) -> str | None:
        try:
            id = digest_of(content_of(image))
        except (OSError, ValueError) as error:
            self._refuse(row, index, str(error), isinstance(error, OSError))
            return None
        self.pages.setdefault(id, Page(id, self.column.name, row, index))
        return id

    def note(self, rows: list[dict[str, Any]]) -> None:
        """Take notice of rows that may have an error."""
        for row in rows:
            if row["error"] is not None:
                page = self.pages[row["id"]]
                self._refuse(page.number, page.index, row["error"], row["is_os_error"])

    def _refuse(self, row: int, index: int, error: str, is_os_error: bool) -> None:
        which = f", image {index}" if self.column.is_list else ""
        message = f"Row {row}, column {self.column.column!r}{which}: {error}"
        if self.raises:
            raise OSError(message) if is_os_error else ValueError(message)
        self.bad.append(message)

    def warn(self) -> None:
        """Name those that were passed over."""
        if self.bad:
            logger.warning("Left out the rows of %d images:\n%s", len(self.bad), list_some(self.bad, separator="\n"))


# The result


@dataclass(frozen=True, eq=False)
class ReadFeatures:
    """Puts tokens in the place of their ids whenever rows of a dataset are read: what `with_transform` takes.

    Attributes:
        column: Column of the dataset with the ids: one a row, `None`, or a list.
        table: What is stored.
    """

    column: str
    table: TokenTable

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
    dataset: "datasets.Dataset", ids: list[list[str | None]], transform: ReadFeatures, is_list: bool
) -> "datasets.Dataset":
    """The dataset with the column of features, less the rows whose images could not be read."""
    import datasets

    is_complete = [all(id in transform.table for id in row) for row in ids]
    feature = datasets.Value("string")
    column = ids if is_list else [row[0] if row else None for row in ids]
    dataset = dataset.with_format(None).add_column(
        transform.column, column, feature=datasets.List(feature) if is_list else feature
    )
    if not all(is_complete):
        dataset = dataset.select([row for row, complete in enumerate(is_complete) if complete])
    return dataset.with_transform(transform)
