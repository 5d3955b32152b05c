"""Measure what int8 saves of an encoder, what it does to its tokens, and what that costs in reading.

    make finetune                                    # trains the model that is measured, in outputs/finetune
    python -m benchmarks.quantization                # its encoder; 500 held-out pages are read with each recipe
    python -m benchmarks.quantization --model encoder/        # an encoder of yours, or a LLaVA around it
    python -m benchmarks.quantization --full-size    # the released size with random weights, at 1024 x 1024

Each recipe is applied to each group of layers alone, and to all of them. torchao's take linear layers only, through
transformers' `TorchAoConfig`, and what is measured was saved and loaded again; ONNX Runtime's takes convolutions too.
The error is that of the tokens, against the float32 encoder on the same pages: its root mean square as a share of
theirs, and the mean cosine of a token and its original. A LLaVA reads pages of handwritten digits; the digits
read are all digits less one for each that has to be inserted, deleted or replaced.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig, TorchAoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.compression import Page, Reader
from benchmarks.environment import environment, load
from benchmarks.processes import ROOT
from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites import IMAGE_TOKEN
from deepseek_ocr_vision.export import export_encoder


GROUPS = {
    "patch embedding": ("sam_model.patch_embed",),
    "SAM blocks": ("sam_model.blocks",),
    "neck, compressor": ("sam_model.neck", "sam_model.net_"),
    "CLIP": ("vision_model",),
    "all": ("",),
}
HEADING = ("recipe", "layers", "MB", "of float32", "s a page", "relative RMS", "cosine", "digits read", "points")
ERROR_PAGES = 16


class Quantised(NamedTuple):
    """An encoder that a recipe made, and what it takes on disk."""

    encoder: nn.Module
    num_bytes: int


class Subject:
    """What is measured: an encoder, saved in float32, with pages and, if it is a part of one, its LLaVA."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.folder, self.source = folder, folder / "float32"
        self.reader: Reader | None = None
        if options.full_size:
            torch.manual_seed(0)
            self.encoder = DeepSeekOCRVisionModel(DeepSeekOCRVisionConfig(feature_mode="concat"))
            image_processor = DeepSeekOCRVisionImageProcessor()
        elif PreTrainedConfig.get_config_dict(options.model)[0].get("model_type") == "llava":
            llava = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
            self.reader = Reader(llava, LlavaProcessor.from_pretrained(options.model), IMAGE_TOKEN)
            self.encoder, image_processor = llava.model.vision_tower, self.reader.processor.image_processor
        else:
            self.encoder = DeepSeekOCRVisionModel.from_pretrained(options.model, dtype=torch.float32)
            image_processor = self.encoder.default_image_processor()
        self.encoder.eval().save_pretrained(self.source)
        self.pages = handwritten_pages(options.num_pages, image_processor.size["height"])
        number = 1 if options.full_size else min(ERROR_PAGES, options.num_pages)
        images = [self.pages[index]["image"] for index in range(number)]
        self.pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]  # [B, 3, H, W]
        self.expected = self.tokens(self.encoder)

    def layers(self, group: str) -> list[str]:
        """The names of a group's linear layers and convolutions."""
        layers = (name for name, module in self.encoder.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        return [name for name in layers if name.startswith(GROUPS[group])]

    @torch.no_grad()
    def tokens(self, encoder: nn.Module) -> torch.Tensor:
        """Of the pages that errors are measured on, [B, N, C]."""
        return torch.cat([encoder(page[None]).last_hidden_state for page in self.pixel_values])

    def measure(self, encoder: nn.Module) -> tuple[float, float, float, float | None]:
        """Seconds a page, relative root mean square and cosine of the tokens, and the share of digits read."""
        self.tokens(encoder)  # the first pages take longer
        start = time.perf_counter()
        tokens = self.tokens(encoder)
        seconds = (time.perf_counter() - start) / len(tokens)
        error = (tokens - self.expected).square().mean().sqrt() / self.expected.square().mean().sqrt()
        cosine = F.cosine_similarity(tokens, self.expected, dim=-1).mean()
        return seconds, error.item(), cosine.item(), self.digits_read(encoder)

    @torch.no_grad()
    def digits_read(self, encoder: nn.Module) -> float | None:
        """The share of digits on held-out pages that the LLaVA reads with an encoder; nothing without a LLaVA."""
        if self.reader is None:
            return None
        self.reader.model.model.vision_tower = encoder
        held_out = (self.pages[index] for index in range(len(self.pages)))
        pages = [Page(page["image"], page["text"], 0.0) for page in held_out]
        written = ["".join(page.text.split()) for page in pages]
        read = ["".join(text.split()) for text in self.reader.read(pages)]
        mistakes, total = sum(map(Levenshtein.distance, read, written)), sum(map(len, written))
        return 1 - mistakes / total


def handwritten_pages(number: int, page_size: int) -> Any:
    """The pages that `examples/finetune.py` holds out."""
    sys.path.insert(0, str(ROOT / "examples"))
    from pages import load_handwritten_pages

    return load_handwritten_pages(num_pages=1, num_held_out_pages=number, page_size=page_size, seed=0)[1]


# Recipes


def by_torchao(name: str, subject: Subject, group: str) -> Quantised | None:
    """A recipe of torchao's, saved and loaded as any checkpoint; none without linear layers."""
    import torchao

    linear = {layer for layer, module in subject.encoder.named_modules() if isinstance(module, nn.Linear)}
    others = sorted(linear - {*subject.layers(group)})
    if len(others) == len(linear):
        return None
    recipe = TorchAoConfig(getattr(torchao.quantization, name)(), modules_to_not_convert=others)
    made = DeepSeekOCRVisionModel.from_pretrained(subject.source, quantization_config=recipe)
    with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
        made.save_pretrained(folder)
        num_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        return Quantised(DeepSeekOCRVisionModel.from_pretrained(folder).eval(), num_bytes)


class OnnxEncoder(nn.Module):
    """An exported encoder in ONNX Runtime, as a LLaVA's vision tower."""

    def __init__(self, file: Path):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Give the tokens [B, N, C] of pixels [B, 3, H, W] in LLaVA's form."""
        tokens = torch.from_numpy(self.session.run(None, {"pixel_values": pixel_values.numpy()})[0])
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


def by_onnx_runtime(subject: Subject, group: str) -> Quantised:
    """ONNX Runtime's dynamic quantisation of weights and activations."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported, file = exported_file(subject), subject.folder / "quantised.onnx"
    nodes = nodes_of(exported, subject.layers(group))
    nodes += [f"{name}_MatMul" for name in nodes]  # what it makes of a Gemm first
    # On processors without VNNI, products of uint8 and int8 overflow; int8 weights would take one bit less.
    quantize_dynamic(exported, file, per_channel=True, weight_type=QuantType.QUInt8, nodes_to_quantize=nodes)
    return Quantised(OnnxEncoder(file), bytes_of(file))


def bytes_of(file: Path) -> int:
    """What an ONNX file takes with the weights that may lie beside it."""
    return sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*") if path.suffix != ".json")


def exported_file(subject: Subject) -> Path:
    """The encoder as ONNX, written once."""
    file = subject.folder / "float32.onnx"
    if not file.is_file():
        height, width = subject.pixel_values.shape[-2:]
        export_encoder(subject.encoder, file, format="onnx", size=(height, width))
    return file


def nodes_of(file: Path, layers: list[str]) -> list[str]:
    """The nodes of an exported graph that a list of layers became."""
    import onnx

    scopes = {f"model.{name}" for name in layers}
    found = []
    for node in onnx.load(file, load_external_data=False).graph.node:
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        if scopes & {*metadata.get("pkg.torch.onnx.name_scopes", "").replace("'", " ").split()}:
            found.append(node.name)
    return found


RECIPES: dict[str, Callable[[Subject, str], Quantised | None]] = {
    "torchao-weights": partial(by_torchao, "Int8WeightOnlyConfig"),
    "torchao-activations": partial(by_torchao, "Int8DynamicActivationInt8WeightConfig"),
    "onnxruntime": by_onnx_runtime,
}


# The table


def rows(subject: Subject, chosen: Sequence[str], groups: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The table's rows: without a recipe, and then each recipe that was chosen with each group of layers."""
    yield HEADING
    yield ("---",) * len(HEADING)
    whole = sum(path.stat().st_size for path in subject.source.glob("*.safetensors"))
    *measured, before = subject.measure(subject.encoder)
    yield row("PyTorch, float32", "", (whole, whole), measured, before, before)
    exported = exported_file(subject)
    *measured, read = subject.measure(OnnxEncoder(exported))
    yield row("ONNX Runtime, float32", "", (bytes_of(exported), whole), measured, read, before)
    for name in chosen:
        for group in groups:
            quantised = RECIPES[name](subject, group)
            if quantised is None:
                yield (name, group, "no linear layers", *[""] * (len(HEADING) - 3))
            else:
                *measured, read = subject.measure(quantised.encoder)
                yield row(name, group, (quantised.num_bytes, whole), measured, read, before)


def row(
    name: str, group: str, num_bytes: tuple[int, int], measured: list[float], read: float | None, before: float | None
) -> tuple[str, ...]:
    """One row of the table."""
    size, whole = num_bytes
    seconds, error, cosine = measured
    cells = (
        name,
        group,
        f"{size / 1e6:.1f}",
        f"{size / whole:.0%}",
        f"{seconds:.3g}",
        f"{error:.1e}",
        f"{cosine:.5f}",
    )
    if read is None or before is None:
        return (*cells, "", "")
    return (*cells, f"{read:.2%}", f"{100 * (read - before):+.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a table to the standard output."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "folder of an encoder, or of a LLaVA around one (default: %(default)s)"
    parser.add_argument("--model", default="outputs/finetune/composite", help=where)
    parser.add_argument("--full-size", action="store_true", help="a new encoder of the released size")
    parser.add_argument("--num-pages", type=int, default=500, help="held-out pages to read (default: %(default)s)")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="default: all")
    parser.add_argument("--layers", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="default: every group")
    options = parser.parse_args(arguments)
    around = environment({"threads": torch.get_num_threads(), "device": "cpu"}, load())
    with tempfile.TemporaryDirectory() as folder:
        for cells in rows(Subject(options, Path(folder)), options.recipes, options.layers):
            sys.stdout.write(f"| {' | '.join(cells)} |\n")
            sys.stdout.flush()
    machine, versions = around["machine"], " ".join(f"{name} {one}" for name, one in around["versions"].items())
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    sys.stdout.write(f"\n{machine['processor']}, {threads}; {versions}; commit {around['commit']}\n")


if __name__ == "__main__":
    main()
