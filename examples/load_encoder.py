"""Load a saved encoder by the Auto classes, and encode pages: nothing of this package is imported here.

    python examples/load_encoder.py outputs/finetune/encoder page.png another_page.png

The folder carries its code, so `trust_remote_code=True` is all that it takes. `finetune.py` runs this in a fresh
process, with `--reference`, to compare with the tokens of the encoder that it trained.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor


def encode(folder: str, pages: list[str]) -> torch.Tensor:
    """Encode images one by one; give the tokens [B, N, C]."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        tokens = [model(**processor(images=page, return_tensors="pt")).last_hidden_state for page in pages]
    return torch.cat(tokens)


def main() -> None:
    """Print, as one line of JSON, the tokens' shape and how far they are from the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="Folder with the encoder.")
    parser.add_argument("pages", nargs="*", help="Images to encode.")
    parser.add_argument("--reference", type=Path, help="Folder with 0.png, 1.png, ... and tokens.safetensors.")
    arguments = parser.parse_args()
    if not arguments.reference:
        tokens = encode(arguments.encoder, arguments.pages)
        report = {"shape": list(tokens.shape), "mean": tokens.mean().item(), "std": tokens.std().item()}
    else:
        expected = load_file(arguments.reference / "tokens.safetensors")["tokens"]
        pages = [str(arguments.reference / f"{index}.png") for index in range(len(expected))]
        tokens = encode(arguments.encoder, pages)
        difference = (tokens - expected).abs().max().item() / expected.std().item()
        report = {"num_pages": len(pages), "shape": list(tokens.shape[1:]), "equal": torch.equal(tokens, expected)}
        report["difference"] = difference
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
