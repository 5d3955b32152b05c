"""The example `examples/optical_memory.py`: its passages, its two runs, what it measures, and what it leaves."""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_weights
from PIL import Image, features
from transformers import AutoModelForCausalLM, AutoProcessor, LlamaConfig, LlavaForConditionalGeneration


matplotlib = pytest.importorskip("matplotlib")
if not features.check("freetype2"):
    pytest.skip("Pillow was built without FreeType", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import optical_memory  # noqa: E402
import passages  # noqa: E402

from deepseek_ocr_vision.composites import build_model, build_processor  # noqa: E402
from deepseek_ocr_vision.composites.small import byte_tokenizer  # noqa: E402
from deepseek_ocr_vision.processing.text_pages import TextRenderer  # noqa: E402
from deepseek_ocr_vision.training.collator import ImageTextCollator  # noqa: E402


STEPS = 4
FEW_STEPS = [
    *("--max_steps", str(STEPS), "--warmup_steps", "1", "--logging_steps", "2", "--save_steps", "2"),
    *("--eval_steps", "2", "--per_device_train_batch_size", "3", "--num_held_out_passages", "5"),
    *("--disable_tqdm", "true"),
]


def remember(output: Path, *options: str) -> None:
    """Run the example in this process."""
    optical_memory.main(["--output_dir", str(output), *FEW_STEPS, *options])


def result(output: Path, run: str) -> optical_memory.MemoryResult:
    return optical_memory.MemoryResult.load(output / run / "result.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output folder of a whole run of a few steps."""
    output = tmp_path_factory.mktemp("optical_memory") / "output"
    remember(output)
    return output


def renderer() -> TextRenderer:
    return TextRenderer(size=128, font_size=20, margin=0)


def some_passages(split: str = "train", *, texts: list[str] | None = None, **options) -> passages.Passages:
    texts = texts or ["one two three four five six seven " * 20, "eight nine ten"]
    options = {"num_passages": 20, "pages_per_passage": 1, "seed": 0, "split": split} | options
    return passages.Passages(texts, renderer=renderer(), **options)


# Texts


def test_no_paragraph_is_both_trained_on_and_held_out():
    """Pins Python's chapter on compound statements, which holds the topics `if`, `for` and `with` once more."""
    texts = passages.read_texts([])
    for seed in range(3):
        splits = passages.split_texts(texts, held_out_fraction=0.1, seed=seed)
        held_out = {
            part for text in texts for part in passages.paragraphs(text) if part in " ".join(splits["held_out"])
        }
        held_out = {part for part in held_out if len(part) > 80}  # shorter ones are found by chance
        assert len(held_out) > 20
        assert not any(part in text for part in held_out for text in splits["train"])


def test_the_split_is_of_whole_texts_and_of_the_size_asked_for():
    """Pins a share of the texts instead of the characters, and a split that leaves one side empty."""
    texts = [f"{name} " * 100 for name in "abcdefghij"]
    splits = passages.split_texts(texts, held_out_fraction=0.3, seed=1)
    assert sorted(text.strip()[0] for text in splits["train"] + splits["held_out"]) == list("abcdefghij")
    assert len(splits["held_out"]) == 3
    for fraction in (0.001, 0.999):
        assert all(passages.split_texts(texts, held_out_fraction=fraction, seed=1).values())


def test_a_passage_follows_from_seed_split_and_index_alone():
    """Pins a generator carried from passage to passage, which would make one depend on where a run resumed."""
    train = some_passages()
    assert [train[index] for index in reversed(range(5))][::-1] == [some_passages()[index] for index in range(5)]
    assert train[0] != some_passages(seed=1)[0]
    assert train[0] != some_passages("held_out")[0]
    assert len(list(train)) == 20


def test_the_answer_is_what_is_on_the_pages():
    """Pins answers that go on where the last page is full: nothing could read those."""
    for sample in some_passages(pages_per_passage=2, num_passages=5):
        drawn = list(renderer().pages(sample["answer"]))
        assert [page.image.tobytes() for page in drawn] == [image.tobytes() for image in sample["images"]]
        assert sample["prompt"].count("<image>") == len(drawn)


def test_all_of_a_text_can_be_chosen_and_words_stay_whole():
    """Pins a last word that is never trained on, and passages that begin within a word."""
    words = [f"w{index}" for index in range(30)]
    texts = [" ".join(words[:20]), " ".join(words[20:])]
    first = {sample["answer"].split()[0] for sample in some_passages(texts=texts, num_passages=300)}
    assert first == set(words)


def test_some_passages_to_train_on_come_without_pages():
    """Pins a model that never trained without pages, beside which any memory looks good."""
    blind = [not sample["images"] for sample in some_passages(num_passages=200, blind_fraction=0.25)]
    assert 0.17 < np.mean(blind) < 0.33
    assert not any(not sample["images"] for sample in some_passages())


# What is measured


def test_bits_per_byte_are_those_of_the_probabilities():
    """Pins nats for bits, a mean over batches of different lengths, and counting the prompt or the end."""
    processor = build_processor(page_size=64)
    model = build_model(processor).eval()
    samples = [passages.as_sample([Image.new("L", (64, 64), 99)], text) for text in ("ab", "cdefg\u00e9", "h")]
    measured = [
        optical_memory.bits_per_byte(model, samples, collator=ImageTextCollator(processor), batch_size=size)
        for size in (1, 2)
    ]
    bits = 0.0
    for sample in samples:
        inputs = processor(images=sample["images"], text=sample["prompt"] + sample["answer"], return_tensors="pt")
        likelihoods = model(**inputs).logits[0].log_softmax(-1)  # [L, V]
        number = len(sample["answer"].encode())
        rows = zip(likelihoods[-number - 1 : -1], inputs["input_ids"][0, -number:], strict=True)
        bits -= sum(row[token].item() for row, token in rows) / math.log(2)
    assert measured == pytest.approx([bits / 10] * 2, rel=1e-4)


def test_tokens_that_are_known_cost_nothing():
    """Pins a baseline of text that counts what it was given, or is divided by the bytes of the rest alone."""
    processor = build_processor(page_size=64)
    model = build_model(processor).eval()
    options = {"collator": ImageTextCollator(processor), "batch_size": 3}
    samples = [passages.as_sample([], text) for text in ("abcdef", "gh", "abc")]  # a token is a byte
    of_all, of_four, of_six = (optical_memory.bits_per_byte(model, samples, num_known=n, **options) for n in (0, 4, 6))
    start = [passages.as_sample([], text) for text in ("abcd", "gh", "abc")]
    assert of_four * 11 == pytest.approx(
        (of_all * 11) - optical_memory.bits_per_byte(model, start, **options) * 9, rel=1e-4
    )
    assert of_four > 0
    assert of_six == 0


def test_each_passage_gets_the_pages_of_another_one():
    """Pins a control that hands out the right pages."""
    samples = [passages.as_sample([index], str(index)) for index in range(3)]
    others = passages.with_pages_of_another(samples)
    assert [(sample["images"], sample["answer"]) for sample in others] == [([2], "0"), ([0], "1"), ([1], "2")]
    assert [sample["prompt"] for sample in passages.without_pages(samples)] == ["\n"] * 3


def test_reading_a_batch_gives_what_reading_one_by_one_does():
    """Pins padding on the wrong side, after which `generate` goes on from the padding."""
    torch.manual_seed(1)
    processor = build_processor(page_size=64)
    model = build_model(processor).eval()
    pages = [Image.new("L", (64, 64), level) for level in (0, 128, 255)]
    samples = [passages.as_sample(pages[:number], "text") for number in (1, 2, 3)]
    read = [optical_memory.read_passages(model, samples, processor=processor, batch_size=size) for size in (1, 3)]
    assert read[0] == read[1]


# The whole of it


def test_everything_is_left_in_the_output_folder(finished):
    """Pins a name that changes, or an image cut off."""
    assert {path.name for path in finished.iterdir()} == {
        *("arguments.json", "report.md", "loss.png", "pages.png", "frozen", "trained"),
    }
    for name in ("loss.png", "pages.png"):
        with Image.open(finished / name) as image:
            image.verify()
    report = (finished / "report.md").read_text()
    for expected in (
        *("bits per byte without pages", "with as many of their first text tokens", "encoder frozen"),
        *("encoder trained", "are 4 tokens"),
    ):
        assert expected in report


def test_the_encoder_stays_as_it_is_unless_it_is_trained(finished):
    """Pins a frozen run that trains the encoder after all, or a trained one that does not."""
    assert result(finished, "frozen").changed_encoder_tensors == 0
    trained = result(finished, "trained")
    assert trained.changed_encoder_tensors == trained.encoder_tensors > 0


def test_both_runs_log_losses_with_and_without_pages(finished):
    """Pins a comparison of losses that are not there."""
    for run in ("frozen", "trained"):
        for kind in ("with", "without"):
            steps, losses = result(finished, run).curve(f"eval_{kind}_pages_loss")
            assert steps == [2, 4]
            assert all(math.isfinite(loss) for loss in losses)


def test_the_saved_model_is_the_one_that_was_measured(finished):
    """Pins a composite saved before training, or one that does not load with its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(finished / "frozen" / "composite")
    processor = AutoProcessor.from_pretrained(finished / "frozen" / "composite")
    text_arguments, _, _ = optical_memory.parse_arguments(["--output_dir", str(finished), *FEW_STEPS])
    texts = passages.split_texts(passages.read_texts([]), held_out_fraction=0.1, seed=0)
    held_out = optical_memory.build_passages(texts, text_arguments, page_size=128, num_training_passages=1, seed=0)[
        "held_out"
    ]
    before = result(finished, "frozen")
    assert [sample["answer"] for sample in held_out] == before.written
    collator = ImageTextCollator(processor)
    for kind, memory in optical_memory.memories(list(held_out), num_tokens=4).items():
        bits = optical_memory.bits_per_byte(model, **memory, collator=collator, batch_size=5)
        assert bits == pytest.approx(before.bits_per_byte[kind], rel=1e-4)


def test_a_run_cut_off_gives_the_same_losses_and_a_finished_one_is_kept(finished, tmp_path):
    """Pins a run that starts over after a crash, or goes on with other weights, and finished ones trained again."""
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    (output / "frozen" / "result.json").unlink()
    shutil.rmtree(output / "frozen" / f"checkpoint-{STEPS}")
    kept = (output / "trained" / "result.json").stat().st_mtime_ns
    remember(output)
    for kind in ("loss", "eval_with_pages_loss", "eval_without_pages_loss", "grad_norm"):
        assert result(output, "frozen").curve(kind) == result(finished, "frozen").curve(kind)
    assert result(output, "frozen").read == result(finished, "frozen").read
    assert (output / "trained" / "result.json").stat().st_mtime_ns == kept


def test_with_a_pretrained_language_model_only_the_projector_is_trained(finished, tmp_path):
    """Pins a user's language model changed, or drawn anew, where only the projector was to be trained."""
    encoder, language_model, output = tmp_path / "encoder", tmp_path / "language_model", tmp_path / "output"
    tower = LlavaForConditionalGeneration.from_pretrained(finished / "trained" / "composite").model.vision_tower
    tower.save_pretrained(encoder)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    causal = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    causal.save_pretrained(language_model)
    tokenizer.save_pretrained(language_model)
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file in files:
        file.write_text(f"This is the text of {file.stem}. " * 30)
    options = ["--encoder", str(encoder), "--language_model", str(language_model), "--train_encoder", "false"]
    remember(output, *options, "--text", *map(str, files), "--pages_per_passage", "2", "--font_size", "20")
    trained = LlavaForConditionalGeneration.from_pretrained(output / "frozen" / "composite")
    assert_same_weights(trained.model.vision_tower, tower)
    assert_same_weights(trained.model.language_model, causal.model)
    assert torch.equal(trained.lm_head.weight, causal.lm_head.weight)
    projector = sum(parameter.numel() for parameter in trained.model.multi_modal_projector.parameters())
    assert result(output, "frozen").trainable_parameters == projector
    assert not (output / "trained").exists()
    assert "are 8 tokens" in (output / "report.md").read_text()


def test_another_run_in_the_same_folder_is_refused(finished, tmp_path):
    """Pins a report about a mixture of two runs."""
    with pytest.raises(FileExistsError, match="--seed is 1 and was 0"):
        remember(finished, "--seed", "1")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not make"):
        remember(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blind_fraction", "0"], "--blind_fraction is 0.0"),
        (["--pages_per_passage", "0"], "--pages_per_passage is 0"),
        (["--max_steps", "-1"], "--max_steps is -1"),
        (["--held_out_fraction", "1"], "--held_out_fraction is 1.0"),
        (["--text", "one.txt"], "at least two files"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(tmp_path, options, message):
    """Pins a crash after the first run, which has trained for nothing."""
    with pytest.raises(ValueError, match=message):
        remember(tmp_path / "output", *options)
    assert not (tmp_path / "output").exists()
