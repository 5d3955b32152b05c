"""Measure memory and time of a training step of the whole DeepSeek-OCR, beside the formula of docs/deepseek_ocr.md.

    python -m benchmarks.whole_model           # about 10 minutes on two cores, 20 GB
    python -m benchmarks.whole_model --quick   # a tiny model, to see that it works

The encoder has the released size. The language model has the released widths and experts, but two layers in place of
twelve (one dense, one with experts) and an eighth of the vocabulary: 0.73 billion parameters, not 3.34. A step is
forward, backward and AdamW on a page and 200 tokens of text; each case has a process of its own. `held` is what that
process holds after a step beyond its libraries, gradients included, which the formula computes; `peak` is its peak.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.stored_tokens import write
from benchmarks.workloads import peak_memory, resident_memory, return_freed_memory
from deepseek_ocr_vision import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.composites import DeepSeekOCRConfig, DeepSeekOCRForConditionalGeneration
from deepseek_ocr_vision.training import LANGUAGE_MODEL_LORA_TARGETS, LORA_TARGETS


NUM_TEXT_TOKENS = 200
LORA_RANK = 16
VOCAB_SIZE = 16_160
RELEASED_LANGUAGE_MODEL = {"hidden_size": 1280, "intermediate_size": 6848, "num_attention_heads": 10}
RELEASED_EXPERTS = {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6}
TINY_LANGUAGE_MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TINY_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
WIDTH_OF_EXPERTS = 896


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        trained: `"everything"`, `"encoder"` (the language model is frozen, as are projector and special tokens) or
            `"LoRA"`, rank 16, in encoder, attention and shared experts.
        weights: Their dtype, in which everything is computed.
        size: Side of the page in pixels.
        checkpointing: Whether gradient checkpointing is on.
    """

    trained: str
    weights: str = "float32"
    size: int = 1024
    checkpointing: bool = False


CASES = (
    Case("LoRA"),
    Case("encoder"),
    Case("everything", size=640),
    Case("everything"),
    Case("everything", checkpointing=True),
    # Few processors multiply in bfloat16, and what is held does not depend on the page.
    Case("LoRA", weights="bfloat16", size=128),
    Case("encoder", weights="bfloat16", size=128),
    Case("everything", weights="bfloat16", size=128),
)
HEAD = ("trained", "weights", "page", "parameters", "formula", "held", "peak", "step")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a table to the standard output."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_model", description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="a tiny model, and pages of 128 x 128 pixels")
    quick = parser.parse_args(arguments).quick
    write(*HEAD)
    write(*["---"] * len(HEAD))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for case in CASES:
            write(*row(case, processes.submit(measure, case, quick=quick).result()))


def row(case: Case, measured: dict[str, float]) -> tuple[str, ...]:
    """A line of the table."""
    trained = f"{case.trained}{', checkpointing' if case.checkpointing else ''}"
    parameters = f"{measured['trained'] / 1e6:,.0f} M of {measured['parameters'] / 1e6:,.0f} M"
    memory = [f"{measured[name] / 1e9:.2f} GB" for name in ("formula", "held", "peak")]
    seconds = f"{measured['seconds']:.1f} s"
    return trained, case.weights, f"{case.size} x {case.size}", parameters, *memory, seconds


def measure(case: Case, *, quick: bool) -> dict[str, float]:
    """Two steps of a case in this process: memory in bytes and the seconds of the second."""
    imported = resident_memory()
    model = with_trained(build(case, quick=quick), case.trained)
    batch = batch_of(case, quick=quick)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    for _ in range(2):
        optimizer.zero_grad()
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # A gradient and AdamW's two values for each trained parameter, in the parameter's own dtype.
    formula = weights + 3 * sum(parameter.nbytes for parameter in trained)
    counts = {
        "trained": sum(each.numel() for each in trained),
        "parameters": sum(map(torch.numel, model.parameters())),
    }
    return_freed_memory()
    held, peak = resident_memory() - imported, peak_memory() - imported
    return counts | {"formula": formula, "held": held, "peak": peak, "seconds": seconds}


def build(case: Case, *, quick: bool) -> DeepSeekOCRForConditionalGeneration:
    """A whole model with new weights, in training."""
    make = DeepSeekOCRVisionConfig.tiny if quick else DeepSeekOCRVisionConfig
    sizes = TINY_LANGUAGE_MODEL | TINY_EXPERTS if quick else RELEASED_LANGUAGE_MODEL | RELEASED_EXPERTS
    text_config = sizes | {
        "moe_intermediate_size": 32 if quick else WIDTH_OF_EXPERTS,
        "num_key_value_heads": sizes["num_attention_heads"],
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "vocab_size": VOCAB_SIZE,
    }
    config = DeepSeekOCRConfig(
        vision_config=make(feature_mode="concat"), text_config=text_config, image_token_id=VOCAB_SIZE - 1
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, case.weights))
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def with_trained(model: DeepSeekOCRForConditionalGeneration, trained: str) -> Any:
    """The model with gradients for what is trained alone."""
    if trained == "encoder":
        return model.freeze("projector", "sequence", "language_model")
    if trained == "everything":
        return model
    import peft

    targets = LORA_TARGETS["sam"] + LORA_TARGETS["clip"]
    targets = targets + LANGUAGE_MODEL_LORA_TARGETS["attention"] + LANGUAGE_MODEL_LORA_TARGETS["shared_experts"]
    return peft.get_peft_model(model, peft.LoraConfig(r=LORA_RANK, target_modules=targets))


def batch_of(case: Case, *, quick: bool) -> dict[str, torch.Tensor]:
    """A random page, with a token for each of its tokens and text behind."""
    size = 128 if quick else case.size
    rows = size // 64
    num_image_tokens = rows * (rows + 1) + 1  # an end for each row of tokens, and one of the page
    page = torch.full((1, num_image_tokens), VOCAB_SIZE - 1)
    text = torch.randint(VOCAB_SIZE - 1, (1, NUM_TEXT_TOKENS))
    pixel_values = torch.randn(1, 3, size, size).to(getattr(torch, case.weights))
    ignored = torch.full_like(page, -100)
    return {
        "input_ids": torch.cat([page, text], dim=1),
        "labels": torch.cat([ignored, text], dim=1),
        "pixel_values": pixel_values,
    }


if __name__ == "__main__":
    main()
