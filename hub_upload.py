"""How an encoder is published on the Hub, in three steps that can also be called one by one.

`stage` writes into a new folder what a repository of the encoder holds. `verify` loads that folder in fresh processes
without this package, as its readers will, and compares the tokens with the checkpoint's. `push` sends it, in one
commit. `python hub_upload.py CHECKPOINT REPO_ID` does all three; after a step that fails, none follows.
"""

import argparse
import hashlib
import inspect
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, ModelInfo, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from deepseek_ocr_vision.configuration import PRESETS, DeepSeekOCRVisionConfig
from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import list_some
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor
from deepseek_ocr_vision.saving.checksums import read_checksums, sha256_of, verify_checksums, write_checksums
from deepseek_ocr_vision.saving.code import FLAT_CODE
from deepseek_ocr_vision.saving.saving_deepseek_ocr_vision import CHECKSUMS, PACKAGE
from deepseek_ocr_vision.saving.staging import atomic_write, staging_folder
from deepseek_ocr_vision.weights import check_repository_id, compare_checksums, is_encoder, load_encoder
from deepseek_ocr_vision.weights.checkpoints import read_config
from deepseek_ocr_vision.weights.repository import RUN_AGAIN, TOKEN, explained, without_token
from deepseek_ocr_vision.weights.safetensors_files import is_finite


BASE_MODEL = "deepseek-ai/DeepSeek-OCR"
LICENSE = "mit"
CARD, WEIGHTS = "README.md", "model.safetensors"
# What `stage` writes is what `push` sends: all of these names, and no other.
PUBLISHED = (
    CARD,
    CHECKSUMS,
    "config.json",
    WEIGHTS,
    "preprocessor_config.json",
    *(f"{name}_{PACKAGE}.py" for names in FLAT_CODE.values() for name in names),
)
# A repository that holds one of these and no config.json is somebody's model of another kind.
WEIGHT_SUFFIXES = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors", ".tflite")

PAGE = (448, 512)
"""Width and height of the page that tokens are compared on; multiples of 64, for processors that do not resize."""

_FEATURES = {
    "residual": "`tokens + CLIP(tokens)`, as the package `deepseek-ocr-encoder` computes them",
    "concat": "`concat(CLIP(tokens), tokens)`, as the released model has them before its projector",
    "projected": "`concat(CLIP(tokens), tokens)` after the released projector, as DeepSeek-OCR's decoder reads them",
    "sequence": "`concat(CLIP(tokens), tokens)` after the released projector, with the learned `image_newline` after "
    "each row and `view_seperator` at the end, as the sequence of DeepSeek-OCR's decoder has them",
}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parity:
    """How tokens of a staged folder compare with those of the checkpoint, on one rendered page.

    Attributes:
        difference: The largest difference, over the standard deviation of the tokens; anything but 0.0 is an error.
        num_tokens: How many tokens were compared.
        dtype: The dtype of weights and tokens, such as `"float32"`.
    """

    difference: float
    num_tokens: int
    dtype: str


# Before anything else: names.


def _check_names(*, license: str = LICENSE, base_model: str | None = None, revision: str | None = None) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"`license` is {license!r}; it has to be one of the Hub's identifiers, such as 'mit'.")
    if base_model is not None:
        check_repository_id(base_model)
    if revision is not None and (not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", revision) or ".." in revision):
        raise ValueError(f"`revision` is {revision!r}; it has to be the name of a branch.")


# First step.


def stage(
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    repo_id: str,
    license: str = LICENSE,
    base_model: str | None = BASE_MODEL,
) -> list[Path]:
    """Write a checkpoint into a new folder as a Hub repository holds it: the files of `PUBLISHED`.

    The write is atomic: what is interrupted leaves nothing under the folder's name.

    Args:
        checkpoint: A folder with the encoder's `config.json` and weights. Its image processor is taken if it has one,
            and else the preset that belongs to its feature mode.
        folder: Where to write; it must not exist, or be empty.
        repo_id: The repository that the model card is to name, `namespace/name`.
        license: The Hub's identifier of the weights' licence.
        base_model: The repository whose weights these were trained from; `None` if they were trained from scratch.

    Returns:
        The files written, sorted.

    Raises:
        ValueError: The checkpoint is not one of this encoder, its weights do not fit its configuration or are not
            finite, or an argument is not allowed.
        FileExistsError: There is something at `folder` already.
        OSError: The checkpoint cannot be read, or the folder not be written.
    """
    check_repository_id(repo_id)
    _check_names(license=license, base_model=base_model)
    checkpoint, folder = Path(checkpoint), Path(folder)
    with atomic_write(folder) as staged:
        model, image_processor = _read(checkpoint)
        page = _render_page(staged.with_name("page.png"))
        # More than there is: one file, whatever the size.
        model.save_pretrained(staged, max_shard_size=2**60)
        image_processor.save_pretrained(staged)
        parity = _compare(_encode(*_read(staged), page), _encode(model, image_processor, page), staged)
        write_checksums(staged)
        card = _model_card(
            staged, model, image_processor, parity=parity, repo_id=repo_id, license=license, base_model=base_model
        )
        (staged / CARD).write_text(card, encoding="utf-8")
    return sorted(folder.iterdir())


def _read(checkpoint: Path) -> tuple[DeepSeekOCRVisionModel, DeepSeekOCRVisionImageProcessor]:
    """A checkpoint's model, in the dtype that it is saved in, and its image processor."""
    if not checkpoint.is_dir():
        raise NotADirectoryError(
            f"{checkpoint} is no folder; a checkpoint is a folder with a config.json and weights."
        )
    if not is_encoder(checkpoint):
        model_type = read_config(checkpoint / "config.json").get("model_type")
        raise ValueError(
            f"{checkpoint} holds another model (model_type {model_type!r}); `deepseek-ocr-vision extract` gets the "
            "encoder out of a whole checkpoint."
        )
    compare_checksums(checkpoint)
    model, image_processor = load_encoder(checkpoint, dtype="auto")
    keys = [key for key, weight in model.state_dict().items() if not is_finite(weight)]
    if keys:
        raise ValueError(f"{checkpoint} has NaN or infinity in {list_some(keys)}.")
    return model, image_processor


def _render_page(path: Path) -> Path:
    """Render a page: lines of text, and a coloured figure that tells the order of the channels."""
    page = Image.new("RGB", PAGE, "white")
    draw = ImageDraw.Draw(page)
    for line in range(20):
        draw.text((32, 24 + 18 * line), f"{line + 1}. A page becomes tokens, and tokens a page.", fill=(20, 20, 60))
    draw.rectangle((96, 400, 352, 480), fill=(200, 40, 30), outline=(10, 120, 30), width=6)
    page.save(path)
    return path


# Also run by the fresh process, which gets the text of this function and has no other name of this file.
def _encode(model: Any, processor: Any, page: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The page's pixels as the processor prepares them, and its tokens, at a size of 512 pixels at most.

    A page of 1024 takes four times as long, and would tell no more of weights and code.
    """
    side = min(512, model.config.image_size)
    with torch.no_grad():
        tokens = model(processor(images=page, size=side, return_tensors="pt").pixel_values).last_hidden_state
    return {"pixel_values": processor(images=page, return_tensors="pt").pixel_values, "tokens": tokens[0].clone()}


def _compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], folder: Path) -> Parity:
    """Require that both are the same to the last bit."""
    tokens, expected_tokens = found["tokens"].double(), expected["tokens"].double()
    if not torch.isfinite(expected_tokens).all():
        raise ValueError(f"{folder}: the checkpoint's own tokens of a rendered page are not finite.")
    if not torch.equal(found["pixel_values"], expected["pixel_values"]):
        raise ValueError(f"{folder} prepares a page in another way than the checkpoint.")
    if tokens.shape != expected_tokens.shape:
        shapes = f"{list(tokens.shape)}, not {list(expected_tokens.shape)}"
        raise ValueError(f"{folder} gives tokens of another shape than the checkpoint: {shapes}.")
    largest = (tokens - expected_tokens).abs().max().item()
    difference = largest / expected_tokens.std().item() if largest else 0.0
    if difference != 0.0:
        raise ValueError(
            f"{folder} gives other tokens than the checkpoint: they are up to {difference:.2g} standard deviations "
            "apart, and have to be the same."
        )
    return Parity(difference, len(tokens), str(found["tokens"].dtype).removeprefix("torch."))


# The model card.


def _model_card(
    folder: Path,
    model: DeepSeekOCRVisionModel,
    image_processor: DeepSeekOCRVisionImageProcessor,
    *,
    parity: Parity,
    repo_id: str,
    license: str,
    base_model: str | None,
) -> str:
    """The text of README.md, for a folder that has its checksums."""
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license=license,
        base_model=base_model,
        tags=["deepseek-ocr", "ocr", "document-understanding", "vision-encoder", "vision-tower"],
    )
    trained_from = f"Its weights come from [{base_model}](https://huggingface.co/{base_model})."
    values = {
        "name": repo_id.split("/")[1],
        "repo_id": repo_id,
        "license": license,
        "origin": trained_from if base_model else "Its weights were trained from scratch.",
        "checksums": CHECKSUMS,
        "weights": WEIGHTS,
        "num_bytes": f"{(folder / WEIGHTS).stat().st_size:,}",
        "sha256": read_checksums(folder)[WEIGHTS],
        "num_parameters": f"{model.num_parameters():,}",
        "dtype": parity.dtype,
        "difference": parity.difference,
        "num_tokens": parity.num_tokens,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }
    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    body = template.substitute(values | _shapes(model, image_processor))
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{body}"))


def _shapes(model: DeepSeekOCRVisionModel, image_processor: DeepSeekOCRVisionImageProcessor) -> dict[str, Any]:
    """What the card says of the ways in and out."""
    config, size = model.config, image_processor.size
    height, width, tokens, page = "height", "width", "tokens", "images in their own size"
    geometry = "left in their size, whose sides have to be multiples of 64"
    if image_processor.do_resize:
        rows, columns = size["height"], size["width"]
        # A page of this size; where there are tiles, a larger image has more tokens.
        small = min(rows, columns, image_processor.tile_size or rows)
        tokens = str(image_processor.num_image_tokens(small, small, feature_mode=config.feature_mode))
        height, width, page = str(rows), str(columns), f"{rows} x {columns}"
        pads = image_processor.do_pad
        pads = PRESETS[image_processor.preset].pads(rows, columns) if pads is None else pads
        geometry = f"fitted into {page} pixels, the rest grey" if pads else f"stretched to {page} pixels"
    special = ", a newline after each row, a separator at the end" if config.feature_mode == "sequence" else ""
    return {
        "order": f"row by row{special}",
        "pixel_shape": f"[1, {config.num_channels}, {height}, {width}]",
        "token_shape": f"[1, {tokens}, {config.hidden_size}]",
        "page": page,
        "num_channels": config.num_channels,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "feature_mode": config.feature_mode,
        "features": _FEATURES[config.feature_mode],
        "preset": image_processor.preset,
        "geometry": geometry,
        "image_mean": image_processor.image_mean,
        "image_std": image_processor.image_std,
    }


# Second step.


def verify(folder: str | os.PathLike, checkpoint: str | os.PathLike) -> Parity:
    """Load a staged folder as its readers will, save it again, load that, and compare the tokens.

    Each load happens in a fresh process, offline, where this package cannot be imported, by the Auto classes and
    `trust_remote_code=True`: the folder's code is run.

    Args:
        folder: What `stage` wrote.
        checkpoint: What it was staged from.

    Returns:
        What was measured.

    Raises:
        ValueError: A file is not what its checksum says, the folder does not load, or its tokens are others.
        OSError: A file is missing or cannot be read.
    """
    folder, checkpoint = Path(folder).resolve(), Path(checkpoint).resolve()
    _check_sums(folder)
    with staging_folder(tempfile.gettempdir()) as temporary:
        page, copy = _render_page(temporary / "page.png"), temporary / "copy"
        expected = _encode(*_read(checkpoint), page)
        parity = _compare(_encode_in_a_fresh_process(folder, page, copy=copy), expected, folder)
        try:
            _compare(_encode_in_a_fresh_process(copy, page), expected, copy)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} loads, but not when it is saved again from there. {error}") from error
    return parity


def _check_sums(folder: Path) -> None:
    """Require that all files to publish are there, and are the ones that were summed."""
    missing = [name for name in PUBLISHED if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; `stage` writes them.")
    not_summed = set(PUBLISHED) - {CARD, CHECKSUMS} - set(verify_checksums(folder))
    if not_summed:
        raise ValueError(f"{folder / CHECKSUMS} says nothing about {', '.join(sorted(not_summed))}.")


def _encode_in_a_fresh_process(source: Path, page: Path, *, copy: Path | str = "") -> dict[str, torch.Tensor]:
    functions = (inspect.getsource(function) for function in (_encode, _load_encode_save))
    start = "from __future__ import annotations\nimport sys\nimport torch\n"
    program = "\n\n".join([start, *functions, "_load_encode_save(*sys.argv[1:])"])
    with staging_folder(tempfile.gettempdir()) as home:
        result = home / "result.safetensors"
        # -P: nothing is imported from the working directory.
        command = [sys.executable, "-P", "-c", program, *map(str, (source, page, result, copy))]
        options: dict[str, Any] = {"cwd": home, "env": _environment_of_a_reader(str(home)), "text": True}
        finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, **options)
        if finished.returncode:
            said = "\n".join(finished.stderr.strip().splitlines()[-5:])
            raise ValueError(f"{source} does not load where this package is not installed:\n{said}")
        return load_file(result)


def _environment_of_a_reader(home: str) -> dict[str, str]:
    """This process's environment without tokens, offline, with caches of its own, and as many threads.

    With another number of threads sums are taken in another order, and their last bits differ.
    """
    kept = {name: value for name, value in os.environ.items() if "TOKEN" not in name.upper()}
    folders = {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_MODULES_CACHE": f"{home}/modules"}
    threads = str(torch.get_num_threads())
    return kept | folders | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


# Run by the fresh process alone, which gets the text of this function.
def _load_encode_save(source: str, page: str, result: str, copy: str) -> None:
    """Load a folder without this package, encode a page, and save model and processor into `copy` if it is named."""
    # An import that finds `None` there fails as one of a package that is not installed.
    nothing: Any = None
    sys.modules["deepseek_ocr_vision"] = nothing
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = AutoModel.from_pretrained(source, dtype="auto", trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    if type(config) is not type(model.config):
        raise TypeError(f"AutoConfig gives a {type(config)}, AutoModel a model with a {type(model.config)}.")
    encoded = _encode(model, processor, page)
    pixel_values = image_processor(images=page, return_tensors="pt").pixel_values
    if not torch.equal(pixel_values, encoded["pixel_values"]):
        raise ValueError("AutoImageProcessor and AutoProcessor prepare a page in two ways.")
    save_file(encoded, result)
    if copy:
        model.save_pretrained(copy)
        processor.save_pretrained(copy)


# Third step.


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    force: bool = False,
    token: str | None = None,
) -> str:
    """Send a staged folder to the Hub, in one commit or as a pull request.

    Only the names of `PUBLISHED` are sent, whatever else lies in the folder. What the Hub has already is not sent
    again, so after a broken connection the same call completes the upload. When it is through, the Hub's checksums
    are compared with the folder's.

    Args:
        folder: What `stage` wrote and `verify` approved.
        repo_id: The repository, `namespace/name`; made if it is not there, except for a pull request.
        private: Whether the repository has to be private.
        create_pr: Whether to open a pull request instead of committing.
        revision: The branch, made from `main` if it is not there, except for a pull request. Defaults to `main`.
        force: Whether a repository that holds another model may be overwritten.
        token: The token, by default that of `HF_TOKEN` or of `hf auth login`.

    Returns:
        The URL of the commit or pull request or, if there was nothing to change, of the branch.

    Raises:
        ValueError: An argument is not allowed, the folder is not as it was staged, a file holds a token, or the
            repository holds another model, or is public though it has to be private.
        OSError: The Hub refused, with its status in the message, or cannot be reached; or there is no token.
    """
    check_repository_id(repo_id)
    _check_names(revision=revision)
    folder = Path(folder)
    token = _required_token(token)
    paths = files_to_publish(folder, token=token)
    _check_sums(folder)
    api = HfApi(token=token)
    with explained(repo_id, token=token):
        parent = _prepare(api, repo_id, revision, private=private, create_pr=create_pr, force=force)
        changed = _differing(api, repo_id, paths, revision=parent) if parent else paths
        if not changed:
            _logger.warning("Nothing changed: %s holds these very files.", repo_id)
            return f"{api.endpoint}/{repo_id}/tree/{revision or 'main'}"
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path.name, str(path)) for path in changed],
            commit_message="Upload the DeepSeek-OCR vision encoder",
            revision=revision,
            create_pr=create_pr,
            # What was looked at above: nobody else's commit in between is overwritten.
            parent_commit=parent,
        )
        wrong = _differing(api, repo_id, paths, revision=commit.pr_revision or commit.oid)
    if wrong:
        names = ", ".join(path.name for path in wrong)
        raise OSError(f"{commit.commit_url} is there, but {names} is not what was sent. {RUN_AGAIN}")
    return commit.pr_url or commit.commit_url


def files_to_publish(folder: str | os.PathLike, *, token: str | None = None) -> list[Path]:
    """The files of a folder that may be published: those with a name of `PUBLISHED`.

    Raises:
        ValueError: A file is a link, which may lead out of the folder, or holds a token, or what looks like one.
    """
    folder = Path(folder)
    paths = [folder / name for name in PUBLISHED if (folder / name).is_file()]
    links = [path.name for path in paths if path.is_symlink()]
    if links:
        raise ValueError(f"{folder}: {', '.join(links)} is a link; only files of the folder itself are published.")
    for path in paths:
        text = "" if path.name == WEIGHTS else path.read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(text) or (token and token in text):
            raise ValueError(f"{path} holds what looks like a token of the Hub; it must not be published.")
    return paths


def _required_token(token: str | None) -> str:
    token = token or get_token()
    if not token:
        raise PermissionError("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    return token


def _prepare(
    api: HfApi, repo_id: str, revision: str | None, *, private: bool, create_pr: bool, force: bool
) -> str | None:
    """Make repository and branch if they are not there; the commit that was looked at, `None` for a new repository."""
    remote, found_revision = _remote(api, repo_id, revision, must_exist=create_pr)
    if remote is None:
        # An error if it is there even so: the token may not see it then, and what is not seen is not overwritten.
        api.create_repo(repo_id, private=private or None)
    else:
        _check_remote(api, remote, repo_id, private=private, force=force)
    if not found_revision and revision not in (None, "main"):
        api.create_branch(repo_id, branch=revision)
    return remote.sha if remote else None


def _remote(api: HfApi, repo_id: str, revision: str | None, *, must_exist: bool) -> tuple[ModelInfo | None, bool]:
    """What the repository holds, at `main` if it has no such revision, and whether it has."""
    try:
        return api.model_info(repo_id, revision=revision), True
    except RevisionNotFoundError:
        if must_exist:
            raise
        return api.model_info(repo_id), False
    except RepositoryNotFoundError as error:
        # The client calls a refused token by this name too.
        if must_exist or error.response.status_code != 404:
            raise
        return None, False


def _check_remote(api: HfApi, remote: ModelInfo, repo_id: str, *, private: bool, force: bool) -> None:
    """Require that a repository is this encoder's to overwrite, and as private as it has to be."""
    if private and not remote.private:
        raise ValueError(f"{repo_id} is there already and is public; make it private in its settings first.")
    names = {file.rfilename for file in remote.siblings or []}
    weights = sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES))
    kind = None
    if "config.json" in names:
        kind = _model_type(api, repo_id, remote.sha)
    elif weights:
        kind = f"no config.json, but {', '.join(weights[:3])}"
    if kind not in (None, DeepSeekOCRVisionConfig.model_type) and not force:
        raise ValueError(f"{repo_id} holds another model ({kind}); `force` (--force) overwrites it.")


def _model_type(api: HfApi, repo_id: str, revision: str | None) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        path = api.hf_hub_download(repo_id, "config.json", revision=revision, local_dir=temporary)
        try:
            model_type = read_config(Path(path)).get("model_type")
        except ValueError:
            return "a config.json that is none"
    return model_type if model_type == DeepSeekOCRVisionConfig.model_type else f"model_type {model_type!r}"


def _differing(api: HfApi, repo_id: str, paths: list[Path], *, revision: str) -> list[Path]:
    """Those of the files that the Hub has not, or has otherwise."""
    there = api.get_paths_info(repo_id, [path.name for path in paths], revision=revision)
    files = {entry.path: entry for entry in there if isinstance(entry, RepoFile)}
    sums = read_checksums(paths[0].parent)
    return [path for path in paths if not _is_same(files.get(path.name), path, sums)]


def _is_same(entry: RepoFile | None, path: Path, sums: dict[str, str]) -> bool:
    if entry is None:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == (sums.get(path.name) or sha256_of(path))
    contents = path.read_bytes()
    # How git names a file.
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()


# All three.


def upload(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    license: str = LICENSE,
    base_model: str | None = BASE_MODEL,
) -> str | None:
    """Stage a checkpoint in a temporary folder, verify it, and push it, saying so on the way.

    The arguments are those of `stage` and `push`; with `dry_run` it stops before the Hub is asked anything.

    Returns:
        The URL of what was pushed; `None` after a dry run.

    Raises:
        ValueError: As the three steps.
        OSError: As the three steps.
    """
    check_repository_id(repo_id)
    _check_names(license=license, base_model=base_model, revision=revision)
    if not dry_run:
        _required_token(None)
    with staging_folder(tempfile.gettempdir()) as temporary:
        folder = temporary / "staged"
        try:
            _say(f"Staging {checkpoint}")
            stage(checkpoint, folder, repo_id=repo_id, license=license, base_model=base_model)
            _say("Verifying what was staged, and a copy saved from there, in fresh processes without the package")
            parity = verify(folder, checkpoint)
            _say(f"The tokens are the checkpoint's: {parity.num_tokens} compared, difference {parity.difference}")
            _say(_listing(folder, Path(checkpoint)))
        except Exception as error:
            error.add_note("Nothing was pushed.")
            raise
        target = f"{repo_id}, {'a pull request to ' if create_pr else ''}branch {revision or 'main'}"
        target += ", private" if private else ""
        if dry_run:
            _say(f"Dry run, so nothing was pushed. It would go to {target}")
            return None
        _say(f"Pushing to {target}")
        url = push(folder, repo_id, private=private, create_pr=create_pr, revision=revision, force=force)
    _say(url)
    return url


def _listing(folder: Path, checkpoint: Path) -> str:
    """The files to publish with their sizes, and what of the checkpoint's own folder is not among them."""
    files = [f"{path.stat().st_size:>15,}  {path.name}" for path in files_to_publish(folder)]
    left_out = sorted(path.name for path in checkpoint.iterdir() if path.name not in PUBLISHED)
    return "\n".join(["To publish:", *files, *(f"{'left out':>15}  {name}" for name in left_out)])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


HELP: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "description": (
        "Publish a checkpoint of the encoder on the Hugging Face Hub. It is staged in a temporary folder (one\n"
        "model.safetensors, configuration, image processor, the code that trust_remote_code=True loads, checksums,\n"
        "model card), verified there in fresh processes without this package, and pushed in one commit. A check that\n"
        "fails stops everything, with exit code 1 and nothing pushed."
    ),
    "epilog": (
        "examples:\n"
        "  %(prog)s outputs/finetune/encoder me/my-encoder --dry-run\n"
        "  %(prog)s outputs/finetune/encoder me/my-encoder --private --base-model none\n\n"
        "The token is that of `hf auth login`, or HF_TOKEN; there is no option for it, as a shell keeps what is\n"
        "typed. After a broken connection run the same command again: what the Hub has already is not sent a second\n"
        "time. TMPDIR names the disk for temporary files, which take twice the size of the weights."
    ),
}
"""What a parser of this command is built with; `add_arguments` gives it the arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments that `run` reads."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder written by save_pretrained, by a Trainer or by a conversion")
    add("repo_id", help="the repository, namespace/name; it is made if it is not there")
    add("--private", action="store_true", help="make the repository private; an error if it is there and public")
    add("--create-pr", action="store_true", help="open a pull request instead of committing to the branch")
    add("--revision", help="branch to commit to, made from main if it is not there (default: main)")
    add("--force", action="store_true", help="overwrite a repository that holds another model")
    add("--dry-run", action="store_true", help="stage, verify and list the files, without a connection to the Hub")
    add("--license", default=LICENSE, help="the weights' licence, by the Hub's identifier (default: %(default)s)")
    base = "the repository whose weights these were trained from, or 'none' if from scratch (default: %(default)s)"
    add("--base-model", default=BASE_MODEL, help=base)


def run(options: argparse.Namespace) -> int:
    """Do what the parsed arguments say. Exit code 0, or 1 with a message on standard error, or 130 after Ctrl-C."""
    names = ("private", "create_pr", "revision", "force", "dry_run", "license")
    arguments = {name: getattr(options, name) for name in names}
    base_model = None if options.base_model == "none" else options.base_model
    try:
        upload(options.checkpoint, options.repo_id, base_model=base_model, **arguments)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        message = "\n".join([f"Error: {error}", *getattr(error, "__notes__", [])])
        sys.stderr.write(f"{without_token(message, os.environ.get('HF_TOKEN'))}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted. {RUN_AGAIN}\n")
        return 130
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="hub_upload.py", **HELP)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
