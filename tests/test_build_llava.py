"""`examples/build_llava.py` and what it is made of: a composite from two checkpoints, with its chat template."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import FEATURE_MODES, tiny_config
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, ImageTextCollator
from deepseek_ocr_vision.composites import build_processor
from deepseek_ocr_vision.composites.small import byte_tokenizer
from deepseek_ocr_vision.weights import load_encoder


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import build_llava


TEXT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{{ '[' + messages[0]['content'] + ']' }}"
    "{%- set messages = messages[1:] %}{% endif %}"
    "{%- for message in messages %}{{ '<' + message['role'] + '>' + message['content'].strip() + eos_token }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
IMAGE_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def save_encoder(folder: Path, feature_mode: str = "residual") -> str:
    DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).save_pretrained(folder)
    return str(folder)


def save_language_model(folder: Path, *, template: str | None = None, tied: bool = False, config=None) -> str:
    """A language model whose tokenizer knows no images yet, and that ends at another token than its config says."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaConfig(vocab_size=len(tokenizer) - 5, **sizes, tie_word_embeddings=tied, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config or llama)
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(folder)
    return str(folder)


def build(out: Path, *options: str) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    build_llava.main(["--out", str(out), *options])
    return LlavaForConditionalGeneration.from_pretrained(out), LlavaProcessor.from_pretrained(out)


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_a_composite_of_two_checkpoints_has_the_weights_of_both(tmp_path, feature_mode):
    """Pins weights that are drawn anew without a word because their names differ in a composite."""
    encoder = save_encoder(tmp_path / "encoder", feature_mode)
    language_model = save_language_model(tmp_path / "language_model")
    model, processor = build(tmp_path / "llava", "--encoder", encoder, "--language_model", language_model)

    tower = DeepSeekOCRVisionModel.from_pretrained(encoder)
    for name, tensor in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name
    causal = AutoModelForCausalLM.from_pretrained(language_model).eval()
    text = processor(text=["hello"], return_tensors="pt")
    vocabulary = causal.config.vocab_size
    torch.testing.assert_close(model(**text).logits[..., :vocabulary], causal(**text).logits)
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert model.generation_config.eos_token_id == [1, 7]
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert model.model.multi_modal_projector.linear_1.weight.std() > 0.01


def test_what_a_composite_needs_of_the_encoder_is_set(tmp_path, capsys):
    """Pins LLaVA's defaults, layer -2 and a class token dropped, and pages cut into 14 pixels a token."""
    model, processor = build(tmp_path / "llava", "--page_size", "192")
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-1, "full")
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (64, "full")
    assert model.config.image_seq_length == 9
    assert processor.tokenizer.padding_side == "left"
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert prompt == "user: <image>What is this?\nassistant:"
    inputs = processor(images=Image.new("RGB", (300, 200)), text=prompt, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] <= inputs["input_ids"].shape[1] + 2
    written = capsys.readouterr().out
    assert f'model = LlavaForConditionalGeneration.from_pretrained("{tmp_path / "llava"}")' in written
    assert f'processor = LlavaProcessor.from_pretrained("{tmp_path / "llava"}")' in written


def test_the_image_processor_is_the_encoders_own_less_its_tiles(tmp_path):
    """Pins an encoder that was trained on other colours than its preset has, and tiles, which LLaVA drops."""
    encoder = save_encoder(tmp_path / "encoder")
    DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam").save_pretrained(encoder)
    model, processor = build(tmp_path / "llava", "--encoder", encoder, "--page_size", "704")
    assert processor.image_processor.preset == "deepseek-ocr"
    assert processor.image_processor.tile_size is None
    assert model.config.image_seq_length == 11 * 11


@pytest.mark.parametrize("feature_mode", ["projected", "sequence"])
def test_an_encoder_comes_out_of_a_composite_in_every_feature_mode(tmp_path, feature_mode):
    """Pins the encoder's own projector and special tokens, which were looked for outside of the vision tower."""
    encoder = save_encoder(tmp_path / "encoder", feature_mode)
    DeepSeekOCRVisionImageProcessor(size=128).save_pretrained(encoder)
    build(tmp_path / "llava", "--encoder", encoder)
    loaded, _ = load_encoder(tmp_path / "llava")
    expected = DeepSeekOCRVisionModel.from_pretrained(encoder).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("page_size", [128, 192])
def test_the_released_sequence_has_as_many_placeholders_as_tokens(tmp_path, page_size):
    """Pins the tokens at the ends of rows: "Image features and image tokens do not match", also without images."""
    encoder = save_encoder(tmp_path / "encoder", "sequence")
    model, processor = build(tmp_path / "llava", "--encoder", encoder, "--page_size", str(page_size))
    rows = page_size // 64
    assert model.config.image_seq_length == rows * (rows + 1) + 1
    samples = [{"prompt": "<image> and <image>", "answer": "a", "images": [Image.new("RGB", (300, 200))] * 2}]
    for batch in (samples, [{"text": "no image"}]):
        model.zero_grad()
        model(**ImageTextCollator(processor)(batch)).loss.backward()
        without = [name for name, each in model.model.vision_tower.named_parameters() if each.grad is None]
        assert without == []


@pytest.mark.parametrize(("dtype", "expected"), build_llava.DTYPES.items())
def test_weights_are_stored_as_asked(tmp_path, dtype, expected):
    """Pins a part that stays in float32 and is twice the size."""
    language_model = save_language_model(tmp_path / "language_model", tied=True)
    model, _ = build(tmp_path / "llava", "--dtype", dtype, "--language_model", language_model)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.lm_head.weight is model.get_input_embeddings().weight


# Chat templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "user: <image>What is this?\nassistant:"),
        (TEXT_TEMPLATE, "<user><image>What is this?<eos><assistant>"),
        (IMAGE_TEMPLATE, "<image>\nWhat is this?"),
        ("{{ raise_exception('never') }}", "user: <image>What is this?\nassistant:"),
    ],
)
def test_the_language_models_chat_template_is_kept_and_made_to_hold_images(tmp_path, template, expected):
    """Pins a language model that is asked in another form than it was trained in, or sees a Python list."""
    language_model = save_language_model(tmp_path / "language_model", template=template)
    build_processor(language_model=language_model).save_pretrained(tmp_path / "processor")
    processor = LlavaProcessor.from_pretrained(tmp_path / "processor")
    assert processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == expected
    assert (processor.chat_template == template) == (template == IMAGE_TEMPLATE)


def test_a_text_template_still_sees_every_turn_and_may_change_the_messages(tmp_path):
    """Pins templates that take the system's turn off the messages, as Llama's do."""
    language_model = save_language_model(tmp_path / "language_model", template=TEXT_TEMPLATE)
    processor = build_processor(language_model=language_model)
    messages = [{"role": "system", "content": "be brief"}, *QUESTION, {"role": "assistant", "content": " 12 "}]
    written = processor.apply_chat_template(messages, tokenize=False)
    assert written == "[be brief]<user><image>What is this?<eos><assistant>12<eos>"


# Outputs


def test_an_output_in_use_is_refused_before_anything_is_loaded(tmp_path):
    """Pins a composite that replaces or mixes with what was there."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("llava", "file"):
        with pytest.raises(FileExistsError, match=f"--out .*{name} is in use"):
            build_llava.main(["--out", str(tmp_path / name), "--encoder", "nowhere"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "llava", "notes.txt"]


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Pins half a composite, which loads with weights drawn anew."""

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(LlavaProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="full"):
        build_llava.main(["--out", str(tmp_path / "llava")])
    assert list(tmp_path.iterdir()) == []


def test_a_language_model_that_llava_cannot_tie_is_named(tmp_path):
    """Pins GPT-2, whose embeddings go by another name: an AttributeError about `embed_tokens`, without the cause."""
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    language_model = save_language_model(tmp_path / "gpt2", config=config)
    with pytest.raises(ValueError, match=r"gpt2 .*`embed_tokens`"):
        build_llava.main(["--out", str(tmp_path / "llava"), "--language_model", language_model])
