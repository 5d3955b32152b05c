"""The shape of the house: who imports whom, and what an installation holds."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, run_python

from deepseek_ocr_vision import __version__
from deepseek_ocr_vision.__main__ import main


TRAVELLING = {
    "saving": set(),
    "configuration": {"saving"},
    "modeling": {"saving", "configuration"},
    "processing": {"saving", "configuration"},
}
BELOW = {
    "weights": {*TRAVELLING},
    "encoding": {*TRAVELLING, "weights"},
    "export": {*TRAVELLING, "weights", "encoding"},
    "composites": {*TRAVELLING, "weights", "encoding"},
    "training": {*TRAVELLING, "weights", "encoding", "composites"},
    "visualize": {*TRAVELLING, "weights", "encoding", "composites"},
}
MAY_IMPORT = TRAVELLING | BELOW
FOLDERS = tuple(MAY_IMPORT)


def in_a_try(tree: ast.AST) -> set[ast.AST]:
    """The imports in a `try` of a function, which what travels may lack."""
    tries = [
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    ]
    return {each for node in tries if isinstance(node, ast.Try) for each in node.body}


def imported_folders(path: Path) -> set[str]:
    """The folders of ours that a module imports from, its own and what it may lack aside."""
    tree = ast.parse(path.read_text())
    optional = in_a_try(tree) if path.parts[-2] in TRAVELLING else set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in optional:
            prefix = "" if node.level else "deepseek_ocr_vision."
            match = re.match(rf"{re.escape(prefix)}(\w+)", node.module or "")
            if match and match[1] in FOLDERS:
                found.add(match[1])
    return found - {path.relative_to(ROOT).parts[0]}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_one_way(folder):
    """Pins the house: configuration stands alone, modeling and processing stand on it and not on each
    other, and what people train and look with stands on these.
    """
    for path in (ROOT / folder).rglob("*.py"):
        assert imported_folders(path) <= MAY_IMPORT[folder], path


def test_the_table_of_contributing_says_who_imports_whom():
    """Pins a table that said other things than the test above, which is what counts."""
    rows = re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [folder for folder, _ in rows] == list(FOLDERS)
    for folder, may_import in rows:
        assert set(re.findall(r"`(\w+)`", may_import)) == MAY_IMPORT[folder], folder


def test_importing_the_package_registers_all_four_auto_classes():
    """Pins the front door, in a fresh interpreter."""
    output = run_python("""
        import deepseek_ocr_vision as package
        from transformers import AutoConfig, AutoModel, LlavaConfig
        config = AutoConfig.for_model("deepseek_ocr_vision_encoder")
        print(type(config) is package.DeepSeekOCRVisionConfig)
        from transformers import IMAGE_PROCESSOR_MAPPING, MODEL_MAPPING, PROCESSOR_MAPPING
        print(all(type(config) in mapping for mapping in (IMAGE_PROCESSOR_MAPPING, MODEL_MAPPING, PROCESSOR_MAPPING)))
        llava = LlavaConfig(vision_config={"model_type": "deepseek_ocr_vision_encoder"})
        print(type(llava.vision_config) is type(config))
        print(all(hasattr(package, name) for name in package.__all__))
    """)
    assert output.split() == ["True"] * 4


def test_the_wheel_holds_the_package_and_no_tests(tmp_path):
    """Pins a root that is the package: what lies beside it must not be packed, nor anything of it forgotten."""
    pytest.importorskip("wheel", reason="the extra `dev` is not installed")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    copy = tmp_path / "source"
    passed_over = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=passed_over)
    subprocess.run(command, cwd=copy, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"deepseek_ocr_vision-{__version__}-")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    expected |= {"__init__.py", "__main__.py", "app.py", "hub_upload.py", "model_card.md", "py.typed"}
    assert names == {f"deepseek_ocr_vision/{name}" for name in expected}


def test_the_version_is_in_one_place_and_in_the_changelog(capsys):
    """Pins a release whose metadata, command line and changelog say different things."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: deepseek_ocr_vision.__version__"
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"deepseek-ocr-vision {__version__}\n")
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == __version__
