"""The encoder inside transformers' composites: LLaVA above all, and what else takes it as its vision tower."""

import pytest
import torch
from helpers import FEATURE_MODES, pixels, run_python, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_composites import (
    IMAGE_TOKEN,
    LANGUAGE,
    inputs,
    tiling_processor,
    tiny_dual_encoder,
    tiny_encoder_decoder,
    tiny_llava,
    tiny_tiling_llava,
)
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
)

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites import build_processor
from deepseek_ocr_vision.training.collator import ImageTextCollator


def without_gradient(module: torch.nn.Module) -> list[str]:
    return [
        name for name, parameter in module.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_the_loss_reaches_every_weight_of_the_tower(feature_mode):
    """Pins the projector's width, the layer's index, and the gradient path through a composite."""
    model = tiny_llava(feature_mode)
    assert type(model.model.vision_tower) is DeepSeekOCRVisionModel
    batch = inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert without_gradient(model.model.vision_tower) == []


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


def test_the_answer_depends_on_the_image():
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


def test_a_trained_composite_is_the_same_in_a_fresh_process(tmp_path):
    """Pins checkpoints that only load where the model was built, in each mode: after a step, by the Auto class."""
    expected = {}
    for feature_mode in FEATURE_MODES:
        model = tiny_llava(feature_mode)
        batch = inputs()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.eval().save_pretrained(tmp_path / feature_mode)
        expected[feature_mode] = model(**batch).logits.detach()
    save_file(inputs(), tmp_path / "inputs.safetensors")
    run_python(
        f"""
        import deepseek_ocr_vision
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForImageTextToText
        inputs = load_file("{tmp_path}/inputs.safetensors")
        logits = {{}}
        for feature_mode in {FEATURE_MODES}:
            model = AutoModelForImageTextToText.from_pretrained("{tmp_path}/" + feature_mode)
            logits[feature_mode] = model(**inputs).logits.detach()
            assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (2, 9)
        save_file(logits, "{tmp_path}/logits.safetensors")
        """
    )
    found = load_file(tmp_path / "logits.safetensors")
    for feature_mode in FEATURE_MODES:
        assert torch.equal(found[feature_mode], expected[feature_mode])


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}])
def test_the_auto_classes_load_a_composite_with_its_head_and_without(tmp_path, options):
    """Pins `AutoModel`, which gives the model below the head, and `trust_remote_code`, which is not needed."""
    model = tiny_llava().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **options)
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)
    below = AutoModel.from_pretrained(tmp_path, **options)
    assert type(below.vision_tower) is DeepSeekOCRVisionModel
    assert torch.equal(below(**inputs()).last_hidden_state, model.model(**inputs()).last_hidden_state)


# Batches


SAMPLES = [
    {"prompt": "<image>What?", "answer": "12", "pages": [30]},
    {"prompt": "<image> and <image>: which is the longer one?", "answer": "the second", "pages": [90, 150]},
    {"prompt": "2 + 2", "answer": "4", "pages": []},
    {"prompt": "<image>", "answer": "", "pages": [210]},
]


@pytest.fixture
def processor() -> LlavaProcessor:
    return build_processor(page_size=128)


def samples() -> list[dict]:
    """Samples with no, one and several images, of different lengths."""
    drawn = [[Image.new("RGB", (128, 128), (shade, 255 - shade, 9)) for shade in row["pages"]] for row in SAMPLES]
    return [row | {"images": images} for row, images in zip(SAMPLES, drawn, strict=True)]


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_mixed_samples_gives_each_what_it_gives_alone(processor, feature_mode, side):
    """Pins images read by another sample's placeholders, and padding that tokens attend to, on either side."""
    model = tiny_llava(feature_mode, vocab_size=300, image_token_index=processor.image_token_id).eval()
    batch = ImageTextCollator(processor, padding_side=side)(samples())
    with torch.no_grad():
        logits = model(**batch).logits
        for index, sample in enumerate(samples()):
            alone = ImageTextCollator(processor, touch_encoder=False)([sample])
            mask = batch["attention_mask"][index].bool()
            torch.testing.assert_close(logits[index][mask], model(**alone).logits[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(batch["labels"][index][mask], alone["labels"][0])


def test_generating_for_mixed_samples_writes_what_each_gets_alone(processor):
    """Pins a processor that pads on the right, where `generate` goes on after padding."""
    model = tiny_llava(vocab_size=300, image_token_index=processor.image_token_id).eval()
    rows = samples()
    images = [image for row in rows for image in row["images"]]
    batch = processor(images=images, text=[row["prompt"] for row in rows], padding=True, return_tensors="pt")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, written in zip(rows, together, strict=True):
        alone = processor(images=row["images"] or None, text=[row["prompt"]], return_tensors="pt")
        expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert written[: len(expected)].tolist() == expected.tolist()


# Other composites


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_llava_reads_from_several_layers_in_residual_mode_alone(feature_mode):
    """Pins what the guide says: in the other modes CLIP's layers have a class token, which the result has not."""
    model = tiny_llava(feature_mode, vision_feature_layer=[0, -1])
    if feature_mode == "residual":
        assert model(**inputs()).logits.shape == (2, 7, 32)
    else:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            model(**inputs())


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
@pytest.mark.parametrize("kind", ["LlavaNext", "LlavaOnevision"])
def test_composites_that_cut_a_page_into_tiles_take_the_tower(kind, feature_mode, tmp_path):
    """Pins tiles of the tower's own page size, with a line's end after each row, and batches without images."""
    model, processor = tiny_tiling_llava(kind, feature_mode), tiling_processor()
    wide = Image.new("RGB", (300, 120), (9, 99, 200))
    collator = ImageTextCollator(processor)
    batch = collator([{"prompt": "<image>", "answer": "a", "image": wide}])
    assert batch["pixel_values"].shape == (1, 3, 3, 128, 128)  # the whole page and two tiles
    model(**batch).loss.backward()
    assert without_gradient(model.model.vision_tower) == []
    assert model(**collator([{"text": "no image"}])).loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_a_dual_encoder_takes_the_tower(feature_mode, tmp_path):
    """Pins `pooler_output`, which contrastive training reads."""
    model = tiny_dual_encoder(feature_mode).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "pixel_values": pixels(2)}
    model(**batch, return_loss=True).loss.backward()
    assert without_gradient(model.vision_model) == []
    model.save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits_per_image, model(**batch).logits_per_image)


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_an_encoder_decoder_takes_the_tower(feature_mode, tmp_path):
    """Pins a decoder that attends to the tokens by cross-attention, as TrOCR's does."""
    model = tiny_encoder_decoder(feature_mode).eval()
    batch = {"labels": torch.tensor([[1, 2, 3], [4, 5, 6]]), "pixel_values": pixels(2)}
    model(**batch).loss.backward()
    assert without_gradient(model.encoder) == []
    generated = model.generate(pixel_values=pixels(2), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 4)
    model.save_pretrained(tmp_path)
    loaded = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_trainer_trains_an_encoder_decoder(tmp_path):
    """Pins a composite that hands all it does not know to its encoder, such as the number of labels of a batch."""
    model = tiny_encoder_decoder("residual")
    rows = [{"labels": torch.tensor([1, 2, 3]), "pixel_values": pixels(1)[0]}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    assert Trainer(model, arguments, train_dataset=rows).train().training_loss > 0


def test_vipllava_does_not_take_the_tower():
    """Pins what the guide says: VipLlava always drops a first token, and the tower's is no class token."""
    config = VipLlavaConfig(
        vision_config=tiny_config(),
        text_config=LlamaConfig(**LANGUAGE, vocab_size=32),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=[-1],
    )
    with pytest.raises((ValueError, IndexError)):
        VipLlavaForConditionalGeneration(config)(**inputs())
