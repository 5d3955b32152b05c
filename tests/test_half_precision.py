"""Half precision: what is rounded in an attention layer is no more than the original code rounds."""

import copy
from functools import partial

import pytest
import torch
from helpers import pixels, tiny_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling import attention_deepseek_ocr_vision as attention
from deepseek_ocr_vision.modeling import base_deepseek_ocr_vision as base
from deepseek_ocr_vision.modeling.attention_deepseek_ocr_vision import SamAttention


class ProductDtypes(TorchDispatchMode):
    """Notes what layers and attention multiply in, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("convolution", "mm", "attention")):
            self.seen |= {each.dtype for each in args if isinstance(each, torch.Tensor)}
        return function(*args, **(kwargs or {}))


CASES = [  # formulation, and what the processor can do
    ("eager", {}),
    ("sdpa_folded", {}),
    ("sdpa_masked", {}),
    ("blockwise", {}),
    ("blockwise", {"architecture": "x86_64"}),
]
GRID, WIDTH = 16, 128


def attention_with_logits_up_to(largest: float, window_size: int) -> tuple[SamAttention, torch.Tensor]:
    """A small layer in float64, and an input [1, H, W, C] for which queries and keys give logits up to a number."""
    torch.manual_seed(0)
    config = tiny_config(sam_config={"hidden_size": WIDTH, "num_attention_heads": 2}).sam_config
    module = SamAttention(config, table_size=window_size or GRID, window_size=window_size).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden_states = torch.randn(1, GRID, GRID, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        query, key, _ = attention.split_heads(module.qkv(hidden_states), module.num_heads)
        logits = module.scaling * query @ key.transpose(-2, -1)
        module.qkv.weight[: 2 * WIDTH] *= (largest / logits.max()).sqrt()
    return module, hidden_states


def original_attention(module: SamAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """What DeepSeek's own code computes: every step in the weights' dtype, the bias as SDPA's mask."""
    side = module.window_size or GRID
    count = -(-GRID // side)
    padded = F.pad(hidden_states, (0, 0, 0, count * side - GRID, 0, count * side - GRID))
    windows = padded.view(count, side, count, side, WIDTH).transpose(1, 2).flatten(0, 1)  # [windows, side, side, C]
    query, key, value = attention.split_heads(module.qkv(windows), module.num_heads)
    offsets = torch.arange(side)[:, None] - torch.arange(side) + side - 1
    places = query.unflatten(2, (side, side))
    rel_h = torch.einsum("nahwd,hid->nahwi", places, module.rel_pos_h[offsets])
    rel_w = torch.einsum("nahwd,wjd->nahwj", places, module.rel_pos_w[offsets])
    bias = (rel_h[..., None] + rel_w[..., None, :]).reshape(*query.shape[:3], side * side)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # [windows, heads, N, D]
    output = module.proj(output.transpose(1, 2).flatten(2)).unflatten(1, (side, side))
    return output.unflatten(0, (count, count)).transpose(1, 2).flatten(2, 3).flatten(0, 1)[None, :GRID, :GRID]


def output_and_gradients(module: SamAttention, compute, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output without gradients and with them, for which SDPA takes other kernels, and all gradients."""
    with torch.no_grad():
        inference = compute(hidden_states)
    hidden_states = hidden_states.clone().requires_grad_()
    output = compute(hidden_states)
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, [hidden_states, *parameters], weighting)
    return {"inference": inference, "output": output.detach()} | dict(zip(("input", *names), gradients, strict=True))


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each is from what is expected: root mean square, relative to the standard deviation."""
    return {
        name: ((actual[name] - expected[name]).square().mean().sqrt() / expected[name].std()).item() for name in actual
    }


@pytest.mark.parametrize("largest", [60, 231])
@pytest.mark.parametrize("window_size", [0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_formulation_rounds_more_than_the_original_code(monkeypatch, dtype, window_size, largest):
    """Pins logits that were rounded to half precision, and came to 1.8 times the error of the original code.

    Two ways of rounding as much differ by a few percent; the original computes its gradients in float32.
    """
    module, hidden_states = attention_with_logits_up_to(largest, window_size)
    half, inputs = copy.deepcopy(module).to(dtype), hidden_states.to(dtype)
    exact = copy.deepcopy(half).double()
    expected = output_and_gradients(exact, partial(original_attention, exact), inputs.double())
    limits = errors(output_and_gradients(half, partial(original_attention, half), inputs), expected)
    exact.config._attn_implementation = "eager"
    assert max(errors(output_and_gradients(exact, exact, inputs.double()), expected).values()) < 1e-9
    for implementation, capabilities in CASES:
        monkeypatch.setattr(base, "EMULATED", [] if base.has_products(dtype, capabilities) else [dtype])
        half.config._attn_implementation = implementation
        for name, error in errors(output_and_gradients(half, half, inputs), expected).items():
            slack = 1.05 if name in ("inference", "output") else 1.15
            assert error < slack * limits[name], (implementation, capabilities, name, error, limits[name])


@pytest.mark.parametrize("is_emulated", [True, False])
@pytest.mark.parametrize("by_autocast", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "blockwise", "sdpa_masked"])
def test_nothing_is_emulated(monkeypatch, implementation, by_autocast, is_emulated):
    """Pins 100 s for a page in bfloat16 that takes 9 in float32, with autocast and without, and backward."""
    monkeypatch.setattr(base, "EMULATED", [torch.bfloat16] if is_emulated else [])
    torch.manual_seed(0)
    model = DeepSeekOCRVisionModel(tiny_config()).eval()
    model.set_attn_implementation({"sam_config": implementation, "clip_config": implementation})
    page = pixels(1, 128, 128)
    expected = model(page).last_hidden_state
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    half = copy.deepcopy(model) if by_autocast else copy.deepcopy(model).bfloat16()
    half.zero_grad()
    with ProductDtypes() as dtypes:
        with torch.autocast("cpu", torch.bfloat16, enabled=by_autocast):
            tokens = half(page).last_hidden_state
        tokens.float().square().mean().backward()
    assert (torch.bfloat16 not in dtypes.seen) is is_emulated
    assert tokens.dtype == (torch.float32 if by_autocast else torch.bfloat16)  # autocast adds up in float32
    assert (tokens - expected).norm() < 0.05 * expected.norm()
    for name, parameter in half.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        if name.endswith("weight"):
            assert (parameter.grad - gradients[name]).norm() < 0.2 * gradients[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_products_by_keyword_are_not_emulated_either(monkeypatch, dtype):
    """Pins adapters and registered attention that name a bias or a mask, which would stay in half precision."""
    monkeypatch.setattr(base, "EMULATED", [torch.bfloat16])
    tokens, weight = torch.randn(1, 2, 4, 4).bfloat16(), torch.randn(4, 4).bfloat16()
    mask = torch.tensor([[1, 0, 0, 0]] * 4).to(dtype)
    expected = F.scaled_dot_product_attention(
        tokens.float(), tokens.float(), tokens.float(), mask if dtype is torch.bool else mask.float()
    )
    with base.never_emulated(tokens), ProductDtypes() as dtypes:
        attended = F.scaled_dot_product_attention(tokens, key=tokens, value=tokens, attn_mask=mask)
        mapped = F.linear(input=tokens, weight=weight, bias=weight[0])
        mixed = F.linear(tokens, weight, bias=weight[0])
    assert torch.equal(attended, expected.bfloat16())
    assert torch.equal(mapped, mixed)
    assert mapped.dtype == torch.bfloat16
    assert torch.bfloat16 not in dtypes.seen


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_computes_again_is_not_emulated_either(monkeypatch, use_reentrant):
    """Pins layers that are computed again outside of the encoder's context, to tensors of another dtype."""
    monkeypatch.setattr(base, "EMULATED", [torch.bfloat16])
    torch.manual_seed(0)
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected")).bfloat16().train()
    page = pixels(1, 128, 128)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with ProductDtypes() as dtypes:
            model(page).last_hidden_state.float().square().mean().backward()
        assert torch.bfloat16 not in dtypes.seen
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(map(torch.equal, gradients(), expected))


def test_quantised_tensors_and_float64_are_left_alone(monkeypatch):
    """Pins weights that would lose their class, and gradients that would be rounded to float32 on their way."""
    monkeypatch.setattr(base, "EMULATED", [torch.bfloat16])

    class Quantised(torch.Tensor):
        """A tensor of another class."""

    tokens, layer = torch.ones(2, 4, dtype=torch.bfloat16), torch.nn.Linear(4, 4).bfloat16()
    with base.never_emulated(tokens), ProductDtypes() as dtypes:
        layer(tokens)
        assert dtypes.seen == {torch.float32}
        layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised))
        layer(tokens)
        assert dtypes.seen == {torch.float32, torch.bfloat16}
    layer, tokens = torch.nn.Linear(4, 4).double(), torch.randn(2, 4, dtype=torch.float64)
    expected = layer(tokens)
    with torch.autocast("cpu", torch.bfloat16), base.never_emulated(torch.ones(1)):
        assert torch.equal(layer(tokens), expected)


def test_in_half_precision_it_compiles_and_exports_in_one_graph(monkeypatch):
    """Pins a question to the processor inside a graph, and a compiled model that is emulated where ours is not."""
    monkeypatch.setattr(base, "EMULATED", [torch.bfloat16])
    model = DeepSeekOCRVisionModel(tiny_config()).bfloat16().eval()
    page = pixels(1, 128, 128).bfloat16()
    seen = []

    def record(graph, inputs):
        seen.extend(
            each.meta["example_value"].dtype
            for node in graph.graph.nodes
            if node.target in (F.linear, F.conv2d, F.scaled_dot_product_attention)
            for each in node.all_input_nodes
        )
        return graph.forward

    with torch.no_grad():
        expected = model(page).last_hidden_state
        compiled = torch.compile(model, backend=record, fullgraph=True)(page).last_hidden_state
        exported = torch.export.export(model, (page,)).module()(page).last_hidden_state
    assert not base._IN_GRAPHS or set(seen) == {torch.float32}
    for tokens in (compiled, exported):
        assert (tokens - expected).float().norm() < 0.05 * expected.float().norm()
