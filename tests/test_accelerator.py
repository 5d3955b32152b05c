"""The path on an accelerator, checked without one: PyTorch's fake tensors have a device and a dtype, and no values.

An operation that mixes devices or dtypes, or that asks for a value on the host, is an error for them.
"""

import pytest
import torch
from helpers import (
    EVERY_FEATURE_MODE,
    GRADIENT_TOLERANCE,
    TOLERANCE,
    golden_features,
    needs_golden,
    pixels,
    relative_error,
    tiny_config,
)
from packaging import version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling.attention_deepseek_ocr_vision import SamAttention, fold_bias, kernel_filling


pytestmark = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.7") and not torch.cuda.is_available(),
    reason="torch 2.6 asks for a CUDA driver also for fake tensors, 2.14 does not",
)


class NoCopiesBetweenDevices(TorchDispatchMode):
    """Refuses to copy a tensor from one device to another, for which an accelerator would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            assert source.device == result.device, f"{func} from {source.device} to {result.device}"
        return result


def tokens_of_a_fake_accelerator(model: DeepSeekOCRVisionModel, dtype: torch.dtype, **inputs) -> torch.Tensor:
    """Run the forward pass as on CUDA; the tokens. The backward pass needs a device that is there."""
    mode = FakeTensorMode()
    # The mode converts real tensors one by one; the model itself stays as it is.
    weights = {name: mode.from_tensor(weight.detach()) for name, weight in model.named_parameters()}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    with mode:
        weights = {name: w.to("cuda", dtype).requires_grad_(name in trained) for name, w in weights.items()}
        on_device = {
            name: mode.from_tensor(value).to("cuda", dtype) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        with NoCopiesBetweenDevices():
            tokens = torch.func.functional_call(model, weights, kwargs=on_device).last_hidden_state
    assert tokens.requires_grad == bool(trained)
    assert (tokens.device.type, tokens.dtype) == ("cuda", dtype)
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sdpa_folded", "sdpa_masked"])
def test_every_formulation_runs_on_an_accelerator_in_every_dtype(implementation, dtype):
    """Pins tables, masks and one-hot vectors that are made on the host or in another dtype."""
    model = DeepSeekOCRVisionModel(tiny_config())
    model.set_attn_implementation(implementation)
    tokens = tokens_of_a_fake_accelerator(model, dtype, pixel_values=pixels(2, 64, 128))
    assert tokens.shape == (2, 2, model.config.hidden_size)


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_every_feature_mode_runs_on_an_accelerator_with_tiles(feature_mode):
    """Pins the learned tokens, the class token, and the lengths of rows, which were copied from the host."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    tiles = {"pixel_values_local": pixels(2, 64, 64), "num_local_patches": [2, 0], "patches_grid": [[2, 1], [0, 0]]}
    tokens = tokens_of_a_fake_accelerator(model, torch.bfloat16, pixel_values=pixels(2, 128, 64), **tiles)
    num_special = 3 + 1 if feature_mode == "sequence" else 0  # a newline for each of three rows, and the separator
    assert tokens.shape == (2, 2 + 2 + num_special, model.config.hidden_size)


@pytest.mark.parametrize("frozen", [(), ("sam",), ("clip",)])
def test_checkpointing_and_freezing_run_on_an_accelerator(frozen):
    """Pins random states and inputs that gradient checkpointing reads on the host."""
    model = DeepSeekOCRVisionModel(tiny_config()).train()
    model.gradient_checkpointing_enable()
    if frozen:
        model.freeze(*frozen)
    tokens_of_a_fake_accelerator(model, torch.bfloat16, pixel_values=pixels(1, 128, 64))


def test_a_graph_for_an_accelerator_has_the_bias_folded_in():
    """Pins four times as much kept for the backward pass: a compiled graph took the bias as a tensor."""
    with FakeTensorMode(), torch.device("cuda"):
        model = DeepSeekOCRVisionModel(tiny_config()).eval()
        page = torch.empty(1, 3, 128, 128)
        graph = torch.export.export(model, (page,), strict=False).graph
    calls = [node for node in graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(calls) == 4
    assert all(len(call.args) < 4 and call.kwargs.get("attn_mask") is None for call in calls)


def test_in_half_precision_queries_and_keys_are_as_wide_as_kernels_take():
    """Pins windows 92 wide, which two kernels refuse and one copies."""
    with FakeTensorMode(), torch.device("cuda"):
        model = AutoModel.from_config(tiny_config(), dtype=torch.bfloat16).eval()
        graph = torch.export.export(model, (torch.empty(1, 3, 128, 192),), strict=False).graph
    calls = [node for node in graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    widths = [argument.meta["val"].shape[-1] for call in calls[:2] for argument in call.args[:3]]  # of the SAM stage
    assert widths
    assert all(width % 8 == 0 for width in widths)


BF16, CONSUMER, SERVER = torch.bfloat16, (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("width", "dtype", "capability", "is_trained", "expected"),
    [
        (92, BF16, SERVER, True, 96),  # a window of 14 x 14
        (92, torch.float16, SERVER, False, 96),
        (92, torch.float32, SERVER, True, 92),
        (192, BF16, CONSUMER, True, 192),  # a page of 1024 x 1024
        (224, BF16, CONSUMER, True, 232),  # a page of 1280 x 1280
        (196, BF16, (12, 0), True, 232),
        (224, BF16, CONSUMER, False, 224),
        (224, BF16, SERVER, True, 224),
        (224, torch.float32, CONSUMER, True, 224),
        (228, BF16, CONSUMER, True, 232),
    ],
)
def test_widths_are_filled_up_to_what_the_kernels_take(width, dtype, capability, is_trained, expected):
    """Pins a window's width that kernels copy, and pages that consumer cards cannot train on."""
    assert width + kernel_filling(width, dtype, capability, is_trained=is_trained) == expected


@pytest.mark.parametrize("filling", [0, 4, 8])
def test_what_is_filled_up_changes_no_logit(filling):
    """Pins ones in the filling, or a place of a key that moved with it."""
    torch.manual_seed(0)
    query, key, rel_h, rel_w = (torch.randn(shape) for shape in ((2, 3, 5, 7), (2, 15, 7), (2, 3, 5, 3), (2, 3, 5, 5)))
    expected = torch.einsum("gstd,gnd->gstn", query, key).unflatten(-1, (3, 5))
    expected = expected + rel_h[..., :, None] + rel_w[..., None, :]
    query, key = fold_bias(query, key, rel_h, rel_w, filling)
    assert query.shape[-1] == key.shape[-1] == 7 + 3 + 5 + filling
    torch.testing.assert_close(torch.einsum("gstd,gnd->gstn", query, key), expected.flatten(-2))


# On a real one


DEVICE = torch.device("cuda")
needs_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def exact_products(monkeypatch):
    """Convolutions in float32, and not in the 10 bits of TF32, which cuDNN takes by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@needs_accelerator
@needs_golden
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sdpa_masked"])
def test_on_an_accelerator_features_and_gradients_are_the_golden_ones(
    exact_products, golden, golden_model, implementation
):
    """Pins fused kernels, and what they are handed, by the numbers that hold on a CPU."""
    model = golden_model("concat").to(DEVICE)
    model.set_attn_implementation(implementation)
    expected = torch.cat([golden["clip_512"][1:], golden["sam_512"]], dim=-1)
    assert relative_error(golden_features(golden, model, 512), expected) < TOLERANCE[torch.float32]


def trained_step(model: DeepSeekOCRVisionModel, run, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the gradient of the first of all weights."""
    tokens = run(page).last_hidden_state
    tokens.float().square().mean().backward()
    return tokens.detach().clone(), model.sam_model.pos_embed.grad.clone()


@needs_accelerator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_accelerator_a_compiled_model_trains_as_it_does_without(exact_products, dtype):
    """Pins Inductor's kernels around the folded attention, forward and backward."""
    model = DeepSeekOCRVisionModel(tiny_config()).to(DEVICE, dtype).train()
    page = pixels(2, 128, 192).to(DEVICE, dtype)
    expected = trained_step(model, model, page)
    model.zero_grad()
    torch.compiler.reset()
    actual = trained_step(model, torch.compile(model, fullgraph=True), page)
    for of_compiled, of_eager in zip(actual, expected, strict=True):
        assert relative_error(of_compiled, of_eager) < max(TOLERANCE[dtype], GRADIENT_TOLERANCE)


@needs_accelerator
def test_a_cuda_graph_of_a_training_step_replays_it_for_other_pages(exact_products):
    """Pins values that the host asks for, and activations that are computed again, while a graph is recorded."""
    model = DeepSeekOCRVisionModel(tiny_config()).to(DEVICE).train()
    page = pixels(1, 128, 128).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are chosen and gradients made before a graph is recorded
        trained_step(model, model, page)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        recorded = trained_step(model, model, page)
    other = torch.randn_like(page)
    page.copy_(other)
    model.zero_grad(set_to_none=False)
    graph.replay()
    recorded = [each.clone() for each in recorded]
    model.zero_grad()
    for of_graph, of_eager in zip(recorded, trained_step(model, model, other), strict=True):
        assert relative_error(of_graph, of_eager) < GRADIENT_TOLERANCE


@needs_accelerator
def test_a_global_layer_keeps_no_bias_for_the_backward_pass():
    """Pins four times as much memory: the bias of a page of 1024 x 1024 has 384 MiB in half precision."""
    config = DeepSeekOCRVisionConfig().sam_config
    layer = SamAttention(config, table_size=64).to(DEVICE, torch.bfloat16)
    hidden_states = torch.randn(1, 64, 64, config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    kept = {}
    for name in ("sdpa", "sdpa_masked"):
        layer.config._attn_implementation = name
        before = torch.cuda.memory_allocated()
        output = layer(hidden_states)
        kept[name] = torch.cuda.memory_allocated() - before
        del output
    assert kept["sdpa"] < kept["sdpa_masked"] / 3
