"""Threads: as many as the work is worth."""

import pytest
import torch
from helpers import tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling.threads import MULTIPLY_ADDS_OF_A_THREAD, choose_num_threads, fit_threads


@pytest.fixture
def eight_threads(monkeypatch):
    """Eight threads, not chosen by the user; afterwards as many as before."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("pieces", "available", "expected"), [(0, 8, 1), (0.9, 8, 1), (2.5, 8, 2), (8, 8, 8), (100, 8, 8), (100, 1, 1)]
)
def test_each_thread_gets_a_piece_that_is_worth_it(pieces, available, expected):
    """Pins a small model that took fifteen times as long beside one busy core."""
    assert choose_num_threads(pieces * MULTIPLY_ADDS_OF_A_THREAD, available=available) == expected


def test_the_users_own_choice_wins():
    """Pins `OMP_NUM_THREADS`, set by those who know their machine; empty is not set."""
    assert choose_num_threads(0, available=8, omp_num_threads="8") == 8
    assert choose_num_threads(0, available=8, omp_num_threads="") == 1


def test_a_small_model_gets_one_thread_and_the_full_encoder_all(eight_threads):
    """Pins both ends: the encoder of `make finetune` with its batch, and one page for the released sizes."""
    with torch.device("meta"):
        full = DeepSeekOCRVisionModel(DeepSeekOCRVisionConfig())
    assert fit_threads(full, num_pixels=1024 * 1024) == torch.get_num_threads() == 8
    assert fit_threads(DeepSeekOCRVisionModel(tiny_config()), num_pixels=32 * 128 * 128) == 1
    assert torch.get_num_threads() == 1
    assert fit_threads(full, num_pixels=1024 * 1024) == 1, "there were no more"


def test_a_chosen_number_of_threads_is_left_alone(eight_threads, monkeypatch):
    """Pins `OMP_NUM_THREADS` at the place where threads are set."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert fit_threads(DeepSeekOCRVisionModel(tiny_config()), num_pixels=128 * 128) == torch.get_num_threads() == 8
