"""The command line: `deepseek-ocr-vision COMMAND`, or `python -m deepseek_ocr_vision COMMAND`.

Thin over the package: `extract` is `from_deepseek_ocr`, `write-back` is `write_deepseek_ocr`, `verify` is
`weights.check_checkpoint`, `show` is `visualize.draw_sheet`, `encode` is `encoding.encode_pages`, `read` is
`composites.read_pages`, `export` is `export.export_encoder`, `upload` is `hub_upload`.
"""

import argparse
import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek_ocr_vision import PRESETS, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor, __version__, hub_upload
from deepseek_ocr_vision.composites.prompts import IMAGE_TOKEN, PROMPTS, prompt_of
from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import FEATURE_MODES
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import MODES
from deepseek_ocr_vision.encoding import encode_pages
from deepseek_ocr_vision.encoding.encoder import printable
from deepseek_ocr_vision.encoding.sources import DPI, close_documents, find_pages, open_page, page_of
from deepseek_ocr_vision.export import FORMATS, export_encoder
from deepseek_ocr_vision.modeling.device import default_device
from deepseek_ocr_vision.modeling.threads import fit_threads
from deepseek_ocr_vision.saving.checksums import write_checksums
from deepseek_ocr_vision.visualize import draw_sheet, view_page
from deepseek_ocr_vision.visualize.pages import require_image_suffix, save_image
from deepseek_ocr_vision.weights import atomic_write, check_checkpoint, compare_checksums, load_encoder


FAILED, SOME_FAILED, INTERRUPTED = 1, 3, 130
DTYPES = ("float32", "bfloat16", "float16")
TOKENS = ("float32", "float16", "bfloat16", "int8", "none")
_DTYPE_HELP = "to compute in (default: as stored, or float32 where the processor has no products in that)"


def extract(options: argparse.Namespace) -> int:
    """Take the encoder out of a released checkpoint.

    Write the encoder in a DeepSeek-OCR or Unlimited-OCR checkpoint as a checkpoint of its own, with processor, code
    and checksums. Of a repository on the Hub only the encoder's 0.8 GB are fetched.
    """
    hub_options = _chosen(options, "revision", "cache_dir", "preset", "local_files_only")
    compare_checksums(options.source)
    with atomic_write(options.target) as partial:
        model = DeepSeekOCRVisionModel.from_deepseek_ocr(
            options.source, feature_mode=options.feature_mode, dtype=options.dtype or "auto", **hub_options
        )
        processor = DeepSeekOCRVisionProcessor.from_deepseek_ocr(options.source, **hub_options)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_checksums(partial)
    num_bytes = sum(path.stat().st_size for path in options.target.iterdir())
    dtype = str(model.dtype).removeprefix("torch.")
    sys.stdout.write(
        f"{options.target}: {model.num_parameters():,} parameters in {dtype}, {num_bytes / 1e9:.2f} GB, feature mode "
        f"{model.config.feature_mode!r}, preset {options.preset!r}. It loads by\n"
        f'    AutoModel.from_pretrained("{options.target}", trust_remote_code=True)\n'
    )
    return 0


def write_back(options: argparse.Namespace) -> int:
    """Put a trained encoder back into a released checkpoint.

    Write a full checkpoint in the layout of BASE, with the encoder's weights replaced and everything else byte for
    byte as it was. What the encoder does not have keeps the base's values.
    """
    compare_checksums(options.model)
    model = DeepSeekOCRVisionModel.from_pretrained(options.model, dtype="auto")
    report = model.write_deepseek_ocr(options.base, options.target, **_chosen(options, "revision", "cache_dir"))
    sys.stdout.write(f"{report}\n")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check a checkpoint on this machine.

    Compare a checkpoint's files with its SHA256SUMS, if it has them, load the encoder, and make sure that its weights
    and the tokens of a page are finite. Exit code 1 if not.
    """
    sys.stdout.write(f"{check_checkpoint(options.folder)}\n")
    return 0


def show(options: argparse.Namespace) -> int:
    """Draw what an encoder sees on a page.

    Draw a sheet for each page: its tokens as colours, and of one token what is similar, what it attends to, and the
    pixels that it depends on. Needs matplotlib (extra `train`).
    """
    targets = _sheets(options.pages, options.out, options.page)
    model, image_processor = load_encoder(options.model, preset=options.preset)
    for page, target in zip(options.pages, targets, strict=True):
        view = view_page(model, page_of(page, options.page, dpi=DPI), image_processor=image_processor)
        title = f"{printable(page.name)}: {view.grid[0]} x {view.grid[1]} tokens of {printable(options.model)}"
        save_image(draw_sheet(view, options.token, layer=options.layer, title=title), target)
        sys.stdout.write(f"{target}\n")
    return 0


def encode(options: argparse.Namespace) -> int:
    """Turn pages into a table of tokens.

    Encode images, PDFs and datasets into a table of Parquet parts. Started again, it goes on where it was. Exit code 0
    if every page is there, 3 if some could not be read (see errors.jsonl), 1 if none could or it failed. Needs the
    extra `encode`.
    """
    fields = _chosen(options, "out", "tokens", "batch_size", "num_workers", "pages_per_file", "dpi", "split")
    fields |= _chosen(options, "image_column", "shard", "ray", "num_encoders", "gpus_per_encoder")
    fields["timeout"] = options.timeout if options.num_workers else None
    if options.progress_json:
        fields |= {"show_progress": False, "on_progress": _write_progress}
    try:
        choices = _chosen(options, "preset", "mode", "feature_mode", "dtype")
        model, image_processor = load_encoder(options.model, **choices)
        is_here = options.ray is None  # Ray moves what it has
        device = (options.device or default_device()) if is_here else "cpu"
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it as a plain function
        if is_here and model.device.type == "cpu":
            height, width = (image_processor.size[side] for side in ("height", "width"))
            fit_threads(model, num_pixels=options.batch_size * height * width)
        summary = encode_pages(options.inputs, model, image_processor, **fields)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. What is finished stays; the same command goes on from there.\n")
        return INTERRUPTED
    (sys.stderr if options.progress_json else sys.stdout).write(f"{options.out}: {summary}\n")
    return _exit_code(any_failed=bool(summary.problems), any_done=bool(summary.num_pages))


def read(options: argparse.Namespace) -> int:
    """Read pages to text or markdown by a whole DeepSeek-OCR.

    Read images, PDFs and folders of them, and write their text to the standard output as it comes. Of a repository on
    the Hub the whole 6.7 GB are fetched. Exit code 3 if some pages could not be read, 1 if none could. Needs
    transformers 5.21 or newer and, for PDFs, pypdfium2 (extra `encode`).
    """
    from transformers import TextStreamer

    from deepseek_ocr_vision.composites.read_pages import load_reader, read_page

    choices = _chosen(options, "max_new_tokens", "ngram_size", "window_size") | {"prompt": prompt_of(options.prompt)}
    found = find_pages(options.pages)
    model, processor = load_reader(
        options.model, **_chosen(options, "mode", "dtype", "device", "revision", "cache_dir")
    )
    failed = [f"{problem.source}: {problem.error}" for problem in found.problems]
    sys.stderr.writelines(f"Left out ({kind}): {', '.join(names)}\n" for kind, names in found.left_out.items())
    num_read = 0
    for page in found.pages:
        name = f"{printable(page.source)}, page {page.number + 1}"
        sys.stderr.write(f"{name}\n")
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            image = open_page(page, found.columns, dpi=options.dpi)
            read_page(model, processor, image, **choices, streamer=streamer)
            num_read += 1
        except (OSError, ValueError) as error:
            failed.append(f"{name}: {error}")
    close_documents()
    sys.stderr.writelines(f"Not read: {line}\n" for line in failed)
    return _exit_code(any_failed=bool(failed), any_done=bool(num_read))


def export(options: argparse.Namespace) -> int:
    """Write an encoder as a file for another runtime.

    Write an encoder as ONNX, pt2 (torch.export) or OpenVINO, for pages of one size or of any, and for any batch. The
    file is run in its own runtime, and kept only if it gives the model's tokens. Needs the extra `export`, but for
    pt2.
    """
    compare_checksums(options.model)
    model, image_processor = load_encoder(options.model, **_chosen(options, "feature_mode", "dtype"))
    size = options.size[0] if options.size and len(options.size) == 1 else options.size
    choices = _chosen(options, "format", "dynamic", "raw_images") | {"size": size, "image_processor": image_processor}
    result = export_encoder(model, options.out, **choices)
    memory = "" if result.peak_bytes is None else f", with {result.peak_bytes / 1e9:.1f} GB of memory"
    sys.stdout.write(
        f"{result.file}: in its own runtime the tokens differ from the model's by {result.difference:.1e} of their "
        f"standard deviation ({result.tolerance:.0e} is allowed){memory}. "
        f"{result.description} says what goes in and comes out.\n"
    )
    return 0


def _chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _exit_code(*, any_failed: bool, any_done: bool) -> int:
    if not any_failed:
        return 0
    return SOME_FAILED if any_done else FAILED


def _write_progress(progress: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(progress)}\n")
    sys.stdout.flush()


def _two_integers(separator: str, example: str) -> Callable[[str], tuple[int, int]]:
    """What argparse reads two integers by, of the form of an example."""

    def two_integers(text: str) -> tuple[int, int]:
        try:
            first, second = map(int, text.split(separator))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {example}") from error
        return first, second

    return two_integers


def _sheets(pages: Sequence[Path], out: str | None, number: int) -> list[Path]:
    """Where the sheet of each file goes; whatever can be wrong about files and places is found before any work."""
    for page in pages:
        if not page.is_file():
            raise FileNotFoundError(f"There is no page {page}.")
    is_folder = out is None or len(pages) > 1 or out.endswith(("/", os.sep)) or Path(out).is_dir()
    if is_folder and out is not None and Path(out).is_file():
        raise NotADirectoryError(f"{out} is a file; {len(pages)} pages need a folder.")
    end = "sheet.png" if number == 1 else f"{number}-sheet.png"
    targets = [Path(out or ".") / f"{page.stem}-{end}" for page in pages] if is_folder else [Path(str(out))]
    for index, target in enumerate(targets):
        require_image_suffix(target)
        if target in targets[:index]:
            raise ValueError(
                f"Two pages have one name; they would be written to {target} twice. Show them one by one."
            )
    return targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 1 with a message, or 130 after Ctrl-C. argparse itself exits with 2.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As for errors: what is written may name a file whose name the terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return options.run(options)
    except (ImportError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. What was fetched or finished is kept, nothing is left half written.\n")
        return INTERRUPTED


# The arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepseek-ocr-vision",
        description="The DeepSeek-OCR vision encoder: its weights out of a released checkpoint, back into one, onto "
        "the Hub and into other runtimes, what it sees on a page, and pages into tokens or text. Each command has its "
        "own --help.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = (_add_extract, _add_write_back, _add_verify, _add_show, _add_encode, _add_read, _add_export)
    for add_command in adders:
        add_command(commands)
    upload = commands.add_parser("upload", help="publish an encoder on the Hub", **hub_upload.HELP)
    hub_upload.add_arguments(upload)
    upload.set_defaults(run=hub_upload.run)
    return parser


def _command(
    commands: argparse._SubParsersAction, run: Callable[[argparse.Namespace], int], *, example: str
) -> Callable[..., argparse.Action]:
    """Add a command that says of itself what its function's docstring says; give what adds its arguments."""
    name, described = run.__name__.replace("_", "-"), inspect.getdoc(run) or ""
    summary, _, description = described.partition("\n\n")
    summary = summary[:1].lower() + summary[1:].removesuffix(".")
    parser = commands.add_parser(
        name, help=summary, description=description, epilog=f"deepseek-ocr-vision {name} {example}"
    )
    parser.set_defaults(run=run)
    return parser.add_argument


def _add_extract(commands: argparse._SubParsersAction) -> None:
    add = _command(commands, extract, example="deepseek-ai/DeepSeek-OCR encoder --preset deepseek-ocr")
    add("source", help="Hub id, folder or safetensors file")
    add("target", type=Path, help="new folder")
    add(
        "--preset",
        choices=list(PRESETS),
        default="deepseek-ocr-encoder",
        help="which preprocessing, and with it which features (default: %(default)s)",
    )
    add("--feature-mode", choices=FEATURE_MODES, help="other features than the preset's")
    add("--dtype", help="convert the weights, such as to float32 (default: as they are stored)")
    _add_hub_options(add)
    add("--local-files-only", action="store_true", help="do without the Hub")


def _add_write_back(commands: argparse._SubParsersAction) -> None:
    add = _command(commands, write_back, example="outputs/encoder deepseek-ai/DeepSeek-OCR DeepSeek-OCR-mine")
    add("model", help="the encoder: folder or Hub id, as save_pretrained or extract wrote it")
    add("base", help="the checkpoint to take everything else from: folder, safetensors file or Hub id")
    add("target", type=Path, help="new folder, or file if BASE is one")
    _add_hub_options(add)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    add = _command(commands, verify, example="encoder")
    add("folder", type=Path, help="the encoder's checkpoint, or a released one")


def _add_show(commands: argparse._SubParsersAction) -> None:
    add = _command(commands, show, example="page.png --model encoder --token 3,5")
    add("pages", nargs="+", type=Path, metavar="page", help="image, PDF or TIFF")
    add("--model", required=True, help="the encoder, or a released checkpoint: folder or Hub id")
    add("--preset", choices=list(PRESETS), help="other preprocessing than the checkpoint's")
    add("--page", type=int, default=1, help="of a PDF or TIFF, from 1 (default: %(default)s)")
    where = "image file to write or, for several pages, a folder; what is there is replaced"
    add("--out", help=f"{where} (default: NAME-sheet.png here)")
    which = "which token, from 0,0 at the top left (default: the one with the most on its square)"
    add("--token", type=_two_integers(",", "ROW,COL, such as 3,5"), metavar="ROW,COL", help=which)
    add("--layer", type=int, default=-1, help="which CLIP layer's attention, from 0, or from -1 back (default: last)")


def _add_encode(commands: argparse._SubParsersAction) -> None:
    add = _command(commands, encode, example="scans report.pdf --model encoder --out tokens --workers 8")
    add("inputs", nargs="+", metavar="INPUT", help="image, PDF, folder of them, or name or folder of a dataset")
    add("--out", required=True, help="folder or URL to write, or to go on with")
    add("--model", required=True, help="an encoder or a released checkpoint: folder or Hub id")
    add("--preset", choices=list(PRESETS), help="other preprocessing than the checkpoint's")
    add("--mode", choices=list(MODES), help="one of the released model's resolutions")
    add("--feature-mode", choices=FEATURE_MODES, help="other features than the checkpoint's")
    add("--dtype", choices=DTYPES, help=_DTYPE_HELP)
    add("--batch-size", type=int, default=1, help="pages at once (default: %(default)s)")
    add("--device", type=_device, help="such as cuda:1 (default: the accelerator there is)")
    preparing = "processes that prepare pages for each encoder (default: %(default)s)"
    add("--workers", type=int, default=2, dest="num_workers", help=preparing)
    patience = "seconds for a page to be read and prepared, after which it is left out (default: %(default)s)"
    add("--timeout", type=float, default=60, help=patience)
    stored = "how tokens are stored; none: their mean alone (default: as they are computed)"
    add("--tokens", choices=TOKENS, help=stored)
    add("--pages-per-file", type=int, default=128, help="pages of a part (default: %(default)s)")
    share = "encode the I-th of N shares of the pages, from 0, as one of several commands that share them"
    add("--shard", type=_two_integers("/", "I/N, such as 0/8"), default=(0, 1), metavar="I/N", help=share)
    on_ray = "by actors of Ray, on a cluster at ADDRESS or, without it, on this machine"
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help=on_ray)
    add("--encoders", type=int, default=1, dest="num_encoders", help="on Ray (default: %(default)s)")
    add("--gpus-per-encoder", type=float, default=0, help="on Ray; may be a fraction (default: %(default)s)")
    in_json = "a line of JSON every few seconds in place of the bar: pages, errors, rate, the encoder's share"
    add("--progress-json", action="store_true", help=in_json)
    add("--dpi", type=float, default=DPI, help="that PDFs are rendered with (default: %(default)s)")
    add("--split", default="train", help="of a dataset (default: %(default)s)")
    add("--image-column", default="image", help="of a dataset (default: %(default)s)")


def _add_read(commands: argparse._SubParsersAction) -> None:
    add = _command(commands, read, example="scan.png report.pdf --model deepseek-ai/DeepSeek-OCR > text.md")
    add("pages", nargs="+", metavar="PAGE", help="image, PDF, or folder of them")
    add("--model", required=True, help="a whole model, released or trained: folder or Hub id")
    asked = f"{', '.join(PROMPTS)}, for one of the released prompts, or a prompt in full, with {IMAGE_TOKEN}"
    add("--prompt", default="markdown", help=f"{asked} (default: %(default)s)")
    add("--mode", choices=list(MODES), default="gundam", help="resolution (default: %(default)s)")
    add("--dtype", choices=DTYPES, help=_DTYPE_HELP)
    add("--device", type=_device, help="such as cuda:1 (default: the accelerator there is)")
    add("--max-new-tokens", type=int, help="of a page (default: as many as the model has room for)")
    add("--ngram-size", type=int, default=20, help="tokens that are not written twice, or 0 (default: %(default)s)")
    add("--window-size", type=int, help="how many tokens back that counts (default: all)")
    add("--dpi", type=float, default=DPI, help="that PDFs are rendered with (default: %(default)s)")
    _add_hub_options(add)


def _add_export(commands: argparse._SubParsersAction) -> None:
    add = _command(commands, export, example="encoder --format onnx --out encoder.onnx")
    add("model", help="the encoder, or a released checkpoint: folder or Hub id")
    add("--format", choices=FORMATS, required=True, help="of the file")
    add("--out", required=True, help="file to write, ending in .onnx, .pt2 or, for OpenVINO, .xml")
    sides = "side of a page, or height and width (default: the encoder's own)"
    add("--size", type=int, nargs="+", metavar="PIXELS", help=sides)
    add("--dynamic", action="store_true", help="pages of any size")
    add("--feature-mode", choices=FEATURE_MODES, help="other features than the checkpoint's")
    add("--dtype", choices=("float32", "float16"), default="float32", help="to compute in (default: %(default)s)")
    add("--raw-images", action="store_true", help="take images of uint8, which the file normalises, not pixels")


def _device(name: str) -> str:
    """A device on which something can be computed."""
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} is no device that is there: {reason}") from error
    return name


def _add_hub_options(add: Callable[..., argparse.Action]) -> None:
    add("--revision", help="branch, tag or commit on the Hub")
    add("--cache-dir", help="the Hub's cache (default: huggingface_hub's own)")


if __name__ == "__main__":
    sys.exit(main())
