"""Where to compute, where nobody says so."""

import torch


def default_device() -> torch.device:
    """The accelerator that there is, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
