"""Time of a forward pass beside transformers' `UnlimitedOcrVisionModel`, the same architecture, in one process.

`python benchmarks/forward.py` runs the two in turn, full-size with random weights and SDPA, and writes the median
of each and of the ratio pair by pair. Machines differ and drift: only the ratio means something.
"""

import argparse
import platform
import statistics
import sys
import time

import torch
import transformers
from transformers import UnlimitedOcrVisionConfig, UnlimitedOcrVisionModel

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel


def seconds(model: torch.nn.Module, pixel_values: torch.Tensor) -> float:
    """Wall-clock seconds of one forward pass without gradients."""
    with torch.no_grad():
        start = time.perf_counter()
        model(pixel_values)
        return time.perf_counter() - start


def main() -> None:
    """Measure and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the page in pixels, a multiple of 64")
    parser.add_argument("--pairs", type=int, default=5, help="how often the two are run in turn, after one warm-up")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    project = DeepSeekOCRVisionModel(DeepSeekOCRVisionConfig(feature_mode="concat")).eval().to(dtype)
    config = UnlimitedOcrVisionConfig()
    config._attn_implementation = "sdpa"
    peer = UnlimitedOcrVisionModel(config).eval().to(dtype)
    pixel_values = torch.randn(1, 3, options.size, options.size, dtype=dtype)

    pairs = [(seconds(project, pixel_values), seconds(peer, pixel_values)) for _ in range(options.pairs + 1)][1:]
    ratios = [ours / theirs for ours, theirs in pairs]
    sys.stdout.write(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {options.size} x {options.size}, {options.dtype}, "
        f"{options.pairs} pairs\n"
        f"deepseek-ocr-vision     {statistics.median(ours for ours, _ in pairs):7.2f} s\n"
        f"UnlimitedOcrVisionModel {statistics.median(theirs for _, theirs in pairs):7.2f} s\n"
        f"ratio                   {statistics.median(ratios):7.2f}   ({min(ratios):.2f} to {max(ratios):.2f})\n"
    )


if __name__ == "__main__":
    main()
