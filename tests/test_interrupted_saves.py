"""Saves that are killed or fail at any point: the folder loads as it was or as it was to be, bit for bit."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import EVERY_FEATURE_MODE, assert_same_weights, run_python, tiny_config
from hub_server import HubServer
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor
from deepseek_ocr_vision.saving.atomic import PENDING
from deepseek_ocr_vision.saving.checksums import write_checksums
from deepseek_ocr_vision.saving.staging import PREFIX
from deepseek_ocr_vision.weights import check_checkpoint


ONE_FILE, MANY_FILES = "5GB", "120KB"
# What changes a folder, as Python tells audit hooks before it does it. "os.rename" is `os.replace` too.
WRITES = ("open", "os.link", "os.mkdir")
EXCHANGES = ("os.link", "os.remove", "os.rename")
CHANGES = (*WRITES, "os.remove", "os.rename", "os.rmdir")
CODE = "_deepseek_ocr_vision.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")


@pytest.fixture(autouse=True)
def memory_for_a_disk(monkeypatch) -> None:
    """What has been written outlives a process without `fsync`, which takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def model_of(seed: int, feature_mode: str = "residual") -> DeepSeekOCRVisionModel:
    torch.manual_seed(seed)
    return DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))


def in_a_child(action: Callable[[], object]) -> int:
    """Run something in a forked process; its return code, 1 for an error, negative if a signal killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_change(folder: Path, events: tuple[str, ...], react: Callable[[], object]) -> None:
    """Call `react` right before each change of something in a folder, code aside, for the rest of the process."""

    def watch(event: str, arguments: tuple) -> None:
        if event not in events:
            return
        paths = [str(argument) for argument in arguments[:2]]
        is_read = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if any(path.startswith(f"{folder}/") for path in paths) and not is_read and CODE not in "".join(paths):
            react()

    sys.addaudithook(watch)


def kills(folder: Path, action: Callable[[], object], events: tuple[str, ...] = CHANGES) -> Iterator[int]:
    """Kill an action right before every one of its changes in a folder, which is as it was each time before."""
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    left = 0

    def count_down() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for number in range(1, 1000):
        left = number
        code = in_a_child(lambda: (on_change(folder, events, count_down), action()))
        if code == 0:
            return
        assert code == -signal.SIGKILL
        yield number
        shutil.rmtree(folder)
        shutil.copytree(before, folder)


def same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> bool:
    actual, expected = actual.state_dict(), expected.state_dict()
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def files_in(folder: Path) -> set[str]:
    """Everything below a folder, hidden files too, but not the code."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.name.endswith(CODE)}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder) if (folder / name).is_file()}


# Killed


@pytest.mark.parametrize(
    ("old_mode", "old_size", "new_mode", "new_size"),
    [
        ("residual", ONE_FILE, "concat", ONE_FILE),
        ("projected", MANY_FILES, "residual", ONE_FILE),
        ("residual", ONE_FILE, "concat", MANY_FILES),
        ("concat", MANY_FILES, "concat", MANY_FILES),
    ],
)
def test_a_model_saved_over_another_and_killed_loads_as_one_of_the_two(
    tmp_path, old_mode, old_size, new_mode, new_size
):
    """Pins weights of one model under the configuration of another, shards of two saves, a folder without any, and
    half a save among the files that a plain `upload_folder` publishes.
    """
    old, new, folder = model_of(1, old_mode), model_of(2, new_mode), tmp_path / "model"
    old.save_pretrained(folder, max_shard_size=old_size)
    new.save_pretrained(tmp_path / "clean", max_shard_size=new_size)
    # huggingface_hub uploads nothing of `.cache/huggingface`.
    published = {path.name for path in (*folder.iterdir(), *(tmp_path / "clean").iterdir())} | {".cache"}
    found = []
    for _ in kills(folder, lambda: new.save_pretrained(folder, max_shard_size=new_size), EXCHANGES):
        loaded = AutoModel.from_pretrained(folder)
        found.append(same_weights(loaded, new))
        assert found[-1] or same_weights(loaded, old)
        assert {path.name for path in folder.iterdir()} <= published
        assert loaded.config.feature_mode == (new_mode if found[-1] else old_mode)
        assert "all there and finite" in check_checkpoint(folder)
    assert set(found) == {False, True}
    assert found == sorted(found), "once the new model is there it stays"
    assert same_weights(AutoModel.from_pretrained(folder), new)


def test_what_a_killed_save_leaves_behind_is_gone_after_the_next(tmp_path):
    """Pins pending weights, staging folders, and a configuration that points to either."""
    folder, clean = tmp_path / "model", tmp_path / "clean"
    model_of(1).save_pretrained(folder)
    second, third = model_of(2), model_of(3)
    third.save_pretrained(clean)
    for _ in kills(folder, lambda: second.save_pretrained(folder, max_shard_size=MANY_FILES)):
        third.save_pretrained(folder)
        assert contents(folder) == contents(clean)
        assert files_in(folder) == files_in(clean)


def test_a_save_killed_while_the_weights_are_written_changes_nothing(tmp_path):
    """Pins weights that are cut: the system kills the process when the file has reached 100,000 bytes."""
    model_of(1).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def save_until_killed() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        model_of(2).save_pretrained(tmp_path)

    assert in_a_child(save_until_killed) == -signal.SIGXFSZ
    assert before.items() <= contents(tmp_path).items()
    assert same_weights(AutoModel.from_pretrained(tmp_path), model_of(1))


@pytest.mark.parametrize("part", ["config", "image processor", "processor"])
def test_what_is_saved_beside_the_weights_is_exchanged_in_one_step(tmp_path, part):
    """Pins a JSON file that is cut or empty."""
    folder = tmp_path / "model"

    def save(size: int) -> None:
        image_processor = DeepSeekOCRVisionImageProcessor(size=size)
        parts = {"image processor": image_processor, "processor": DeepSeekOCRVisionProcessor(image_processor)}
        parts["config"] = tiny_config(image_size=size)
        parts[part].save_pretrained(folder)

    def saved_size() -> int:
        if part == "config":
            return json.loads((folder / "config.json").read_text())["image_size"]
        auto_class = AutoImageProcessor if part == "image processor" else AutoProcessor
        loaded = auto_class.from_pretrained(folder)
        return getattr(loaded, "image_processor", loaded).size["height"]

    save(128)
    found = [saved_size() for _ in kills(folder, lambda: save(192))]
    assert set(found) == {128, 192}
    assert found == sorted(found)
    assert saved_size() == 192


def test_the_staging_folder_of_a_living_process_is_left_alone(tmp_path):
    """Pins two processes that save into one folder: one tidies up, the other is in the middle of it."""
    model, (ready, tell) = model_of(1), os.pipe()

    def save_forever() -> None:
        model.state_dict = lambda: (os.write(tell, b"."), time.sleep(60))
        model.save_pretrained(tmp_path)

    child = os.fork()
    if child == 0:
        save_forever()
    try:
        os.read(ready, 1)
        model_of(2).save_pretrained(tmp_path)
        (staging,) = (tmp_path / ".cache" / "huggingface").iterdir()
        assert (staging / "config.json").is_file()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    model_of(3).save_pretrained(tmp_path)
    assert not (tmp_path / ".cache").exists()
    assert same_weights(AutoModel.from_pretrained(tmp_path), model_of(3))


# Errors


def test_a_disk_that_is_full_is_an_error_that_names_the_folder_and_changes_nothing(tmp_path):
    """Pins safetensors' own error, which names nothing and is no `OSError`, and half a file left in the way."""
    model_of(1).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def save_without_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match=f"{tmp_path} could not be saved, and is as it was before: .*File too large"):
            model_of(2).save_pretrained(tmp_path)

    assert in_a_child(save_without_space) == 0
    assert contents(tmp_path) == before
    assert files_in(tmp_path) == set(before)


@pytest.mark.parametrize("first", range(1, 14))
def test_a_disk_that_is_full_from_some_point_on_leaves_one_of_the_two_models(tmp_path, first):
    """Pins an error when the configuration is exchanged already, and the weights have not their usual names yet."""
    old, new, left = model_of(1), model_of(2, "concat"), first
    old.save_pretrained(tmp_path)

    def fail_in_the_end() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    in_a_child(lambda: (on_change(tmp_path, WRITES, fail_in_the_end), new.save_pretrained(tmp_path)))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same_weights(loaded, new if loaded.config.feature_mode == "concat" else old)
    # Nothing is left but weights that the configuration names where they are.
    if PENDING not in (tmp_path / "config.json").read_text():
        assert not (tmp_path / ".cache").exists()
    assert not list(tmp_path.rglob(f"{PREFIX}*"))


def test_a_folder_that_is_read_only_stays_as_it_is(tmp_path):
    """Pins a disk that does not take any change. The tests may run as root, whom no permission stops."""
    model_of(1).save_pretrained(tmp_path)
    write_checksums(tmp_path)
    before = contents(tmp_path)

    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def save() -> None:
        on_change(tmp_path, CHANGES, refuse)
        with pytest.raises(OSError, match="Read-only"):
            model_of(2).save_pretrained(tmp_path)

    assert in_a_child(save) == 0
    assert contents(tmp_path) == before


# What transformers can do


def test_a_model_is_saved_over_the_files_that_it_was_loaded_from(tmp_path):
    """Pins weights in a memory map of the very file that is replaced."""
    model_of(1).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.sam_model.pos_embed.add_(1)
    loaded.save_pretrained(tmp_path)
    assert_same_weights(AutoModel.from_pretrained(tmp_path), loaded)
    assert not same_weights(loaded, model_of(1))


def test_one_file_takes_the_place_of_many_and_the_other_way_round(tmp_path):
    """Pins what transformers leaves beside: it would load the old file before the new index."""
    for seed, size, number in ((1, MANY_FILES, 4), (2, ONE_FILE, 1), (3, MANY_FILES, 4), (4, MANY_FILES, 4)):
        model_of(seed).save_pretrained(tmp_path, max_shard_size=size)
        assert same_weights(AutoModel.from_pretrained(tmp_path), model_of(seed))
        assert len([name for name in files_in(tmp_path) if name != "config.json"]) == number
        assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())


def test_a_variant_lies_beside_the_weights_and_is_replaced_whole(tmp_path):
    """Pins variants, which share one configuration with the weights, and their shards."""
    model_of(1).save_pretrained(tmp_path)
    for seed, size in ((2, ONE_FILE), (3, MANY_FILES), (4, MANY_FILES), (5, ONE_FILE)):
        model_of(seed).save_pretrained(tmp_path, variant="other", max_shard_size=size)
        assert same_weights(AutoModel.from_pretrained(tmp_path), model_of(1))
        assert same_weights(AutoModel.from_pretrained(tmp_path, variant="other"), model_of(seed))
    assert files_in(tmp_path) == {"config.json", "model.safetensors", "model.other.safetensors"}


def test_weights_that_are_given_are_saved_and_stay_as_they_are(tmp_path):
    """Pins what `Trainer` and accelerate pass: the weights that they have gathered."""
    weights = model_of(2).state_dict()
    model_of(1).save_pretrained(tmp_path, state_dict=dict(weights), is_main_process=True, max_shard_size=MANY_FILES)
    assert same_weights(AutoModel.from_pretrained(tmp_path), model_of(2))


def test_a_process_that_is_not_the_main_one_changes_nothing(tmp_path):
    """Pins `is_main_process=False`, which older versions of transformers take for the configuration alone."""
    model_of(1).save_pretrained(tmp_path)
    before = contents(tmp_path)
    model_of(2).save_pretrained(tmp_path, is_main_process=False)
    assert contents(tmp_path) == before
    assert files_in(tmp_path) == set(before)


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_a_folder_is_the_same_whatever_was_there(tmp_path, feature_mode):
    """Pins traces of what an encoder was saved over."""
    model_of(1, "projected").save_pretrained(tmp_path / "over", max_shard_size=MANY_FILES)
    for name in ("over", "new"):
        model_of(2, feature_mode).save_pretrained(tmp_path / name)
    assert contents(tmp_path / "over") == contents(tmp_path / "new")


def test_saving_uploads_all_that_was_saved_once_it_is_there(tmp_path):
    """Pins `push_to_hub=True`: the code goes along, the weights are those given, and the folder is done before."""
    code = f"""
        import torch
        from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
        from helpers import tiny_config

        model = DeepSeekOCRVisionModel(tiny_config())
        ones = {{name: torch.ones_like(weight) for name, weight in model.state_dict().items()}}
        model.save_pretrained("{tmp_path}/encoder", state_dict=ones, push_to_hub=True, repo_id="tester/encoder")
        DeepSeekOCRVisionImageProcessor(size=128).save_pretrained("{tmp_path}/encoder", push_to_hub=True)
    """
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home", token=hub.token)
        run_python(code, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]), **environment)
        uploaded = hub.files("tester/encoder")
    folder = tmp_path / "encoder"
    assert {path.name for path in folder.iterdir()} | {".gitattributes", "README.md"} == uploaded.keys()
    assert all(uploaded[path.name] == path.read_bytes() for path in folder.iterdir())
    assert (AutoModel.from_pretrained(folder).sam_model.pos_embed == 1).all()
