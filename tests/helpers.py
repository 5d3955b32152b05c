"""What the tests share: small configurations, the golden weights and inputs, tolerances, fresh interpreters."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel


ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
# Those that give a token for each square, and the one with special tokens between them.
FEATURE_MODES = ("residual", "concat", "projected")
EVERY_FEATURE_MODE = (*FEATURE_MODES, "sequence")
IMPLEMENTATIONS = ("eager", "sdpa", "blockwise", "sdpa_folded", "sdpa_masked")

# How far two ways of computing the same may be apart, relative to the spread of the values.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
GRADIENT_TOLERANCE = 1e-3

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden values are not at {GOLDEN}")


tiny_config = DeepSeekOCRVisionConfig.tiny


def free_port() -> str:
    """A port for processes that a test starts; accelerate below 1.7 chooses none by itself."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def pixels(batch: int = 2, height: int = 128, width: int = 128, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random pixels [batch, 3, height, width], the same at every call."""
    generator = torch.Generator().manual_seed(batch + height + width)
    return torch.randn(batch, 3, height, width, generator=generator).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the standard deviation of what is expected."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.std()).item()


def golden_pixels(side: int) -> torch.Tensor:
    """The input that the golden values were made from, [1, 3, side, side]."""
    generator = np.random.Generator(np.random.PCG64(side))
    return torch.from_numpy(generator.standard_normal((1, 3, side, side), dtype=np.float32))


def golden_shapes() -> dict[str, tuple[int, ...]]:
    """The 472 vision tensors of a released checkpoint."""
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / "vision_keys.json").read_text()).items()}


def golden_weight(key: str, shape: tuple[int, ...], *, salt: str = "") -> torch.Tensor:
    """The weight that the rule in the golden folder's README gives for a key, and WHOLE_MODEL.md for a whole model."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32((key + salt).encode())))
    weight = generator.standard_normal(shape, dtype=np.float32)
    if "norm" in key or ".neck.1." in key or ".neck.3." in key:
        weight = 1 + 0.1 * weight if key.endswith(".weight") else 0.1 * weight
    elif "rel_pos" in key:
        weight = 0.1 * weight
    elif key.endswith(".bias"):
        weight = 0.02 * weight
    elif any(part in key for part in ("pos_embed", "position_embedding", "class_embedding")):
        weight = 0.1 * weight
    elif key != "embed_tokens.weight":
        weight = weight / np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(weight)


def golden_features(golden: dict[str, torch.Tensor], model: DeepSeekOCRVisionModel, side: int) -> torch.Tensor:
    """Features [N, C] of the golden pixels, by a model wherever it is, whose gradients have to be the golden ones."""
    pixel_values = golden_pixels(side).to(model.device).requires_grad_()
    features = model(pixel_values).last_hidden_state
    generator = np.random.Generator(np.random.PCG64(7))
    weighting = torch.from_numpy(generator.standard_normal(tuple(features.shape), dtype=np.float32))
    (features * weighting.to(model.device)).mean().backward()

    prefix = f"{model.config.feature_mode}_{side}_grad_"
    gradient = pixel_values.grad.cpu()
    assert gradient.norm().item() == pytest.approx(golden[prefix + "pixel_norm"].item(), rel=GRADIENT_TOLERANCE)
    assert relative_error(gradient[0, :, 100:132, 200:232], golden[prefix + "pixels_crop"]) < GRADIENT_TOLERANCE
    names = [key.removeprefix(f"{prefix}norm.") for key in golden if key.startswith(f"{prefix}norm.")]
    assert len(names) >= 12
    for name in names:
        gradient = model.get_parameter(name).grad.cpu()
        expected_norm = golden[f"{prefix}norm.{name}"].item()
        assert gradient.norm().item() == pytest.approx(expected_norm, rel=GRADIENT_TOLERANCE), name
        assert relative_error(gradient.flatten()[:256], golden[f"{prefix}head.{name}"]) < GRADIENT_TOLERANCE, name
    return features.detach()[0].cpu()


def run_python(code: str, *, package_installed: bool = True, **environment: str) -> str:
    """Run code in a fresh interpreter, offline, and return what it writes; fail with its errors if it fails.

    Args:
        code: The program.
        package_installed: Whether `import deepseek_ocr_vision` works there.
        environment: Further environment variables.
    """
    # An import that finds a `None` in sys.modules fails just as one of a package that is not installed.
    blocker = "" if package_installed else "import sys; sys.modules['deepseek_ocr_vision'] = None\n"
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | environment
    command = [sys.executable, "-c", blocker + textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd="/", check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def released_tensors(model: DeepSeekOCRVisionModel, *, language_width: int = 48) -> dict[str, torch.Tensor]:
    """A checkpoint in the released layout around the weights of a model in `projected` or `sequence` mode: what the
    encoder does not compute with, and a little of a language model.
    """
    tensors = {f"model.{key}": tensor.detach() for key, tensor in model.state_dict().items()}
    width = model.config.clip_config.hidden_size
    draw = torch.Generator().manual_seed(0)
    others = {
        "lm_head.weight": (20, language_width),
        "model.embed_tokens.weight": (20, language_width),
        "model.image_newline": (language_width,),
        "model.layers.0.mlp.experts.3.up_proj.weight": (30, language_width),
        "model.norm.weight": (language_width,),
        "model.view_seperator": (language_width,),
        "model.vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
    }
    others = {name: torch.randn(shape, generator=draw).to(model.dtype) for name, shape in others.items()}
    tensors = others | tensors
    num_positions = model.config.clip_config.grid_size**2 + 1
    return tensors | {"model.vision_model.embeddings.position_ids": torch.arange(num_positions)[None]}


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], config: DeepSeekOCRVisionConfig, *, num_shards: int = 1
) -> Path:
    """Write tensors as a checkpoint of one or several files, whose configuration states the encoder's sizes as
    transformers' Unlimited-OCR does, with a tokenizer beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clip = config.clip_config.to_dict()
    sizes = {"sam_config": config.sam_config.to_dict()}
    sizes["encoder_config"] = clip | {"image_size": clip["grid_size"] * 14, "patch_size": 14}
    contents = {"model_type": "deepseek_vl_v2", "architectures": ["DeepseekOCRForCausalLM"], "vision_config": sizes}
    contents["language_config"] = {"hidden_size": config.projection_dim}
    (folder / "config.json").write_text(json.dumps(contents))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    names = sorted(tensors)
    files = [f"model-{index + 1:05}-of-{num_shards:05}.safetensors" for index in range(num_shards)]
    weight_map = {name: files[index * num_shards // len(names)] for index, name in enumerate(names)}
    for file in files:
        shard = {name: tensors[name].contiguous() for name in names if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Both have the same tensors, bit for bit."""
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
