"""SAM's attention, block by block: whatever the blocks, the windows and the padding, it is the one with the bias."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import GRADIENT_TOLERANCE, TOLERANCE, relative_error, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepseek_ocr_vision.modeling import attention_deepseek_ocr_vision as attention
from deepseek_ocr_vision.modeling import base_deepseek_ocr_vision as base
from deepseek_ocr_vision.modeling.attention_deepseek_ocr_vision import SamAttention


def make_attention(window_size: int, *, table_size: int = 8, dtype: torch.dtype = torch.float64) -> SamAttention:
    """A small attention with weights that matter."""
    config = tiny_config().sam_config
    module = SamAttention(config, table_size=window_size or table_size, window_size=window_size).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def outputs_and_gradients(
    module: SamAttention, implementation: str, hidden_states: torch.Tensor
) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    module.config._attn_implementation = implementation
    hidden_states = hidden_states.clone().requires_grad_()
    output = module(hidden_states)
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    gradients = torch.autograd.grad((output * weighting).sum(), [hidden_states, *module.parameters()])
    return [output.detach(), *gradients]


@pytest.mark.parametrize(("block_bytes", "copy_bytes"), [(1, 1), (1000, 1 << 24), (5000, 1), (1 << 24, 1 << 24)])
@pytest.mark.parametrize("window_size", [0, 3, 4, 8, 11])
@pytest.mark.parametrize("grid", [(8, 8), (5, 9), (7, 4)])
def test_blocks_windows_and_padding_change_nothing(monkeypatch, grid, window_size, block_bytes, copy_bytes):
    """Pins every cut: blocks of one row of one head, copies of one head, windows that divide the grid or do not."""
    monkeypatch.setattr(attention, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(attention, "COPY_BYTES", copy_bytes)
    module = make_attention(window_size)
    hidden_states = torch.randn(2, *grid, 32, dtype=torch.float64)
    expected = outputs_and_gradients(module, "eager", hidden_states)
    for implementation in ("blockwise", "sdpa_folded", "sdpa_masked"):
        actual = outputs_and_gradients(module, implementation, hidden_states)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9), implementation


@pytest.mark.parametrize("window_size", [0, 3])
def test_gradcheck_of_blocks(monkeypatch, window_size):
    """Pins the backward pass of our own, against finite differences."""
    monkeypatch.setattr(attention, "BLOCK_BYTES", 600)
    module = make_attention(window_size, table_size=4)
    module.config._attn_implementation = "blockwise"
    hidden_states = torch.randn(1, 4, 5, 32, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def compute(hidden_states: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), hidden_states)

    assert torch.autograd.gradcheck(compute, (hidden_states, *parameters), fast_mode=True)


@pytest.mark.parametrize("emulated", [[], [torch.bfloat16]], ids=["half blocks", "single blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window_size", [0, 3])
def test_half_precision_sums_in_single(monkeypatch, window_size, dtype, emulated):
    """Pins gradients that are added up over many blocks: in bfloat16 the later ones would be lost."""
    monkeypatch.setattr(attention, "BLOCK_BYTES", 500)
    monkeypatch.setattr(base, "EMULATED", emulated)
    module = make_attention(window_size)
    hidden_states = torch.randn(1, 8, 8, 32, dtype=torch.float64)
    expected = outputs_and_gradients(module, "eager", hidden_states)
    actual = outputs_and_gradients(module.to(dtype), "blockwise", hidden_states.to(dtype))
    limit = GRADIENT_TOLERANCE if dtype == torch.float32 else TOLERANCE[dtype]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < limit * theirs.norm()


@pytest.mark.parametrize("window_size", [0, 3])
def test_nothing_of_the_size_of_the_bias_is_kept_for_backward(window_size):
    """Pins 0.8 GB a global block: only the fused projection, the output and the tables are kept."""
    module = make_attention(window_size, table_size=16, dtype=torch.float32)
    module.config._attn_implementation = "sdpa"
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden_states = torch.randn(1, 16, 16, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(hidden_states)
    tokens = hidden_states.nbytes
    parameters = sum(parameter.nbytes for parameter in module.parameters())
    tables = 2 * 16 * 16 * 16 * 4
    # Input, query with key and value, output; and what gathering the tables keeps.
    assert sum(kept.values()) <= tokens * (1 + 3 + 1) + parameters + 3 * tables
    # With padding, one row that stands for all of it.
    rows = 16 * 16 + (1 if window_size else 0)
    assert max(kept.values()) <= 3 * tokens // (16 * 16) * rows


@pytest.mark.parametrize("implementation", ["blockwise", "sdpa_folded", "sdpa_masked"])
def test_under_autocast_it_is_close_to_full_precision(implementation):
    """Pins mixed precision: weights in float32, products in bfloat16, gradients in float32."""
    module = make_attention(3, dtype=torch.float32)
    hidden_states = torch.randn(1, 8, 8, 32)
    expected = outputs_and_gradients(module, "eager", hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(module, implementation, hidden_states)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.float() - theirs).norm() < TOLERANCE[torch.bfloat16] * theirs.norm()


@pytest.mark.parametrize("window_size", [0, 3])
def test_second_and_forward_derivatives_of_blocks_are_those_of_the_plain_formula(window_size):
    """Pins gradient penalties and Hessians, which a backward pass of our own would get wrong or refuse."""
    results = []
    for implementation in ("eager", "blockwise"):
        torch.manual_seed(0)
        module = make_attention(window_size)
        module.config._attn_implementation = implementation
        hidden_states = torch.randn(1, 4, 4, 32, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(hidden_states).square().sum(), hidden_states, create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), [hidden_states, *module.parameters()])
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(hidden_states, torch.ones_like(hidden_states))
            tangent = forward_ad.unpack_dual(module(dual)).tangent
        transformed = torch.func.jvp(module, (hidden_states,), (torch.ones_like(hidden_states),))[1]
        results.append([*second, tangent, transformed])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_second_derivative_of_a_fused_kernel_is_an_error_that_names_the_way_out():
    """Pins PyTorch's own message, which names a kernel that nobody has called."""
    module = make_attention(0)
    module.config._attn_implementation = "sdpa_folded"
    hidden_states = torch.randn(1, 4, 4, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(hidden_states).square().sum(), hidden_states, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"set_attn_implementation\('eager'"):
        gradient.square().sum().backward()
    with pytest.raises(NotImplementedError, match=r"set_attn_implementation\('eager'"):
        torch.func.jvp(module, (hidden_states,), (torch.ones_like(hidden_states),))
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(module(hidden_states).square().sum(), hidden_states, create_graph=True)
        gradient.square().sum().backward()
    assert hidden_states.grad.any()


@pytest.mark.parametrize(
    ("dtype", "capabilities", "expected"),
    [
        (torch.bfloat16, {"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, False),
        (torch.float16, {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}, False),
        (torch.bfloat16, {"architecture": "x86_64", "avx512_bf16": True}, True),
        (torch.bfloat16, {"architecture": "x86_64", "amx_bf16": True}, True),
        (torch.float16, {"architecture": "x86_64", "avx512_fp16": True}, True),
        (torch.bfloat16, {"architecture": "aarch64"}, True),
        (torch.bfloat16, {}, True),
        (torch.float32, {"architecture": "x86_64"}, True),
        (torch.float64, {"architecture": "x86_64"}, True),
    ],
)
def test_a_processor_says_whether_it_multiplies_in_half_precision(dtype, capabilities, expected):
    """Pins 100 s for a page in bfloat16 on a processor with AVX2 alone; the others keep what is fast there."""
    assert base.has_products(dtype, capabilities) is expected


def test_sdpa_means_what_suits_device_and_graph():
    """Pins the choice: blocks on a CPU, folded on a GPU, the mask where a graph is made."""
    choose = attention._formulation
    assert choose("sdpa", torch.device("cpu")) == "blockwise"
    assert choose("sdpa", torch.device("cuda")) == "sdpa_folded"
    assert choose("sdpa", torch.device("meta")) == "sdpa_masked"
    assert choose("eager", torch.device("cuda")) == "eager"
    module = make_attention(3, dtype=torch.float32)
    module.config._attn_implementation = "sdpa"
    program = torch.export.export(module, (torch.randn(1, 8, 8, 32),))
    assert "scaled_dot_product_attention" in str(program.graph)
    assert relative_error(program.module()(torch.ones(1, 8, 8, 32)), module(torch.ones(1, 8, 8, 32))) < 1e-4


@pytest.mark.parametrize("window_size", [0, 3])
def test_compiled_blocks_are_one_operator_for_every_size(window_size):
    """Pins loops that a compiled graph unrolled, and one more graph for each size of page."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = make_attention(window_size)
    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, dynamic=True, fullgraph=True)
    for shape in [(2, 8, 12, 32), (3, 9, 6, 32), (2, 12, 8, 32)]:
        hidden_states = torch.randn(*shape, dtype=torch.float64)
        expected = outputs_and_gradients(module, "blockwise", hidden_states)
        actual = outputs_and_gradients(compiled, "blockwise", hidden_states)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9), shape
    assert len(graphs) == 1
    assert sum("blockwise_attention" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_exported_blocks_run_at_sizes_that_they_were_not_exported_at():
    """Pins an export with dynamic sizes that refused all others."""
    module = make_attention(3)
    module.config._attn_implementation = "blockwise"
    sizes = {dim: torch.export.Dim(name, min=2, max=64) for dim, name in enumerate(("batch", "height", "width"))}
    hidden_states = torch.randn(2, 8, 7, 32, dtype=torch.float64)
    program = torch.export.export(module, (hidden_states,), dynamic_shapes=(sizes,)).module()
    for shape in [(2, 9, 9, 32), (3, 5, 30, 32), (2, 12, 8, 32)]:
        hidden_states = torch.randn(*shape, dtype=torch.float64)
        assert torch.allclose(program(hidden_states), module(hidden_states), rtol=1e-9, atol=1e-9), shape
