"""The gradient path: what reaches what, and what is kept for the way back."""

import pytest
import torch
from helpers import FEATURE_MODES, IMPLEMENTATIONS, TOLERANCE, pixels, relative_error, tiny_config
from torch import nn

from deepseek_ocr_vision import DeepSeekOCRVisionModel


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass while the context is open."""

    def __enter__(self):
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.total += tensor.nbytes
        return tensor

    def __exit__(self, *exception):
        self._hooks.__exit__(*exception)


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_gradcheck_from_pixels_to_tokens(feature_mode, attn_implementation):
    """Pins the derivative itself, against finite differences in double precision."""
    small_stages = {
        "sam_config": tiny_config().sam_config.to_dict() | {"hidden_size": 8, "mlp_dim": 8, "output_channels": 4},
        "clip_config": tiny_config().clip_config.to_dict() | {"intermediate_size": 8},
    }
    config = tiny_config(**small_stages, feature_mode=feature_mode, attn_implementation=attn_implementation)
    model = DeepSeekOCRVisionModel(config).double()
    pixel_values = pixels(1, 64, 64, dtype=torch.float64)
    patch = pixel_values[..., :2, :2].clone().requires_grad_()

    def tokens(patch: torch.Tensor) -> torch.Tensor:
        whole = pixel_values.clone()
        whole[..., :2, :2] = patch
        return model(whole).last_hidden_state

    assert torch.autograd.gradcheck(tokens, (patch,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
@pytest.mark.parametrize("side", [128, 192])
def test_every_parameter_gets_a_gradient_in_every_mode(feature_mode, side):
    """Pins that a mode creates no parameter that it does not use; DDP stops on one without a gradient."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    model(pixels(1, side, side)).last_hidden_state.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert without == []


def test_a_frozen_encoder_keeps_nothing_and_its_projector_trains(tiny_model):
    """Pins the commonest use: an ordinary tensor comes out, at no memory, and what is trained on it learns."""
    tiny_model.freeze()
    projector = nn.Linear(32, 8)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        with SavedBytes() as saved:
            tokens = tiny_model(pixels()).last_hidden_state
        assert saved.total == 0
        loss = (projector(tokens) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_the_count_of_saved_bytes_can_tell(tiny_model):
    """Pins the instrument of the tests around it: the same forward with trainable weights keeps a good deal."""
    with SavedBytes() as saved:
        tiny_model(pixels())
    assert saved.total > 100_000


def test_with_only_clip_trainable_sam_keeps_nothing(tiny_model):
    """Pins that SAM, four fifths of the work, costs no memory when it is frozen in front of a trained CLIP."""
    tiny_model.freeze("sam")
    with SavedBytes() as saved_by_sam:
        feature_map = tiny_model.sam_model(pixels())
    with SavedBytes() as saved_by_clip:
        tiny_model.vision_model(feature_map).last_hidden_state.sum().backward()
    assert saved_by_sam.total == 0
    assert saved_by_clip.total > 0


def test_a_gradient_passes_through_a_frozen_encoder_to_the_pixels(tiny_model):
    """Pins saliency, adversarial pages and trained renderers, which an outright `no_grad` breaks."""
    pixel_values = pixels().requires_grad_()
    tiny_model.freeze()(pixel_values).last_hidden_state.sum().backward()
    assert (pixel_values.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


@pytest.mark.parametrize("side", [128, 192])
def test_inference_mode_earlier_in_the_process_leaves_nothing_behind(tiny_model, side):
    """Pins that nothing is cached: a cached inference tensor breaks training with "cannot be saved for backward"."""
    with torch.inference_mode():
        tiny_model(pixels(1, side, side))
    tiny_model(pixels(1, side, side)).last_hidden_state.mean().backward()
    assert all(parameter.grad is not None for parameter in tiny_model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen", [(), ("sam.patch_embed",), ("sam",), ("sam.patch_embed", "sam.blocks.0")])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, use_reentrant, frozen):
    """Pins the first trainable layer above frozen ones, which reentrant checkpointing gives no gradient by itself."""
    tiny_model.freeze(*frozen) if frozen else tiny_model.unfreeze()

    def gradients() -> dict[str, torch.Tensor]:
        tiny_model.zero_grad()
        tiny_model(pixels()).last_hidden_state.square().mean().backward()
        return {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}

    expected = gradients()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients()
    assert actual.keys() == expected.keys()
    assert all(relative_error(actual[name], expected[name]) < 1e-5 for name in expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_runs_layers_again_and_keeps_less(tiny_model, use_reentrant):
    """Pins that checkpointing is at work at all in both stages, not merely switched on."""
    calls = []
    block, layer = tiny_model.sam_model.blocks[0].mlp, tiny_model.vision_model.transformer.layers[0].mlp
    block.register_forward_pre_hook(lambda *_: calls.append("sam"))
    layer.register_forward_pre_hook(lambda *_: calls.append("clip"))
    with SavedBytes() as saved_without:
        tiny_model(pixels())
    calls.clear()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with SavedBytes() as saved_with:
        output = tiny_model(pixels()).last_hidden_state
    output.sum().backward()
    assert sorted(calls) == ["clip", "clip", "sam", "sam"]
    assert saved_with.total < 0.6 * saved_without.total


def test_checkpointing_a_frozen_encoder_still_keeps_nothing(tiny_model):
    """Pins that making inputs require a gradient, for reentrant checkpointing, stops where nothing is trained."""
    tiny_model.freeze().gradient_checkpointing_enable({"use_reentrant": True})
    assert not tiny_model(pixels()).last_hidden_state.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_train(dtype):
    """Pins that pixels are cast to the weights' dtype and that all gradients come out finite in it."""
    model = DeepSeekOCRVisionModel(tiny_config())
    expected = model(pixels()).last_hidden_state
    model = model.to(dtype)
    output = model(pixels()).last_hidden_state
    output.float().square().mean().backward()
    assert output.dtype == dtype
    assert relative_error(output, expected) < TOLERANCE[dtype]
    assert all(p.grad.isfinite().all() and p.grad.count_nonzero() for p in model.parameters())


def test_autocast_trains_in_bfloat16(tiny_model):
    """Pins that float32 weights under autocast get float32 gradients and close outputs."""
    expected = tiny_model(pixels()).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model(pixels()).last_hidden_state
    output.float().square().mean().backward()
    assert relative_error(output, expected) < TOLERANCE[torch.bfloat16]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in tiny_model.parameters())


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_an_empty_batch_still_touches_every_parameter(tiny_model, attn_implementation):
    """Pins a process of a DDP run whose batch has no images: no gradient there makes the others wait for ever."""
    tiny_model.set_attn_implementation(attn_implementation)
    tokens = tiny_model(pixels(0)).last_hidden_state
    tokens.sum().backward()
    assert tokens.shape == (0, 4, 32)
    assert all(p.grad is not None and not p.grad.any() for p in tiny_model.parameters())


def test_a_new_model_learns():
    """Pins the initialisation: transformers' SAM configurations initialise weights to 1e-10, which never learn."""
    torch.manual_seed(0)
    defaults = {"initializer_range": 0.02}
    config = tiny_config(
        sam_config=tiny_config().sam_config.to_dict() | defaults,
        clip_config=tiny_config().clip_config.to_dict() | defaults,
    )
    model, head = DeepSeekOCRVisionModel(config), nn.Linear(32, 2)
    bright = torch.tensor([0, 1] * 8)
    stripes = torch.arange(128) // 8 % 2 * 2.0 - 1
    pages = pixels(16) + torch.where(bright.bool()[:, None, None], stripes[:, None], stripes)[:, None]
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(30):
        loss = nn.functional.cross_entropy(head(model(pages).pooler_output), bright)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.parametrize("sam", ["sdpa", "sdpa_masked", "eager"])
def test_the_encoder_can_be_differentiated_twice_with_clip_in_plain_steps(sam):
    """Pins gradient penalties on the pixels: what the docs say can be differentiated twice."""
    results = []
    for implementation in (sam, "eager"):
        torch.manual_seed(0)
        config = tiny_config(attn_implementation={"sam_config": implementation, "clip_config": "eager"})
        model = DeepSeekOCRVisionModel(config).double()
        pixel_values = pixels(dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(
            model(pixel_values).last_hidden_state.square().sum(), pixel_values, create_graph=True
        )
        results.append(torch.autograd.grad(gradient.square().sum(), [pixel_values, *model.parameters()]))
    for ours, theirs in zip(*results, strict=True):
        # The bias of the keys moves no output, so its gradient is rounding alone.
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * (1 + theirs.abs().max().item()))


def test_a_second_derivative_under_the_default_is_an_error_that_names_the_way_out(tiny_model):
    """Pins PyTorch's own message, which names a kernel that nobody has called."""
    pixel_values = pixels().requires_grad_()
    (gradient,) = torch.autograd.grad(
        tiny_model(pixel_values).last_hidden_state.sum(), pixel_values, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"set_attn_implementation\('eager'"):
        gradient.square().sum().backward()
