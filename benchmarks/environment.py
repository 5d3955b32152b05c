"""The circumstances of a measurement: machine, versions, date and revision."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import ROOT


PACKAGES = ("torch", "transformers", "torchvision", "pillow", "deepseek-ocr-encoder", "peft", "torchao", "onnxruntime")


def environment(machine: dict[str, Any], load_at_start: float | None) -> dict[str, Any]:
    """The circumstances of a measurement.

    Args:
        machine: What the measuring process says: threads and device.
        load_at_start: What `load` gave before anything was measured.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"processor": _processor(), "cores": cores, "memory_bytes": memory, **machine},
        "load_at_start": load_at_start,
        "versions": versions,
    }


def load() -> float | None:
    """How many processes have been computing in the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The revision of this checkout, with a plus sign if files were changed since."""
    try:
        revision, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changes else "")
