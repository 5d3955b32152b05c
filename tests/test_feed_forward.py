"""The MLP of a layer: the same numbers whatever is kept of it, and no more kept than what goes into its activation."""

import pytest
import torch
from helpers import pixels, relative_error, tiny_config
from torch import nn

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling import base_deepseek_ocr_vision as base


WIDTH, HIDDEN_WIDTH, NUM_TOKENS = 8, 32, 10


class QuickGELU(nn.Module):
    """Keeps two tensors for its backward pass."""

    def forward(self, hidden_layer: torch.Tensor) -> torch.Tensor:
        return hidden_layer * torch.sigmoid(1.702 * hidden_layer)


def make_mlp(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    activation = nn.Sequential(QuickGELU(), nn.Dropout(dropout))
    mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN_WIDTH), activation, nn.Linear(HIDDEN_WIDTH, WIDTH))
    return mlp.double()


def make_tokens() -> torch.Tensor:
    return torch.randn(2, NUM_TOKENS // 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def output_and_gradients(mlp: nn.Sequential, compute) -> list[torch.Tensor]:
    tokens = make_tokens().requires_grad_()
    torch.manual_seed(2)
    output = compute(tokens)
    torch.rand(1)  # what is random on the way back must not depend on what came after
    return [output, *torch.autograd.grad(output.square().sum(), [tokens, *mlp.parameters()])]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_is_the_plain_mlp_with_its_gradients(dropout):
    """Pins an activation that is computed again otherwise than the first time, dropped values included, which an
    adapter or an activation may have.
    """
    mlp = make_mlp(dropout=dropout)
    expected = output_and_gradients(mlp, mlp)
    actual = output_and_gradients(mlp, lambda tokens: base.feed_forward(tokens, *mlp))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", ["nothing", "both", "second"])
def test_the_hidden_layer_is_kept_once(frozen):
    """Pins the activation's output, and its own intermediate results, which would take twice as much again."""
    mlp = make_mlp()
    expand, activation, contract = mlp
    contract.requires_grad_(frozen == "nothing")
    expand.requires_grad_(frozen != "both")
    tokens = make_tokens().requires_grad_()
    kept = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == NUM_TOKENS * HIDDEN_WIDTH:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = base.feed_forward(tokens, expand, activation, contract)
    assert len(kept) == 1
    output.sum().backward()
    assert tokens.grad is not None


def test_in_pieces_it_is_the_same(monkeypatch):
    """Pins the pieces that a pass without gradients is cut into, whatever their size, and that a kept one is whole."""
    model = DeepSeekOCRVisionModel(tiny_config())
    expected = model(pixels()).last_hidden_state
    assert expected.requires_grad
    for size in (1, 50, 64, 1000):
        monkeypatch.setattr(base, "PIECE_TOKENS", size)
        with torch.no_grad():
            assert relative_error(model(pixels()).last_hidden_state, expected) < 1e-5
            assert model(pixels(1)[:0]).last_hidden_state.shape == (0, 4, 32)


def test_it_can_be_differentiated_twice():
    """Pins gradient penalties, for which the activation is computed again twice."""
    mlp = make_mlp()
    tokens = make_tokens().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda tokens: base.feed_forward(tokens, *mlp), tokens)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_gradients_of_each_image_by_torch_func(attn_implementation):
    """Pins `torch.func.grad` and `vmap`, under which nothing can be computed again, by the default attention too."""
    model = DeepSeekOCRVisionModel(tiny_config())
    model.set_attn_implementation(attn_implementation)
    parameters = dict(model.named_parameters())
    page = pixels(2)

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(model, parameters, (image[None],))
        return outputs.last_hidden_state.square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, page)
    for index in range(2):
        expected = torch.autograd.grad(loss(parameters, page[index]), list(parameters.values()))
        for name, theirs in zip(parameters, expected, strict=True):
            assert relative_error(gradients[name][index], theirs) < 1e-4, name


@pytest.mark.parametrize("enabled", [False, True])
def test_several_models_at_once_by_torch_func(enabled):
    """Pins `vmap` over stacked weights: tokens are of one model when they come in, and of all of them later."""
    model = DeepSeekOCRVisionModel(tiny_config())
    stacked = {name: torch.stack([weight, weight / 2]) for name, weight in model.named_parameters()}
    page = pixels()

    def tokens_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (page,)).last_hidden_state

    with torch.set_grad_enabled(enabled):
        tokens = torch.func.vmap(tokens_of)(stacked)
        assert relative_error(tokens[0], model(page).last_hidden_state) < 1e-5
    assert relative_error(tokens[1], tokens[0]) > 0.1
