"""The command line: what its commands say, and their exit codes. `encode` and `show` have tests of their own."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_same_weights, pixels, released_tensors, run_python, tiny_config, write_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.__main__ import main


COMMANDS = ("extract", "write-back", "verify", "show", "encode", "export", "upload")


@pytest.fixture
def released(tmp_path):
    """A released checkpoint in two files."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected")).to(torch.bfloat16)
    return write_checkpoint(tmp_path / "released", released_tensors(model), model.config, num_shards=2)


def test_out_trained_back_in_and_out_again(tmp_path, released, capsys):
    """Pins the three commands as a user strings them together, bit for bit."""
    encoder, back, again = (tmp_path / name for name in ("encoder", "back", "again"))
    assert main(["extract", str(released), str(encoder), "--preset", "deepseek-ocr"]) == 0
    assert "feature mode 'concat'" in capsys.readouterr().out
    model = DeepSeekOCRVisionModel.from_pretrained(encoder, verify_checksums=True)
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(encoder).image_processor.preset == "deepseek-ocr"
    model.sam_model.pos_embed.data += 1
    model.save_pretrained(tmp_path / "trained")

    assert main(["write-back", str(tmp_path / "trained"), str(released), str(back)]) == 0
    assert "keep the base's values: model.image_newline" in capsys.readouterr().out
    assert main(["extract", str(back), str(again), "--feature-mode", "concat"]) == 0
    assert_same_weights(DeepSeekOCRVisionModel.from_pretrained(again), model)


def test_an_extracted_folder_loads_without_the_package(tmp_path, released):
    """Pins what `extract` is for: a folder that can be given away."""
    assert main(["extract", str(released), str(tmp_path / "encoder"), "--dtype", "float32"]) == 0
    expected = DeepSeekOCRVisionModel.from_pretrained(tmp_path / "encoder")(pixels(1)).last_hidden_state.sum().item()
    save_file({"pixels": pixels(1)}, tmp_path / "pixels")
    code = f"""
        from safetensors.torch import load_file
        from transformers import AutoModel, AutoProcessor
        AutoProcessor.from_pretrained({str(tmp_path / "encoder")!r}, trust_remote_code=True)
        encoder = {str(tmp_path / "encoder")!r}
        model = AutoModel.from_pretrained(encoder, trust_remote_code=True)

        def compare():
            AutoModel.from_pretrained(encoder, trust_remote_code=True, verify_checksums=True)

        for needs_the_package in (compare, lambda: model.write_deepseek_ocr("base", "target")):
            try:
                needs_the_package()
            except ImportError as error:
                assert "needs the package deepseek-ocr-vision" in str(error)
            else:
                raise AssertionError("it went on without the package")
        print(model(load_file({str(tmp_path / "pixels")!r})["pixels"]).last_hidden_state.sum().item())
    """
    output = run_python(code, package_installed=False, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert float(output) == expected


def test_verify_finds_what_was_damaged(tmp_path, released, capsys):
    """Pins exit code and message for a sound folder, a flipped byte, and a weight that is no number."""
    assert main(["verify", str(released)]) == 0
    assert "all there and finite" in capsys.readouterr().out
    encoder = tmp_path / "encoder"
    assert main(["extract", str(released), str(encoder)]) == 0
    capsys.readouterr()
    assert main(["verify", str(encoder)]) == 0
    assert "files are as SHA256SUMS says" in capsys.readouterr().out
    weights = load_file(encoder / "model.safetensors")
    weights["sam_model.pos_embed"][0, 0, 0, 0] = float("nan")
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(encoder)]) == 1
    assert "model.safetensors is not what SHA256SUMS says" in capsys.readouterr().err
    (encoder / "SHA256SUMS").unlink()
    assert main(["verify", str(encoder)]) == 1
    assert "sam_model.pos_embed holds NaN" in capsys.readouterr().err


def test_show_takes_a_released_checkpoint(tmp_path, released):
    """Pins `show`, which failed where `encode` worked."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    Image.new("RGB", (70, 50), "white").save(tmp_path / "page.png")
    assert main(["show", str(tmp_path / "page.png"), "--model", str(released), "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").is_file()


def test_what_fails_says_why_and_leaves_nothing(tmp_path, released, capsys):
    """Pins exit code 1 without a traceback, and no half of a folder."""
    (tmp_path / "mine").write_text("mine")
    for arguments, expected in (
        (["extract", str(tmp_path / "nowhere"), str(tmp_path / "out")], "nowhere' does not exist"),
        (["extract", str(released), str(tmp_path / "mine")], "is there already"),
        (["extract", str(released), str(tmp_path / "out"), "--dtype", "int8"], "`dtype` is 'int8'"),
        (["write-back", str(tmp_path / "nowhere"), str(released), str(tmp_path / "out")], "nowhere"),
        (["verify", str(tmp_path / "nowhere")], "nowhere"),
        (["upload", str(released), "a/.."], "'a/..' is no repository id"),
    ):
        assert main(arguments) == 1
        assert expected in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"released", "mine"}


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(device, capsys):
    """Pins a traceback of RuntimeError, after the weights were loaded."""
    with pytest.raises(SystemExit) as exit:
        main(["encode", "scans", "--model", "nowhere", "--out", "out", "--device", device])
    assert exit.value.code == 2
    assert f"argument --device: '{device}' is no device that is there" in capsys.readouterr().err


def test_an_interruption_ends_with_130_and_no_traceback(tmp_path, released, capsys, monkeypatch):
    """Pins Ctrl-C."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(DeepSeekOCRVisionModel, "save_pretrained", interrupt)
    assert main(["extract", str(released), str(tmp_path / "out")]) == 130
    assert "Interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_both_ways_to_start_it_teach_what_it_does():
    """Pins the console command, `python -m`, and help for each command."""
    for start in ([sys.executable, "-m", "deepseek_ocr_vision"], [f"{sys.prefix}/bin/deepseek-ocr-vision"]):
        output = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(command in output for command in COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
