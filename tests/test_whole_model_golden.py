"""The whole DeepSeek-OCR, our encoder inside, against every number that DeepSeek's own code gave (WHOLE_MODEL.md)."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import GOLDEN, needs_golden
from safetensors.torch import load_file
from whole_model import golden_whole_model

from deepseek_ocr_vision.composites.deepseek_ocr_weights import released_views


pytestmark = needs_golden

# Relative to the largest value. Looser ones no longer tell a model with the load-balancing loss from one without it.
TOLERANCE = 1e-5
HEAD_TOLERANCE = 1e-4

ENCODER = ("sam", "clip", "projector", "sequence")
IMAGE_TOKEN, PADDING = 1000, 2
NUM_PARAMETERS = 556  # of which CLIP's patch embedding is used by nothing


@dataclass(frozen=True)
class Case:
    """Inputs of WHOLE_MODEL.md: rows of ids, and the images' and tiles' pixels."""

    rows: list[list[int]]
    pages: tuple[int, int] | None = None
    tiles: tuple[int, int] | None = None
    patches_grid: tuple[int, int] = (1, 1)

    def inputs(self) -> dict:
        length = max(map(len, self.rows))
        input_ids = torch.tensor([row + [PADDING] * (length - len(row)) for row in self.rows])
        inputs = {"input_ids": input_ids}
        inputs["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in self.rows])
        if self.pages:
            inputs["pixel_values"] = pixels(*self.pages)
        if self.tiles:
            inputs["pixel_values_local"] = pixels(*self.tiles)
            inputs |= {"num_local_patches": [self.tiles[0]], "patches_grid": [list(self.patches_grid)]}
        return inputs


def text(seed: int, length: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(seed)).integers(3, 1000, size=length, dtype=np.int64).tolist()


def pixels(batch: int, side: int) -> torch.Tensor:
    generator = np.random.Generator(np.random.PCG64(side))
    return torch.from_numpy(generator.standard_normal((batch, 3, side, side), dtype=np.float32))


def images(length: int) -> list[int]:
    return [IMAGE_TOKEN] * length


CASES = {
    "a": Case([[0, *images(73), *text(11, 26)]], (1, 512)),
    "b": Case([[0, *images(483), *text(12, 16)]], (1, 1024), (2, 640), (2, 1)),
    "c": Case([[0, *images(73), *text(13, 26)], [0, *images(73), *text(14, 16)]], (2, 512)),
    "d": Case([[0, *text(15, 63)]]),
}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "whole_model_golden.safetensors")


@pytest.fixture(scope="module")
def whole_model(golden_weights):
    return golden_whole_model(golden_weights)


@pytest.fixture
def model(whole_model):
    """The model, everything trainable, in the state that every test begins with."""
    whole_model.eval().requires_grad_(True)
    whole_model.set_attn_implementation("sdpa")
    whole_model.config.aux_loss_alpha = 0.001
    yield whole_model
    whole_model.zero_grad(set_to_none=True)
    whole_model.gradient_checkpointing_disable()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def labelled(inputs: dict) -> dict:
    ignored = (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0)
    return inputs | {"labels": inputs["input_ids"].masked_fill(ignored, -100)}


def assert_outputs(golden, name: str, outputs, mask: torch.Tensor) -> None:
    """Logits, loss, router logits and image embeddings are the golden ones."""
    logits, mask = outputs.logits, mask.bool()
    if name == "b":
        assert error(logits[:, ::7, ::5], golden["b.logits_7_5"]) < TOLERANCE
        assert error(logits[:, -1], golden["b.logits_last"]) < TOLERANCE
    else:
        assert error(logits[mask], golden[f"{name}.logits"][mask]) < TOLERANCE
    assert outputs.loss.item() == pytest.approx(golden[f"{name}.loss"].item(), rel=TOLERANCE)
    for layer, of_layer in enumerate(outputs.router_logits, start=1):
        assert error(of_layer[mask.flatten()], golden[f"{name}.router_logits.{layer}"]) < TOLERANCE
    if name != "d":
        embeddings = torch.cat(outputs.image_outputs.pooler_output)
        embeddings = embeddings[::7] if name == "b" else embeddings
        assert error(embeddings, golden[f"{name}.image_embeds"]) < TOLERANCE


def assert_gradients(golden, model, prefix: str, inputs: dict) -> None:
    """Every gradient has the golden norm, none is missing, and the heads are the golden ones."""
    parameters = dict(model.named_parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    gradients = released_views(gradients)
    has_gradient = released_views({name: torch.full_like(p, p.grad is not None) for name, p in parameters.items()})
    keys = json.loads((GOLDEN / "whole_model_keys.json").read_text())
    keys = sorted(key for key in keys if not key.endswith("position_ids"))
    expected = golden[f"{prefix}.grad_norms"].tolist()
    assert len(keys) == len(expected) == NUM_PARAMETERS
    for released, norm in zip(keys, expected, strict=True):
        key = released.removeprefix("model.")
        if np.isnan(norm):
            assert key not in gradients or not has_gradient[key].any(), key
        else:
            assert has_gradient[key].all(), key
            assert gradients[key].double().norm().item() == pytest.approx(norm, rel=TOLERANCE, abs=1e-12), key
    heads = [name for name in golden if name.startswith(f"{prefix}.grad_head.")]
    assert heads
    for head in heads:
        gradient = gradients[head.removeprefix(f"{prefix}.grad_head.").removeprefix("model.")]
        assert error(gradient.flatten()[:256], golden[head]) < HEAD_TOLERANCE, head
    for name, key in (("pixels", "pixel_values"), ("tiles", "pixel_values_local")):
        if f"{prefix}.grad_{name}_norm" in golden:
            gradient = inputs[key].grad
            norms = gradient.double().flatten(1).norm(dim=1)
            assert error(norms, golden[f"{prefix}.grad_{name}_norm"]) < TOLERANCE
            crop = gradient[:, :, 100:132, 200:232]
            assert error(crop, golden[f"{prefix}.grad_{name}_crop"]) < HEAD_TOLERANCE


@pytest.fixture(scope="module")
def image_outputs():
    """What the encoder gave for a case, for the tests that are about the language model: minutes, if computed anew."""
    return {}


def with_image_outputs(model, name: str, image_outputs: dict) -> dict:
    """A case's inputs with what the encoder makes of its pixels in place of these."""
    inputs = CASES[name].inputs()
    arguments = ("pixel_values", "pixel_values_local", "num_local_patches", "patches_grid")
    pixels = {key: inputs.pop(key) for key in arguments if key in inputs}
    if name not in image_outputs:
        with torch.no_grad():
            image_outputs[name] = model.get_image_features(**pixels)
    return inputs | {"mm_encoder_outputs": {"image": image_outputs[name]}}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_model_gives_the_numbers_of_deepseeks_own_code(golden, model, image_outputs, name):
    """Pins prompt, special tokens, tiles, routing and causal attention, from the pixels to the logits."""
    inputs = CASES[name].inputs()
    with torch.no_grad():
        outputs = model(**labelled(inputs), output_router_logits=True)
    image_outputs[name] = outputs.image_outputs
    assert_outputs(golden, name, outputs, inputs["attention_mask"])


@pytest.mark.parametrize("name", CASES)
def test_eager_attention_gives_the_same_numbers(golden, model, image_outputs, name):
    """Pins both models' other attention: from the pixels on in one case, the language model's in all."""
    model.set_attn_implementation("eager")
    inputs = CASES[name].inputs() if name in "ad" else with_image_outputs(model, name, image_outputs)
    with torch.no_grad():
        outputs = model(**labelled(inputs), output_router_logits=True)
    assert_outputs(golden, name, outputs, inputs["attention_mask"])


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_gradient_is_that_of_the_original_code_without_its_no_grad(golden, model, name):
    """Pins that all 555 parameters that are used get their gradient, without the load-balancing loss and with it."""
    inputs = CASES[name].inputs()
    for key in ("pixel_values", "pixel_values_local"):
        if key in inputs:
            inputs[key].requires_grad_()
    outputs = model.train()(**labelled(inputs))
    if name == "b":  # the largest page, once: its backward pass takes a minute
        outputs.loss.backward()
    else:
        # Both from one forward pass.
        (outputs.loss - outputs.aux_loss).backward(retain_graph=True)
        assert_gradients(golden, model, f"{name}.unfrozen_noaux", inputs)
        outputs.aux_loss.backward()
    assert_gradients(golden, model, f"{name}.unfrozen", inputs)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("prefix", ["a.unfrozen", "a.unfrozen_noaux", "d.aux", "d.noaux"])
def test_the_option_for_the_load_balancing_loss_is_the_original_codes(golden, model, prefix):
    """Pins `aux_loss_alpha` by itself, and training on text alone."""
    model.config.aux_loss_alpha = 0.0 if prefix.endswith("noaux") else 0.001
    inputs = CASES[prefix[0]].inputs()
    if "pixel_values" in inputs:
        inputs["pixel_values"].requires_grad_()
    model.train()(**labelled(inputs)).loss.backward()
    assert_gradients(golden, model, prefix, inputs)


@pytest.mark.parametrize("variant", ["released", "released_noaux"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_frozen_encoder_leaves_the_gradients_of_the_released_code(golden, model, image_outputs, name, variant):
    """Pins that freezing by group name does to the language model what the released `no_grad` does."""
    model.config.aux_loss_alpha = 0.0 if variant.endswith("noaux") else 0.001
    model.freeze(*ENCODER)
    inputs = CASES[name].inputs() if name == "a" else with_image_outputs(model, name, image_outputs)
    model.train()(**labelled(inputs)).loss.backward()
    assert_gradients(golden, model, f"{name}.{variant}", inputs)


def test_gradients_under_gradient_checkpointing_are_those_of_the_original_code(golden, model):
    """Pins that checkpointing reaches the blocks of both models, and leaves the load-balancing loss in."""
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    tower = model.model.vision_tower
    layers = [*tower.sam_model.blocks, *tower.vision_model.transformer.layers, *model.model.language_model.layers]
    assert all(layer.gradient_checkpointing for layer in layers)
    inputs = CASES["a"].inputs()
    inputs["pixel_values"].requires_grad_()
    model.train()(**labelled(inputs)).loss.backward()
    assert_gradients(golden, model, "a.unfrozen", inputs)


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_greedy_generation_gives_the_tokens_of_the_original_code(golden, model, image_outputs, name):
    """Pins the cache, and that images are read once and not at every token."""
    inputs = with_image_outputs(model, name, image_outputs) if name == "b" else CASES[name].inputs()
    outputs = generate(model, inputs, 8)
    assert outputs.sequences[0, -8:].tolist() == golden[f"{name}.generated"].tolist()
    assert error(torch.cat(outputs.scores)[:, ::5], golden[f"{name}.generated_scores"]) < TOLERANCE


def test_200_generated_tokens_are_those_of_the_original_code(golden, model):
    """Pins plain causal attention: a window of 128 tokens changes nothing before the 128th token."""
    outputs = generate(model, CASES["d"].inputs(), 200)
    assert outputs.sequences[0, -200:].tolist() == golden["d.generated_200"].tolist()
    assert error(outputs.scores[-1][0], golden["d.generated_200_scores_last"]) < TOLERANCE


def generate(model, inputs: dict, length: int):
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "eos_token_id": None}
    return model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
