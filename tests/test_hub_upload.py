"""Publishing a checkpoint: staging it, verifying it, and pushing it, through the real client, to a Hub on loopback."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, pixels, run_python, tiny_config
from hub_server import Fault, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor
from deepseek_ocr_vision import hub_upload as module
from deepseek_ocr_vision.hub_upload import PUBLISHED, files_to_publish, main, push, stage, verify
from deepseek_ocr_vision.saving.checksums import verify_checksums, write_checksums
from deepseek_ocr_vision.saving.code import FLAT_CODE


REPO = "me/encoder"
TOKEN = "hf_" + "x7" * 17
CODE = {f"{name}_deepseek_ocr_vision.py" for names in FLAT_CODE.values() for name in names}
CLIP_CONFIG = json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}).encode()


def save_checkpoint(folder):
    """A folder with a model alone, in bfloat16."""
    torch.manual_seed(0)
    DeepSeekOCRVisionModel(tiny_config(feature_mode="concat")).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def staged_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publishing")
    stage(save_checkpoint(folder / "checkpoint"), folder / "staged", repo_id=REPO)
    return folder / "staged"


@pytest.fixture
def staged(tmp_path, staged_once):
    """A staged folder that may be changed."""
    shutil.copytree(staged_once, tmp_path / "staged")
    return tmp_path / "staged"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub for this process, and for those that it starts; the client has read its environment long ago."""
    with HubServer(token=TOKEN) as server:
        for name, value in server.environment(tmp_path / "home", token=TOKEN).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        close_session()
        yield server
        close_session()


def contents_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub, revision="main") -> dict[str, bytes]:
    """What a repository holds beside what the Hub itself puts into a new one."""
    return {name: text for name, text in hub.files(REPO, revision).items() if name != ".gitattributes"}


def requests_to(hub, method, path) -> list:
    return [request for request in hub.requests if request.method == method and re.search(path, request.path)]


# Staging.


def test_a_staged_folder_holds_what_is_published_and_nothing_else(tmp_path, checkpoint):
    """Pins what gets published: an optimizer state or a stray file of the checkpoint must not."""
    (checkpoint / "optimizer.pt").write_text("state")
    (checkpoint / ".env").write_text("TOKEN=secret")
    files = {path.name for path in stage(checkpoint, tmp_path / "staged", repo_id=REPO)}
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "SHA256SUMS"}
    assert files == set(PUBLISHED) == CODE | others
    assert set(verify_checksums(tmp_path / "staged")) == files - {"README.md", "SHA256SUMS"}


def test_staging_keeps_every_weight_and_its_dtype(checkpoint, staged):
    """Pins the model on the way through."""
    before = AutoModel.from_pretrained(checkpoint, dtype="auto")
    after = AutoModel.from_pretrained(staged, dtype="auto", verify_checksums=True)
    assert after.dtype == torch.bfloat16
    assert torch.equal(after(pixels()).last_hidden_state, before(pixels()).last_hidden_state)


def test_a_checkpoint_in_shards_becomes_one_file(tmp_path, checkpoint):
    """Pins `model.safetensors` as the one file of weights, which the checksums and the model card speak of."""
    model = AutoModel.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    stage(tmp_path / "shards", tmp_path / "staged", repo_id=REPO)
    assert load_file(tmp_path / "staged" / "model.safetensors").keys() == model.state_dict().keys()


def test_staging_twice_gives_the_same_bytes(tmp_path, checkpoint):
    """Pins a second upload that sends everything again because of a date or an order of keys."""
    for name in ("first", "second"):
        stage(checkpoint, tmp_path / name, repo_id=REPO)
    assert contents_of(tmp_path / "first") == contents_of(tmp_path / "second")


@pytest.mark.parametrize("saved_as", [lambda processor: processor, DeepSeekOCRVisionProcessor])
def test_the_image_processor_is_the_checkpoints_or_the_one_that_belongs_to_it(tmp_path, checkpoint, staged, saved_as):
    """Pins tokens of another preprocessing than the model was trained with."""
    image_processor = AutoImageProcessor.from_pretrained(staged)
    assert (image_processor.preset, image_processor.size) == ("deepseek-ocr", {"height": 128, "width": 128})
    saved_as(DeepSeekOCRVisionImageProcessor("deepseek-ocr-encoder", size=192)).save_pretrained(checkpoint)
    stage(checkpoint, tmp_path / "second", repo_id=REPO)
    for loaded in (
        AutoImageProcessor.from_pretrained(tmp_path / "second"),
        AutoProcessor.from_pretrained(tmp_path / "second").image_processor,
    ):
        assert (loaded.preset, loaded.size) == ("deepseek-ocr-encoder", {"height": 192, "width": 192})


def test_a_folder_that_is_there_is_not_touched(tmp_path, checkpoint):
    """Pins somebody's files under the target's name."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=str(target)):
        stage(checkpoint, target, repo_id=REPO)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(tmp_path, checkpoint):
    """Pins a failure half-way: no folder, no temporary one."""
    save_file({"sam_model.pos_embed": torch.zeros(1)}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a DeepSeek-OCR vision checkpoint"):
        stage(checkpoint, tmp_path / "staged", repo_id=REPO)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_weights_that_are_not_finite_are_named(tmp_path, checkpoint):
    """Pins a diverged model that gets published."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["sam_model.pos_embed"][0] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinity in sam_model\.pos_embed"):
        stage(checkpoint, tmp_path / "staged", repo_id=REPO)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_another_model_is_refused(tmp_path):
    """Pins a folder given by mistake."""
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**fields, image_size=28, patch_size=14)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip_vision_model"):
        stage(tmp_path / "clip", tmp_path / "staged", repo_id=REPO)


@pytest.mark.parametrize("field", [{"license": "mit\nlicense_link: x"}, {"base_model": "../x"}, {"repo_id": "me"}])
def test_names_that_the_model_card_cannot_hold_are_refused(tmp_path, checkpoint, field):
    """Pins a second line in the front matter, and a repository that nobody can load."""
    with pytest.raises(ValueError, match=re.escape(repr(next(iter(field.values()))))):
        stage(checkpoint, tmp_path / "staged", **({"repo_id": REPO} | field))


# Verifying.


def test_a_byte_that_flipped_after_staging_is_found(staged, checkpoint):
    """Pins damage on the disk between two steps, before any process is started."""
    with open(staged / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match=r"model\.safetensors is not what SHA256SUMS says"):
        verify(staged, checkpoint)


def test_files_that_are_missing_or_not_summed_are_errors(staged, checkpoint):
    """Pins a manifest that covers less than what is published."""
    lines = (staged / "SHA256SUMS").read_text().splitlines(keepends=True)
    (staged / "SHA256SUMS").write_text("".join(line for line in lines if "config.json" not in line))
    with pytest.raises(ValueError, match=r"nothing about config\.json, preprocessor_config\.json"):
        verify(staged, checkpoint)
    (staged / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks preprocessor_config\.json"):
        verify(staged, checkpoint)


def damage_weights(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["sam_model.pos_embed"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_code(folder) -> None:
    """Code that does not run, and that would give the token away."""
    path = folder / "configuration_deepseek_ocr_vision.py"
    path.write_text(f"{path.read_text()}\nimport os\nraise RuntimeError('damaged', os.environ.get('HF_TOKEN'))\n")


def damage_saving(folder) -> None:
    """Code that changes a weight when the model is saved."""
    path = folder / "saving_deepseek_ocr_vision.py"
    start = "save = super().save_pretrained"
    damage = "[getattr(self, name).pos_embed.data.zero_() for name in ('sam_model',) if hasattr(self, name)]"
    assert start in path.read_text()
    path.write_text(path.read_text().replace(start, f"{damage}\n        {start}"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, r"gives other tokens than the checkpoint: .* standard deviations apart"),
        (damage_code, r"does not load where this package is not installed:[\s\S]*\('damaged', None\)"),
        (damage_saving, r"loads, but not when it is saved again from there\. .* gives other tokens"),
    ],
)
def test_a_failed_check_stops_everything(hub, checkpoint, monkeypatch, capsys, damage, message):
    """Pins a push in spite of weights, code or a re-save that readers would stumble over."""

    def stage_and_damage(checkpoint, folder, **options):
        stage(checkpoint, folder, **options)
        damage(folder)
        write_checksums(folder)

    monkeypatch.setattr(module, "stage", stage_and_damage)
    assert main([str(checkpoint), REPO]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Nothing was pushed." in error
    assert "Traceback" not in error
    assert TOKEN not in error
    assert hub.requests == []


# All three steps.


def test_a_published_checkpoint_loads_from_the_hub_and_its_card_runs_as_it_stands(hub, tmp_path, checkpoint):
    """Pins the whole way: the command, the Hub, and a reader who has transformers and the card, not this package."""
    command = [sys.executable, str(ROOT / "hub_upload.py"), str(checkpoint), REPO, "--base-model", "none"]
    pushed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/{REPO}/commit/{hub.commit_id(REPO)}" in pushed.stdout
    assert len(requests_to(hub, "POST", "/commit/")) == 1
    files = published(hub)
    assert files.keys() == set(PUBLISHED)
    assert all(
        TOKEN.encode() not in text for text in (*files.values(), pushed.stdout.encode(), pushed.stderr.encode())
    )
    assert all(str(tmp_path).encode() not in text for text in files.values())

    usage, training = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), flags=re.DOTALL)
    assert len(usage.splitlines()) <= 10
    Image.linear_gradient("L").resize((90, 130)).save(tmp_path / "page.png")
    keep = "from safetensors.torch import save_file\nsave_file({'features': features}, 'features')\n"
    check = "assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())\n"
    code = "\n".join([f"import os\nos.chdir({str(tmp_path)!r})", usage, keep, training, check])
    said = run_python(code, package_installed=False, **hub.environment(tmp_path / "reader"))
    assert said == "torch.Size([1, 4, 64]) torch.Size([4, 64])\n"
    (expected,) = AutoModel.from_pretrained(checkpoint).encode(str(tmp_path / "page.png"))
    assert torch.equal(load_file(tmp_path / "features")["features"], expected)


def test_a_dry_run_verifies_and_lists_and_asks_the_hub_nothing(hub, checkpoint, monkeypatch, capsys):
    """Pins what people run first: no connection, no token needed, and every name that would be published."""
    monkeypatch.setenv("HF_TOKEN", "")
    (checkpoint / ".env").write_text("TOKEN=secret")
    assert main([str(checkpoint), REPO, "--dry-run", "--create-pr", "--revision", "next"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^ +[\d,]+  {re.escape(name)}$", said, flags=re.MULTILINE) for name in PUBLISHED)
    assert re.search(r"^ +left out  \.env$", said, flags=re.MULTILINE)
    assert "difference 0.0" in said
    assert f"nothing was pushed. It would go to {REPO}, a pull request to branch next" in said
    assert hub.requests == []


def test_a_refusal_by_the_hub_is_told_without_a_traceback(hub, checkpoint, capsys):
    """Pins exit code and message of the command."""
    hub.faults.append(Fault(path="/commit/", status=403))
    assert main([str(checkpoint), REPO]) == 1
    error = capsys.readouterr().err
    assert f"Error: {REPO}: the Hub answered 403 to POST /api/models/{REPO}/commit/main" in error
    assert "--create-pr" in error
    assert "Traceback" not in error
    assert TOKEN not in error


@pytest.mark.parametrize(
    "repo_id", ["../x", "a/..", "me/a--b", "me/x\n", "", "encoder", "a/b/c", "me/", "/x", "me/x.git", "me/ü", None]
)
def test_a_bad_repository_id_is_an_error_before_anything_else(hub, tmp_path, checkpoint, staged, repo_id, capsys):
    """Pins an id that reaches the network or the disk."""
    for call in (lambda: push(staged, repo_id), lambda: stage(checkpoint, tmp_path / "other", repo_id=repo_id)):
        with pytest.raises(ValueError, match=re.escape(repr(repo_id))):
            call()
    if repo_id is not None:
        assert main([str(checkpoint), repo_id]) == 1
        assert repr(repo_id) in capsys.readouterr().err
    assert hub.requests == []
    assert not (tmp_path / "other").exists()


def test_without_a_token_nothing_is_begun(hub, checkpoint, monkeypatch, capsys):
    """Pins a minute of staging before somebody learns that he is not logged in."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(checkpoint / "none"))
    assert main([str(checkpoint), REPO]) == 1
    said = capsys.readouterr()
    assert "hf auth login" in said.err
    assert "Staging" not in said.out
    assert hub.requests == []


def test_the_command_says_what_went_wrong_with_a_checkpoint(hub, tmp_path, checkpoint, capsys):
    """Pins a mistyped folder, and a damaged file that safetensors itself complains of."""
    assert main([str(tmp_path / "nowhere"), REPO]) == 1
    assert "nowhere" in capsys.readouterr().err
    (checkpoint / "model.safetensors").write_bytes(b"<html>")
    assert main([str(checkpoint), REPO]) == 1
    assert "Nothing was pushed." in capsys.readouterr().err
    assert hub.requests == []


def test_the_script_runs_from_the_checkout_and_has_no_option_for_a_token():
    """Pins `python hub_upload.py --help`, which imports the package as everybody does."""
    command = [sys.executable, str(ROOT / "hub_upload.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "trust_remote_code" in result.stdout
    assert "--token" not in result.stdout


# Pushing.


def test_a_push_is_one_commit_of_exactly_the_staged_files(hub, staged):
    """Pins what arrives, byte for byte, and what lies beside it and must not."""
    expected = contents_of(staged)
    for name in (".env", "optimizer.pt", ".tmp1234", "id_rsa", "training_args.bin"):
        (staged / name).write_text("secret")
    (staged / "link").symlink_to("/etc/hostname")
    (staged / "modeling").mkdir()
    url = push(staged, REPO)
    assert url == f"{hub.url}/{REPO}/commit/{hub.commit_id(REPO)}"
    assert published(hub) == expected
    assert len(requests_to(hub, "POST", "/commit/")) == 1
    assert not hub.is_private(REPO)


def test_a_second_push_of_the_same_changes_nothing(hub, staged, caplog):
    """Pins empty commits and weights that are sent again."""
    push(staged, REPO)
    before, number = hub.commit_id(REPO), len(hub.requests)
    assert push(staged, REPO) == f"{hub.url}/{REPO}/tree/main"
    assert "Nothing changed" in caplog.text
    assert hub.commit_id(REPO) == before
    assert not any(re.search("commit/|lfs|repos/create", request.path) for request in hub.requests[number:])


def test_a_changed_card_is_pushed_alone(hub, staged):
    """Pins a commit of everything for the sake of one file."""
    push(staged, REPO)
    (staged / "README.md").write_text("---\nlicense: mit\n---\nAnother card.\n")
    number = len(hub.requests)
    push(staged, REPO)
    assert published(hub) == contents_of(staged)
    assert not any("lfs" in request.path for request in hub.requests[number:])


def test_a_link_or_a_token_among_the_files_stops_the_push(hub, staged):
    """Pins files from outside of the folder, and secrets in a config, behind names that are allowed."""
    config = staged / "config.json"
    for secret in (TOKEN, "hf_oauth_" + "y" * 30):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"note": secret}))
        write_checksums(staged)
        with pytest.raises(ValueError, match=r"config\.json holds what looks like a token") as caught:
            push(staged, REPO)
        assert secret not in str(caught.value)
    config.rename(staged.parent / "elsewhere.json")
    config.symlink_to(staged.parent / "elsewhere.json")
    with pytest.raises(ValueError, match=r"config\.json is a link"):
        files_to_publish(staged)
    assert hub.requests == []


def test_a_folder_that_changed_since_it_was_staged_is_not_pushed(hub, staged):
    """Pins a push of something else than what was verified."""
    (staged / "sam_deepseek_ocr_vision.py").write_text("")
    with pytest.raises(ValueError, match=r"sam_deepseek_ocr_vision\.py is not what SHA256SUMS says"):
        push(staged, REPO)
    assert hub.requests == []


def test_a_pull_request_leaves_the_branch_as_it_is(hub, staged):
    """Pins `create_pr`, for repositories of others."""
    hub.add_repository(REPO, {"README.md": b"theirs"})
    assert push(staged, REPO, create_pr=True) == f"{hub.url}/{REPO}/discussions/1"
    assert hub.files(REPO) == {"README.md": b"theirs"}
    assert published(hub, "refs/pr/1") == contents_of(staged)


def test_a_branch_is_made_if_it_is_not_there(hub, staged):
    """Pins `revision`, for a repository that is new as for one that is there."""
    for _ in range(2):
        push(staged, REPO, revision="next")
        assert published(hub) == {}
        assert published(hub, "next") == contents_of(staged)
        hub.repositories[REPO].refs.pop("next")
    with pytest.raises(ValueError, match=re.escape("'../main'")):
        push(staged, REPO, revision="../main")


def test_private_means_private(hub, staged):
    """Pins weights that are meant for few, pushed to a repository that all can read."""
    push(staged, REPO, private=True)
    assert hub.is_private(REPO)
    hub.add_repository("me/public", {})
    with pytest.raises(ValueError, match="me/public is there already and is public"):
        push(staged, "me/public", private=True)
    assert hub.files("me/public") == {}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": CLIP_CONFIG, "model.safetensors": b"theirs"}, r"another model \(model_type 'clip'\)"),
        ({"config.json": b"[1, 2]"}, "another model"),
        ({"llama.gguf": b"theirs"}, r"another model \(no config\.json, but llama\.gguf\)"),
        ({"pytorch_model.bin": b"theirs"}, r"another model .*pytorch_model\.bin"),
    ],
)
def test_another_model_is_overwritten_only_by_force(hub, staged, files, message):
    """Pins a mistyped name that replaces a model people depend on."""
    hub.add_repository(REPO, files)
    for options in ({}, {"revision": "next"}, {"create_pr": True}):
        with pytest.raises(ValueError, match=message):
            push(staged, REPO, **options)
    assert hub.files(REPO) == files
    assert not requests_to(hub, "POST", "commit|lfs|create|branch")
    push(staged, REPO, force=True)
    assert hub.files(REPO) == files | contents_of(staged)


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, staged, monkeypatch):
    """Pins the moment between looking at a repository and committing to it."""
    hub.add_repository(REPO, {"README.md": b"a card"})
    look = module._check_remote

    def look_and_lose_the_race(*arguments, **options):
        look(*arguments, **options)
        repository = hub.repositories[REPO]
        repository.commit("main", {}, repository.refs["main"])

    monkeypatch.setattr(module, "_check_remote", look_and_lose_the_race)
    with pytest.raises(OSError, match=r"the Hub answered 412 .* Somebody else has committed"):
        push(staged, REPO)
    assert hub.files(REPO) == {}


@pytest.mark.parametrize(
    ("status", "path"),
    [
        (401, "/api/models/"),
        (403, "/api/repos/create"),
        (404, "/preupload/"),
        (429, "/api/repos/create"),
        (500, "/commit/"),
        (500, "/paths-info/"),
        (403, "/lfs/objects/batch"),
        (403, "^/lfs/"),
    ],
)
def test_a_refusal_names_status_and_repository_and_a_second_run_completes(hub, staged, status, path):
    """Pins a failure that says nothing, and one after which the same command does not help."""
    hub.faults.append(Fault(path=path, status=status, times=None))
    with pytest.raises(OSError, match=rf"^{REPO}: the Hub answered {status} to [A-Z]+ /") as caught:
        push(staged, REPO)
    assert TOKEN not in str(caught.value)
    assert "Signature" not in str(caught.value)
    hub.faults.clear()
    push(staged, REPO)
    assert published(hub) == contents_of(staged)


def test_a_pull_request_to_a_repository_or_branch_that_is_not_there_is_an_error(hub, staged):
    """Pins a repository that is made in a namespace of others, because its name was mistyped."""
    with pytest.raises(OSError, match=rf"{REPO}: the Hub answered 404"):
        push(staged, REPO, create_pr=True)
    hub.add_repository(REPO, {})
    with pytest.raises(OSError, match=rf"{REPO}: the Hub answered 404"):
        push(staged, REPO, create_pr=True, revision="next")
    assert not requests_to(hub, "POST", "")


def test_a_token_that_is_refused_is_not_told(hub, staged):
    """Pins a token in an error, where it would be copied into a bug report."""
    with pytest.raises(OSError, match=rf"{REPO}: the Hub answered 401 .*hf auth login") as caught:
        push(staged, REPO, token=(wrong := "hf_" + "w" * 34))
    assert wrong not in str(caught.value)


def test_a_cut_connection_is_resumed(hub, staged, monkeypatch):
    """Pins an upload that breaks every time the client tries, and the same command that completes it later."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults.append(Fault(method="PUT", cut_after=1000, times=None))
    with pytest.raises(OSError, match=rf"^{REPO}: the connection to the Hub failed .* Run it again"):
        push(staged, REPO)
    assert published(hub) == {}
    hub.faults.clear()
    push(staged, REPO)
    assert published(hub) == contents_of(staged)


def test_weights_that_the_hub_has_are_not_sent_a_second_time(hub, staged):
    """Pins gigabytes sent again because the last request of an upload had failed."""
    hub.faults.append(Fault(path="/commit/", status=500))
    with pytest.raises(OSError, match="500"):
        push(staged, REPO)
    (sent,) = requests_to(hub, "PUT", "")
    push(staged, REPO)
    assert requests_to(hub, "PUT", "") == [sent]
    weights = (staged / "model.safetensors").read_bytes()
    assert hashlib.sha256(hub.files(REPO)["model.safetensors"]).digest() == hashlib.sha256(weights).digest()


def test_what_the_hub_holds_is_compared_with_what_was_sent(hub, staged, monkeypatch):
    """Pins a file that arrives otherwise, or is left out by a .gitignore of the repository."""
    look, names = module._differing, ["model.safetensors", "sam_deepseek_ocr_vision.py"]
    hub.add_repository(REPO, {})

    def damage_and_look(api, repo_id, paths, *, revision):
        repository = hub.repositories[REPO]
        files = repository.commits[repository.resolve(revision)]
        if names[0] in files:
            files[names[0]] = files["README.md"]
            del files[names[1]]
        return look(api, repo_id, paths, revision=revision)

    monkeypatch.setattr(module, "_differing", damage_and_look)
    with pytest.raises(OSError, match=", ".join(names)):
        push(staged, REPO)
