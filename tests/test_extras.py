"""The extras of setup.cfg: what is missing is named together with the extra that has it."""

import configparser
import re
import sys

import pytest
import torch
from helpers import ROOT, tiny_config
from PIL import Image

from deepseek_ocr_vision import (
    DeepSeekOCRVisionImageProcessor,
    DeepSeekOCRVisionModel,
    gradient_report,
    precompute_features,
)
from deepseek_ocr_vision.encoding import encode_pages, load_pages
from deepseek_ocr_vision.visualize import draw_sheet, view_page


PAGE = Image.new("RGB", (128, 128), "white")


def extras() -> dict[str, str]:
    """The extras by name, each with the packages that it brings."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return dict(parser["options.extras_require"])


def encode(*inputs, folder):
    processor = DeepSeekOCRVisionImageProcessor(size=128)
    return encode_pages(inputs, DeepSeekOCRVisionModel(tiny_config()), processor, out=folder / "tokens")


def encode_a_pdf(folder):
    PAGE.save(folder / "page.pdf")
    return encode(folder / "page.pdf", folder=folder)


def encode_an_image(folder):
    PAGE.save(folder / "page.png")
    return encode(folder / "page.png", folder=folder)


def encode_on_ray(folder):
    PAGE.save(folder / "page.png")
    model, processor = DeepSeekOCRVisionModel(tiny_config()), DeepSeekOCRVisionImageProcessor(size=128)
    return encode_pages([folder / "page.png"], model, processor, out=folder / "tokens", ray="local", num_workers=1)


def store_features(folder):
    processor = DeepSeekOCRVisionImageProcessor(size=128)
    return precompute_features([PAGE], DeepSeekOCRVisionModel(tiny_config()), processor, cache_dir=folder)


def draw_a_sheet(folder):
    return draw_sheet(view_page(DeepSeekOCRVisionModel(tiny_config()), PAGE))


def plot_gradients(folder):
    model = DeepSeekOCRVisionModel(tiny_config())
    report = gradient_report(model, model(torch.rand(1, 3, 128, 128)).last_hidden_state.sum())
    return report.plot(folder / "gradients.png")


def open_the_demo(folder):
    import deepseek_ocr_vision.app  # noqa: F401


@pytest.mark.parametrize(
    ("package", "ask"),
    [
        ("pyarrow", encode_an_image),
        ("datasets", lambda folder: load_pages(folder)),
        ("datasets", store_features),
        ("pypdfium2", encode_a_pdf),
        ("ray", encode_on_ray),
        ("matplotlib", draw_a_sheet),
        ("matplotlib", plot_gradients),
        ("gradio", open_the_demo),
    ],
)
def test_an_error_about_a_missing_package_names_an_extra_that_has_it(package, ask, tmp_path, monkeypatch):
    """Pins messages that named extras without the package in question."""
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.endswith(".app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'deepseek-ocr-vision\[\w+\]'") as error:
        ask(tmp_path)
    extra = re.search(r"\[(\w+)\]", str(error.value))[1]
    assert re.search(rf"\n{package}(\[\w+\])?>=", extras()[extra])


def test_whatever_names_an_extra_names_one_that_there_is():
    """Pins code and documents that name an extra's former name."""
    suffixes = (".py", ".md", ".ipynb", ".cfg", ".yml", ".yaml")
    files = [path for path in ROOT.rglob("*") if path.suffix in suffixes]
    assert len(files) > 100
    pattern = re.compile(r"(?:deepseek-ocr-vision|'\.|\"\.)\[([\w,]+)\]|\bextras? `(\w+)`")
    for path in files:
        parts = path.relative_to(ROOT).parts
        if parts[0] == "build" or any(part.startswith(".") and part not in (".ci", ".github") for part in parts):
            continue
        for match in pattern.finditer(path.read_text()):
            names = (match[1] or match[2]).split(",")
            assert set(names) <= extras().keys(), f"{path}: {match[0]}"
