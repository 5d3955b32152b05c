"""Files for other runtimes: they give the model's tokens there, or they are not left behind."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pixels, relative_error, tiny_config
from PIL import Image

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.__main__ import main
from deepseek_ocr_vision.export import ExportError, export_encoder, runtimes


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed (extra `export`)")


def model_of(feature_mode="concat"):
    torch.manual_seed(0)
    return DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).eval()


def test_the_command_writes_a_file_that_gives_the_model_s_tokens_and_says_how_to_use_it(tmp_path, capsys):
    """Pins `export --format pt2`: the file, its check in a fresh process, and the JSON beside it."""
    model = model_of()
    model.save_pretrained(tmp_path / "encoder")
    DeepSeekOCRVisionImageProcessor(size=128).save_pretrained(tmp_path / "encoder")
    file = tmp_path / "encoder.pt2"
    command = ["export", str(tmp_path / "encoder"), "--format", "pt2", "--size", "64", "128", "--out", str(file)]
    assert main(command) == 0
    assert "differ" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "encoder.pt2", "encoder.pt2.json"]
    program = torch.export.load(file).module()
    for batch_size in (1, 3):
        batch = pixels(batch_size, 64, 128)
        assert relative_error(program(batch), model(batch).last_hidden_state) < 1e-4
    description = json.loads((tmp_path / "encoder.pt2.json").read_text())
    assert description["inputs"] == [{"name": "pixel_values", "shape": ["batch", 3, 64, 128], "dtype": "float32"}]
    assert description["outputs"][0]["shape"] == ["batch", 2, model.config.hidden_size]
    assert description["preprocessing"]["image_mean"] == DeepSeekOCRVisionImageProcessor().image_mean
    assert description["check"]["difference"] <= description["check"]["tolerance"] == 1e-4


@pytest.mark.parametrize("fields", [{"do_normalize": False}, {"do_rescale": False, "do_normalize": False}])
def test_a_file_of_raw_images_does_what_its_image_processor_does(fields, tmp_path):
    """Pins pixels that were normalised although the image processor does not."""
    model, page = model_of(), Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB")
    prepares = DeepSeekOCRVisionImageProcessor(size=64, **fields)
    options = {"size": 64, "raw_images": True, "image_processor": prepares}
    before = model.config._attn_implementation
    result = export_encoder(model, tmp_path / "encoder.pt2", format="pt2", **options)
    assert model.config._attn_implementation == before
    tokens = torch.export.load(result.file).module()(torch.tensor(np.asarray(page))[None])
    assert relative_error(tokens, model(**prepares(page, return_tensors="pt")).last_hidden_state) < 1e-4


@pytest.mark.parametrize("raw_images", [False, True])
def test_pages_prepared_as_its_description_says_are_what_the_file_takes(raw_images, tmp_path):
    """Pins a file for 64 x 128 whose description named pages of 1024 x 1024, tiles, and normalising twice."""
    model, page = model_of(), Image.effect_mandelbrot((90, 120), (-2, -1, 1, 1), 20).convert("RGB")
    prepares = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam")
    options = {"size": (64, 128), "raw_images": raw_images, "image_processor": prepares}
    result = export_encoder(model, tmp_path / "encoder.pt2", format="pt2", **options)
    fields = json.loads(result.description.read_text())["preprocessing"]
    layout = {"data_format": "channels_last"} if raw_images else {}
    batch = DeepSeekOCRVisionImageProcessor.from_dict(fields)(page, return_tensors="pt", **layout)["pixel_values"]
    tokens = torch.export.load(result.file).module()(batch.to(torch.uint8) if raw_images else batch)
    expected = prepares(page, return_tensors="pt", tile_size=None, size={"height": 64, "width": 128})
    assert relative_error(tokens, model(**expected).last_hidden_state) < 1e-4


@pytest.mark.parametrize(
    ("format", "suffix", "feature_mode"),
    [
        pytest.param("onnx", ".onnx", "projected", marks=needs("onnx", "onnxscript", "onnxruntime")),
        pytest.param("openvino", ".xml", "residual", marks=needs("openvino")),
    ],
)
def test_other_runtimes_give_the_model_s_tokens(format, suffix, feature_mode, tmp_path):
    """Pins ONNX with images that the file normalises itself, and OpenVINO; the call itself compares the tokens."""
    model = model_of(feature_mode)
    file = tmp_path / f"encoder{suffix}"
    result = export_encoder(model, file, format=format, size=(64, 128), raw_images=format == "onnx")
    assert file.is_file()
    assert result.difference < 1e-4
    assert len(result.seconds) == 2
    assert result.peak_bytes > 1 << 20


@pytest.mark.parametrize(
    ("format", "suffix"),
    [("pt2", ".pt2"), pytest.param("onnx", ".onnx", marks=needs("onnx", "onnxscript", "onnxruntime"))],
)
def test_one_file_serves_pages_of_any_size(format, suffix, tmp_path):
    """Pins `dynamic`: a file for one size, or one that resizes its tables in another way than the model."""
    model = model_of()
    result = export_encoder(model, tmp_path / f"encoder{suffix}", format=format, dynamic=True)
    assert result.difference < 1e-4
    description = json.loads(result.description.read_text())
    assert description["inputs"][0]["shape"] == ["batch", 3, "height", "width"]
    assert description["outputs"][0]["shape"] == ["batch", "tokens", model.config.hidden_size]


def test_where_the_system_does_not_tell_the_memory_it_is_unknown(monkeypatch, tmp_path):
    """Pins `import resource`, which fails on Windows and with it every export there."""
    assert runtimes.peak_bytes() > 1 << 20
    monkeypatch.setattr(runtimes, "STATUS", tmp_path / "none")
    assert runtimes.peak_bytes() > 1 << 20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runtimes.peak_bytes() is None


def test_the_memory_of_a_runtime_is_its_own():
    """Pins `ru_maxrss`, which a process on Linux has from the one that started it: the model's, and not the file's."""
    held = torch.ones(1 << 28)  # 1 GiB
    command = [sys.executable, "-c", "import runtimes; print(runtimes.peak_bytes())"]
    folder = Path(runtimes.__file__).parent
    peak = int(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)
    assert 1 << 20 < peak < held.nbytes / 2


@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx_as_people_export_it_gives_the_model_s_tokens(tmp_path):
    """Pins `torch.onnx.export` with gradients and the default attention: "Cannot view a tensor with shape ..."."""
    import onnxruntime

    model, batch, file = model_of(), pixels(1, 128, 64), tmp_path / "encoder.onnx"
    torch.onnx.export(model, (batch,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    tokens = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
    assert relative_error(torch.from_numpy(tokens), model(batch).last_hidden_state) < 1e-4


def test_exported_with_any_batch_it_gives_the_model_s_tokens():
    """Pins a batch size that exporting took for a constant."""
    model = model_of()
    model.set_attn_implementation("sdpa_folded")
    batch = {"pixel_values": {0: torch.export.Dim("batch", max=1024)}}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"pixel_values": pixels(2, 64, 128)}, dynamic_shapes=batch, strict=False
        ).module()
        for batch_size in (1, 3):
            others = pixels(batch_size, 64, 128)
            actual = program(pixel_values=others).last_hidden_state
            assert relative_error(actual, model(others).last_hidden_state) < 1e-5


def test_a_file_that_gives_other_tokens_is_not_left_behind_and_the_model_is_as_before(tmp_path):
    """Pins the promise of the check, by a model that adds noise: the file draws other noise than the model."""
    model = model_of().train()
    model.set_attn_implementation("eager")
    model.sam_model.neck.register_forward_hook(lambda module, inputs, output: output + torch.rand_like(output))
    (tmp_path / "encoder.pt2").write_text("the one before")
    with pytest.raises(ExportError, match=r"differ by .* and 1e-04 is allowed"):
        export_encoder(model, tmp_path / "encoder.pt2", format="pt2", size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt2"]
    assert (tmp_path / "encoder.pt2").read_text() == "the one before"
    assert model.training
    assert model.sam_model.config._attn_implementation == model.vision_model.config._attn_implementation == "eager"


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    """Pins a description beside a file that could not be written."""
    (tmp_path / "encoder.pt2").mkdir()
    with pytest.raises(IsADirectoryError, match="which is a folder"):
        export_encoder(model_of(), tmp_path / "encoder.pt2", format="pt2", size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tflite"}, r"`format`.*'onnx'"),
        ({"file": "encoder.onnx"}, r"'encoder\.onnx'.*'\.pt2'"),
        ({"size": 100}, r"`size` is 100.*multiples of 64"),
        ({"size": (64, 0)}, "`size`"),
        ({"size": (64, 128, 64)}, r"`size` is \(64, 128, 64\).*height and width"),
        ({"dynamic": True, "size": 64}, r"`dynamic`.*`size`"),
        ({"dynamic": True, "format": "openvino", "file": "encoder.xml"}, r"`dynamic`.*'openvino'.*'pt2'"),
        ({"model": model_of().bfloat16()}, r"bfloat16.*float32 or float16"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(change, message):
    """Pins messages for mistakes that the exporters would report in their own terms."""
    arguments = {"model": model_of(), "file": "encoder.pt2", "format": "pt2"} | change
    with pytest.raises(ValueError, match=message):
        export_encoder(arguments.pop("model"), arguments.pop("file"), **arguments)
