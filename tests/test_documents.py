"""The documents: every block of Python is run, every command is parsed, every link leads somewhere."""

import argparse
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate.commands.merge import merge_command_parser
from helpers import ROOT, released_tensors, tiny_config, write_checkpoint
from PIL import Image, ImageDraw
from test_from_encoder import make_encoder
from transformers import LlamaConfig, LlamaForCausalLM
from whole_model import HAS_WHOLE_MODEL, NO_WHOLE_MODEL, tiny_whole_model, write_released

import deepseek_ocr_vision
from deepseek_ocr_vision import DeepSeekOCRVisionModel, composites, encoding, visualize
from deepseek_ocr_vision.__main__ import main
from deepseek_ocr_vision.composites.small import byte_tokenizer


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "examples" / "first_ten_minutes.ipynb"
# How many blocks of a page cannot be run, each with its reason in the page.
NOT_RUN = {"deepseek_ocr.md": 1, "encoding.md": 1, "migrating.md": 3, "other_trainers.md": 1, "weights.md": 1}
NOT_RUN |= {"quantization.md": 2}
WIDTH_OF_CODE = 88  # characters, as docs/site.css has room for
# Commands and modules of other people.
FOREIGN = {"git", "pip", "swift", "timeit"}

BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.S | re.M
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


class Block(NamedTuple):
    """A fenced block: its language, what is in it, the line above it, and why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in its order."""
    text = page.read_text()
    return [
        Block(match["language"], match["code"], text[: match.start("code")].count("\n"), match["reason"])
        for match in BLOCK.finditer(text)
    ]


def pages_with(language: str) -> list:
    """The pages that have blocks of a language, as parameters of a test."""
    found = [page for page in PAGES if any(block.language == language for block in blocks(page))]
    return [pytest.param(page, id=page.name) for page in found]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES[2:]])
def test_code_fits_the_width_of_a_page(page):
    """Pins commands whose options are only seen by scrolling; what a command prints may be wider."""
    code = [
        line for block in blocks(page) if block.language not in ("text", "json") for line in block.code.split("\n")
    ]
    assert [line for line in code if len(line) > WIDTH_OF_CODE] == []


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory) -> Path:
    """What a reader has at hand, under the names that the pages use, at a small size."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    released = folder / "deepseek-ai" / "DeepSeek-OCR"
    if HAS_WHOLE_MODEL:
        write_released(released, tiny_whole_model().to(torch.bfloat16))
    else:
        encoder = DeepSeekOCRVisionModel(tiny_config(feature_mode="sequence")).to(torch.bfloat16)
        write_checkpoint(released, released_tensors(encoder), encoder.config)
    extract = ["extract", str(released), str(folder / "encoder"), "--preset", "deepseek-ocr"]
    assert main(extract) == 0
    for trained in ("outputs/encoder", "outputs/finetune/encoder"):
        extract[2] = str(folder / trained)
        assert main([*extract, "--dtype", "float32"]) == 0
    _write_language_model(folder / "my_llama")
    page = Image.new("RGB", (400, 300), "white")
    ImageDraw.Draw(page).text((60, 40), "a page", fill="black", font_size=60)
    page.save(folder / "page.png")
    encode = [
        "encode",
        str(folder / "page.png"),
        "--model",
        str(folder / "encoder"),
        "--out",
        str(folder / "scans_tokens"),
    ]
    assert main(encode) == 0
    return folder


def _write_language_model(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def namespace(readers_folder, tmp_path, monkeypatch) -> dict:
    """Where the blocks of a page are run: a module of its own, in a folder of its own with what a reader has."""
    shutil.copytree(readers_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    pages = [{"pixel_values": torch.zeros(3, 128, 128), "labels": label} for label in (0, 1)]
    vars(module).update(encoder=make_encoder(), pages=pages)
    return vars(module)


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, namespace, capsys):
    """Pins a page that tells of names that have changed, or of output that is not what comes out."""
    skip_without_whole_model(page, "read_pages")
    output = None
    for block in blocks(page):
        if block.language == "text" and output is not None:
            assert comparable(block.code) == comparable(output), f"{page.name}, line {block.line}"
        output = None
        if block.language == "python" and block.reason is None:
            capsys.readouterr()
            # Empty lines in front, so that a traceback has the line of the page.
            exec(compile("\n" * block.line + block.code, page, "exec"), namespace)
            output = capsys.readouterr().out


def skip_without_whole_model(page: Path, word: str) -> None:
    """Skip a page with this word in one of its blocks where transformers lacks the classes of the whole model."""
    if not HAS_WHOLE_MODEL and any(word in block.code for block in blocks(page)):
        pytest.skip(NO_WHOLE_MODEL)


def comparable(output: str) -> list[str]:
    """The words of an output without its decimals, whose last digits differ between versions of PyTorch."""
    return NUMBER.sub("#", output).split()


def test_the_blocks_that_are_not_run_are_these():
    """Pins a number of blocks that nobody runs which grows unseen."""
    not_run = {page.name: sum(block.reason is not None for block in blocks(page)) for page in PAGES}
    assert {name: number for name, number in not_run.items() if number} == NOT_RUN


class Parsed(BaseException):
    """The command's parser took the arguments."""


@pytest.fixture
def parsers_only(monkeypatch) -> None:
    """Every command ends, with `Parsed`, when its parser has taken its arguments."""
    parse_known_args = argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse_and_stop(parser, *args, **kwargs):
        nonlocal depth
        depth += 1
        try:
            options, unknown = parse_known_args(parser, *args, **kwargs)
        finally:
            depth -= 1
        if depth == 0 and not unknown:
            raise Parsed
        return options, unknown

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_the_commands_of_a_page_have_the_options_that_it_gives_them(page, parsers_only, monkeypatch):
    """Pins options that were renamed, and scripts that moved."""
    skip_without_whole_model(page, "finetune_deepseek_ocr")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)  # as `python -m` has it
    for block in blocks(page):
        if block.language == "bash":
            for command in commands(block.code):
                check_command(command, monkeypatch)


def commands(code: str) -> list[list[str]]:
    """The commands of a block as words, without comments and without variables in front."""
    found, pending = [], ""
    for line in code.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        pending = ""
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    assert not pending, code
    return found


def check_command(words: list[str], monkeypatch) -> None:
    """Make sure that a command is there and takes its arguments."""
    command, *arguments = words
    if command == "make":
        check_make(arguments, monkeypatch)
    elif command == "deepseek-ocr-vision":
        with pytest.raises(Parsed):
            main(arguments)
    elif words[:2] == ["accelerate", "launch"]:
        check_python(script_of_launch(words[2:]), monkeypatch)
    elif words[:2] == ["accelerate", "merge-weights"]:
        with pytest.raises(Parsed):
            merge_command_parser().parse_args(words[2:])
    elif command == "python":
        check_python(arguments, monkeypatch)
    else:
        assert command in FOREIGN, words


def check_make(arguments: list[str], monkeypatch) -> None:
    """Make sure of the targets, and of what is handed on to the benchmarks."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "ARGS" and arguments[0] == "bench" and value != "--help":
            check_python(["-m", "benchmarks", *shlex.split(value)], monkeypatch)
        elif name not in ("ARGS", "PYTHON"):
            assert argument in targets, argument


def script_of_launch(arguments: list[str]) -> list[str]:
    """What `accelerate launch` would run, after its own parser has taken what belongs to it."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    with pytest.raises(Parsed):
        parser.parse_args(arguments)
    scripts = [index for index, argument in enumerate(arguments) if argument.endswith(".py")]
    return arguments[scripts[0] :]


def check_python(arguments: list[str], monkeypatch) -> None:
    """Make sure that a script or module is there and, if it is ours, takes its arguments."""
    if arguments[0] == "-m":
        module, *options = arguments[1:]
        assert importlib.util.find_spec(module), module
        run, target = runpy.run_module, module
    else:
        script, *options = arguments
        assert (ROOT / script).is_file() or "/" not in script, script
        run, target = runpy.run_path, str(ROOT / script)
        monkeypatch.syspath_prepend((ROOT / script).parent)
    if target in FOREIGN or "--help" in options or not (run is runpy.run_module or Path(target).is_file()):
        return
    monkeypatch.setattr(sys, "argv", [target, *options])
    try:
        run(target, run_name="__main__")
    except Parsed:
        return
    except ImportError as error:
        if "pip install 'deepseek-ocr-vision[" not in str(error):
            raise
        pytest.skip(str(error))
    pytest.fail(f"{target} did not read its options")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in [*PAGES, ROOT / "CHANGELOG.md"]])
def test_links_lead_to_files(page):
    """Pins links to pages that were renamed; anchors are checked where the site is built."""
    broken = [link for link in LINK.findall(BLOCK.sub("", page.read_text())) if not (page.parent / link).exists()]
    assert not broken


def test_the_notebook_runs_from_top_to_bottom_and_is_stored_without_output(tmp_path):
    """Pins ten first minutes that end in an error, and outputs that make every change of the notebook a large one."""
    nbformat = pytest.importorskip("nbformat", reason="the extra `dev` is not installed")
    client = pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    resources = {"metadata": {"path": tmp_path}}
    client.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_api_page_lists_all_that_is_public():
    """Pins names at the front door that no page explains."""
    listed = {line.rpartition(".")[2] for line in (ROOT / "docs" / "api.md").read_text().splitlines() if ":::" in line}
    constants = {"IMAGE_TOKEN", "__version__"}
    for module in (deepseek_ocr_vision, composites, encoding, visualize):
        assert set(module.__all__) - constants <= listed, module.__name__
