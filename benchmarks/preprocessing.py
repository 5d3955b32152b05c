"""Ways to turn a page into `pixel_values`: this package's, transformers' and torchvision's."""

import statistics
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor


PAGE_SIZE = (1000, 1400)  # width and height in pixels


def random_page(seed: int) -> Image.Image:
    """A page of 1,000 x 1,400 random pixels."""
    width, height = PAGE_SIZE
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def compare_ways(size: int, page: Image.Image, *, pages: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Prepare a page in all `WAYS` in turn, after a warm-up.

    Args:
        size: Side of the result in pixels.
        page: As a PIL image; a way that starts from a tensor gets one, [3, height, width].
        pages: How often a way prepares it in a round.
        rounds: How often the ways take turns.

    Returns:
        `images_per_second` of each way, the median of the rounds, and in `failures` the reason why a way failed.
    """
    tensor = torch.from_numpy(np.array(page)).permute(2, 0, 1).contiguous()
    seconds: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for index in range(rounds + 1):
        for way, prepare in WAYS.items():
            try:
                duration = timeit.timeit(prepare(size, tensor if "tensor" in way else page), number=pages)
            except (ImportError, AttributeError) as error:  # not installed, or not in this version
                failures[way] = str(error)
                continue
            if index:
                seconds.setdefault(way, []).append(duration / pages)
    rates = {way: 1 / statistics.median(values) for way, values in seconds.items()}
    return {"images_per_second": rates, "failures": failures}


def _ours(backend: str, size: int, image: Any) -> Callable[[], Any]:
    processor = DeepSeekOCRVisionImageProcessor(size=size, resize_backend=backend)
    return lambda: processor(image, return_tensors="pt")


def _transformers(name: str, size: int, image: Any) -> Callable[[], Any]:
    import transformers

    processor = getattr(transformers, name)(size={"height": size, "width": size}, do_center_crop=False)
    return lambda: processor(image, return_tensors="pt")


def _torchvision(size: int, image: Any) -> Callable[[], Any]:
    from torchvision import transforms

    preset = DeepSeekOCRVisionImageProcessor(size=size)
    resize = transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
    normalize = transforms.Normalize(preset.image_mean, preset.image_std)
    compose = transforms.Compose([resize, transforms.ToTensor(), normalize])
    return lambda: compose(image)[None]


WAYS: dict[str, Callable[[int, Any], Callable[[], Any]]] = {
    "this package, Pillow": partial(_ours, "pil"),
    "this package, torchvision, from a PIL image": partial(_ours, "torchvision"),
    "this package, torchvision, from a tensor": partial(_ours, "torchvision"),
    "transformers' CLIPImageProcessorPil": partial(_transformers, "CLIPImageProcessorPil"),
    "transformers' CLIPImageProcessor, from a PIL image": partial(_transformers, "CLIPImageProcessor"),
    "transformers' CLIPImageProcessor, from a tensor": partial(_transformers, "CLIPImageProcessor"),
    "torchvision's transforms on a PIL image, as deepseek-ocr-encoder": _torchvision,
}
