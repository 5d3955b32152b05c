"""Checkpoints of `Trainer`: which of them is whole, and that its weights reach the model, a LLaVA's above all."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import training_job
from helpers import assert_same_weights, tiny_config
from safetensors.torch import load_file, save_file
from torch import nn
from training_job import Job, result_of, trainer_of
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint, load_sharded_checkpoint

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites import build_model, build_processor
from deepseek_ocr_vision.training.resuming import (
    last_complete_checkpoint,
    load_weights,
    make_resumable,
    resume,
    why_incomplete,
)


STEPS = 4
ARGUMENTS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Job:
    """A run of a LLaVA with a checkpoint in the middle and one at the end."""
    job = Job(str(tmp_path_factory.mktemp("finished")), arguments=ARGUMENTS)
    assert training_job.start(job) == [0]
    return job


@pytest.fixture
def run(finished, tmp_path) -> Job:
    """A copy of that run, to do harm to."""
    folder = tmp_path / "run"
    shutil.copytree(finished.output_dir, folder)
    return Job(str(folder), arguments=ARGUMENTS)


def losses(state: TrainerState) -> list[float]:
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def expected_losses(job: Job) -> list[float]:
    return [entry["loss"] for entry in result_of(job)["log"]]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def tiny_llava(**fields) -> LlavaForConditionalGeneration:
    text_config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tiny_config(), text_config=text_config, vision_feature_layer=-1, **fields)
    )


# Which checkpoint is whole


@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_with_a_file_cut_off_or_missing_is_passed_over(run, damage, name):
    """Pins the newest folder taken as it is, which is what `Trainer` does."""
    newest = Path(run.output_dir, "checkpoint-4")
    assert last_complete_checkpoint(run.output_dir) == str(newest)
    damage(newest / name)
    assert get_last_checkpoint(run.output_dir) == str(newest)
    assert last_complete_checkpoint(run.output_dir) == str(newest.with_name("checkpoint-2"))
    assert name.split(".")[0].split("_")[0] in why_incomplete(newest).replace("weights", "model")
    with pytest.raises(ValueError, match=r"`checkpoint` .*checkpoint-4 is not complete"):
        resume(trainer_of(run), checkpoint=newest)


def test_a_missing_shard_is_named(run):
    """Pins a checkpoint of several files that counts as whole because each that is there is."""
    folder = Path(run.output_dir, "checkpoint-4")
    (folder / "model.safetensors").unlink()
    build_model(build_processor(page_size=128)).save_pretrained(folder, max_shard_size="2MB")
    assert why_incomplete(folder) is None
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert why_incomplete(folder) == f"{shard.name} is missing"
    (folder / "model.safetensors.index.json").unlink()
    assert why_incomplete(folder) == "model.safetensors.index.json is missing"


def test_what_an_interrupted_save_left_aside_does_not_count(run):
    """Pins a checkpoint that was saved again, whole, and still counts as cut off."""
    aside = Path(run.output_dir, "checkpoint-4", ".cache", "huggingface", "deepseek_ocr_vision-1")
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"half")
    assert last_complete_checkpoint(run.output_dir).endswith("checkpoint-4")


def test_a_folder_without_checkpoints_has_none(tmp_path):
    """Pins a crash at the first start, and at folders that somebody else made."""
    assert last_complete_checkpoint(tmp_path / "new") is None
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-3").write_text("")
    assert last_complete_checkpoint(tmp_path) is None


def test_checkpoints_are_ordered_by_step(run):
    """Pins the order of the alphabet, in which step 10 comes before step 4."""
    for step in (4, 10):
        target = Path(run.output_dir, f"checkpoint-{step}")
        shutil.copytree(Path(run.output_dir, "checkpoint-2"), target, dirs_exist_ok=True)
        state = TrainerState.load_from_json(str(target / "trainer_state.json"))
        state.global_step = step
        state.save_to_json(str(target / "trainer_state.json"))
    assert last_complete_checkpoint(run.output_dir) == str(Path(run.output_dir, "checkpoint-10"))


def test_a_checkpoint_of_weights_alone_is_none_to_go_on_from(run):
    """Pins a resumed run whose optimizer starts anew, as `save_only_model` leaves nothing else."""
    folder = Path(run.output_dir, "checkpoint-4")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    assert "save_only_model" in why_incomplete(folder)


def test_checkpoints_of_fewer_processes_are_not_overwritten_in_silence(run):
    """Pins a run that starts anew, over what it had, because it got more processes."""
    for step in (2, 4):
        folder = Path(run.output_dir, f"checkpoint-{step}")
        for index in (1, 0):
            shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{index}.pth")
        (folder / "rng_state.pth").unlink()
    assert last_complete_checkpoint(run.output_dir, num_processes=2).endswith("checkpoint-4")
    assert last_complete_checkpoint(run.output_dir, num_processes=1).endswith("checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-4 does not hold the states of `num_processes` 4"):
        last_complete_checkpoint(run.output_dir, num_processes=4)


def test_the_launchers_number_of_processes_counts_unless_one_is_given(run, monkeypatch):
    """Pins a check for one process in a run of several, which passes when the others' states are missing."""
    folder = Path(run.output_dir, "checkpoint-4")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_complete_checkpoint(run.output_dir).endswith("checkpoint-2")
    assert last_complete_checkpoint(run.output_dir, num_processes=1).endswith("checkpoint-4")


def test_what_deepspeed_writes_is_whole_with_the_states_of_all_processes(run):
    """Pins DeepSpeed's folders taken for incomplete, having no `optimizer.pt`, or for whole whatever is there."""
    folder = Path(run.output_dir, "checkpoint-4")
    for name in ("optimizer.pt", "scheduler.pt", "model.safetensors"):
        (folder / name).unlink()
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_0.pth")
    (folder / "rng_state.pth").rename(folder / "rng_state_1.pth")
    states = folder / "global_step4"
    states.mkdir()
    for index in (0, 1):
        torch.save({}, states / f"bf16_zero_pp_rank_{index}_mp_rank_00_optim_states.pt")
    assert why_incomplete(folder, num_processes=2) == "there are no weights"
    (folder / "latest").write_text("global_step4")
    assert why_incomplete(folder, num_processes=2) is None
    (states / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "of process 1 is missing from global_step4" in why_incomplete(folder, num_processes=2)


# Weights that reach the model


def test_trainer_as_it_is_resumes_a_llava(finished, run):
    """Pins `train(resume_from_checkpoint=...)` going on with the weights that the model was built with."""
    trainer = trainer_of(run)
    make_resumable(trainer.model)
    trainer.train(resume_from_checkpoint=str(Path(run.output_dir, "checkpoint-2")))
    assert losses(trainer.state) == expected_losses(finished)


def test_trainer_as_it_is_loads_the_best_weights_of_a_llava(tmp_path):
    """Pins `load_best_model_at_end` leaving the last weights in the model."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # The best is to be the first: that with the highest loss.
    best |= {"metric_for_best_model": "loss", "greater_is_better": True}
    job = Job(str(tmp_path), arguments=ARGUMENTS | best)
    trainer = trainer_of(job)
    state = resume(trainer)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    first = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    last = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_weights(trainer.model, first)
    assert not torch.equal(first.lm_head.weight, last.lm_head.weight)
    again = trainer_of(job)
    resume(again)
    assert_same_weights(again.model, first)


def test_names_are_translated_file_by_file(tmp_path):
    """Pins a checkpoint of several files, each of which holds a part of the weights, taken for weights that lack."""
    model, other = tiny_llava(), tiny_llava()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    load_sharded_checkpoint(make_resumable(other), str(tmp_path), strict=False)
    assert_same_weights(other, model)
    third = tiny_llava()
    load_weights(third, tmp_path)
    assert_same_weights(third, model)


def test_names_are_translated_in_a_part_of_a_larger_module(tmp_path):
    """Pins a hook that knows nothing of the prefix under which its model stands."""
    model, module = tiny_llava(), nn.ModuleDict({"reader": tiny_llava(), "head": nn.Linear(2, 2)})
    model.save_pretrained(tmp_path)
    saved = {f"reader.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    saved |= {f"head.{name}": tensor for name, tensor in module["head"].state_dict().items()}
    make_resumable(module).load_state_dict(saved)
    assert_same_weights(module["reader"], model)


def test_tied_weights_that_are_saved_once_are_not_missed(tmp_path):
    """Pins a strict loader that takes the tied head, which no file holds, for missing."""
    model, other = tiny_llava(tie_word_embeddings=True), tiny_llava(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert_same_weights(other, model)
    assert other.lm_head.weight is other.get_input_embeddings().weight


def test_float32_weights_are_not_rounded_to_the_dtype_of_the_configuration(tmp_path):
    """Pins master weights that lose half their digits at every resume, as `from_pretrained` obeys `config.dtype`."""
    model = tiny_llava()
    model.config.dtype = model.config.text_config.dtype = torch.bfloat16
    other = copy.deepcopy(model)
    nn.init.zeros_(other.lm_head.weight)
    torch.manual_seed(1)
    nn.init.normal_(model.lm_head.weight)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    load_weights(other, tmp_path)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_weights_of_another_model_are_an_error_also_where_trainer_is_content_with_a_warning(tmp_path):
    """Pins a model that goes on with the weights it has."""
    encoder = DeepSeekOCRVisionModel(tiny_config())
    encoder.save_pretrained(tmp_path)
    model = make_resumable(tiny_llava())
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="not those of LlavaForConditionalGeneration: no place for "):
        model.load_state_dict(encoder.state_dict(), strict=False)
    with pytest.raises(ValueError, match="is not of this LlavaForConditionalGeneration: no place for "):
        load_weights(model, tmp_path)
    assert_same_weights(model, before)


def test_weights_of_another_size_are_an_error_that_names_them(tmp_path):
    """Pins weights that are drawn anew where they do not fit."""
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["language_model.lm_head.weight"] = torch.zeros(7, 16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for lm_head\.weight of shape \(7, 16\)"):
        load_weights(model, tmp_path)


def test_a_missing_weight_is_an_error_that_names_it(tmp_path):
    """Pins a weight that keeps what it was drawn as, under a warning."""
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    weights = copy.deepcopy(load_file(tmp_path / "model.safetensors"))  # of old safetensors it is the file itself
    del weights["vision_tower.sam_model.pos_embed"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks model\.vision_tower\.sam_model\.pos_embed"):
        load_weights(model, tmp_path)
    with pytest.raises(RuntimeError, match="pos_embed"):
        make_resumable(model).load_state_dict(weights)


def test_an_adapter_reaches_a_model_of_peft_and_no_other(tmp_path):
    """Pins an adapter that is taken for no weights at all."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv_proj"])
    first, second = (peft.get_peft_model(DeepSeekOCRVisionModel(tiny_config()), config) for _ in range(2))
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    first.save_pretrained(tmp_path)
    load_weights(second, tmp_path)
    adapters = [peft.get_peft_model_state_dict(model) for model in (first, second)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    with pytest.raises(ValueError, match="holds an adapter, and the model is a DeepSeekOCRVisionModel"):
        load_weights(DeepSeekOCRVisionModel(tiny_config()), tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path):
    """Pins a model that was never loaded, with nobody told."""
    with pytest.raises(ValueError, match="holds no weights"):
        load_weights(tiny_llava(), tmp_path)


# Going on


def test_a_run_that_is_finished_is_loaded_and_takes_no_step_more(finished, run):
    """Pins the step that `Trainer` takes when it resumes from the last checkpoint."""
    trainer = trainer_of(run)
    assert losses(resume(trainer)) == expected_losses(finished)
    last = LlavaForConditionalGeneration.from_pretrained(Path(run.output_dir, "checkpoint-4"))
    assert_same_weights(trainer.model, last)


def test_a_finished_run_that_is_to_go_on_longer_does(finished, run):
    """Pins a run that counts as finished by what its arguments once were."""
    run.arguments = ARGUMENTS | {"max_steps": STEPS + 1}
    state = resume(trainer_of(run))
    assert losses(state)[:STEPS] == expected_losses(finished)
    assert state.global_step == STEPS + 1


def test_an_earlier_checkpoint_is_not_resumed_beside_later_ones(run):
    """Pins a mixture of two runs in one folder, when the second is killed while it overwrites the first."""
    earlier = Path(run.output_dir, "checkpoint-2")
    with pytest.raises(ValueError, match=r"has later ones beside it, such as .*checkpoint-4; move them away"):
        resume(trainer_of(run), checkpoint=earlier)
    shutil.rmtree(Path(run.output_dir, "checkpoint-4"))
    assert resume(trainer_of(run), checkpoint=earlier).global_step == STEPS


def test_a_trainer_that_makes_its_model_anew_is_refused(run):
    """Pins a model that is loaded, and replaced by a new one when training starts."""
    trainer = Trainer(model_init=lambda: tiny_llava(), args=trainer_of(run).args, train_dataset=[])
    with pytest.raises(ValueError, match="`model_init`"):
        resume(trainer)
