"""As many threads as the work is worth: `fit_threads`.

PyTorch takes a thread for each core and cuts every product into as many pieces. It goes on when the last piece is
done, and the threads that are done wait by spinning. Where another program keeps a core busy, the piece on that core
waits until the scheduler gives it a turn, which takes milliseconds. Pieces of a small model take less than one, so
that nearly all of its time would be waiting. With pieces that take longer than a turn little is lost.
"""

import os

import torch
from torch import nn


MULTIPLY_ADDS_OF_A_THREAD = 250_000_000
"""What a product has to give each thread to do: some 6 ms of one core, two turns of Linux' scheduler."""

PIXELS_OF_A_ROW = 16 * 16
"""Pixels of one patch, which is one row of the encoder's matrix products."""


def choose_num_threads(multiply_adds: float, *, available: int, omp_num_threads: str | None = None) -> int:
    """How many threads of those `available` to compute with, where a product has so many multiply-adds on average.

    The user's own choice, as in the environment variable `OMP_NUM_THREADS`, wins.
    """
    if omp_num_threads:
        return available
    return max(1, min(available, int(multiply_adds // MULTIPLY_ADDS_OF_A_THREAD)))


def fit_threads(model: nn.Module, *, num_pixels: int) -> int:
    """Set PyTorch's threads to as many as a step of a model is worth on the CPU; never to more than there were.

    This is for programs, whose process is their own, and not for functions that others call. A user who sets
    `OMP_NUM_THREADS` has chosen, and nothing changes.

    Args:
        model: The encoder, or a composite around it.
        num_pixels: Pixels of a step: pages x height x width.

    Returns:
        The number of threads.
    """
    sizes = [weight.numel() for weight in model.parameters() if weight.dim() > 1]
    multiply_adds = sum(sizes) / max(1, len(sizes)) * num_pixels / PIXELS_OF_A_ROW
    asked = os.environ.get("OMP_NUM_THREADS")
    num_threads = choose_num_threads(multiply_adds, available=torch.get_num_threads(), omp_num_threads=asked)
    torch.set_num_threads(num_threads)
    return num_threads
