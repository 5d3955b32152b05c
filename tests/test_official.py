"""From a released checkpoint to a fine-tuned one and back, on one path for two checkpoints: a synthetic one of the
released form, whose encoder has the released width and few layers, in every run; and the official one, which
`make test-official` fetches.
"""

from pathlib import Path

import pytest
import torch
from helpers import TOLERANCE, assert_same_weights, relative_error
from huggingface_hub import constants, snapshot_download
from transformers import Trainer, TrainingArguments, UnlimitedOcrForConditionalGeneration
from whole_model import VOCAB_SIZE, tiny_whole_model, unlimited_config, write_released

from deepseek_ocr_vision import DeepSeekOCRVisionModel, ImageTextCollator, text_to_pages
from deepseek_ocr_vision.composites import PROMPTS, DeepSeekOCRForConditionalGeneration
from deepseek_ocr_vision.composites.read_pages import load_reader, read_page


OFFICIAL = "deepseek-ai/DeepSeek-OCR"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs, and read it back."


def test_a_synthetic_checkpoint_is_read_trained_written_back_and_read_again(tmp_path):
    """Pins the whole path at the released width, in several shards."""
    vision_config = {
        "sam_config": {"num_hidden_layers": 2, "global_attn_indexes": [1]},
        "clip_config": {"num_hidden_layers": 2},
    }
    text_config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = tiny_whole_model(vision_config=vision_config, text_config=text_config)
    released = write_released(tmp_path / "released", model, num_shards=4)
    there_and_back(released, released, tmp_path / "written", mode="tiny", num_steps=2)


@pytest.mark.skipif(constants.HF_HUB_OFFLINE, reason="offline; `make test-official` fetches 6.7 GB")
def test_the_official_checkpoint_is_read_trained_written_back_and_read_again(tmp_path):
    """Pins what no synthetic checkpoint tells: that the official weights read a page, before and after."""
    encoder = DeepSeekOCRVisionModel.from_deepseek_ocr(OFFICIAL, preset="deepseek-ocr")  # by ranges, 0.8 GB
    folder = Path(snapshot_download(OFFICIAL))
    assert_same_weights(encoder, DeepSeekOCRVisionModel.from_deepseek_ocr(folder, preset="deepseek-ocr"))
    before, after = there_and_back(OFFICIAL, folder, tmp_path / "written", mode="base", num_steps=10)
    assert words(before) == words(TEXT)
    assert words(after) == words(TEXT)


def there_and_back(source: str | Path, folder: Path, written: Path, *, mode: str, num_steps: int) -> list[str]:
    """Go the whole way, and give what was read before and after."""
    (page,) = text_to_pages(TEXT)
    model, processor = load_reader(source, mode=mode, device="cpu")
    assert_same_encoder(folder, processor(page, PROMPTS["text"], return_tensors="pt")["pixel_values"], model.config)
    read = [read_page(model, processor, page, prompt="text", max_new_tokens=64)]

    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "norm" in name}
    model.freeze().unfreeze("projector", "language_model.layers.0", "language_model.layers.1", "language_model.head")
    train(model, processor, page, num_steps=num_steps)
    assert any(not torch.equal(parameter, start[n]) for n, parameter in model.named_parameters() if n in start)

    report = model.write_deepseek_ocr(source, written)
    assert len(report.kept) == 1
    again = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(written)
    trained = model.state_dict()
    for name, tensor in again.state_dict().items():
        # A router is in float32 here, and in the dtype of all others there.
        assert torch.equal(tensor, trained[name].to(again.dtype).to(tensor.dtype)), name
    assert_same_logits(again, written, processor(page, PROMPTS["text"], return_tensors="pt"))
    return [*read, read_page(again, processor, page, prompt="text", max_new_tokens=64)]


def train(model, processor, page, *, num_steps: int) -> None:
    sample = {"image": page, "prompt": PROMPTS["text"], "answer": TEXT}
    options = {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    options |= {"disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1}
    arguments = TrainingArguments("unused", max_steps=num_steps, learning_rate=1e-3, **options)
    trainer = Trainer(model, arguments, train_dataset=[sample] * 16, data_collator=ImageTextCollator(processor))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == num_steps
    assert losses[-1] < losses[0]
    model.eval()


def assert_same_encoder(folder: Path, pixel_values: torch.Tensor, config) -> None:
    """Our encoder's tokens in float32 are those of transformers' own tower with the same weights."""
    ours = DeepSeekOCRVisionModel.from_deepseek_ocr(folder, preset="deepseek-ocr", dtype="float32")
    theirs = UnlimitedOcrForConditionalGeneration.from_pretrained(
        folder, config=unlimited_config(config), dtype="auto"
    )
    tower = theirs.model.vision_tower.float().eval()
    with torch.no_grad():
        expected = tower(pixel_values).last_hidden_state
        assert relative_error(ours(pixel_values).last_hidden_state, expected) < TOLERANCE[torch.float32]


def assert_same_logits(model, folder: Path, inputs) -> None:
    """transformers' own class reads the written checkpoint as we do."""
    theirs = UnlimitedOcrForConditionalGeneration.from_pretrained(
        folder, config=unlimited_config(model.config), dtype=model.dtype
    ).eval()
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        expected = theirs(**inputs).logits[:, -1]
        assert relative_error(model(**inputs).logits[:, -1], expected) < 5 * TOLERANCE[model.dtype]


def words(text: str) -> list[str]:
    return text.split()
