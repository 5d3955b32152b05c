"""The main job, `examples/finetune.py`: its pages, its two runs, what it leaves, and going on after a crash."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weights
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    set_seed,
)

from deepseek_ocr_vision.composites import build_model, build_processor
from deepseek_ocr_vision.composites.small import byte_tokenizer
from deepseek_ocr_vision.training.collator import NOT_TRAINED_ON


datasets = pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rapidfuzz")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import pages  # noqa: E402
from files import replacing, write_text  # noqa: E402
from finetuning import runs  # noqa: E402
from finetuning.arguments import names_checkpoint_of, parse_arguments  # noqa: E402
from finetuning.output import claim_output_folder  # noqa: E402
from finetuning.schedule import fit_to_data  # noqa: E402
from receipts import draw_receipt, read_metadata, text_of, write_metadata, write_receipts  # noqa: E402


STEPS = 6
FEW_STEPS = [
    *("--max_steps", str(STEPS), "--warmup_steps", "2", "--logging_steps", "1", "--save_steps", "2"),
    *("--eval_steps", "3", "--per_device_train_batch_size", "4", "--num_pages", "40", "--num_held_out_pages", "6"),
]


def command(output: Path, *options: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / "finetune.py"), "--output_dir", str(output), *FEW_STEPS, *options]


def environment() -> dict[str, str]:
    """One thread: on busy cores two of them wait for each other far longer than such small work takes."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def finetune_in_a_process(output: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(output, *options), capture_output=True, text=True, check=False, env=environment())


def losses(output: Path, run: str) -> list[tuple]:
    """What `Trainer` logged, less what a clock says."""
    history = json.loads((output / run / "result.json").read_text())["history"]
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [tuple(entry.get(key) for key in kept) for entry in history if "loss" in entry or "eval_loss" in entry]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output folder of a whole run of a few steps, started from the command line and never cut off."""
    output = tmp_path_factory.mktemp("finetune") / "output"
    process = finetune_in_a_process(output)
    assert process.returncode == 0, process.stderr
    return output


@pytest.fixture
def resumable(finished, tmp_path) -> Path:
    """A copy of the output folder, as if both runs had been cut off after their last checkpoint."""
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    for run in ("trained", "frozen"):
        (output / run / "result.json").unlink()
    return output


def parse(output: Path, *options: str):
    return parse_arguments(command(output, *options)[2:])


# Pages of handwritten digits


def test_no_scan_is_both_trained_on_and_held_out():
    """Splitting pages and not scans would put the same stroke on both sides, and the accuracy would mean nothing."""
    for seed in range(3):
        scans = pages.split_scans(seed)
        train, held_out = set(scans["train"].indexes), set(scans["held_out"].indexes)
        assert (len(train), len(held_out)) == (1400, 397)
        assert train | held_out == set(range(1797))


def test_scans_keep_their_labels_through_the_shuffle():
    """Shuffling images and digits by two orders would teach nonsense."""
    bunch = pages.load_digits()
    scans = pages.split_scans(3)["held_out"]
    assert scans.digits == [bunch.target[index] for index in scans.indexes]
    ink = [255 - int(image.getpixel((4, 3))) for image in scans.images]
    assert ink == [round(bunch.images[index][3, 4] * 255 / 16) for index in scans.indexes]


def handwritten(seed: int = 0, split: str = "train", page_size: int = 128) -> pages.HandwrittenPages:
    scans = pages.split_scans(seed)[split]
    return pages.HandwrittenPages(scans, num_pages=50, page_size=page_size, seed=seed, split=split)


def same(first: dict, second: dict) -> bool:
    return first["text"] == second["text"] and first["image"].tobytes() == second["image"].tobytes()


def test_a_page_follows_from_seed_split_and_index_alone():
    """A generator carried from page to page would make a page depend on the workers and on where a run resumed."""
    train = handwritten()
    last_first = [train[index] for index in reversed(range(10))][::-1]
    assert all(same(page, handwritten()[index]) for index, page in enumerate(last_first))
    assert not same(train[0], train[1])
    assert not same(train[0], handwritten(seed=1)[0])
    assert handwritten(split="held_out").stream != train.stream


def test_iterating_over_pages_ends():
    """Without an IndexError at the end, a `for` loop over the pages never stops."""
    assert len(list(handwritten())) == 50


def test_text_is_read_row_by_row_from_the_left():
    """Text in the order of drawing, or by columns, cannot be told from a page."""
    train = handwritten(page_size=192)
    for index in range(20):
        rng = pages.np.random.default_rng([*train.stream, index])
        digits = train.choose_digits(rng)
        cells = [cell for cell, _ in digits]
        assert cells == sorted(cells)
        assert 5 <= len(cells) == len(set(cells)) <= 9
        rows = train[index]["text"].split("\n")
        expected: dict[int, str] = {}
        for (row, _), scan in digits:
            expected[row] = expected.get(row, "") + str(train.scans.digits[scan])
        assert rows == list(expected.values())


def test_digits_lie_in_their_cells_without_overlap():
    """A digit across a cell's edge would be cut or overlap its neighbour, and the page could not be read."""
    train = handwritten()
    for index in range(20):
        rng = pages.np.random.default_rng([*train.stream, index])
        cells = {cell for cell, _ in train.choose_digits(rng)}
        image = train[index]["image"].convert("L")
        for row in range(2):
            for column in range(2):
                cell = image.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
                assert (cell.getextrema()[0] < 128) == ((row, column) in cells)


# Batches


def test_labels_are_the_text_and_its_end_alone():
    """Labels on image tokens or padding would train the model to write those."""
    processor = build_processor(page_size=128)
    batch = runs.Collator(processor)(
        [{"image": Image.new("RGB", (128, 128)), "text": text} for text in ("7", "12\n3")]
    )
    eos = processor.tokenizer.eos_token_id
    for row, text in zip(batch["labels"], ("7", "12\n3"), strict=True):
        kept = row[row != NOT_TRAINED_ON].tolist()
        assert kept == [*processor.tokenizer(text)["input_ids"], eos]
    assert (batch["input_ids"][0] == processor.image_token_id).sum() == 4


def test_a_page_whose_text_names_the_image_token_is_refused():
    """Such a text would be taken for a second image, with an error far away."""
    processor = build_processor(page_size=128)
    with pytest.raises(ValueError, match="<image>"):
        runs.Collator(processor)([{"image": Image.new("RGB", (128, 128)), "text": "see <image>"}])


@pytest.mark.parametrize("text", ["0123456789\n42", "naïve café, 漢字 \t🙂"])
def test_the_byte_tokenizer_gives_any_text_back(text):
    """A vocabulary of digits, or a decoder that tidies spaces, would silently change the user's text."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


# The whole of it


def test_everything_is_left_in_the_output_folder(finished):
    """A name that changes breaks the README and whoever reads these files."""
    files = {str(path.relative_to(finished)) for path in finished.rglob("*")}
    assert files >= {"report.html", "composite/README.md"}
    assert files >= {"report.md", "loss.png", "predictions.png", "encoder/config.json", "encoder/model.safetensors"}
    assert files >= {"composite/config.json", "composite/model.safetensors", "composite/tokenizer.json"}
    assert not [file for file in files if ".tmp" in file]
    for name in ("loss.png", "predictions.png"):
        with Image.open(finished / name) as image:
            image.verify()


def test_the_report_holds_both_runs_and_the_command(finished):
    """Numbers without the command and the versions cannot be measured again."""
    text = (finished / "report.md").read_text()
    for expected in (
        "character error rate",
        "encoder trained",
        "encoder frozen",
        "finetune.py --output_dir",
        "Alpaydin",
    ):
        assert expected in text
    assert f"transformers {version('transformers')}" in text
    assert "bit for bit equal" in text


def test_the_saved_encoder_is_the_trained_one(finished):
    """Saving the encoder as it started, or the composite's before training, would pass unnoticed."""
    composite = LlavaForConditionalGeneration.from_pretrained(finished / "composite")
    encoder = AutoModel.from_pretrained(finished / "encoder")
    assert all(
        torch.equal(value, encoder.state_dict()[key])
        for key, value in composite.model.vision_tower.state_dict().items()
    )
    page = handwritten()[0]["image"]
    pixels = AutoProcessor.from_pretrained(finished / "encoder")(images=page, return_tensors="pt")["pixel_values"]
    processor = AutoProcessor.from_pretrained(finished / "composite")
    inputs = processor(images=page, text="<image>", return_tensors="pt")
    assert pixels.shape == (1, 3, 128, 128)
    assert torch.equal(pixels, inputs["pixel_values"])


def test_training_changes_every_weight_of_the_encoder_and_freezing_none(finished):
    """A cut graph leaves weights as they were, and a forgotten `freeze` makes both runs the same."""
    start = initial_encoder()
    for run, changes in (("trained", True), ("frozen", False)):
        checkpoint = LlavaForConditionalGeneration.from_pretrained(finished / run / f"checkpoint-{STEPS}")
        tower = checkpoint.model.vision_tower.state_dict()
        changed = {key: not torch.equal(value, start[key]) for key, value in tower.items()}
        assert set(changed.values()) == {changes}, changed


def initial_encoder() -> dict[str, torch.Tensor]:
    set_seed(0)
    model = build_model(build_processor())
    return model.model.vision_tower.state_dict()


def test_both_runs_start_alike_and_see_the_same_pages(finished):
    """Another start or another order would make the comparison one of luck."""
    trained, frozen = ([entry[1] for entry in losses(finished, run)] for run in ("trained", "frozen"))
    # Attention has another kernel where no gradient is needed, so the last bit may differ.
    assert trained[0] == pytest.approx(frozen[0], rel=1e-5)
    assert trained[STEPS - 2] != pytest.approx(frozen[STEPS - 2], rel=1e-5)


# Going on


def test_killed_and_resumed_gives_the_losses_of_an_uninterrupted_run(finished, tmp_path):
    """Lost optimizer states, another page order or new random numbers would show in the last bits of the losses."""
    output = tmp_path / "output"
    resume = ("--resume_from_checkpoint", "true")
    kill_after_checkpoint(output / "trained", *resume)
    leave_unfinished(output / "trained")
    kill_after_checkpoint(output / "frozen", *resume)
    process = finetune_in_a_process(output, *resume)
    assert process.returncode == 0, process.stderr
    assert "The run with the encoder trained is finished" in process.stderr
    assert re.search(r"Going on from .*frozen/checkpoint-\d", process.stderr)
    for run in ("trained", "frozen"):
        assert losses(output, run) == losses(finished, run)


def kill_after_checkpoint(run: Path, *options: str) -> None:
    """Run until the run has its first checkpoint, and kill the process then without warning."""
    line = command(run.parent, *options)
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()) as process:
        wait_for(run / "checkpoint-2" / "trainer_state.json", process)
        process.send_signal(signal.SIGKILL)
    assert not (run / "result.json").exists()


def leave_unfinished(run: Path) -> None:
    """Leave what a process leaves that is killed while it writes the second checkpoint."""
    folder = run / "checkpoint-4"
    shutil.copytree(run / "checkpoint-2", folder, dirs_exist_ok=True)
    truncate(folder / "optimizer.pt")
    (folder / "trainer_state.json").unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600  # on cores that others keep busy a start alone takes minutes
    while not path.exists():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("lost", [(), ("checkpoint-6/scheduler.pt",)])
def test_killed_at_the_end_gives_the_log_of_a_run_that_was_not(resumable, lost):
    """`Trainer` takes one step too many from the last checkpoint, and stumbles over one that was cut off."""
    run = resumable / "frozen"
    for name in lost:
        (run / name).unlink()
    _, model_arguments, arguments = parse(resumable, "--resume_from_checkpoint", "true")
    processor = build_processor(page_size=128)
    set_seed(0)
    model = build_model(processor)
    runs.freeze(model.model.vision_tower, "frozen", [])
    splits = {"train": handwritten(), "held_out": handwritten(split="held_out")}
    fit_to_data(arguments, num_pages=50, page_size=128, is_own=False)
    job = runs.Job(splits, processor, model_arguments, arguments, report=None)
    history = runs.train(runs.new_trainer(model, job, run), "true").log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [*range(1, STEPS + 1)]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_finished_run_is_kept_unless_its_checkpoint_is_asked_for(finished):
    """Training a finished run again wastes its time; not training it on request ignores the user."""
    checkpoint = str(finished / "trained" / "checkpoint-4")
    assert names_checkpoint_of(finished / "trained", checkpoint)
    assert not names_checkpoint_of(finished / "frozen", checkpoint)


@pytest.mark.parametrize("path", ["checkpoint-4", "trained", "other/checkpoint-4"])
def test_a_checkpoint_that_is_no_run_of_the_output_folder_is_refused(finished, path):
    """A path with a typing error would quietly resume from somewhere else."""
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        parse(finished, "--resume_from_checkpoint", str(finished / path))


def test_an_output_folder_in_use_is_refused(finished):
    """Without this a second run would mix its checkpoints with the first one's."""
    before = (finished / "report.md").read_bytes()
    with pytest.raises(FileExistsError, match=r"--resume_from_checkpoint true.*--overwrite"):
        finetune.main(command(finished)[2:])
    assert (finished / "report.md").read_bytes() == before


def test_resuming_with_other_arguments_is_refused(finished):
    """The second half of a run with another seed or learning rate belongs to no run at all."""
    with pytest.raises(ValueError, match=r"--learning_rate is 0\.5 and was 0\.001; --seed is 3 and was 0"):
        finetune.main(
            command(finished, "--resume_from_checkpoint", "true", "--seed", "3", "--learning_rate", "0.5")[2:]
        )


def test_overwriting_deletes_what_the_script_made_and_nothing_else(finished, tmp_path):
    """A folder's other files are the user's."""
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    (output / "notes.txt").write_text("mine")
    (output / ".encoder.tmp-killed").mkdir()
    claim_output_folder(output, {}, resume=False, overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == ["arguments.json", "notes.txt"]


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume_from_checkpoint", "true")])
def test_a_folder_that_the_script_did_not_make_is_left_alone(tmp_path, options):
    """`--output_dir .` beside someone's own `encoder/` must not replace it."""
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not make"):
        finetune.main(command(tmp_path, *options)[2:])
    assert (tmp_path / "encoder" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("option", ["--encoder", "--language_model", "--data"])
def test_what_is_read_cannot_lie_where_is_written(finished, option):
    """`--overwrite` would delete the checkpoint that the run is to start from."""
    with pytest.raises(ValueError, match=f"{option} .*lies in --output_dir"):
        parse(finished, option, str(finished / "encoder"), "--overwrite")


def test_an_unknown_layer_group_is_named_and_the_output_folder_stays_free(tmp_path):
    """A typing error that occupies the output folder has to be cleaned up by hand before the next try."""
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'sam.neckk' is no layer group"):
            finetune.main(command(tmp_path / "output", "--freeze", "sam.neckk")[2:])


# Your own pages, encoder and language model


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of eight receipts; the first is a CMYK JPEG."""
    folder = write_receipts(tmp_path / "my pages", 8)
    rows = read_metadata(folder)
    draw_receipt(text_of(0)).convert("CMYK").save(folder / "scans" / "0.jpg")
    write_metadata(folder, [rows[0] | {"file_name": "scans/0.jpg"}, *rows[1:]])
    return folder


def test_own_pages_encoder_and_language_model_train_and_frozen_groups_stay(finished, folder, tmp_path):
    """Starting from new weights instead of the checkpoints, or training what was to be frozen, goes unnoticed."""
    language_model = tmp_path / "language_model"
    tokenizer = byte_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>").save_pretrained(
        language_model
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(language_model)
    shutil.copytree(finished / "encoder", tmp_path / "start")
    options = ["--data", str(folder), "--encoder", str(tmp_path / "start"), "--language_model", str(language_model)]
    options += ["--freeze", "sam", "clip.embeddings", "--page_size", "192", "--no_compare_frozen"]
    options += ["--held_out_fraction", "0.25"]
    process = finetune_in_a_process(tmp_path / "output", *options)
    assert process.returncode == 0, process.stderr
    start = AutoModel.from_pretrained(tmp_path / "start").state_dict()
    end = AutoModel.from_pretrained(tmp_path / "output" / "encoder").state_dict()
    changed = {key for key in start if not torch.equal(start[key], end[key])}
    assert changed == {key for key in start if key.startswith("vision_model.transformer.")}
    report = (tmp_path / "output" / "report.md").read_text()
    assert "6 pages to train on, 2 held out" in report
    assert "encoder frozen" not in report


def finetune_here(output: Path, *options: str) -> None:
    """Run the example in this process."""
    finetune.main(command(output, "--use_cpu", "true", "--disable_tqdm", "true", *options)[2:])


def test_the_report_is_of_the_best_model_where_that_is_the_one_that_is_saved(folder, tmp_path):
    """Pins the last loss beside the weights of an earlier step."""
    output = tmp_path / "output"
    options = ["--data", str(folder), "--page_size", "128", "--no_compare_frozen", "--load_best_model_at_end", "true"]
    # The first evaluation is the best one if a large loss is what is wanted.
    options += ["--metric_for_best_model", "loss", "--greater_is_better", "true", "--eval_steps", "2"]
    finetune_here(output, *options)
    result = json.loads((output / "trained" / "result.json").read_text())
    found = {entry["step"]: entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry}
    assert len(found) == 3
    assert result["step"] == max(found, key=found.get) < STEPS
    assert result["loss"] == found[result["step"]]
    checkpoint = output / "trained" / f"checkpoint-{result['step']}"
    best, saved = (LlavaForConditionalGeneration.from_pretrained(path) for path in (checkpoint, output / "composite"))
    assert_same_weights(saved, best)
    assert f"{result['loss']:.4f}" in (output / "report.md").read_text()


def test_changed_pages_are_not_gone_on_with(folder, tmp_path):
    """Pins old scores under new images: what is finished was kept whatever its pages had become."""
    options = ["--data", str(folder), "--page_size", "128", "--no_compare_frozen", "--max_steps", "1"]
    finetune_here(tmp_path / "output", *options)
    draw_receipt("another").save(folder / "scans" / "3.png")
    with pytest.raises(ValueError, match="what --data holds has changed since"):
        finetune_here(tmp_path / "output", *options, "--resume_from_checkpoint", "true")


@pytest.mark.parametrize("cause", ["disk", "drawing", "saving"])
def test_what_would_fail_at_the_end_fails_before_the_first_step(folder, tmp_path, monkeypatch, cause):
    """Pins a run of hours that cannot be saved or drawn."""
    if cause == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
        message = "0.0 GB left"
    elif cause == "drawing":
        monkeypatch.setattr(finetune, "draw_predictions", fail)
        message = "cannot be done"
    else:
        monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", fail)
        message = "cannot be done"
    options = ["--data", str(folder), "--page_size", "128", "--no_compare_frozen"]
    with pytest.raises(OSError, match=message):
        finetune_here(tmp_path / "output", *options)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["arguments.json"]


def fail(*arguments, **options) -> None:
    raise OSError("cannot be done")


def test_what_is_trained_is_saved_before_anything_is_read_or_drawn(folder, tmp_path, monkeypatch):
    """Pins a model that is lost because its report fails."""
    monkeypatch.setattr(runs, "read_pages", fail)
    options = ["--data", str(folder), "--page_size", "128", "--no_compare_frozen"]
    with pytest.raises(OSError, match="cannot be done"):
        finetune_here(tmp_path / "output", *options)
    for name in ("composite", "encoder"):
        assert (tmp_path / "output" / name / "model.safetensors").is_file()


# Files


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    """A report cut off by a full disk must not take the place of a whole one."""
    path = tmp_path / "report.md"
    write_text(path, "old")

    def fail_halfway() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
