"""`ImageTextCollator`: what is trained on, which images belong where, and batches without any."""

import pytest
import torch
from helpers import tiny_config
from PIL import Image
from tokenizers import processors
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionProcessor
from deepseek_ocr_vision.composites import build_processor
from deepseek_ocr_vision.composites.small import byte_tokenizer
from deepseek_ocr_vision.training.collator import NOT_TRAINED_ON, ImageTextCollator


SIDES = ("right", "left")
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "And here? <image>"},
    {"role": "assistant", "content": "345"},
]


@pytest.fixture
def processor() -> LlavaProcessor:
    """Bytes as tokens, pages of 128 x 128 pixels, so of four tokens."""
    return build_processor(page_size=128)


def page(shade: int = 200) -> Image.Image:
    return Image.new("RGB", (128, 128), (shade, 10, 99))


def tiny_llava(text_config=None) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=tiny_config(),
        text_config=text_config or LlamaConfig(**sizes, vocab_size=300, initializer_range=0.3),
        image_token_index=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def trained_text(processor: LlavaProcessor, labels: torch.Tensor) -> str:
    """What the labels of one sample say."""
    return processor.tokenizer.decode(labels[labels != NOT_TRAINED_ON])


# What is trained on


@pytest.mark.parametrize("side", SIDES)
def test_the_answer_and_its_end_alone_are_trained_on(processor, side):
    """Pins labels on prompts, image tokens or padding, which a model would learn to write."""
    samples = [
        {"prompt": "<image>Read this:", "answer": "7 é", "image": page()},
        {"text": "Compare <image> and <image>they differ", "images": [page(), page(9)]},
        {"prompt": "2 + 2", "answer": "4"},
        {"text": "no image", "images": []},
    ]
    batch = ImageTextCollator(processor, padding_side=side)(samples)
    expected = ["7 é<eos>", "they differ<eos>", "4<eos>", "no image<eos>"]
    assert [trained_text(processor, row) for row in batch["labels"]] == expected
    trained = batch["labels"] != NOT_TRAINED_ON
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    assert batch["attention_mask"][trained].all()


@pytest.mark.parametrize("side", SIDES)
def test_each_sample_reads_as_it_was_written_with_its_images_in_order(processor, side):
    """Pins tokens lost where parts are joined, and images that go to another sample's placeholders."""
    samples = [
        {"prompt": "a<image>b<image>", "answer": "c", "images": [page(0), page(100)]},
        {"text": "none"},
        {"prompt": "<image>", "answer": "d", "image": page(200)},
    ]
    batch = ImageTextCollator(processor, padding_side=side)(samples)
    image = "<image>" * 4
    texts = [f"a{image}b{image}c<eos>", "none<eos>", f"{image}d<eos>"]
    masks = batch["attention_mask"].bool()
    read = [processor.tokenizer.decode(row[mask]) for row, mask in zip(batch["input_ids"], masks, strict=True)]
    assert read == texts
    assert masks[:, -1 if side == "left" else 0].all()
    expected = processor.image_processor([page(0), page(100), page(200)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_every_turn_of_the_assistant_is_trained_on_and_no_header(processor):
    """Pins a mask that takes the last turn alone, or the words that open a turn."""
    batch = ImageTextCollator(processor)([{"messages": CHAT, "images": [page(), page(9)]}])
    assert trained_text(processor, batch["labels"][0]) == " 12<eos> 345<eos>"
    whole = processor.apply_chat_template(CHAT, tokenize=False)
    expected = processor(images=[page(), page(9)], text=whole, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_images_inside_the_messages_are_those_of_the_sample(processor):
    """Pins the form that data sets of conversations have, where an image stands among the words of its turn."""
    inside = [{"role": "user", "content": [{"type": "image", "image": page()}, {"type": "text", "text": "What?"}]}]
    inside += [CHAT[1], {"role": "user", "content": [{"type": "image", "image": page(9)}]}, CHAT[3]]
    plain = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    plain += [CHAT[1], {"role": "user", "content": [{"type": "image"}]}, CHAT[3]]
    collator = ImageTextCollator(processor)
    batch, expected = collator([{"messages": inside}]), collator([{"messages": plain, "images": [page(), page(9)]}])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_prompt_and_completion_are_those_of_trl(processor):
    """Pins TRL's names, for plain text and for messages, of which the completion's alone are trained on."""
    collator = ImageTextCollator(processor)
    batch = collator([{"prompt": "<image>Read:", "completion": "7", "image": page()}])
    expected = collator([{"prompt": "<image>Read:", "answer": "7", "image": page()}])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    batch = collator([{"prompt": CHAT[:3], "completion": CHAT[3:], "images": [page(), page(9)]}])
    assert trained_text(processor, batch["labels"][0]) == " 345<eos>"
    with pytest.raises(TypeError, match="list under `prompt`"):
        collator([{"prompt": CHAT[:3], "completion": "345", "images": [page(), page(9)]}])


def test_an_end_that_is_written_already_is_not_written_twice(processor):
    """Pins data sets whose answers end as the model's own do."""
    batch = ImageTextCollator(processor)([{"prompt": "a", "answer": "b<eos>"}])
    assert trained_text(processor, batch["labels"][0]) == "b<eos>"


@pytest.mark.parametrize("text", ["hello", "<bos>hello"])
def test_a_tokenizer_that_begins_sequences_begins_each_sample_once(processor, text):
    """Pins prompts that lack the token which `generate` gets, or have it at every joint, or twice from a template."""
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    batch = ImageTextCollator(processor, touch_encoder=False)([{"prompt": text, "answer": "b"}])
    assert tokenizer.decode(batch["input_ids"][0]) == "<bos>hellob<eos>"
    assert trained_text(processor, batch["labels"][0]) == "b<eos>"


# Batches without images


def loss_and_gradients(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["rotary", "absolute"])
def test_a_blank_image_leaves_loss_and_gradients_as_they_are(processor, side, kind):
    """Pins placeholders that are attended to, trained on, or push the samples to other positions."""
    absolute = GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = tiny_llava(absolute if kind == "absolute" else None).eval()
    samples = [{"prompt": "a", "answer": "bcd"}, {"text": "xy"}, {"text": "longer than others"}]
    touched = ImageTextCollator(processor, padding_side=side)(samples)
    plain = ImageTextCollator(processor, padding_side=side, touch_encoder=False)(samples)
    assert "pixel_values" not in plain
    assert touched["pixel_values"].shape == (1, 3, 64, 64)
    loss, gradients = loss_and_gradients(model, touched)
    expected_loss, expected = loss_and_gradients(model, plain)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in gradients.items():
        if expected[name] is None:
            assert name.startswith(("model.vision_tower.", "model.multi_modal_projector."))
            assert gradient is not None, name
            assert not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_more_placeholders_than_samples_are_spread_over_all_of_them(processor):
    """Pins an image processor that makes no page of one token, and a batch that grows by a whole page of columns."""
    processor.image_processor = Stretching()
    batch = ImageTextCollator(processor)([{"text": "a"}, {"text": "b"}, {"text": "c"}])
    assert batch["pixel_values"].shape == (1, 3, 128, 128)
    assert batch["input_ids"].shape == (3, 4)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4
    assert tiny_llava()(**batch).loss.isfinite()


class Stretching:
    """An image processor of someone else's."""

    model_input_names = ("pixel_values",)

    def __init__(self):
        self.ours = DeepSeekOCRVisionImageProcessor(size=128)

    def __call__(self, images, **options):
        return self.ours(images, return_tensors="pt")

    def fetch_images(self, images):
        return images


def test_distributed_training_goes_on_through_batches_without_images(processor, tmp_path):
    """Pins the error for parameters without a gradient, and the hang where it is not even checked."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny_llava())
        with_images = [{"prompt": "<image>", "answer": "b", "image": page()}]
        for samples in (with_images, [{"text": "hello"}], with_images):
            model(**ImageTextCollator(processor)(samples)).loss.backward()
        model(**ImageTextCollator(processor, touch_encoder=False)([{"text": "hello"}])).loss.backward()
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            model(**ImageTextCollator(processor)(with_images))
    finally:
        torch.distributed.destroy_process_group()


def test_trainer_as_it_is_trains_with_the_collator(processor, tmp_path):
    """Pins keys that `Trainer` does not pass on, and a collator that a worker process cannot be given."""
    samples = [
        {"prompt": "<image>", "answer": "7", "image": page()},
        {"text": "hello"},
        {"messages": CHAT, "images": [page(), page(9)]},
    ]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        num_train_epochs=4,
        learning_rate=1e-2,
        logging_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_num_workers=1,
    )
    trainer = Trainer(tiny_llava(), arguments, train_dataset=samples, data_collator=ImageTextCollator(processor))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# What is refused


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        ({"text": "<image>a"}, ValueError, r"Sample 1 .* 0 images .* 1 times '<image>' .* begins '<image>a<eos>'"),
        ({"text": "a", "image": "x.png"}, ValueError, "Sample 1 .* 1 images .* 0 times"),
        ({"prompt": "a", "answer": "<image>"}, ValueError, "Sample 1 .* an answer with '<image>'"),
        ({"prompt": "a"}, ValueError, r"Sample 1 .* under \['prompt'\].*remove_unused_columns=False"),
        ({}, ValueError, r"Sample 1 .* under \[\].* Its keys are \[\]"),
        ({"text": "a", "messages": CHAT}, ValueError, r"\['messages', 'text'\]"),
        ({"prompt": "a", "answer": 7}, TypeError, "Sample 1 .* int under `answer`"),
        ({"text": "a", "images": "x.png"}, TypeError, "Sample 1 .* str under `images`"),
        ({"text": "<image>a", "images": [None]}, TypeError, "Sample 1 .* among its images None"),
        ({"text": "<image>a", "image": {"bytes": b"a", "path": None}}, TypeError, "Sample 1 .* does not decode"),
        ({"text": "a", "images": [], "image": "x.png"}, ValueError, "under `image` and `images`"),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, CHAT[1]],
                "image": "x.png",
            },
            ValueError,
            "under `image` and its messages",
        ),
        ({"messages": CHAT[:1], "images": ["x.png"]}, ValueError, "no message of the role 'assistant'"),
    ],
)
def test_a_sample_that_cannot_be_meant_is_named(processor, sample, error, message):
    """Pins errors from deep inside a model, hours into a run, that name tensors and no sample."""
    with pytest.raises(error, match=message):
        ImageTextCollator(processor)([{"text": "fine"}, sample])


def test_a_template_that_rewrites_earlier_turns_is_refused(processor):
    """Pins masks at wrong places, where a template drops what was thought in earlier turns."""
    processor.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="writes otherwise"):
        ImageTextCollator(processor)([{"messages": [*CHAT[1:2], *CHAT[1:2]]}])


def test_what_the_collator_cannot_work_with_is_refused_when_it_is_built(processor):
    """Pins failures at the first batch, after the model was loaded."""
    with pytest.raises(ValueError, match="`padding_side` is 'both'"):
        ImageTextCollator(processor, padding_side="both")
    with pytest.raises(TypeError, match="DeepSeekOCRVisionProcessor, which has no tokenizer and no image_token"):
        ImageTextCollator(DeepSeekOCRVisionProcessor())
    for name in ("pad_token", "eos_token"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
        setattr(tokenizer, {"pad_token": "eos_token", "eos_token": "pad_token"}[name], "<pad>")
        processor.tokenizer = tokenizer
        with pytest.raises(ValueError, match=f"no `{name}`"):
            ImageTextCollator(processor)
