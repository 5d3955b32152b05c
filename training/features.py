"""A frozen encoder's tokens, computed once: `precompute_features`.

A frozen encoder gives the same tokens for a page in every epoch, and computing them is most of what a training step
costs. Here they are computed and stored; `deepseek_ocr_vision.training.precomputed` trains from them.

Letters in the shapes: P pictures, N tokens of a picture, C channels.
"""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from filelock import Timeout
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.encoding.batches import are_alike, encode_batch
from deepseek_ocr_vision.training.feature_store import (
    STORED_TYPES,
    FeatureStore,
    ReadFeatures,
    encoder_fingerprint,
    image_processor_settings,
)


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

BadPicture = Literal["raise", "skip"]

NUM_NAMED = 10
"""Bad pictures that a warning names before it only counts them."""


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
    pictures_per_file: int = 128,
    num_workers: int = 0,
    on_bad_picture: BadPicture = "raise",
    show_progress: bool = True,
) -> "datasets.Dataset":
    """Compute the tokens of every picture of a dataset, once, and store them where the next call finds them.

    Tokens are stored under the SHA-256 of the picture's file, so a picture that occurs twice, in another row, under
    another name or in another dataset, is computed once. What was interrupted goes on after the last file that was
    finished. An encoder with other weights, another image processor or another `dtype` computes everything anew, into
    a folder of its own. Several processes with one `cache_dir`, those of one launch or others, share the work: each
    takes the next piece that nobody computes, and each returns when the last piece is done.

    The result has the dataset's columns and one more. That one holds row numbers of what is stored, and a transform of
    the dataset turns them into tokens whenever rows are read. `select`, `shuffle`, `train_test_split` and
    `remove_columns` keep the transform; `with_format` replaces it, and `save_to_disk` writes the numbers alone. Remove
    the column of pictures before training, or each is decoded for nothing. `datasets` copies a dataset that is
    shuffled or split already when a column is added, so do that afterwards.

    Args:
        dataset: One split. A transform of its own is refused: it would change pictures after their tokens were
            computed. For the same reason nothing random can be done to pictures whose tokens are stored.
        model: The encoder. It computes in its own dtype, without autocast.
        processor: Its processor, a `LlavaProcessor` around its image processor, or the image processor itself.
        cache_dir: Folder for the tokens. A page of 256 tokens, 1024 wide, takes 0.5 MB in 16 bits, 1 MB in 32.
        image_column: Column of the pictures: of type `datasets.Image`, or paths of files; one a row, or a list. A row
            may have none.
        features_column: Name of the column to add.
        dtype: What to store: float64, float32, float16 or bfloat16. Defaults to the model's, which is exact.
        batch_size: Pictures that pass through the model at once, as far as they are of one size.
        pictures_per_file: Pictures of a piece of work, which is the most that a process loses when it is killed.
        num_workers: Threads that read and prepare pictures while the model computes.
        on_bad_picture: Whether a picture that cannot be read is an error, or its row is left out, with a warning.
        show_progress: Whether to draw bars.

    Returns:
        The dataset with tokens [N, model.config.hidden_size], on the CPU, in `features_column`; `None` where a row has
        no picture; of a column of lists, a list of such.

    Raises:
        ImportError: `datasets` is not installed.
        TypeError: `dataset`, `model`, `processor` or the column is of none of the types above.
        ValueError: An argument has a value that is not allowed; a picture cannot be read, which names its row; tokens
            are not finite in `dtype`; a stored file is damaged.
        OSError: The file of a picture cannot be read, which names its row; or the disk is full: then what is finished
            stays, and the next call goes on.
    """
    _require_datasets()
    _check_model(model)
    image_processor = _image_processor_of(processor)
    dtype = model.dtype if dtype is None else dtype
    _check_choices(dtype, on_bad_picture)
    _check_integers(1, batch_size=batch_size, pictures_per_file=pictures_per_file)
    _check_integers(0, num_workers=num_workers)
    pictures = Pictures.of(dataset, column=image_column, features_column=features_column)

    encoder = encoder_fingerprint(model)
    settings = {
        "encoder": encoder,
        "image_processor": image_processor_settings(image_processor),
        "mode": pictures.mode,
    }
    store = FeatureStore(cache_dir, settings, dtype=dtype, width=model.config.hidden_size)
    work = Work(
        store=store,
        pictures=pictures,
        model=model,
        image_processor=image_processor,
        bad_pictures=BadPictures(raises=on_bad_picture == "raise"),
        batch_size=batch_size,
        num_workers=num_workers,
        show_progress=show_progress,
    )
    keys = work.read_keys()
    work.run(pictures_per_file)
    work.bad_pictures.warn()
    transform = ReadFeatures(features_column, store.rows(), dtype, encoder)
    return _with_column(dataset, transform, keys=keys, store=store, is_list=pictures.is_list)


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


def _image_processor_of(processor: Any) -> Any:
    image_processor = getattr(processor, "image_processor", processor)
    if not callable(image_processor) or not hasattr(image_processor, "to_dict"):
        raise TypeError(
            f"`processor` is a {type(processor).__name__}; it has to be an image processor, or a processor with one."
        )
    return image_processor


def _check_choices(dtype: Any, on_bad_picture: Any) -> None:
    if dtype not in STORED_TYPES:
        raise ValueError(f"`dtype` is {dtype!r}; it has to be one of {list(STORED_TYPES)}.")
    if on_bad_picture not in get_args(BadPicture):
        raise ValueError(f"`on_bad_picture` is {on_bad_picture!r}; it has to be one of {list(get_args(BadPicture))}.")


def _check_integers(least: int, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` is {value!r}; it has to be an integer, at least {least}.")


# Pictures


StoredPicture = dict[str, Any] | str | None
"""A picture in an Arrow table: `bytes` and `path`, one of which may be `None`, or a path alone."""


class Place(NamedTuple):
    """Where a picture is in a dataset."""

    row: int
    index: int
    """Among the pictures of the row."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a column, not decoded.

    Attributes:
        cells: The column alone, read as Arrow tables: bytes of files, or paths.
        column: Its name.
        is_list: Whether a row has a list of pictures.
        mode: Mode that `datasets` converts them to, such as `"RGB"`, or `None`.
    """

    cells: "datasets.Dataset"
    column: str
    is_list: bool
    mode: str | None

    @classmethod
    def of(cls, dataset: Any, *, column: str, features_column: str) -> "Pictures":
        """Those of a dataset, once its columns are found to be right."""
        import datasets

        _check_dataset(dataset, column, features_column)
        feature = dataset.features[column]
        is_list = isinstance(feature, datasets.List | datasets.LargeList)
        picture = feature.feature if is_list else feature
        if not isinstance(picture, datasets.Image) and picture != datasets.Value("string"):
            raise TypeError(
                f"Column {column!r} is {feature}; it has to hold pictures or paths, or lists of them. "
                f"`dataset.cast_column({column!r}, datasets.Image())` makes pictures of what can be read as such."
            )
        # As Arrow has them, pictures are not decoded.
        cells = dataset.select_columns(column).with_format("arrow")
        return cls(cells, column, is_list, getattr(picture, "mode", None))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.cells)

    def __iter__(self) -> Iterator[list[StoredPicture]]:
        """The pictures of each row."""
        for rows in self.cells.iter(batch_size=1):
            yield self._pictures(rows)

    def _pictures(self, row: Any) -> list[StoredPicture]:
        """The pictures of a table of one row."""
        (cell,) = row[self.column].to_pylist()
        if self.is_list:
            return cell or []
        return [] if cell is None else [cell]

    def name(self, place: Place) -> str:
        """How an error names a picture."""
        name = f"Row {place.row}, column {self.column!r}"
        return f"{name}, picture {place.index}" if self.is_list else name

    def read(self, place: Place) -> bytes:
        """A picture's file."""
        return file_of(self._pictures(self.cells[place.row])[place.index])

    def decode(self, file: bytes) -> Image.Image:
        """The picture as a row of the dataset has it."""
        import datasets

        return datasets.Image(mode=self.mode).decode_example({"bytes": file, "path": None})


def _check_dataset(dataset: Any, column: str, features_column: str) -> None:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}; it has to be a datasets.Dataset, one split that is no stream. "
            "Dataset.from_list and Dataset.from_generator make one of other data."
        )
    if column not in dataset.column_names:
        raise ValueError(f"`image_column` is {column!r}; the dataset has {dataset.column_names}.")
    if features_column in dataset.column_names:
        raise ValueError(
            f"`features_column` is {features_column!r}, but the dataset has a column of that name already."
        )
    if dataset.format["type"] == "custom":
        raise ValueError(
            "`dataset` has a transform, so that pictures in training would not be those whose tokens are stored. Make "
            "it part of the data by `map`, or take it off by `reset_format`."
        )


def file_of(picture: StoredPicture) -> bytes:
    """The file of a picture as `datasets` stores it: bytes, or a path."""
    if picture is None:
        raise ValueError("the picture is None; leave it out of the list.")
    if isinstance(picture, str):
        picture = {"bytes": None, "path": picture}
    return Path(picture["path"]).read_bytes() if picture["bytes"] is None else picture["bytes"]


def key_of(file: bytes) -> str:
    """What a picture is stored under.

    It is taken of the file and not of pixels, for which every picture would have to be decoded at every call. Saved in
    another way, a picture counts as another one then, which costs time and is never wrong.
    """
    return hashlib.sha256(file).hexdigest()


@dataclass
class BadPictures:
    """Pictures that cannot be read: an error each, or kept for a warning at the end."""

    raises: bool
    messages: list[str] = field(default_factory=list)

    def add(self, name: str, error: Exception) -> None:
        """Take notice of one, or raise."""
        message = f"{name}: {error}"
        if self.raises:
            raise (OSError if isinstance(error, OSError) else ValueError)(message) from error
        self.messages.append(message)

    def warn(self) -> None:
        """Name those that were passed over."""
        if self.messages:
            more = len(self.messages) - NUM_NAMED
            named = self.messages[:NUM_NAMED] + ([f"and {more} more"] if more > 0 else [])
            logger.warning("Left out the rows of %d pictures:\n%s", len(self.messages), "\n".join(named))


# Tokens


Prepared = tuple[str, BatchFeature | Exception]
"""A picture's key, and what the model reads, or why there is no such thing."""


@dataclass(kw_only=True)
class Work:
    """Fills a store with the tokens of a dataset's pictures, beside other processes that do the same."""

    store: FeatureStore
    pictures: Pictures
    model: PreTrainedModel
    image_processor: Any
    bad_pictures: BadPictures
    batch_size: int
    num_workers: int
    show_progress: bool
    places: dict[str, Place] = field(default_factory=dict)

    def read_keys(self) -> list[list[str | None]]:
        """The keys of each row's pictures, `None` for one that cannot be read. Notes where each is found first."""
        bar = tqdm(self.pictures, desc="Reading pictures", disable=not self.show_progress)
        return [
            [self._read_key(picture, Place(row, index)) for index, picture in enumerate(pictures)]
            for row, pictures in enumerate(bar)
        ]

    def _read_key(self, picture: StoredPicture, place: Place) -> str | None:
        try:
            key = key_of(file_of(picture))
        except (OSError, ValueError) as error:
            self.bad_pictures.add(self.pictures.name(place), error)
            return None
        self.places.setdefault(key, place)
        return key

    def run(self, pictures_per_file: int) -> None:
        """Compute what is not stored, in pieces that do not depend on what is, so that processes agree on them."""
        keys = list(self.places)
        pieces = [keys[start : start + pictures_per_file] for start in range(0, len(keys), pictures_per_file)]
        with tqdm(total=len(keys), desc="Computing features", disable=not self.show_progress) as bar:
            in_other_hands = [piece for piece in pieces if not self._fill(piece, bar, wait=False)]
            for piece in in_other_hands:
                self._fill(piece, bar, wait=True)

    def _fill(self, piece: list[str], bar: tqdm, *, wait: bool) -> bool:
        """Compute what a piece lacks, unless another process is at it and this one does not wait."""
        if all(key in self.store for key in piece):
            bar.update(len(piece))
            return True
        try:
            with self.store.lock(piece).acquire(timeout=-1 if wait else 0):
                self.store.refresh()
                missing = [key for key in piece if key not in self.store]
                bar.update(len(piece) - len(missing))
                self.store.write(piece, self._computed(missing, bar))
        except Timeout:
            return False
        self.store.refresh()
        return True

    def _computed(self, keys: list[str], bar: tqdm) -> Iterator[dict[str, list]]:
        """Keys and tokens, batch by batch; those of bad pictures are left out."""
        for batch in self._batches(_ahead(self._prepared, keys, self.num_workers)):
            yield {"key": [key for key, _ in batch], "tokens": self._encoded(batch)}
            bar.update(len(batch))

    def _prepared(self, key: str) -> Prepared:
        """What the model reads of a picture. An error is returned: it is the reader's to say what comes of it."""
        try:
            file = self.pictures.read(self.places[key])
            if key_of(file) != key:
                raise ValueError("the file changed while features were being computed.")
            return key, self.image_processor(self.pictures.decode(file), return_tensors="pt")
        except MemoryError:
            raise
        except Exception as error:
            # Pillow's decoders raise whatever the broken bytes lead them to: SyntaxError, struct.error, EOFError, ...
            return key, error

    def _batches(self, prepared: Iterable[Prepared]) -> Iterator[list[tuple[str, BatchFeature]]]:
        batch: list[tuple[str, BatchFeature]] = []
        for key, inputs in prepared:
            if isinstance(inputs, Exception):
                self.bad_pictures.add(self.pictures.name(self.places[key]), inputs)
                continue
            if batch and (len(batch) == self.batch_size or not are_alike(batch[0][1], inputs)):
                yield batch
                batch = []
            batch.append((key, inputs))
        if batch:
            yield batch

    def _encoded(self, batch: list[tuple[str, BatchFeature]]) -> list[torch.Tensor]:
        """The tokens [N, C] of each picture of a batch."""
        tokens = encode_batch(self.model, [inputs for _, inputs in batch], dtype=self.store.dtype)
        for (key, _), each in zip(batch, tokens, strict=True):
            if not each.isfinite().all():
                name = self.pictures.name(self.places[key])
                raise ValueError(f"{name}: its tokens are not finite in {self.store.dtype}; `dtype` may take another.")
        return tokens


def _ahead(function: Callable[[str], Prepared], keys: list[str], num_threads: int) -> Iterator[Prepared]:
    """`map`, computed by threads some items ahead. Pillow and PyTorch let go of the interpreter while they work."""
    if num_threads == 0:
        yield from map(function, keys)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        pending = deque()
        for key in keys:
            pending.append(pool.submit(function, key))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# The result


def _with_column(
    dataset: "datasets.Dataset",
    transform: ReadFeatures,
    *,
    keys: list[list[str | None]],
    store: FeatureStore,
    is_list: bool,
) -> "datasets.Dataset":
    """The dataset with the column of features, less the rows whose pictures could not be read."""
    import datasets

    is_complete = [all(key in store for key in row) for row in keys]
    column = [[store.row_of(key) for key in row if key in store] for row in keys]
    feature = datasets.Value("int64")
    if is_list:
        feature = datasets.List(feature)
    else:
        column = [numbers[0] if numbers else None for numbers in column]
    dataset = dataset.with_format(None).add_column(transform.column, column, feature=feature)
    if not all(is_complete):
        dataset = dataset.select([row for row, complete in enumerate(is_complete) if complete])
    return dataset.with_transform(transform)
