"""Fixtures of all tests. Nothing is downloaded: the Hub is switched off before anything can ask for it.

Tests, and the processes that they start, compute with one thread: their models are small (see
`deepseek_ocr_vision.modeling.threads`). The full-size encoder takes a thread for each core, and if you set
`OMP_NUM_THREADS` yourself, all tests take as many.
"""

import os


# `make test-official` alone says otherwise.
if os.environ.get("HF_HUB_OFFLINE") != "0":
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from helpers import GOLDEN, golden_shapes, golden_weight, tiny_config
from safetensors.torch import load_file
from transformers.utils import logging
from whole_model import HAS_WHOLE_MODEL, NO_WHOLE_MODEL

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel


CHOSEN_THREADS = os.environ.get("OMP_NUM_THREADS")

logging.disable_progress_bar()
if not CHOSEN_THREADS:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

# What these files import is not there either.
WHOLE_MODEL = ["test_whole_model_*.py", "test_official.py", "test_finetune_deepseek_ocr.py"]
collect_ignore_glob = [] if HAS_WHOLE_MODEL else WHOLE_MODEL


# First, so that no process is left alone with one of them at the end: each takes a minute or more.
SLOWEST = (
    "test_whole_model_golden.py",
    "test_golden.py",
    "test_kill_and_resume.py",
    "test_finetune.py",
    "test_hub_upload.py",
    "test_kill_encoding.py",
    "test_weights_from_the_hub.py",
    "test_distributed.py",
    "test_oracles.py",
    "test_weights_out.py",
    "test_weights_in.py",
    "test_hub_server.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of `SLOWEST` in front, for `--dist loadfile --no-loadscope-reorder`, which goes by this order."""
    rank = {name: index for index, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_report_header() -> str | None:
    """What is not tested with this transformers."""
    return None if HAS_WHOLE_MODEL else f"without {', '.join(WHOLE_MODEL)}: {NO_WHOLE_MODEL}"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> DeepSeekOCRVisionModel:
    """A tiny model in `residual` mode."""
    return DeepSeekOCRVisionModel(tiny_config())


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """The golden outputs and gradients."""
    return load_file(GOLDEN / "upstream_golden.safetensors")


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, torch.Tensor]:
    """The golden weights of all 472 vision tensors; 1.6 GB, shared by the tests and so not to be changed."""
    return {key: golden_weight(key, shape) for key, shape in golden_shapes().items()}


@pytest.fixture
def all_threads():
    """A thread for each core, for models that are worth it; not where the user chose, or another worker computes."""
    before = torch.get_num_threads()
    if not CHOSEN_THREADS and "PYTEST_XDIST_WORKER" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def golden_model(golden_weights, all_threads):
    """Make a full-size model of a feature mode around the golden weights, without copying them."""

    def make(feature_mode: str) -> DeepSeekOCRVisionModel:
        with torch.device("meta"):
            model = DeepSeekOCRVisionModel(DeepSeekOCRVisionConfig(feature_mode=feature_mode))
        weights = {key: golden_weights[key] for key in model.state_dict()}
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_()

    return make
