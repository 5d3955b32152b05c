"""Training and generating with the whole DeepSeek-OCR: Trainer, adapters, groups, precision, several processes."""

import pytest
import torch
import training_job
from helpers import TOLERANCE
from PIL import Image, ImageDraw
from training_job import Job, needs_fsdp_on_cpu, result_of, tensors_of
from transformers import Trainer, TrainingArguments
from whole_model import tiny_processor, tiny_whole_model

from deepseek_ocr_vision import ImageTextCollator, gradient_report, layer_decay_groups
from deepseek_ocr_vision.composites import PROMPTS, NoRepeatNGram
from deepseek_ocr_vision.composites.deepseek_ocr import load_balancing_loss
from deepseek_ocr_vision.training import (
    LANGUAGE_MODEL_LORA_PARAMETERS,
    LANGUAGE_MODEL_LORA_TARGETS,
    LORA_TARGETS,
)


WORDS = ("seven", "ox")
STEPS = 3


def samples() -> list[dict]:
    """A page for each word, which is drawn on it."""
    made = []
    for word in WORDS:
        page = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(page).text((8, 40), word, fill="black", font_size=36)
        made.append({"image": page, "prompt": PROMPTS["text"], "answer": word})
    return made


def batch_of(*indexes: int) -> dict:
    chosen = samples()
    return ImageTextCollator(tiny_processor())([chosen[index] for index in indexes])


def train(model, folder, *, steps: int, learning_rate: float) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=len(WORDS),
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    collator = ImageTextCollator(tiny_processor())
    Trainer(model, arguments, train_dataset=samples(), data_collator=collator).train()


def read(model) -> list[str]:
    """What the model reads on the pages, all at once."""
    processor = tiny_processor()
    pages, texts = [sample["image"] for sample in samples()], [sample["prompt"] for sample in samples()]
    inputs = processor(pages, texts, padding=True, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# The load-balancing loss


def test_the_load_balancing_loss_is_in_the_gradients_and_not_in_the_number():
    """Pins the default, which is DeepSeek's, and the way to leave it out."""
    model = tiny_whole_model().train()
    losses, gradients = [], []
    for alpha in (0.0, 0.001, 1.0):
        model.config.aux_loss_alpha = alpha
        model.zero_grad()
        outputs = model(**batch_of(0, 1))
        outputs.loss.backward()
        losses.append(outputs.loss.item())
        gradients.append(model.model.language_model.layers[1].mlp.gate.weight.grad.clone())
        assert (outputs.aux_loss is None) == (alpha == 0)
    assert losses == [losses[0]] * 3
    balance = gradients[2] - gradients[0]
    assert torch.allclose(gradients[1] - gradients[0], 0.001 * balance, atol=1e-3 * balance.abs().max())
    assert balance.norm() > 0
    assert tiny_whole_model().config.aux_loss_alpha == 0.001


def test_evaluation_has_no_load_balancing_loss():
    """Pins that it is of training alone, as in DeepSeek's code."""
    assert tiny_whole_model().eval()(**batch_of(0)).aux_loss is None


def test_experts_that_are_used_alike_have_the_least_loss():
    """Pins the formula at its two ends, and what does not count."""
    even = torch.eye(4)[torch.arange(8) % 4] * 1e-3
    counted = torch.ones(1, 8, dtype=torch.bool)
    assert load_balancing_loss((even,), counted, num_chosen=1).item() == pytest.approx(1.0, abs=1e-3)
    one = torch.eye(4)[torch.zeros(8, dtype=torch.long)] * 100
    assert load_balancing_loss((one, one), counted, num_chosen=1).item() == pytest.approx(8.0)
    half = torch.arange(8)[None] < 4
    assert load_balancing_loss((torch.cat([even[:4], one[:4]]),), half, num_chosen=1).item() < 1.01


def test_accumulated_steps_have_the_gradients_of_one():
    """Pins the part of a step that a batch's load-balancing loss is weighted by."""
    model = tiny_whole_model(aux_loss_alpha=1.0).train()
    whole = batch_of(0, 0)
    num_items = (whole["labels"][:, 1:] != -100).sum()
    model(**whole, num_items_in_batch=num_items).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for _ in range(2):
        model(**batch_of(0), num_items_in_batch=num_items).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-6), name


def test_reentrant_checkpointing_is_refused_where_it_drops_the_load_balancing_loss():
    """Pins router logits without gradients, of which nothing would be seen."""
    model = tiny_whole_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**batch_of(0))
    model.config.aux_loss_alpha = 0.0
    model(**batch_of(0)).loss.backward()


def test_routers_and_experts_get_gradients_in_evaluation_as_well():
    """Pins DeepSeek's code, which has both under `no_grad` outside of training."""
    model = tiny_whole_model().eval()
    model(**batch_of(0, 1)).loss.backward()
    mlp = model.model.language_model.layers[1].mlp
    for parameter in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
        assert parameter.grad.any()


# Groups


def test_layer_groups_hold_every_parameter_once():
    """Pins the one list for freezing and for learning-rate decay, in the order of the data."""
    model = tiny_whole_model()
    groups = model.layer_groups()
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert next(iter(groups)) == "sam.patch_embed"
    assert list(groups)[-7:] == [
        "projector",
        "sequence",
        "language_model.embed_tokens",
        *(f"language_model.layers.{index}" for index in range(3)),
        "language_model.head",
    ]


def test_groups_are_frozen_by_name_and_the_rest_trains():
    """Pins freezing the encoder, the language model, or a layer of it, and gradients through what is frozen."""
    model = tiny_whole_model().train()
    model.freeze("language_model").unfreeze("language_model.layers.2")
    model(**batch_of(0)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    language = {name for name in trained if ".language_model." in name or name.startswith("lm_head")}
    assert language
    assert all(name.startswith("model.language_model.layers.2.") for name in language)
    assert any(name.startswith("model.vision_tower.sam_model.patch_embed") for name in trained)
    with pytest.raises(ValueError, match=r"'decoder' is no layer group.*language_model"):
        model.freeze("decoder")


def test_learning_rates_decay_from_the_text_to_the_pixels():
    """Pins one ladder over both models."""
    model = tiny_whole_model()
    groups = layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5)
    rates = {group["name"]: group["lr"] for group in groups}
    names = list(model.layer_groups())
    assert [rates[name] for name in names] == [0.5 ** (len(names) - index) for index in range(len(names))]


def test_the_gradient_report_knows_the_groups():
    """Pins the rows of both models."""
    model = tiny_whole_model().train()
    report = gradient_report(model, model(**batch_of(0, 1)).loss)
    assert not report.problems
    names = [row.name for row in report.rows]
    assert {"sam.patch_embed", "language_model.layers.0"} <= {name.removeprefix("model.") for name in names}


# Trainer and adapters


def test_a_tiny_model_learns_its_pages_by_heart(tmp_path):
    """Pins the whole path, from pages and labels by Trainer to generated text."""
    model = tiny_whole_model()
    train(model, tmp_path, steps=40, learning_rate=5e-3)
    assert read(model) == list(WORDS)


def test_lora_learns_the_pages_by_heart(tmp_path):
    """Pins the lists of adapted layers, experts included, on an otherwise frozen model."""
    peft = pytest.importorskip("peft")
    language_model = [name for names in LANGUAGE_MODEL_LORA_TARGETS.values() for name in names]
    targets = [*language_model, *LORA_TARGETS["sam"], *LORA_TARGETS["clip"]]
    config = peft.LoraConfig(
        r=8,
        target_modules=targets,
        target_parameters=LANGUAGE_MODEL_LORA_PARAMETERS,
        modules_to_save=["lm_head", "multi_modal_projector"],
    )
    model = peft.get_peft_model(tiny_whole_model(), config)
    train(model, tmp_path, steps=60, learning_rate=5e-3)
    adapted = {name for name, parameter in model.named_parameters() if "lora_B" in name and parameter.any()}
    for part in ("q_proj", "shared_experts.up_proj", "mlp.experts", "sam_model.blocks.1.attn.qkv", "mlp.fc1"):
        assert any(part in name for name in adapted), part
    assert read(model) == list(WORDS)
    assert read(model.merge_and_unload()) == list(WORDS)


def test_the_lists_for_lora_hit_every_linear_layer_of_the_language_model_and_none_of_the_encoder():
    """Pins the names against those of the model."""
    model = tiny_whole_model()
    targets = tuple(f".{name}" for names in LANGUAGE_MODEL_LORA_TARGETS.values() for name in names)
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hit = {name for name in layers if name.endswith(targets)}
    assert hit == {name for name in layers if name.startswith("model.language_model.")}
    parameters = {name for name, _ in model.named_parameters() if name.endswith(tuple(LANGUAGE_MODEL_LORA_PARAMETERS))}
    assert len(parameters) == 4


def test_bfloat16_trains_close_to_float32():
    """Pins weights in bfloat16 with routers in float32, whose gradients are finite and near."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = tiny_whole_model().train()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name.endswith("mlp.gate.weight") else dtype)
        loss = model(**batch_of(0, 1)).loss
        loss.backward()
        gradients.append((loss.item(), model.model.vision_tower.sam_model.patch_embed.proj.weight.grad.float()))
    (loss, gradient), (rough_loss, rough_gradient) = gradients
    assert rough_loss == pytest.approx(loss, rel=TOLERANCE[torch.bfloat16])
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), rough_gradient.flatten(), dim=0) > 0.95


# Generation


def test_left_padded_rows_are_read_as_alone():
    """Pins a batch of prompts of several lengths, with tiles, without, and without an image at all."""
    model, processor = tiny_whole_model(), tiny_processor(tile_size=64, max_patches=4)
    pages = [Image.linear_gradient("L").resize(size) for size in ((256, 128), (60, 60))]
    texts = [PROMPTS["text"], "What is a page?", "<image>\nParse the figure."]
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    batch = processor(pages, texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, (images, text) in enumerate(zip((pages[:1], [], pages[1:]), texts, strict=True)):
        inputs = processor(images, text, return_tensors="pt")
        alone = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert together[row].tolist() == alone.tolist()


def test_ngrams_are_not_repeated_within_a_window():
    """Pins the two options with which the released model is run, against its loops."""
    model, inputs = tiny_whole_model(), tiny_processor()(text="A", return_tensors="pt")
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    plain = model.generate(**inputs, **options)[0].tolist()
    assert repeated(plain, 3)  # an untrained model runs in circles
    always = model.generate(**inputs, **options, logits_processor=[NoRepeatNGram(3)])[0].tolist()
    assert not repeated(always, 3)
    windowed = model.generate(**inputs, **options, logits_processor=[NoRepeatNGram(3, 12)])[0].tolist()
    assert repeated(windowed, 3)
    assert all(not repeated(windowed[start : start + 13], 3) for start in range(len(windowed) - 12))
    for window_size in (2, 0, 3.0):
        with pytest.raises(ValueError, match="`window_size` is"):
            NoRepeatNGram(3, window_size)


def repeated(ids: list[int], size: int) -> bool:
    ngrams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return len(set(ngrams)) < len(ngrams)


# Several processes


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    tiny_whole_model(aux_loss_alpha=0.0).save_pretrained(folder)
    return str(folder)


def job(folder, start: str, *, num_processes: int, **fields) -> Job:
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 2 // num_processes}
    arguments["ddp_find_unused_parameters"] = False
    made = Job(str(folder), "deepseek_ocr", arguments, start_from=start, **fields)
    made.images = False  # half of the batches of one sample have none
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory, start) -> Job:
    made = job(tmp_path_factory.mktemp("alone"), start, num_processes=1)
    assert training_job.start(made) == [0]
    return made


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=needs_fsdp_on_cpu)])
def test_two_processes_train_the_whole_model_as_one_does(tmp_path, start, alone, sharded):
    """Pins DDP and FSDP2: a mean over processes instead of tokens, and experts or an encoder without gradient."""
    made = job(tmp_path, start, num_processes=2)
    if sharded:
        made.fsdp = True
        made.environment = {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "SamBlock,ClipLayer,UnlimitedOcrTextDecoderLayer",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }
    assert training_job.start(made, num_processes=2) == [0, 0]
    losses, expected = ([entry["loss"] for entry in result_of(which)["log"]] for which in (made, alone))
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=TOLERANCE[torch.float32])
    gradients, expected = tensors_of(made, "gradients"), tensors_of(alone, "gradients")
    assert gradients.keys() == expected.keys()
    for name in expected:
        error = (gradients[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-3, name
    if sharded:
        assert {"SamBlock", "ClipLayer", "UnlimitedOcrTextDecoderLayer"} <= set(result_of(made)["units"])
