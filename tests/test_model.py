"""The model as a caller meets it: sizes, inputs, outputs, attention, precision, names."""

import numpy as np
import pytest
import torch
from helpers import EVERY_FEATURE_MODE, FEATURE_MODES, IMPLEMENTATIONS, TOLERANCE, pixels, relative_error, tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionModel


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 128), (192, 64), (64, 256), (320, 192)])
def test_any_multiples_of_64_give_one_token_a_square(feature_mode, height, width):
    """Pins rectangles, which the package `deepseek-ocr-encoder` 1.0.1 crashes on."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    outputs = model(pixels(2, height, width))
    tokens = (height // 64) * (width // 64)
    assert outputs.last_hidden_state.shape == (2, tokens, model.config.hidden_size)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state.mean(dim=1))


@pytest.mark.parametrize("feature_mode", ["residual", "concat"])
def test_a_rectangle_is_resized_an_axis_at_a_time(feature_mode):
    """Pins height and width not being mixed up: a transposed page under transposed tables gives transposed tokens."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).double()
    mirrored = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).double()
    mirrored.load_state_dict(model.state_dict())
    with torch.no_grad():
        for convolution in (module for module in mirrored.modules() if isinstance(module, torch.nn.Conv2d)):
            convolution.weight.copy_(convolution.weight.transpose(2, 3).clone())
        sam, clip = mirrored.sam_model, mirrored.vision_model
        sam.pos_embed.copy_(sam.pos_embed.transpose(1, 2).clone())
        for block in sam.blocks:
            rows = block.attn.rel_pos_h.clone()
            block.attn.rel_pos_h.copy_(block.attn.rel_pos_w)
            block.attn.rel_pos_w.copy_(rows)
        table = clip.embeddings.position_embedding.weight
        table[1:] = table[1:].unflatten(0, (2, 2)).transpose(0, 1).flatten(0, 1).clone()
        page = pixels(1, 128, 256, dtype=torch.float64)
        tokens = model(page).last_hidden_state.unflatten(1, (2, 4))
        mirrored_tokens = mirrored(page.transpose(2, 3)).last_hidden_state.unflatten(1, (4, 2))
    assert relative_error(mirrored_tokens.transpose(1, 2), tokens) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(100, 128, "128 x 128"), (128, 1000, "128 x 1024"), (63, 64, "64 x 64"), (8, 8, "64 x 64"), (0, 64, "64 x 64")],
)
def test_a_size_that_is_no_multiple_of_64_is_an_error_with_the_nearest_that_is(tiny_model, height, width, nearest):
    """Pins that pixels are not cropped by a strided convolution in silence."""
    with pytest.raises(ValueError, match=f"{height} x {width} pixels.*nearest size is {nearest}"):
        tiny_model(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    "shape", [(1, 1, 64, 64), (1, 2, 64, 64), (1, 4, 64, 64), (1, 5, 64, 64), (3, 64, 64), (1, 1, 3, 64, 64)]
)
def test_a_wrong_shape_of_pixels_is_an_error_with_both_shapes(tiny_model, shape):
    """Pins that a missing batch dimension or an alpha channel is named, not met as an error deep in a convolution."""
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\], got " + str(list(shape)).replace("[", r"\[")):
        tiny_model(torch.zeros(shape))


@pytest.mark.parametrize("pixel_values", [np.zeros((1, 3, 64, 64), dtype=np.float32), None, [[0.0]]])
def test_pixels_that_are_no_tensor_are_an_error(tiny_model, pixel_values):
    """Pins numpy arrays from a processor called without `return_tensors="pt"`."""
    with pytest.raises(TypeError, match=f"torch.Tensor, got a {type(pixel_values).__name__}"):
        tiny_model(pixel_values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_pixels_are_an_error(tiny_model, dtype):
    """Pins raw images fed without normalisation, which would be computed on as if they were normalised."""
    with pytest.raises(TypeError, match=str(dtype)):
        tiny_model(torch.zeros(1, 3, 64, 64, dtype=dtype))


@pytest.mark.parametrize("layout", [torch.sparse_coo, "nested"])
def test_pixels_that_are_not_dense_are_an_error(tiny_model, layout):
    """Pins an error of a convolution's, about a kernel that does not exist."""
    pixel_values = torch.nested.nested_tensor([*pixels()]) if layout == "nested" else pixels().to_sparse()
    with pytest.raises(TypeError, match=f"`pixel_values` has to be a dense tensor, got .*{layout}"):
        tiny_model(pixel_values)


def test_pixels_without_values_are_an_error_and_so_is_a_model_without_weights(tiny_model):
    """Pins the meta device, on which half of a computation ends in an error about devices."""
    with pytest.raises(ValueError, match="`pixel_values` is on meta and the model on cpu"):
        tiny_model(pixels().to("meta"))
    with pytest.raises(ValueError, match="`pixel_values` is on cpu and the model on meta"):
        tiny_model.to("meta")(pixels())


@pytest.mark.parametrize("stage", ["sam_model", "vision_model"])
@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_stages_may_be_of_different_precision(feature_mode, stage):
    """Pins SAM in float32 in front of CLIP in bfloat16: each casts what it is given."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    expected = model(pixels()).last_hidden_state
    getattr(model, stage).to(torch.bfloat16)
    outputs = model(pixels()).last_hidden_state
    outputs.sum().backward()
    assert outputs.dtype == torch.float32
    assert relative_error(outputs, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_pixels_of_another_float_dtype_are_cast_to_the_weights(tiny_model, dtype):
    """Pins that a processor's dtype need not be the model's."""
    assert tiny_model(pixels(dtype=dtype)).last_hidden_state.dtype == torch.float32


def test_dtype_follows_the_weights_after_construction(tiny_model):
    """Pins `.to()`, which `deepseek-ocr-encoder` does not follow, keeping a dtype and a device of its own."""
    assert tiny_model.to(torch.bfloat16)(pixels()).last_hidden_state.dtype == torch.bfloat16
    assert tiny_model.double()(pixels()).last_hidden_state.dtype == torch.float64
    assert tiny_model.to("meta")(pixels().to("meta")).last_hidden_state.device.type == "meta"


def test_channels_last_pixels_give_the_same_tokens(tiny_model):
    """Pins the memory format that people use for convolutions, in pixels and in weights."""
    expected = tiny_model(pixels()).last_hidden_state
    channels_last = pixels().to(memory_format=torch.channels_last)
    assert relative_error(tiny_model(channels_last).last_hidden_state, expected) < 1e-5
    tiny_model.to(memory_format=torch.channels_last)
    assert relative_error(tiny_model(channels_last).last_hidden_state, expected) < 1e-5


def test_train_and_eval_compute_the_same(tiny_model):
    """Pins that there is no dropout: a frozen encoder in a training composite gives what it gives alone."""
    expected = tiny_model.train()(pixels()).last_hidden_state
    assert torch.equal(tiny_model.eval()(pixels()).last_hidden_state, expected)


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_a_row_alone_equals_the_row_in_its_batch(feature_mode):
    """Pins that images do not look at each other."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    batch = pixels(3, 192, 128)
    together = model(batch).last_hidden_state
    for row in range(3):
        assert relative_error(model(batch[row : row + 1]).last_hidden_state, together[row : row + 1]) < 1e-5


def test_a_row_of_nan_does_not_reach_the_other_rows(tiny_model):
    """Pins faults in one image staying in it."""
    batch = pixels(2)
    expected = tiny_model(batch).last_hidden_state[0]
    batch[1, 0, 5, 5] = float("nan")
    outputs = tiny_model(batch).last_hidden_state
    assert relative_error(outputs[0], expected) < 1e-5
    assert outputs[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_all_implementations_agree(feature_mode, dtype):
    """Pins that any of them may be chosen, and that a choice after construction is followed."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode, attn_implementation="eager")).to(dtype)
    eager = model(pixels()).last_hidden_state
    for name in IMPLEMENTATIONS:
        model.set_attn_implementation(name)
        assert relative_error(model(pixels()).last_hidden_state, eager) < TOLERANCE[dtype], name


@pytest.mark.parametrize("stage", ["sam_config", "clip_config"])
def test_a_change_of_attention_after_construction_reaches_each_stage(tiny_model, stage):
    """Pins a fault of transformers' Unlimited-OCR: its SAM chooses a class once and ignores the change."""
    from transformers import AttentionInterface

    calls = []

    def counting(module, query, key, value, attention_mask, *, scaling, **_):
        calls.append(query.shape)
        weights = (
            query @ key.transpose(-2, -1) * scaling + (0 if attention_mask is None else attention_mask)
        ).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("counting", counting)
    expected = tiny_model(pixels()).last_hidden_state
    getattr(tiny_model.config, stage)._attn_implementation = "counting"
    assert relative_error(tiny_model(pixels()).last_hidden_state, expected) < 1e-4
    assert len(calls) == 2


def test_stages_can_attend_differently():
    """Pins the dictionary form of `attn_implementation`."""
    implementations = {"sam_config": "sdpa", "clip_config": "eager"}
    model = DeepSeekOCRVisionModel(tiny_config(attn_implementation=implementations))
    assert model.sam_model.config._attn_implementation == "sdpa"
    assert model(pixels(), output_attentions=True).attentions[0].shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_attention_that_cannot_be_used_is_an_error(tiny_model, name):
    """Pins that nothing falls back to another kernel in silence."""
    with pytest.raises((ValueError, ImportError)):
        tiny_model.set_attn_implementation(name)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("feature_mode", "keys"), [("residual", 4), ("concat", 5), ("projected", 5)])
def test_attention_weights_come_when_asked_for(feature_mode, keys, attn_implementation):
    """Pins their shape, one a CLIP layer, that each row is a distribution, and that SDPA does not give `None`."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode, attn_implementation=attn_implementation))
    outputs = model(pixels(), output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, keys, keys)] * 2
    assert all(torch.allclose(weights.sum(-1), torch.ones(2, 4, keys)) for weights in outputs.attentions)
    assert relative_error(outputs.last_hidden_state, model(pixels()).last_hidden_state) < 1e-5


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
@pytest.mark.parametrize("wanted", [True, 1, 0, -1])
def test_hidden_states_end_in_the_tokens_and_may_be_asked_for_by_index(feature_mode, wanted):
    """Pins LLaVA in transformers 5, which passes a layer's index; index 0 is not a no. And no state is a mere copy."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    outputs = model(pixels(), output_hidden_states=wanted)
    assert len(outputs.hidden_states) == model.config.clip_config.num_hidden_layers + 1
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    with_class_token = 4 if feature_mode == "residual" else 5
    assert all(states.shape == (2, with_class_token, 32) for states in outputs.hidden_states[:-1])
    outputs.hidden_states[0].retain_grad()
    outputs.last_hidden_state.sum().backward()
    assert outputs.hidden_states[0].grad.count_nonzero() > 0


@pytest.mark.parametrize("wanted", [None, False])
def test_hidden_states_stay_away_unless_asked_for(tiny_model, wanted):
    """Pins the memory that they would keep."""
    assert tiny_model(pixels(), output_hidden_states=wanted).hidden_states is None


def test_outputs_can_be_chosen_in_the_config(tiny_model):
    """Pins `config.output_hidden_states` and its like, which pipelines and composites set."""
    tiny_model.set_attn_implementation("eager")
    tiny_model.config.output_hidden_states = True
    tiny_model.config.output_attentions = True
    outputs = tiny_model(pixels())
    assert len(outputs.hidden_states) == 3
    assert len(outputs.attentions) == 2
    tiny_model.config.return_dict = False
    assert isinstance(tiny_model(pixels()), tuple)


def test_tuples_and_objects_hold_the_same(tiny_model):
    """Pins `return_dict=False`."""
    tiny_model.set_attn_implementation("eager")
    switches = {"output_hidden_states": True, "output_attentions": True}
    as_object = tiny_model(pixels(), **switches).to_tuple()
    as_tuple = tiny_model(pixels(), **switches, return_dict=False)
    assert torch.equal(as_tuple[0], as_object[0])
    assert torch.equal(as_tuple[1], as_object[1])
    assert [len(part) for part in as_tuple[2:]] == [len(part) for part in as_object[2:]] == [3, 2]


def test_transformers_finds_what_it_looks_for(tiny_model):
    """Pins the attributes by which transformers, accelerate and peft handle a model."""
    assert tiny_model.main_input_name == "pixel_values"
    assert tiny_model.get_input_embeddings() is tiny_model.sam_model.patch_embed.proj
    assert tiny_model.base_model_prefix == "model"
    names = {type(module).__name__ for module in tiny_model.modules()}
    assert set(tiny_model._no_split_modules) <= names
    replacement = torch.nn.Conv2d(3, 32, 16, 16)
    tiny_model.set_input_embeddings(replacement)
    assert tiny_model.get_input_embeddings() is replacement


def test_parameters_are_contiguous(tiny_model):
    """Pins that safetensors takes them as they are."""
    assert all(parameter.is_contiguous() for parameter in tiny_model.parameters())


def test_the_model_refuses_a_config_made_invalid_after_it_was_built():
    """Pins assignments to a config, which nothing validates when they happen."""
    config = tiny_config()
    config.feature_mode = "both"
    with pytest.raises(ValueError, match="feature_mode"):
        DeepSeekOCRVisionModel(config)


def test_exported_it_gives_the_same_tokens(tiny_model):
    """Pins `torch.export`."""
    program = torch.export.export(tiny_model.eval(), (pixels(),))
    assert relative_error(program.module()(pixels()).last_hidden_state, tiny_model(pixels()).last_hidden_state) < 1e-5
