"""Weights in from the Hub: only the encoder's bytes, kept, resumed, and errors that say what to do.

The Hub is a small server on loopback, the client the real one, in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from helpers import released_tensors, run_python, tiny_config, write_checkpoint
from hub_server import Fault, HubServer
from safetensors.torch import load_file, save_file

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.weights.names import is_vision


REPO = "deepseek-ai/DeepSeek-OCR"
LOAD = f"""
    import deepseek_ocr_vision, json, sys
    from deepseek_ocr_vision import DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor
    from safetensors.torch import save_file

    def attempt(**options):
        try:
            model = DeepSeekOCRVisionModel.from_deepseek_ocr({REPO!r}, feature_mode="projected", **options)
            return {{name: tensor.sum().item() for name, tensor in model.state_dict().items()}}
        except (OSError, ValueError) as error:
            return f"{{type(error).__name__}}: {{error}}"
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A released checkpoint in two files, some megabytes of it the encoder, more of it not; and its tensors."""
    torch.manual_seed(0)
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    tensors = released_tensors(model) | {"model.layers.1.mlp.weight": torch.randn(1000, 1000)}
    # Apart from the other vision tensors in the file, since its dtype is.
    tensors["model.sam_model.pos_embed"] = tensors["model.sam_model.pos_embed"].double()
    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "released", tensors, model.config, num_shards=2)
    return folder, tensors


@pytest.fixture
def hub(released):
    """A Hub that has it."""
    with HubServer(token="hf_test_token", redirects=True) as server:
        server.add_repository(REPO, files_of(released[0]))
        yield server


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def run_load(hub: HubServer, home: Path, code: str, *, offline: bool = False) -> object:
    """Run code after `LOAD` in a fresh interpreter, and return what it leaves in `result`."""
    program = textwrap.dedent(LOAD) + textwrap.dedent(code) + "\nprint(json.dumps(result))\n"
    environment = hub.environment(home) | {"HF_HUB_OFFLINE": str(int(offline))}
    return json.loads(run_python(program, **environment).splitlines()[-1])


def expected_sums(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """What `attempt` returns for these tensors: the mixture of dtypes is loaded in the wider one."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    return {name: tensors[f"model.{name}"].double().sum().item() for name in model.state_dict()}


def assert_loaded(result: object, tensors: dict[str, torch.Tensor]) -> None:
    assert isinstance(result, dict), result
    assert result == pytest.approx(expected_sums(tensors), rel=1e-9, abs=1e-9)


def weight_requests(hub: HubServer) -> list:
    """Answers with bytes of weights."""
    return [
        request
        for request in hub.requests
        if request.method == "GET"
        and ".safetensors" in request.path
        and "index" not in request.path
        and request.origin == "storage"
    ]


def test_only_the_vision_tensors_bytes_are_fetched_and_they_are_kept(tmp_path, hub, released):
    """Pins 0.8 of 6.7 GB; and the second time, offline, nothing at all."""
    folder, tensors = released
    code = """
        result = [attempt(), attempt()]
        processor = DeepSeekOCRVisionProcessor.from_deepseek_ocr("deepseek-ai/DeepSeek-OCR")
        result.append(processor.image_processor.size["width"])
    """
    first, second, width = run_load(hub, tmp_path / "home", code)
    assert_loaded(first, tensors)
    assert first == second
    assert width == 128

    requests = weight_requests(hub)
    assert all(request.range for request in requests)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))
    vision = sum(tensor.nbytes for name, tensor in tensors.items() if is_vision(name))
    # The first bytes of a file are looked at before its header is read.
    assert vision < sum(request.bytes_sent for request in requests) <= vision + headers + 2 * 64
    data_requests = [request for request in requests if request.bytes_sent > 5000]
    assert len(data_requests) <= 5, [request.range for request in requests]

    num_requests = len(hub.requests)
    offline = run_load(hub, tmp_path / "home", "result = [attempt(), attempt(local_files_only=True)]", offline=True)
    assert offline == [first, first]
    assert len(hub.requests) == num_requests


def test_the_token_is_sent_to_the_hub_and_not_to_the_store_it_leads_to(tmp_path, hub):
    """Pins a secret that would travel with a redirect, and be seen in an output."""
    with HubServer(token="hf_test_token", redirects=True) as private:
        private.add_repository(REPO, hub.files(REPO), private=True)
        output = run_python(
            textwrap.dedent(LOAD) + "print(type(attempt()).__name__)\nprint(attempt(revision='none'))",
            **private.environment(tmp_path / "home", token="hf_test_token"),
        )
        assert output.startswith("dict\n")
        assert "hf_test_token" not in output
        assert all(request.authorization is None for request in private.requests if request.origin == "storage")
        assert all(request.authorization for request in private.requests if request.origin == "hub")
    everything = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert everything
    assert not any(b"hf_test_token" in path.read_bytes() for path in everything if path.suffix != ".safetensors")


def test_a_connection_that_breaks_off_goes_on_where_it_broke(tmp_path, hub, released):
    """Pins a download that would start again from nothing, within a call and in a second one."""
    # Headers are small: what is cut after 40,000 bytes is data.
    hub.faults.append(Fault(path=r"^/lfs/", cut_after=40_000, times=3))
    result = run_load(hub, tmp_path / "home", "result = attempt()")
    assert_loaded(result, released[1])
    vision = sum(tensor.nbytes for name, tensor in released[1].items() if is_vision(name))
    assert sum(request.bytes_sent for request in weight_requests(hub)) < vision + 100_000


def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(tmp_path):
    """Pins SIGKILL in the middle: no lock is left, no byte fetched twice, and the file is the same."""
    with HubServer(token="hf_test_token") as hub:
        # Many times the size, so that there is a middle.
        hub.add_repository(REPO, files_of(_large_checkpoint(tmp_path)))
        environment = os.environ | hub.environment(tmp_path / "home")
        program = (
            textwrap.dedent(LOAD) + "attempt(config=deepseek_ocr_vision.DeepSeekOCRVisionConfig.from_dict("
            "json.load(open(sys.argv[1]))))"
        )
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "vision.json")], env=environment)
        partial = _wait_for(tmp_path / "home", ".incomplete", at_least=1_000_000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = partial.stat().st_size
        already = len(hub.requests)
        command = [sys.executable, "-c", program, str(tmp_path / "vision.json")]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        assert not list((tmp_path / "home").rglob("*.incomplete"))
        (file,) = (tmp_path / "home").rglob("vision/*.safetensors")
        fetched = sum(request.bytes_sent for request in hub.requests[already:] if ".safetensors" in request.path)
        assert fetched < file.stat().st_size - kept + 200_000
        expected = load_file(tmp_path / "large" / "model.safetensors")
        actual = load_file(file)
        assert all(torch.equal(actual[name], expected[name]) for name in expected if is_vision(name))


def _large_checkpoint(tmp_path: Path) -> Path:
    clip = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 30, "num_attention_heads": 8}
    sam = tiny_config().sam_config.to_dict() | {"downsample_channels": [24, 512]}
    config = tiny_config(sam_config=sam, clip_config=clip | {"grid_size": 2}, feature_mode="projected")
    with torch.device("meta"):
        model = DeepSeekOCRVisionModel(config)
    folder = tmp_path / "large"
    folder.mkdir()
    tensors = {f"model.{key}": torch.randn(tensor.shape) for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (tmp_path / "vision.json").write_text(json.dumps(config.to_dict()))
    return folder


def _wait_for(folder: Path, suffix: str, *, at_least: int) -> Path:
    """The first file whose name ends so and that has grown to a size."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        # Folders come and go meanwhile, which `Path.rglob` does not bear.
        for place, _, names in os.walk(folder):
            for name in names:
                if name.endswith(suffix) and os.stat(os.path.join(place, name)).st_size >= at_least:
                    return Path(place, name)
        time.sleep(0.001)
    raise AssertionError(f"no {suffix} of {at_least:,} bytes within a minute")


def test_a_half_that_is_not_ours_to_go_on_with_is_fetched_anew(tmp_path, hub, released):
    """Pins what a crash or another state of the repository leaves: a foreign beginning, and too many bytes."""
    code = """
        import pathlib
        attempt()
        (file,) = pathlib.Path(HOME).rglob("vision/*.safetensors")
        whole = file.read_bytes()
        partial = file.with_suffix(".incomplete")
        result = []
        for left in (b"x" * 5000, whole[:10_000], whole + b"x"):
            file.unlink(missing_ok=True)
            partial.write_bytes(left)
            outcomes = [attempt()]
            if not file.exists():
                outcomes.append(attempt())
            result.append([len(outcomes), file.read_bytes() == whole, partial.exists()])
    """
    result = run_load(hub, tmp_path / "home", code.replace("HOME", repr(str(tmp_path / "home"))))
    assert result == [[1, True, False], [1, True, False], [2, True, False]]


def test_several_processes_end_with_one_file(tmp_path, hub):
    """Pins two workers that start at once: one fetches, the other waits, both load."""
    environment = os.environ | hub.environment(tmp_path / "home")
    program = textwrap.dedent(LOAD) + "print(type(attempt()).__name__)"
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["dict"] * 3
    assert len(list((tmp_path / "home").rglob("vision/*.safetensors"))) == 1


def test_a_server_without_ranges_gives_whole_files_and_that_is_said_first(tmp_path, released):
    """Pins a mirror that knows no ranges: gigabytes more than asked for are announced."""
    with HubServer(token="hf_test_token", ranges=False) as hub:
        hub.add_repository(REPO, files_of(released[0]))
        environment = os.environ | hub.environment(tmp_path / "home") | {"TRANSFORMERS_VERBOSITY": "warning"}
        program = textwrap.dedent(LOAD) + "print(json.dumps(attempt()))"
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
    assert_loaded(json.loads(result.stdout), released[1])
    assert "does not give parts of files; fetching all of model-0000" in result.stderr
    assert " GB." in result.stderr


def test_what_the_hub_answers_is_told_with_status_repository_and_advice(tmp_path, hub):
    """Pins errors that a user can act on, and a second run that completes."""
    hub.faults.append(Fault(path=r"/resolve/.*config\.json", status=403, times=1))
    (tmp_path / "file").touch()
    unwritable = str(tmp_path / "file" / "cache")  # the tests may run as root, whom no permission stops
    code = f"result = [attempt(), attempt(revision='none'), attempt(cache_dir={unwritable!r}), attempt()]"
    forbidden, missing, unwritten, completed = run_load(hub, tmp_path / "home", code)
    assert unwritable in unwritten
    assert missing.startswith(f"OSError: {REPO}: the Hub answered 404")
    assert forbidden.startswith(f"OSError: {REPO}: the Hub answered 403")
    assert isinstance(completed, dict)


@pytest.mark.parametrize(("status", "times"), [(401, None), (403, None), (404, None), (429, 1), (500, 1)])
def test_an_error_in_the_middle_of_the_weights_is_final_or_waited_for(tmp_path, hub, released, status, times):
    """Pins each status on the data itself: refusals end with an error, what passes is tried again."""
    hub.faults.append(Fault(path=r"^/lfs/", status=status, times=times, headers={"Retry-After": "0"}))
    result = run_load(hub, tmp_path / "home", "result = attempt()")
    if times:
        assert_loaded(result, released[1])
    else:
        assert f"{REPO}: the Hub answered {status}" in result


def test_an_etag_that_changes_in_between_is_an_error_and_the_next_run_completes(tmp_path, hub, released):
    """Pins two halves of different files put together."""
    hub.faults.append(Fault(path=r"/resolve/.*model-00002.*\.safetensors", method="GET", etag='"other"', times=1))
    changed, completed = run_load(hub, tmp_path / "home", "result = [attempt(), attempt()]")
    assert "changed while it was read" in changed
    assert_loaded(completed, released[1])


def test_a_foreign_repository_is_an_error_before_its_weights_are_fetched(tmp_path):
    """Pins gigabytes of a wrong model."""
    with HubServer(token="hf_test_token") as hub:
        save_file({"model.layers.0.mlp.weight": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
        files = {"model.safetensors": tmp_path / "model.safetensors", "config.json": b'{"model_type": "llama"}'}
        hub.add_repository(REPO, files)
        result = run_load(hub, tmp_path / "home", "result = [attempt(), attempt(local_files_only=True)]")
        assert "looks like a language model" in result[0] or "look like a language model" in result[0]
        assert "not in the cache" in result[1]
        assert sum(request.bytes_sent for request in hub.requests if ".safetensors" in request.path) < 1000


def test_an_endpoint_that_cannot_be_reached_is_an_error_that_says_so(tmp_path, hub):
    """Pins a traceback of the HTTP library."""
    environment = hub.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    # The client's own pauses between its tries are not what is tested.
    code = textwrap.dedent(LOAD) + "import time\ntime.sleep = lambda seconds: None\nprint(attempt())"
    output = run_python(code, **environment)
    assert f"OSError: {REPO}: the connection to the Hub failed" in output
    assert "the cache does not hold what is needed" in output
