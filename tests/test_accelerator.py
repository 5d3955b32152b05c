"""The path on an accelerator, checked without one: PyTorch's fake tensors have a device and a dtype, and no values.

An operation that mixes devices or dtypes, or that asks for a value on the host, is an error for them.
"""

import pytest
import torch
from helpers import EVERY_FEATURE_MODE, pixels, relative_error, tiny_config
from packaging import version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling.attention_deepseek_ocr_vision import fold_bias, kernel_filling


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_real_accelerator_the_tokens_are_those_of_the_cpu():
    """Pins the folded attention on real kernels, against the blocks of a CPU."""
    model = DeepSeekOCRVisionModel(tiny_config()).eval()
    page = pixels(1, 512, 512)
    with torch.no_grad():
        expected = model(page).last_hidden_state
        actual = model.to("cuda")(page.to("cuda")).last_hidden_state
    assert relative_error(actual.cpu(), expected) < 1e-3
