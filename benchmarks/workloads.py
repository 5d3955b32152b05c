"""What runs in a measuring process: `python -m benchmarks.workloads '{"contestant": "project", ...}'`.

It builds what the job says, writes a line of JSON about itself, and then answers each line of JSON on its standard
input with one on its standard output, until that is closed.
"""

import ctypes
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.memory import LORA_RANK
from benchmarks.operations import PARTS
from benchmarks.workers import Job
from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel


TINY_SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 64,
    "window_size": 3,
    "global_attn_indexes": [1],
    "output_channels": 16,
    "downsample_channels": [24, 32],
    "image_size": 128,
}
TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "grid_size": 2,
}
INITIALIZER_RANGE = 0.02
PROJECTOR_WIDTH = 1280
# The language model of the composite: of 0.12 billion parameters.
LANGUAGE_MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "vocab_size": 8192,
}
TINY_LANGUAGE_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
NUM_TEXT_TOKENS = 128
PAGE_PICTURE = (1000, 1400)  # width and height of the pages that preprocessing reads
NUM_PRODUCTS = 15
WARM_UP_SIZE = 128


def encoder_config(*, tiny: bool = False, feature_mode: str = "concat") -> DeepSeekOCRVisionConfig:
    """The encoder of the released size, or one for tests."""
    stages = {"sam_config": TINY_SAM, "clip_config": TINY_CLIP} if tiny else {}
    return DeepSeekOCRVisionConfig(feature_mode=feature_mode, **stages)


# Contestants


def project(job: Job) -> nn.Module:
    """This package's encoder, with the features of the released model."""
    with torch.device("meta"):
        model = DeepSeekOCRVisionModel(encoder_config(tiny=job.tiny))
    return with_drawn_weights(model, job)


def unlimited_ocr(job: Job) -> nn.Module:
    """transformers' encoder of the same architecture and the same features, with SDPA."""
    from transformers import UnlimitedOcrVisionConfig, UnlimitedOcrVisionModel

    config = encoder_config(tiny=job.tiny)
    sam, clip = config.sam_config, config.clip_config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_dim", "window_size")
    names = (*names, "global_attn_indexes", "output_channels", "downsample_channels", "image_size")
    sam_fields = {name: getattr(sam, name) for name in names}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    # Its CLIP counts pixels, of which 14 make what is a token here.
    clip_fields = {name: getattr(clip, name) for name in names} | {"image_size": clip.grid_size * 14}
    config = UnlimitedOcrVisionConfig(sam_config=sam_fields, encoder_config=clip_fields)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = UnlimitedOcrVisionModel(config)
    return with_drawn_weights(model, job)


def deepseek_ocr_encoder(job: Job) -> Callable[[torch.Tensor], torch.Tensor]:
    """The package `deepseek-ocr-encoder` around Unlimited-OCR's modules, since what it is made for is not on PyPI."""
    if job.tiny:
        raise ValueError("it is 1024 channels wide and nothing else")
    if job.training != "nothing":
        raise ValueError("it computes under inference_mode")
    from deepseek_ocr_encoder import DeepSeekOCREncoder

    model = unlimited_ocr(job)
    vision_model = SimpleNamespace(
        pre_layrnorm=model.vision_encoder.pre_layrnorm,
        transformer=TensorOutput(model.vision_encoder.encoder, "inputs_embeds"),
        embeddings=model.vision_encoder.embeddings,
    )
    full_model = SimpleNamespace(sam_model=TensorOutput(model.sam_encoder, "pixel_values"), vision_model=vision_model)
    encoder = DeepSeekOCREncoder(full_model, device=job.device, dtype=getattr(torch, job.dtype))
    return lambda pixel_values: encoder._forward_core(pixel_values.to(memory_format=torch.channels_last))


def composite(job: Job) -> nn.Module:
    """transformers' LLaVA: our encoder, a projector, and a Llama."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text_config = LlamaConfig(**(TINY_LANGUAGE_MODEL if job.tiny else LANGUAGE_MODEL))
    config = LlavaConfig(
        vision_config=encoder_config(tiny=job.tiny),
        text_config=text_config,
        image_token_index=text_config.vocab_size - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    # Its frequencies are computed when it is built; what is drawn are weights.
    text_model = model.model.language_model
    rotary, text_model.rotary_emb = type(text_model.rotary_emb), nn.Identity()
    model = with_drawn_weights(model, job)
    text_model.rotary_emb = rotary(text_config).to(job.device)
    return model


class TensorOutput(nn.Module):
    """A module whose output object is reduced to its tensor, as DeepSeek's own modules give it."""

    def __init__(self, module: nn.Module, argument: str):
        super().__init__()
        self.module, self.argument = module, argument

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.module(**{self.argument: hidden_states}).last_hidden_state


CONTESTANTS = {
    "project": project,
    "unlimited-ocr": unlimited_ocr,
    "deepseek-ocr-encoder": deepseek_ocr_encoder,
    "composite": composite,
}


def with_drawn_weights(model: nn.Module, job: Job) -> nn.Module:
    """Give a model on the meta device random weights: each a piece of one long draw, which takes a second.

    The encoders' own initialisation of 400 million weights takes longer than many a step, and what they are matters
    neither to time nor to memory.
    """
    model = model.to(getattr(torch, job.dtype)).to_empty(device=job.device)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(job.seed)
    drawn = torch.randn(max(p.numel() for p in parameters) + len(parameters), generator=generator)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            piece = drawn[index : index + parameter.numel()].view(parameter.shape)
            parameter.copy_(piece * INITIALIZER_RANGE)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
        for buffer in model.buffers():
            if buffer.dtype != torch.long:
                raise ValueError(f"a buffer of {buffer.dtype} was left without values")
            # The only buffers are numbered positions.
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
    return model


# Steps


class Workload:
    """A contestant that was built, and what it can be asked.

    Args:
        job: What to build.
    """

    def __init__(self, job: Job):
        self.job = job
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        self.imported = resident_memory()
        self.model = self.projector = None
        if job.contestant != "preprocessing":
            self.model = self._built()
        self.pixel_values = self._pixels(job.size)
        self.built = memory_in_use(job.device)
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _built(self) -> Callable:
        job = self.job
        model = CONTESTANTS[job.contestant](job)
        if not isinstance(model, nn.Module):
            return model
        prepare_training(model, job.training)
        model.train(job.training != "nothing")
        if job.training == "frozen" and job.contestant == "project":
            kind = {"dtype": getattr(torch, job.dtype), "device": job.device}
            self.projector = nn.Linear(model.config.hidden_size, PROJECTOR_WIDTH, **kind)
        if job.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return torch.compile(model) if job.compiled else model

    def _pixels(self, size: int) -> torch.Tensor:
        job = self.job
        generator = torch.Generator().manual_seed(job.seed)
        pixels = torch.randn(job.batch_size, 3, size, size, generator=generator)
        return pixels.to(job.device, getattr(torch, job.dtype))

    def about(self) -> dict[str, Any]:
        """What this process is."""
        trained = {}
        if isinstance(self.model, nn.Module):
            trained = {"trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}
        device = torch.cuda.get_device_name() if self.job.device == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {"threads": torch.get_num_threads(), "device": device} | trained

    def step(self, *, warm_up: bool = False) -> dict[str, float]:
        """Compute once and say how long it took; a warm-up does so on a small page, which takes little memory."""
        pixel_values = self._pixels(WARM_UP_SIZE) if warm_up else self.pixel_values
        synchronize(self.job.device)
        start = time.perf_counter()
        if self.job.training == "nothing":
            with torch.no_grad():
                self.model(pixel_values)
        else:
            self._loss(pixel_values).backward()
        synchronize(self.job.device)
        seconds = time.perf_counter() - start
        if self.job.training != "nothing":
            self._release()
        return {"seconds": seconds}

    def _loss(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.job.contestant == "composite":
            input_ids = self._text(pixel_values)
            return self.model(pixel_values=pixel_values, input_ids=input_ids, labels=input_ids).loss
        tokens = self.model(pixel_values).last_hidden_state
        if self.projector is not None:
            tokens = self.projector(tokens)
        return tokens.float().square().mean()

    def _text(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What a composite reads: the placeholders of a page, and text after them."""
        config = self.model.config
        num_image_tokens = pixel_values.shape[-1] // 64 * (pixel_values.shape[-2] // 64)
        text = torch.arange(NUM_TEXT_TOKENS, device=pixel_values.device) % config.image_token_id
        page = torch.full((num_image_tokens,), config.image_token_id, device=pixel_values.device)
        return torch.cat([page, text]).repeat(len(pixel_values), 1)

    def _release(self) -> None:
        """Drop the gradients and, as long as nothing else is asked for, give freed memory back."""
        for module in (self.model, self.projector):
            if module is not None:
                module.zero_grad(set_to_none=True)
        if not self.job.gives_back:
            return
        # Only where the C library is glibc.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def product(self) -> dict[str, float]:
        """The speed of a plain matrix product, of the first linear layer of SAM's MLP at this size: as one writes it,
        `left @ right`, and into a result that is there already.
        """
        sam = encoder_config(tiny=self.job.tiny).sam_config
        rows, dtype = (self.job.size // sam.patch_size) ** 2, getattr(torch, self.job.dtype)
        left = torch.ones(rows, sam.hidden_size, dtype=dtype, device=self.job.device)
        right = torch.ones(sam.hidden_size, sam.mlp_dim, dtype=dtype, device=self.job.device)
        operations = 2 * rows * sam.hidden_size * sam.mlp_dim
        with torch.no_grad():
            result = left @ right
            return {
                "operations_per_second": operations / self._median_seconds(lambda: left @ right),
                "in_place_per_second": operations / self._median_seconds(lambda: torch.mm(left, right, out=result)),
            }

    def _median_seconds(self, compute: Callable[[], Any]) -> float:
        durations = []
        for _ in range(NUM_PRODUCTS + 1):
            synchronize(self.job.device)
            start = time.perf_counter()
            compute()
            synchronize(self.job.device)
            durations.append(time.perf_counter() - start)
        return statistics.median(durations[1:])

    def memory(self) -> dict[str, int]:
        """Bytes after importing, with the model and the pixels, and at the most so far."""
        peak = torch.cuda.max_memory_allocated() if self.job.device == "cuda" else peak_memory()
        return {"imported": self.imported, "built": self.built, "peak": peak}

    def profile(self) -> dict[str, dict[str, float]]:
        """Seconds of each part in a step, forward and backward."""
        return profile_by_part(self.model, self.pixel_values)

    def preprocess(self, *, way: str, pages: int) -> dict[str, float]:
        """Prepare some pages in one of the ways of `WAYS` and say how long it took."""
        picture = page_picture(self.job.seed)
        process = preparation(way, self.job.size, picture)
        process()
        start = time.perf_counter()
        for _ in range(pages):
            process()
        return {"seconds": time.perf_counter() - start}


def prepare_training(model: nn.Module, training: str) -> None:
    """Say which parameters get a gradient."""
    encoder = model.model.vision_tower if hasattr(model, "lm_head") else model
    model.requires_grad_(training in ("full", "clip"))
    if training == "clip":
        encoder.freeze("sam")
    elif training == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        adapters = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["qkv", "qkv_proj"])
        inject_adapter_in_model(adapters, encoder)
    if model is not encoder:
        model.model.multi_modal_projector.requires_grad_()
        for module in (model.model.language_model, model.lm_head):
            module.requires_grad_(training != "projector")


def synchronize(device: str) -> None:
    """Wait for what a GPU has been told to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def resident_memory() -> int:
    """Bytes of memory that this process holds now, or the most so far where only that can be known."""
    return _status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """The most memory this process has held, in bytes.

    Linux's own mark of this program first: `ru_maxrss` begins with what the parent process held when it started this.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def memory_in_use(device: str) -> int:
    """Bytes that the model, the pixels and, on a CPU, the rest of the process hold."""
    return torch.cuda.memory_allocated() if device == "cuda" else resident_memory()


# Profile


def profile_by_part(model: DeepSeekOCRVisionModel, pixel_values: torch.Tensor) -> dict[str, dict[str, float]]:
    """Seconds of each of `PARTS` in a forward and a backward pass of all parameters.

    A part lasts from where its input arrives, or on the way back the gradient of its output, until the next one's
    does; what lies between two parts, such as the position table behind the patch embedding, counts to the first.
    """
    device = pixel_values.device.type
    arrivals: list[tuple[str, float]] = []

    def arrive(part: str) -> None:
        synchronize(device)
        arrivals.append((part, time.perf_counter()))

    def watch_gradient(part: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output.last_hidden_state
            tensor.register_hook(lambda gradient: arrive(part))

        return hook

    handles = []
    for part, module, is_last in _modules_by_part(model):
        handles.append(module.register_forward_pre_hook(lambda module, arguments, part=part: arrive(part)))
        if is_last:
            handles.append(module.register_forward_hook(watch_gradient(part)))
    tokens = model(pixel_values).last_hidden_state
    arrive("")
    forward = _durations(arrivals)
    arrivals.clear()
    tokens.float().square().mean().backward()
    arrive("")
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": _durations(arrivals)}


def _modules_by_part(model: DeepSeekOCRVisionModel) -> list[tuple[str, nn.Module, bool]]:
    """The modules of each part in the order of the data, and whether a gradient that arrives there is the part's."""
    sam = model.sam_model
    global_blocks = model.config.sam_config.global_attn_indexes
    blocks = [
        ("global blocks" if index in global_blocks else "windowed blocks", block, True)
        for index, block in enumerate(sam.blocks)
    ]
    compressor = [("compressor", sam.net_2, False), ("compressor", sam.net_3, True)]
    return [
        ("patch embedding", sam.patch_embed, True),
        *blocks,
        ("neck", sam.neck, True),
        *compressor,
        ("CLIP", model.vision_model, True),
    ]


def _durations(arrivals: list[tuple[str, float]]) -> dict[str, float]:
    seconds = dict.fromkeys(PARTS, 0.0)
    for (part, start), (_, end) in pairwise(arrivals):
        seconds[part] += end - start
    return seconds


# Preprocessing


def page_picture(seed: int) -> Image.Image:
    """A page of 1,000 x 1,400 random pixels."""
    width, height = PAGE_PICTURE
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _ours(backend: str, size: int, picture: Any) -> Callable[[], Any]:
    processor = DeepSeekOCRVisionImageProcessor(size=size, resize_backend=backend)
    return lambda: processor(picture, return_tensors="pt")


def _clip(name: str, size: int, picture: Any) -> Callable[[], Any]:
    import transformers

    sizes = {"size": {"height": size, "width": size}, "do_center_crop": False}
    processor = getattr(transformers, name)(**sizes)
    return lambda: processor(picture, return_tensors="pt")


def _torchvision(size: int, picture: Any) -> Callable[[], Any]:
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    preset = DeepSeekOCRVisionImageProcessor(size=size)
    steps = [transforms.Resize((size, size), interpolation=bicubic, antialias=True), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize(preset.image_mean, preset.image_std)])
    return lambda: prepare(picture)[None]


WAYS: dict[str, Callable[[int, Image.Image], Callable[[], Any]]] = {
    "this package, Pillow": lambda size, picture: _ours("pil", size, picture),
    "this package, torchvision, from a PIL picture": lambda size, picture: _ours("torchvision", size, picture),
    "this package, torchvision, from a tensor": lambda size, picture: _ours("torchvision", size, as_tensor(picture)),
    "transformers' CLIPImageProcessorPil": lambda size, picture: _clip("CLIPImageProcessorPil", size, picture),
    "transformers' CLIPImageProcessor, from a PIL picture": lambda size, picture: _clip(
        "CLIPImageProcessor", size, picture
    ),
    "transformers' CLIPImageProcessor, from a tensor": lambda size, picture: _clip(
        "CLIPImageProcessor", size, as_tensor(picture)
    ),
    "torchvision's transforms on a PIL picture, as deepseek-ocr-encoder": _torchvision,
}


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as a tensor [3, height, width] of bytes."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def preparation(way: str, size: int, picture: Image.Image) -> Callable[[], Any]:
    """What prepares the picture once, in one of `WAYS`."""
    return WAYS[way](size, picture)


# The process


def main() -> None:
    """Build, and answer until nobody asks."""
    # What libraries write must not mingle with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(function: Callable[..., dict], **arguments: Any) -> None:
        try:
            result = function(**arguments)
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            result = {"error": f"{kind}{error}".splitlines()[0]}
        answers.write(json.dumps(result) + "\n")
        answers.flush()

    workload = None

    def build() -> dict[str, Any]:
        nonlocal workload
        workload = Workload(replace(Job(), **json.loads(sys.argv[1])))
        return workload.about()

    answer(build)
    for line in sys.stdin:
        arguments = json.loads(line)
        answer(getattr(workload, arguments.pop("command")), **arguments)


if __name__ == "__main__":
    main()
