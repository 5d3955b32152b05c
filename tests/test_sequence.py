"""Tiles in the model, and the sequence of tokens that the released decoder reads."""

import copy

import pytest
import torch
from helpers import (
    EVERY_FEATURE_MODE,
    FEATURE_MODES,
    GRADIENT_TOLERANCE,
    TOLERANCE,
    assert_same_weights,
    pixels,
    relative_error,
    released_tensors,
    tiny_config,
    write_checkpoint,
)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel


FP32 = TOLERANCE[torch.float32]
IMAGE_TOKEN = 31
# Three images: 2 columns x 3 rows of tiles, none, and 2 columns x 1 row.
TILES = {"num_local_patches": [6, 0, 2], "patches_grid": [[2, 3], [1, 1], [2, 1]]}


def inputs(*, dtype: torch.dtype = torch.float32) -> dict:
    """Three pages of 2 x 2 tokens, and eight tiles of 2 x 2 tokens in a size of their own."""
    tiles = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"pixel_values": pixels(3, dtype=dtype), "pixel_values_local": tiles} | TILES


def model_of(feature_mode: str = "sequence", **fields) -> DeepSeekOCRVisionModel:
    return DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode, **fields))


# The order of the tokens


def test_the_sequence_is_an_image_s_rows_with_a_newline_each_and_a_separator_at_the_end():
    """Pins every place in the released sequence of a page: 2 x 3 + 1 tokens."""
    model = model_of()
    projected = model_of("projected")
    projected.load_state_dict(model.state_dict(), strict=False)
    page = projected(pixels()).last_hidden_state
    newline, separator = model.image_newline.expand(2, 1, 48), model.view_seperator.expand(2, 1, 48)
    expected = torch.cat([page[:, :2], newline, page[:, 2:], newline, separator], dim=1)
    outputs = model(pixels())
    assert torch.equal(outputs.last_hidden_state, expected)
    assert outputs.attention_mask is None
    assert model_of()(pixels(1, 192, 128)).last_hidden_state.shape == (1, 3 * 3 + 1, 48)


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_tiles_come_first_in_reading_order_over_their_whole_grid(feature_mode):
    """Pins tiles that follow each other one by one, where a row of text would go through several of them."""
    model = model_of(feature_mode).eval()
    batch = inputs()
    outputs = model(**batch)
    tiles = model(batch["pixel_values_local"]).last_hidden_state.unflatten(1, (2, 2))  # [8, 2, 2, C]
    pages = model(batch["pixel_values"]).last_hidden_state  # [3, 4, C]
    rows = [torch.cat([tiles[row], tiles[row + 1]], dim=1) for row in (0, 2, 4)]  # [2, 4, C] each
    expected = torch.cat([*(part.flatten(0, 1) for part in rows), pages[0]])
    assert relative_error(outputs.last_hidden_state[0], expected) < 1e-5
    last = torch.cat([torch.cat([tiles[6], tiles[7]], dim=1).flatten(0, 1), pages[2]])
    assert relative_error(outputs.last_hidden_state[2, :12], last) < 1e-5
    assert relative_error(outputs.last_hidden_state[1, :4], pages[1]) < 1e-5
    assert outputs.attention_mask.sum(dim=1).tolist() == [28, 4, 12]
    assert not outputs.last_hidden_state[~outputs.attention_mask].any()
    assert relative_error(outputs.pooler_output[1], pages[1].mean(dim=0)) < 1e-5


def oracle_of(model: DeepSeekOCRVisionModel):
    """Unlimited-OCR around copies of a model's weights."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="this transformers has no Unlimited-OCR")
    from test_oracles import oracle_of as tower_of
    from transformers import UnlimitedOcrConfig, UnlimitedOcrModel

    concat = model_of("concat").to(model.dtype)
    concat.load_state_dict(model.state_dict(), strict=False)
    tower = tower_of(concat)
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 200, "n_routed_experts": 4, "moe_intermediate_size": 16}
    oracle = UnlimitedOcrModel(UnlimitedOcrConfig(vision_config=tower.config, text_config=text, image_token_id=199))
    oracle.vision_tower = tower
    oracle.multi_modal_projector = copy.deepcopy(model.projector.layers)
    oracle.image_newline = copy.deepcopy(model.image_newline)
    oracle.view_separator = copy.deepcopy(model.view_seperator)
    return oracle


def test_the_sequence_is_that_of_unlimited_ocr_and_so_are_its_gradients():
    """Pins the whole assembly against transformers' own, tiles and all: to the pixels and to both special tokens."""
    model = model_of()
    oracle = oracle_of(model)
    special_tokens = {"image_newline": "image_newline", "view_seperator": "view_separator"}
    results = []
    for module in (model, oracle):
        batch = inputs()
        for name in ("pixel_values", "pixel_values_local"):
            batch[name].requires_grad_()
        if module is model:
            outputs = model(**batch)
            rows = [row[mask] for row, mask in zip(outputs.last_hidden_state, outputs.attention_mask, strict=True)]
        else:
            rows = oracle.get_image_features(**batch, return_dict=True).pooler_output
        weighting = torch.Generator().manual_seed(2)
        sum((row * torch.randn(row.shape, generator=weighting)).mean() for row in rows).backward()
        gradients = [batch["pixel_values"].grad, batch["pixel_values_local"].grad]
        gradients += [getattr(module, names[module is oracle]).grad for names in special_tokens.items()]
        gradients += [(module.projector.layers if module is model else module.multi_modal_projector).weight.grad]
        results.append((rows, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert [len(row) for row in ours] == [6 * 5 + 7, 7, 2 * 5 + 7]
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual.detach(), expected.detach()) < FP32
    for actual, expected in zip(our_gradients, their_gradients, strict=True):
        assert (actual - expected).norm() / expected.norm() < GRADIENT_TOLERANCE


# Batches


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_every_parameter_gets_a_gradient_with_tiles(feature_mode):
    """Pins a special token or a part that a mode has and does not use."""
    model = model_of(feature_mode)
    outputs = model(**inputs())
    (outputs.last_hidden_state * torch.randn_like(outputs.last_hidden_state)).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def passes(model: DeepSeekOCRVisionModel, batch: dict) -> list[str]:
    """The order in which a forward and a backward pass come by the blocks."""
    visited = []
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            module.register_forward_hook(lambda *_, name=name: visited.append(f"forward {name}"))
            module.register_full_backward_pre_hook(lambda *_, name=name: visited.append(f"backward {name}"))
    model(**batch).last_hidden_state.sum().backward()
    return visited


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_batches_with_many_few_and_no_tiles_and_no_images_take_the_same_way(feature_mode):
    """Pins processes that share weights: each waits at each block for the others, forward and backward."""
    batches = [inputs() for _ in range(4)]
    batches[1] = {name: value[1:2] for name, value in batches[1].items()} | {
        "pixel_values_local": torch.zeros(0, 3, 64, 64)
    }
    batches[2] = {name: value[1:] for name, value in batches[2].items()}
    batches[2]["pixel_values_local"] = batches[2]["pixel_values_local"][:2]
    batches[3] = {name: value[:0] for name, value in batches[3].items()}
    ways = [passes(model_of(feature_mode), batch) for batch in batches]
    assert ways[0] == ways[1] == ways[2] == ways[3]
    assert len(ways[0]) == 2 * 2 * 4


def test_an_empty_batch_of_tiles_touches_the_weights_and_adds_nothing():
    """Pins a process without tiles: tokens and gradients are those of the pages alone."""
    model = model_of()
    expected = model(pixels()).last_hidden_state
    expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    empty = {"pixel_values_local": pixels(1)[:0], "num_local_patches": [0, 0], "patches_grid": [[1, 1], [1, 1]]}
    outputs = model(pixels(), **empty)
    outputs.last_hidden_state.sum().backward()
    assert torch.equal(outputs.last_hidden_state, expected)
    assert outputs.attention_mask.all()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_all_pages_are_encoded_in_one_pass_and_all_tiles_in_another():
    """Pins a loop over images, which would leave the accelerator idle."""
    model = model_of()
    shapes = []
    model.sam_model.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    model(**inputs())
    assert shapes == [(3, 3, 128, 128), (8, 3, 128, 128)]


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_an_image_alone_equals_the_image_in_its_batch(feature_mode):
    """Pins tiles of one image in the tokens of another."""
    model = model_of(feature_mode).eval()
    batch, start = inputs(), 0
    outputs = model(**batch)
    for index, count in enumerate(TILES["num_local_patches"]):
        alone = model(
            batch["pixel_values"][index : index + 1],
            pixel_values_local=batch["pixel_values_local"][start : start + count],
            num_local_patches=torch.tensor([count]),
            patches_grid=torch.tensor(TILES["patches_grid"][index])[None],
        )
        tokens = outputs.last_hidden_state[index][outputs.attention_mask[index]]
        assert relative_error(alone.last_hidden_state[0], tokens) < 1e-5
        assert relative_error(alone.pooler_output[0], outputs.pooler_output[index]) < 1e-5
        start += count


@pytest.mark.parametrize("wanted", [True, -1])
def test_hidden_states_and_attention_come_for_pages_and_tiles(wanted):
    """Pins the last hidden state in its place, and Unlimited-OCR's names for what is the tiles'."""
    outputs = model_of()(**inputs(), output_hidden_states=wanted, output_attentions=True)
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    assert [state.shape for state in outputs.hidden_states[:-1]] == [(3, 5, 32)] * 2
    assert [state.shape for state in outputs.local_hidden_states] == [(8, 5, 32)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(3, 4, 5, 5)] * 2
    assert [weights.shape for weights in outputs.local_attentions] == [(8, 4, 5, 5)] * 2
    plain = model_of()(**inputs(), return_dict=False)
    assert [value.shape for value in plain] == [(3, 37, 48), (3, 48), (3, 37)]


def test_under_autocast_the_special_tokens_are_of_the_tokens_dtype():
    """Pins mixed precision: concatenated with float32 special tokens, all tokens would come out in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model_of()(**inputs()).last_hidden_state.dtype == torch.bfloat16
    model = model_of().double()
    assert model(**inputs()).last_hidden_state.dtype == torch.float64
    assert model.to("meta")(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs().items()})


# What is wrong with a caller's tiles


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pixel_values_local": torch.zeros(8, 3, 100, 64)}, ValueError, "`pixel_values_local` is 100 x 64 pixels"),
        ({"pixel_values_local": torch.zeros(8, 1, 64, 64)}, ValueError, r"`pixel_values_local` .*\[8, 1, 64, 64\]"),
        ({"pixel_values_local": torch.zeros(2, 4, 3, 64, 64)}, ValueError, r"got \[2, 4, 3, 64, 64\]"),
        ({"pixel_values_local": torch.zeros(8, 3, 64, 64).byte()}, TypeError, "`pixel_values_local` .*uint8"),
        ({"pixel_values_local": [torch.zeros(3, 64, 64)] * 8}, TypeError, "`pixel_values_local` .* got a list"),
        ({"pixel_values_local": torch.zeros(7, 3, 64, 64)}, ValueError, "adds up to 8, but .* has 7 tiles"),
        ({"pixel_values_local": None}, ValueError, "but there are no `pixel_values_local`"),
        ({"num_local_patches": None}, TypeError, "`num_local_patches` is None"),
        ({"patches_grid": None}, TypeError, "`patches_grid` is None"),
        ({"num_local_patches": [6, 2]}, ValueError, "`num_local_patches` has 2 entries for 3 images"),
        ({"patches_grid": [[2, 3]]}, ValueError, "`patches_grid` has 1 entries for 3 images"),
        ({"num_local_patches": [6, -1, 3]}, ValueError, r"num_local_patches\[1\]` is -1"),
        ({"num_local_patches": [6.0, 0, 2]}, TypeError, "`num_local_patches` .* has to hold integers"),
        ({"num_local_patches": torch.tensor(8)}, TypeError, "`num_local_patches` is tensor"),
        ({"patches_grid": [[4, 2], [1, 1], [2, 1]]}, ValueError, r"patches_grid\[0\]` is \[4, 2\] and .* is 6"),
        ({"patches_grid": [[-2, -3], [1, 1], [2, 1]]}, ValueError, r"patches_grid\[0\]` is \[-2, -3\]"),
        ({"patches_grid": [[6], [1, 1], [2, 1]]}, ValueError, r"patches_grid\[0\]` is \[6\]"),
        ({"patches_grid": [6, 1, 2]}, TypeError, r"`patches_grid\[0\]` is 6"),
    ],
)
def test_tiles_that_do_not_fit_are_an_error_before_anything_is_computed(changed, error, message):
    """Pins an image's tiles counted to the next one: the numbers would add up, and the tokens be wrong."""
    model = model_of()
    model.sam_model.register_forward_pre_hook(lambda *_: pytest.fail("pages were encoded"))
    with pytest.raises(error, match=message):
        model(**inputs() | changed)


def test_what_unlimited_ocr_s_processor_gives_without_tiles_is_taken():
    """Pins a batch of small images, for which that one leaves `pixel_values_local` out."""
    model = model_of()
    outputs = model(pixels(), num_local_patches=[0, 0], patches_grid=[[1, 1], [1, 1]])
    assert torch.equal(outputs.last_hidden_state, model(pixels()).last_hidden_state)


# Weights


def test_the_special_tokens_come_from_a_released_checkpoint_and_go_back_into_one(tmp_path):
    """Pins their spelling, and that a trained special token is written where the released model reads it."""
    model = model_of()
    base = write_checkpoint(tmp_path / "base", released_tensors(model), model.config, num_shards=2)
    loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(base, feature_mode="sequence")
    assert_same_weights(loaded, model)
    with torch.no_grad():
        loaded.image_newline += 1
        loaded.view_seperator -= 1
    loaded.write_deepseek_ocr(base, tmp_path / "out")
    tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    assert torch.equal(tensors["model.image_newline"], model.image_newline + 1)
    assert torch.equal(tensors["model.view_seperator"], model.view_seperator - 1)


def test_a_checkpoint_without_special_tokens_is_an_error_that_names_them(tmp_path):
    """Pins random special tokens under a mere warning."""
    model_of("projected").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 tensors are missing: image_newline, view_seperator"):
        DeepSeekOCRVisionModel.from_pretrained(tmp_path, feature_mode="sequence")
    with pytest.raises(ValueError, match="2 tensors are missing: image_newline, view_seperator"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path, feature_mode="sequence")


def test_unlimited_ocr_s_own_spelling_of_the_separator_is_read(tmp_path):
    """Pins what transformers saves of Unlimited-OCR: `view_separator`."""
    model = model_of()
    tensors = released_tensors(model)
    tensors["model.view_separator"] = tensors.pop("model.view_seperator")
    base = write_checkpoint(tmp_path, tensors, model.config)
    assert_same_weights(DeepSeekOCRVisionModel.from_deepseek_ocr(base, feature_mode="sequence"), model)


def test_a_saved_model_loads_bit_for_bit_and_other_modes_take_what_they_need(tmp_path):
    """Pins the special tokens in a folder of ours."""
    model = model_of().eval()
    model.save_pretrained(tmp_path)
    loaded = DeepSeekOCRVisionModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert torch.equal(loaded(**inputs()).last_hidden_state, model(**inputs()).last_hidden_state)
    poorer = DeepSeekOCRVisionModel.from_pretrained(tmp_path, feature_mode="projected")
    assert not hasattr(poorer, "image_newline")


def test_new_special_tokens_are_initialised_and_a_seed_gives_the_same_ones():
    """Pins special tokens that stay zero, and so equal: a newline that is no other token than the separator."""
    torch.manual_seed(3)
    model = model_of()
    torch.manual_seed(3)
    assert_same_weights(model_of(), model)
    assert model.image_newline.std().item() == pytest.approx(0.1, rel=0.4)
    assert not torch.equal(model.image_newline, model.view_seperator)


# Where it is used


def test_compiled_and_exported_the_sequence_of_pages_is_the_same():
    """Pins both for the path without tiles."""
    model = model_of().eval()
    expected = model(pixels()).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(pixels()).last_hidden_state, expected) < 1e-5
    program = torch.export.export(model, (pixels(),))
    assert relative_error(program.module()(pixels()).last_hidden_state, expected) < 1e-5


def test_llava_takes_the_sequence_in_place_of_its_placeholders():
    """Pins the released tokens in front of another language model, special tokens trained with the rest."""
    text_config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    config = LlavaConfig(
        vision_config=tiny_config(feature_mode="sequence"),
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    count = DeepSeekOCRVisionImageProcessor(size=128).num_image_tokens(50, 70, feature_mode="sequence")
    input_ids = torch.tensor([1] + [IMAGE_TOKEN] * count + [5, 6]).repeat(2, 1)
    model(input_ids=input_ids, pixel_values=pixels(), labels=input_ids).loss.backward()
    tower = model.model.vision_tower
    assert tower.image_newline.grad.any()
    assert tower.view_seperator.grad.any()
    assert tower.sam_model.pos_embed.grad.any()
