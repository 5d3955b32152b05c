"""Run an exported file in its own runtime: `python runtimes.py FORMAT FILE FOLDER`.

It is run by its path, in a process that never imports the package: what runs here runs where the package is not
installed. In FOLDER are `0.npy` and on, the inputs; it writes `0-output.npy` and on, and `measured.json`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def onnx(file: str) -> Callable[[np.ndarray], np.ndarray]:
    """By ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: session.run(None, {name: values})[0]


def pt2(file: str) -> Callable[[np.ndarray], np.ndarray]:
    """By PyTorch."""
    import torch

    module = torch.export.load(file).module()

    def run(values: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(values)).numpy()

    return run


def openvino(file: str) -> Callable[[np.ndarray], np.ndarray]:
    """By OpenVINO on the CPU, which would compute in bfloat16 where the processor can."""
    import openvino

    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda values: model(values)[0]


STATUS = Path("/proc/self/status")  # of Linux
RUNTIMES = {"onnx": onnx, "pt2": pt2, "openvino": openvino}


def peak_bytes() -> int | None:
    """The most memory that this process has held; nothing on Windows, where Python does not tell."""
    if STATUS.is_file():
        # By `resource`, Linux counts what the process that started this one held, too.
        kilobytes = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")).split()[1]
        return int(kilobytes) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(name: str, file: str, folder: str) -> None:
    """Run a file on every input in a folder."""
    run, seconds = RUNTIMES[name](file), []
    for number in range(len(list(Path(folder).glob("*.npy")))):
        values = np.load(f"{folder}/{number}.npy")
        start = time.perf_counter()
        output = run(values)
        seconds.append(time.perf_counter() - start)
        np.save(f"{folder}/{number}-output.npy", output)
    Path(folder, "measured.json").write_text(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
