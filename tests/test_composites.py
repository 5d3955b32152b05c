"""The encoder as the vision tower of transformers' LLaVA."""

import pytest
import torch
from helpers import FEATURE_MODES, pixels, tiny_config
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from deepseek_ocr_vision import DeepSeekOCRVisionModel


IMAGE_TOKEN = 31


def tiny_llava(feature_mode: str = "residual") -> LlavaForConditionalGeneration:
    """A LLaVA with our tower; the layer and the strategy are what the tower needs."""
    text_config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    config = LlavaConfig(
        vision_config=tiny_config(feature_mode=feature_mode),
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """A picture of 2 x 2 tokens and two words, `batch` times."""
    row = torch.tensor([1] + [IMAGE_TOKEN] * 4 + [5, 6])
    return {"input_ids": row.repeat(batch, 1), "pixel_values": pixels(batch)}


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_the_loss_reaches_every_weight_of_the_tower(feature_mode):
    """Pins the projector's width, the layer's index, and the gradient path through a composite."""
    model = tiny_llava(feature_mode)
    assert type(model.model.vision_tower) is DeepSeekOCRVisionModel
    batch = inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = [n for n, p in model.model.vision_tower.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_composite_may_hand_on_what_trainer_puts_in_its_config(use_cache):
    """Pins `Trainer`, which sets `use_cache` in the config; LLaVA passes it to the tower at the first step."""
    model = tiny_llava()
    model.config.use_cache = use_cache
    batch = inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.model.vision_tower.sam_model.pos_embed.grad.any()


def test_a_frozen_tower_trains_the_projector_in_front_of_the_language_model():
    """Pins the first stage of LLaVA's own recipe."""
    model = tiny_llava()
    model.model.vision_tower.freeze()
    batch = inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.model.multi_modal_projector.parameters())


def test_the_answer_depends_on_the_picture():
    """Pins that tokens get into the language model's sequence at all."""
    model = tiny_llava().eval()
    batch = inputs(1)
    logits = model(**batch).logits
    other = model(**batch | {"pixel_values": -batch["pixel_values"]}).logits
    assert (logits - other).abs().max() > 1e-6
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (1, 10)


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_a_saved_composite_loads_with_the_same_tower(tmp_path, feature_mode):
    """Pins the composite's checkpoint, in which our config and our weights are nested."""
    model = tiny_llava(feature_mode).eval()
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)


def test_a_new_tower_is_drawn_by_its_own_config():
    """Pins a composite's initialisation, which must not draw the tower from the language model's range."""
    tower = tiny_llava().model.vision_tower
    assert tower.sam_model.net_3.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert tower.sam_model.pos_embed.std().item() == pytest.approx(0.1, rel=0.1)
