"""The code that a checkpoint carries: it loads where this package is not installed, and so does a copy of it."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, pixels, run_python, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor
from deepseek_ocr_vision.saving.code import FLAT_CODE, flatten, stage_code


LOAD_ENCODE_SAVE_AGAIN = """
    import sys
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    source, pixels, tokens, target = {arguments!r}
    model = AutoModel.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(AutoConfig.from_pretrained(source, trust_remote_code=True)) is type(model.config)
    save_file({{"tokens": model(load_file(pixels)["pixels"]).last_hidden_state}}, tokens)
    if {with_processor}:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
        assert model.encode("{page}")[0].shape == (4, model.config.hidden_size)
        processor.save_pretrained(target)
    model.save_pretrained(target)
"""


def assert_loads_without_the_package(folder, tmp_path, expected: torch.Tensor, *, with_processor: bool) -> None:
    """Load `folder` and a copy that is saved from there, each in a fresh interpreter without the package."""
    save_file({"pixels": pixels()}, tmp_path / "pixels")
    page = tmp_path / "page.png"
    Image.new("RGB", (70, 50), "white").save(page)
    for index, source in enumerate((folder, tmp_path / "copy 0")):
        paths = (source, tmp_path / "pixels", tmp_path / f"tokens {index}", tmp_path / f"copy {index}")
        arguments = tuple(map(str, paths))
        code = LOAD_ENCODE_SAVE_AGAIN.format(arguments=arguments, with_processor=with_processor, page=page)
        run_python(code, package_installed=False, HF_MODULES_CACHE=str(tmp_path / f"modules {index}"))
        assert torch.equal(load_file(tmp_path / f"tokens {index}")["tokens"], expected)


@pytest.mark.parametrize("feature_mode", ["residual", "projected"])
def test_a_saved_folder_loads_without_the_package_and_so_does_its_copy(tmp_path, feature_mode):
    """Pins `trust_remote_code=True` for a model and its processor in one folder, and a user's re-save."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).eval()
    folder = tmp_path / "saved"
    DeepSeekOCRVisionProcessor(DeepSeekOCRVisionImageProcessor(size=128)).save_pretrained(folder)
    model.save_pretrained(folder)
    expected = model(pixels()).last_hidden_state.detach()
    assert_loads_without_the_package(folder, tmp_path, expected, with_processor=True)


def test_a_checkpoint_of_a_trainer_loads_without_the_package(tmp_path, tiny_model):
    """Pins what `Trainer` leaves while it trains: weights that moved, code and all."""
    start = tiny_model.sam_model.pos_embed.detach().clone()

    def loss_of(outputs, labels, num_items_in_batch=None):
        return (outputs["pooler_output"].mean(dim=-1) - labels).square().mean()

    rows = [{"pixel_values": pixels(1)[0], "labels": torch.tensor(1.0)} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(tiny_model, arguments, train_dataset=rows, compute_loss_func=loss_of).train()
    expected = tiny_model.eval()(pixels()).last_hidden_state.detach()
    assert not torch.equal(tiny_model.sam_model.pos_embed, start)
    assert_loads_without_the_package(tmp_path / "run" / "checkpoint-2", tmp_path, expected, with_processor=False)


def test_with_the_package_installed_its_own_classes_load_a_folder(tmp_path, tiny_model):
    """Pins that nobody is asked to trust code that is installed already."""
    tiny_model.save_pretrained(tmp_path)
    output = run_python(f"""
        import deepseek_ocr_vision
        from transformers import AutoModel
        print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__module__)
    """)
    assert output.strip() == "deepseek_ocr_vision.modeling.modeling_deepseek_ocr_vision"


def test_the_staged_code_imports_what_a_hub_user_has_and_nothing_of_another_folder(tmp_path):
    """Pins the forms of import that transformers follows: flat, by name, and third parties that are installed."""
    allowed = {"torch", "transformers", "safetensors", "numpy", "PIL", "torchvision"}
    names = {path.name for path in stage_code(tmp_path)}
    assert names == {f"{name}_deepseek_ocr_vision.py" for part in FLAT_CODE.values() for name in part}
    for path in tmp_path.iterdir():
        lines = re.findall(r"^\s*(?:from|import)\s+(\S+)", path.read_text(), flags=re.MULTILINE)
        local = {line for line in lines if line.startswith(".")}
        assert {f"{line[1:]}.py" for line in local} <= names, path.name
        needed = {line.split(".")[0] for line in set(lines) - local} - {"deepseek_ocr_vision"}
        assert needed <= allowed | sys.stdlib_module_names, path.name
        # What needs the package stands in a `try`, which transformers passes over when it asks what a user lacks.
        assert "deepseek_ocr_vision" not in get_imports(path), path.name


@pytest.mark.parametrize("entry", ["configuration", "modeling", "image_processing", "processing"])
def test_what_an_auto_class_loads_names_every_file_that_it_travels_with(tmp_path, entry):
    """Pins transformers 5.0, which takes along the files that the loaded one names, and not those that these name."""
    stage_code(tmp_path)
    named = get_relative_imports(tmp_path / f"{entry}_deepseek_ocr_vision.py")
    needed = {Path(file).stem for file in get_relative_import_files(tmp_path / f"{entry}_deepseek_ocr_vision.py")}
    assert needed - {f"{entry}_deepseek_ocr_vision"} <= set(named)


def test_only_imports_across_folders_are_rewritten():
    """Pins that staging changes nothing else, indented imports included."""
    source = "from ..folder.module import Name\nfrom .near import Other\n    from ..a.b import c\ntext = 'from ..x'\n"
    expected = "from .module import Name\nfrom .near import Other\n    from .b import c\ntext = 'from ..x'\n"
    assert flatten(source) == expected


def test_every_module_of_the_three_folders_is_staged():
    """Pins a file that is added later and forgotten: it would be missing only where the package is not installed."""
    for part, names in FLAT_CODE.items():
        modules = {path.name for path in (ROOT / part).glob("*_deepseek_ocr_vision.py")}
        assert modules == {f"{name}_deepseek_ocr_vision.py" for name in names}


def test_staging_again_leaves_equal_files_alone_and_no_temporary_ones(tmp_path):
    """Pins the second save into a folder, and a file that somebody changed in between."""
    paths = stage_code(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in paths}
    paths[0].write_text("changed")
    stage_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    assert paths[0].read_text() != "changed"
    assert all(path.stat().st_mtime_ns == before[path] for path in paths[1:])


def test_the_object_in_memory_is_not_changed_by_saving(tmp_path, tiny_model):
    """Pins `auto_map`, which belongs to the folder: a composite's config would point to code that is not there."""
    tiny_model.save_pretrained(tmp_path)
    assert not hasattr(tiny_model.config, "auto_map")
    assert not hasattr(type(tiny_model).from_pretrained(tmp_path).config, "auto_map")
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
