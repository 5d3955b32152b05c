"""What the whole DeepSeek-OCR reads: prompts, modes, tiles, mixed batches."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from whole_model import IMAGE_TOKEN_ID, tiny_processor, tiny_tokenizer, tiny_whole_model

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, ImageTextCollator
from deepseek_ocr_vision.composites import PROMPTS, DeepSeekOCRProcessor
from deepseek_ocr_vision.training.features import FeatureCollator, precompute_features, precomputed_features


BOS, EOS, GROUNDING = 0, 1, 4
TEXT_ONLY = "What is a page?"


def page(width: int = 128, height: int = 128) -> Image.Image:
    """A page whose pixels differ, so that every tile is another one."""
    gradient = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))


@pytest.fixture
def processor():
    """Pages of 128 pixels, larger ones with tiles of 64."""
    return tiny_processor(tile_size=64, max_patches=4)


def released_ids(tokenizer, prompt: str, *num_tokens: int) -> list[int]:
    """The ids as the released code makes them: text and images apart, joined behind the beginning of the sequence."""
    first, *rest = prompt.split("<image>")
    ids = [BOS, *tokenizer(first, add_special_tokens=False)["input_ids"]]
    for count, text in zip(num_tokens, rest, strict=True):
        ids += [IMAGE_TOKEN_ID] * count + tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize(
    ("mode", "size", "num_tokens"),
    [
        ("tiny", (700, 500), 8 * 9 + 1),
        ("small", (700, 500), 10 * 11 + 1),
        ("base", (700, 500), 16 * 17 + 1),
        ("large", (700, 500), 20 * 21 + 1),
        ("gundam", (640, 500), 16 * 17 + 1),
        ("gundam", (1300, 640), 10 * 21 + 16 * 17 + 1),
        ("gundam", (1000, 1500), 30 * 21 + 16 * 17 + 1),
    ],
)
def test_prompts_become_the_ids_of_the_released_code(processor, mode, size, num_tokens):
    """Pins the count of tokens in every mode, tiles included, and the beginning of the sequence."""
    inputs = processor(page(*size), PROMPTS["markdown"], mode=mode, max_patches=6)
    assert inputs["input_ids"] == [released_ids(processor.tokenizer, PROMPTS["markdown"], num_tokens)]
    assert GROUNDING in inputs["input_ids"][0]


def test_a_text_that_begins_the_sequence_itself_is_not_begun_twice(processor):
    """Pins prompts that were written out in full."""
    plain, begun = (processor(text=text)["input_ids"] for text in (TEXT_ONLY, f"<bos>{TEXT_ONLY}"))
    assert plain == begun
    assert plain[0].count(BOS) == 1
    assert processor(text=TEXT_ONLY, add_special_tokens=False)["input_ids"][0] == plain[0][1:]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_every_row_of_a_mixed_batch_is_what_it_is_alone(processor, order, padding_side):
    """Pins the released code's fault: with a text-only row first it leaves out the images of all others."""
    model = tiny_whole_model()
    samples = [
        ("<image>\nFree OCR.", [page()]),
        (TEXT_ONLY, []),
        ("<image>\nFree OCR. Twice <image>.", [page(256, 128), page(100, 90)]),
        ("Another one: <image>", [page(128, 512)]),
    ]
    samples = [samples[index] for index in order]
    options = {"return_tensors": "pt", "padding": True, "padding_side": padding_side}
    batch = processor([image for _, images in samples for image in images], [text for text, _ in samples], **options)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=positions).logits
    for row, (text, images) in enumerate(samples):
        alone_inputs = processor(images, text, return_tensors="pt")
        with torch.no_grad():
            alone = model(**alone_inputs).logits[0]
        mask = batch["attention_mask"][row].bool()
        assert torch.allclose(together[row][mask], alone, atol=1e-4), row


def test_the_collator_trains_on_answers_alone(processor):
    """Pins labels: prompt, image tokens and padding are passed over, and the end of the sequence is learnt."""
    collator = ImageTextCollator(processor)
    samples = [
        {"prompt": PROMPTS["text"], "answer": " A page. ", "image": page(256, 128)},
        {"prompt": TEXT_ONLY, "answer": "Paper"},
    ]
    batch = collator(samples)
    for row, sample in enumerate(samples):
        trained = batch["labels"][row] != -100
        answer = processor.tokenizer(sample["answer"], add_special_tokens=False)["input_ids"]
        assert batch["labels"][row][trained].tolist() == [*answer, EOS]
        assert batch["input_ids"][row][trained].tolist() == [*answer, EOS]
        images = [sample["image"]] if "image" in sample else []
        prompt = processor(images, sample["prompt"])["input_ids"][0]
        assert batch["input_ids"][row][: len(prompt)].tolist() == prompt
    assert batch["patches_grid"] == [[2, 1]]
    assert batch["pixel_values_local"].shape == (2, 3, 64, 64)


def test_a_batch_without_images_gives_every_parameter_a_gradient(processor):
    """Pins processes that train together, of which one has only text: they wait for each other's gradients."""
    model = tiny_whole_model().train()
    batch = ImageTextCollator(processor)([{"prompt": TEXT_ONLY, "answer": "Paper"}])
    with_image = model(**batch).loss
    with_image.backward()
    # Not all experts are chosen for so few tokens, but their tensor is one.
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.grad.any() for parameter in model.model.vision_tower.parameters())
    names = ("input_ids", "attention_mask", "labels")
    alone = ImageTextCollator(processor, touch_encoder=False)([{"prompt": TEXT_ONLY, "answer": "Paper"}])
    assert set(alone) == set(names)
    assert torch.allclose(model(**alone).loss, with_image, atol=1e-6)


def test_pages_that_are_not_square_are_refused():
    """Pins "shape '[2, 2, 48]' is invalid": transformers takes the root of the number of tokens for both sides."""
    processor = DeepSeekOCRProcessor(DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=(64, 256)), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"\[1, 3, 64, 256\]; pages have to be square"):
        tiny_whole_model()(**processor(page(), "<image>a", return_tensors="pt"))


def test_stored_tokens_train_it_as_pages_do(tmp_path):
    """Pins placeholders without those of the special tokens: "tokens: 12, features: 21"."""
    datasets = pytest.importorskip("datasets")
    model, processor = tiny_whole_model().train(), tiny_processor()
    encoder = model.model.vision_tower
    encoder.freeze()
    pages = [{"image": page(), "text": "a <image>"}, {"image": page(90, 200), "text": "<image> b"}]
    pages = datasets.Dataset.from_list(pages)
    stored = precompute_features(pages, encoder, processor, cache_dir=tmp_path, show_progress=False)
    losses = [model(**ImageTextCollator(processor)([row])).loss for row in pages]
    with precomputed_features(model, stored):
        again = [model(**FeatureCollator(processor)([row])).loss for row in stored]
    assert torch.allclose(torch.stack(again), torch.stack(losses), atol=1e-6)
    with pytest.raises(ValueError, match="12 tokens are no square page's"):
        processor.num_placeholders(12)


def test_the_processor_is_saved_and_loaded(tmp_path, processor):
    """Pins the sizes and the tokenizer on the way through a folder."""
    processor.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DeepSeekOCRProcessor
    assert loaded.chat_template == processor.chat_template
    expected = processor(page(256, 128), PROMPTS["text"], return_tensors="pt")
    actual = loaded(page(256, 128), PROMPTS["text"], return_tensors="pt")
    assert torch.equal(actual["input_ids"], expected["input_ids"])
    assert torch.equal(actual["pixel_values_local"], expected["pixel_values_local"])


def test_images_may_be_paths(tmp_path, processor):
    """Pins files, which are never downloaded."""
    page().save(tmp_path / "page.png")
    from_file = processor(str(tmp_path / "page.png"), PROMPTS["text"], return_tensors="pt")
    assert torch.equal(from_file["pixel_values"], processor(page(), PROMPTS["text"], return_tensors="pt").pixel_values)


def test_mistakes_are_named(processor):
    """Pins the errors of the processor."""
    with pytest.raises(ValueError, match="give a text"):
        processor(page())
    with pytest.raises(TypeError, match="holds a int"):
        processor(text=[3])
    with pytest.raises(ValueError, match="<image>"):
        processor(page(), "no place for it")
    with pytest.raises(ValueError, match="<image>"):
        processor(text="<image>")
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no token '<image>'"):
        DeepSeekOCRProcessor(DeepSeekOCRVisionImageProcessor(), WithoutImageToken(tokenizer))
    with pytest.raises(ValueError, match="`mode` is 'huge'"):
        processor(page(), PROMPTS["text"], mode="huge")


class WithoutImageToken:
    """A tokenizer that knows no image token."""

    def __init__(self, tokenizer):
        self.unk_token_id = tokenizer.unk_token_id

    def convert_tokens_to_ids(self, token: str) -> None:
        return None
