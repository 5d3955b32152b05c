"""The command line: `deepseek-ocr-vision COMMAND`, or `python -m deepseek_ocr_vision COMMAND`.

Thin over the package: `extract` is `from_deepseek_ocr`, `write-back` is `write_deepseek_ocr`, `show` is
`visualize.draw_sheet`, `encode` is `encoding.encode_pages`, `read` is `composites.read_pages`, `export` is
`export.export_encoder`, `upload` is `hub_upload`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek_ocr_vision import PRESETS, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor, __version__, hub_upload
from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import FEATURE_MODES
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import MODES
from deepseek_ocr_vision.encoding import encode_pages
from deepseek_ocr_vision.encoding.encoder import printable
from deepseek_ocr_vision.encoding.sources import close_documents, find_pages, open_page, page_of
from deepseek_ocr_vision.export import FORMATS, export_encoder
from deepseek_ocr_vision.modeling.threads import fit_threads
from deepseek_ocr_vision.saving.checksums import write_checksums
from deepseek_ocr_vision.visualize import draw_sheet, view_page
from deepseek_ocr_vision.visualize.pages import require_image_suffix, save_image
from deepseek_ocr_vision.weights import atomic_write, check_checkpoint, compare_checksums, load_encoder


FAILED, SOME_FAILED, INTERRUPTED = 1, 3, 130
DPI = 144  # pixels an inch that PDFs are rendered with
TOKENS = ("float32", "float16", "bfloat16", "int8", "none")


def extract(options: argparse.Namespace) -> int:
    """Write the encoder of a checkpoint as one of its own, which loads by the Auto classes."""
    hub_options = {"revision": options.revision, "cache_dir": options.cache_dir, "preset": options.preset}
    hub_options["local_files_only"] = options.local_files_only
    if os.path.exists(options.source):
        compare_checksums(options.source)
    with atomic_write(options.target) as partial:
        model = DeepSeekOCRVisionModel.from_deepseek_ocr(
            options.source, feature_mode=options.feature_mode, dtype=options.dtype, **hub_options
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
    """Write a full checkpoint with the encoder's weights in it replaced."""
    if os.path.exists(options.model):
        compare_checksums(options.model)
    model = DeepSeekOCRVisionModel.from_pretrained(options.model, dtype="auto")
    report = model.write_deepseek_ocr(
        options.base, options.target, revision=options.revision, cache_dir=options.cache_dir
    )
    sys.stdout.write(f"{report}\n")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check a checkpoint on this machine: its checksums, that it loads, and that a page gives finite tokens."""
    sys.stdout.write(f"{check_checkpoint(options.folder)}\n")
    return 0


def show(options: argparse.Namespace) -> int:
    """Draw a sheet of what the encoder sees for each page."""
    targets = _sheets(options.pages, options.out, options.page)
    model, image_processor = load_encoder(options.model, preset=options.preset)
    for page, target in zip(options.pages, targets, strict=True):
        view = view_page(model, page_of(page, options.page, dpi=DPI), image_processor=image_processor)
        title = f"{page.name}: {view.grid[0]} x {view.grid[1]} tokens of {options.model}"
        save_image(draw_sheet(view, options.token, layer=options.layer, title=title), target)
        sys.stdout.write(f"{target}\n")
    return 0


def encode(options: argparse.Namespace) -> int:
    """Encode pages into a table of tokens."""
    choices = {name: getattr(options, name) for name in ("preset", "mode", "feature_mode", "dtype")}
    names: tuple[str, ...] = (
        "out",
        "tokens",
        "batch_size",
        "num_workers",
        "pages_per_file",
        "dpi",
        "split",
        "image_column",
        "shard",
    )
    names += ("ray", "num_encoders", "gpus_per_encoder")
    fields = {name: getattr(options, name) for name in names}
    fields["timeout"] = options.timeout if options.num_workers else None
    if options.progress_json:
        fields |= {"show_progress": False, "on_progress": _write_progress}
    try:
        model, image_processor = load_encoder(options.model, **choices)
        is_here = options.ray is None  # Ray moves what it has
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = (options.device or accelerator) if is_here else "cpu"
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it as a plain function
        if is_here and model.device.type == "cpu":
            height, width = (image_processor.size[side] for side in ("height", "width"))
            fit_threads(model, num_pixels=options.batch_size * height * width)
        summary = encode_pages(options.inputs, model, image_processor, **fields)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. What is finished stays; the same command goes on from there.\n")
        return INTERRUPTED
    (sys.stderr if options.progress_json else sys.stdout).write(f"{options.out}: {summary}\n")
    if not summary.problems:
        return 0
    return SOME_FAILED if summary.num_pages else FAILED


def read(options: argparse.Namespace) -> int:
    """Write the text of pages to the standard output, token by token."""
    from transformers import TextStreamer

    from deepseek_ocr_vision.composites.read_pages import load_reader, prompt_of, read_page

    prompt = prompt_of(options.prompt)
    found = find_pages(options.pages)
    names: tuple[str, ...] = ("mode", "dtype", "device", "revision", "cache_dir")
    model, processor = load_reader(options.model, **{name: getattr(options, name) for name in names})
    names = ("max_new_tokens", "ngram_size", "window_size")
    choices = {name: getattr(options, name) for name in names} | {"prompt": prompt}
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
    if not failed:
        return 0
    return SOME_FAILED if num_read else FAILED


def export(options: argparse.Namespace) -> int:
    """Write an encoder as a file for another runtime."""
    model, image_processor = load_encoder(options.model, feature_mode=options.feature_mode, dtype=options.dtype)
    size = None if options.size is None else tuple(options.size) if len(options.size) == 2 else options.size[0]
    result = export_encoder(
        model,
        options.out,
        format=options.format,
        size=size,
        raw_images=options.raw_images,
        image_processor=image_processor,
    )
    sys.stdout.write(
        f"{result.file}: in its own runtime the tokens differ from the model's by {result.difference:.1e} of their "
        f"standard deviation ({result.tolerance:.0e} is allowed), with {result.peak_bytes / 1e9:.1f} GB of memory. "
        f"{result.description} says what goes in and comes out.\n"
    )
    return 0


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
    try:
        return options.run(options)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. What was fetched or finished is kept, nothing is left half written.\n")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepseek-ocr-vision",
        description="The DeepSeek-OCR vision encoder: its weights out of a released checkpoint, back into one, and "
        "onto the Hub, and what it sees on a page. Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_extract(commands)
    _add_write_back(commands)
    _add_verify(commands)
    _add_show(commands)
    _add_encode(commands)
    _add_read(commands)
    _add_export(commands)
    upload = commands.add_parser("upload", help="publish an encoder on the Hub", **hub_upload.HELP)
    hub_upload.add_arguments(upload)
    upload.set_defaults(run=hub_upload.run)
    return parser


def _add_extract(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "extract",
        help="take the encoder out of a released checkpoint",
        description="Write the encoder in a DeepSeek-OCR or Unlimited-OCR checkpoint as a checkpoint of its own, with "
        "processor, code and checksums. Of a repository on the Hub only the encoder's 0.8 GB are fetched.",
        epilog="deepseek-ocr-vision extract deepseek-ai/DeepSeek-OCR encoder --preset deepseek-ocr",
    )
    parser.add_argument("source", help="Hub id, folder or safetensors file")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="deepseek-ocr-encoder",
        help="which preprocessing, and with it which features (default: %(default)s)",
    )
    parser.add_argument("--feature-mode", choices=FEATURE_MODES, help="other features than the preset's")
    parser.add_argument("--dtype", help="convert the weights, such as to float32 (default: as they are stored)")
    _add_hub_options(parser)
    parser.add_argument("--local-files-only", action="store_true", help="do without the Hub")
    parser.set_defaults(run=extract)


def _add_write_back(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "write-back",
        help="put a trained encoder back into a released checkpoint",
        description="Write a full checkpoint in the layout of BASE, with the encoder's weights replaced and "
        "everything else byte for byte as it was. What the encoder does not have keeps the base's values.",
        epilog="deepseek-ocr-vision write-back outputs/encoder deepseek-ai/DeepSeek-OCR DeepSeek-OCR-mine",
    )
    parser.add_argument("model", help="the encoder: folder or Hub id, as save_pretrained or extract wrote it")
    parser.add_argument("base", help="the checkpoint to take everything else from: folder, safetensors file or Hub id")
    parser.add_argument("target", type=Path, help="new folder, or file if BASE is one")
    _add_hub_options(parser)
    parser.set_defaults(run=write_back)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a checkpoint on this machine",
        description="Compare a checkpoint's files with its SHA256SUMS, if it has them, load the encoder, and make "
        "sure that its weights and the tokens of a page are finite. Exit code 1 if not.",
        epilog="deepseek-ocr-vision verify encoder",
    )
    parser.add_argument("folder", type=Path, help="the encoder's checkpoint, or a released one")
    parser.set_defaults(run=verify)


def _add_show(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "show",
        help="draw what an encoder sees on a page",
        description="Draw a sheet for each page: its tokens as colours, and of one token what is similar, what it "
        "attends to, and the pixels that it depends on. Needs matplotlib (extra `train`).",
        epilog="deepseek-ocr-vision show page.png --model encoder --token 3,5",
    )
    parser.add_argument("pages", nargs="+", type=Path, metavar="page", help="image, PDF or TIFF")
    parser.add_argument("--model", required=True, help="the encoder, or a released checkpoint: folder or Hub id")
    parser.add_argument("--preset", choices=list(PRESETS), help="other preprocessing than the checkpoint's")
    parser.add_argument("--page", type=int, default=1, help="of a PDF or TIFF, from 1 (default: %(default)s)")
    parser.add_argument(
        "--out",
        help="image file to write or, for several pages, a folder; what is there is replaced (default: "
        "NAME-sheet.png here)",
    )
    parser.add_argument(
        "--token",
        type=_two_integers(",", "ROW,COL, such as 3,5"),
        metavar="ROW,COL",
        help="which token, from 0,0 at the top left (default: the one with the most on its square)",
    )
    parser.add_argument(
        "--layer", type=int, default=-1, help="which CLIP layer's attention, from 0, or from -1 back (default: last)"
    )
    parser.set_defaults(run=show)


def _add_encode(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "encode",
        help="turn pages into a table of tokens",
        description="Encode images, PDFs and datasets into a table of Parquet parts. Started again, it goes on where "
        "it was. Exit code 0 if every page is there, 3 if some could not be read (see errors.jsonl), 1 if none could "
        "or it failed. Needs the extra `encode`.",
        epilog="deepseek-ocr-vision encode scans report.pdf --model encoder --out tokens --batch-size 8 --workers 8",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, PDF, folder of them, or name or folder of a dataset"
    )
    parser.add_argument("--out", required=True, help="folder or URL to write, or to go on with")
    parser.add_argument("--model", required=True, help="an encoder or a released checkpoint: folder or Hub id")
    _add_encoder_options(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="pages at once (default: %(default)s)")
    parser.add_argument("--device", help="such as cuda:1 (default: the accelerator there is)")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        dest="num_workers",
        help="processes that prepare pages for each encoder (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60,
        help="seconds for a page to be read and prepared, after which it is left out (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        choices=TOKENS,
        help="how tokens are stored; none: their mean alone (default: as they are computed)",
    )
    parser.add_argument("--pages-per-file", type=int, default=128, help="pages of a part (default: %(default)s)")
    parser.add_argument(
        "--shard",
        type=_two_integers("/", "I/N, such as 0/8"),
        default=(0, 1),
        metavar="I/N",
        help="encode the I-th of N shares of the pages, from 0, as one of several commands that share them",
    )
    _add_ray_options(parser)
    parser.add_argument(
        "--progress-json",
        action="store_true",
        help="a line of JSON every few seconds in place of the bar: pages, errors, rate, the encoder's share",
    )
    parser.add_argument("--dpi", type=float, default=DPI, help="that PDFs are drawn with (default: %(default)s)")
    parser.add_argument("--split", default="train", help="of a dataset (default: %(default)s)")
    parser.add_argument("--image-column", default="image", help="of a dataset (default: %(default)s)")
    parser.set_defaults(run=encode)


def _add_ray_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="by actors of Ray, on a cluster at ADDRESS or, without it, on this machine",
    )
    parser.add_argument("--encoders", type=int, default=1, dest="num_encoders", help="on Ray (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-encoder", type=float, default=0, help="on Ray; may be a fraction (default: %(default)s)"
    )


def _add_read(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "read",
        help="read pages to text or markdown by a whole DeepSeek-OCR",
        description="Read images, PDFs and folders of them, and write their text to the standard output as it comes. "
        "Of a repository on the Hub the whole 6.7 GB are fetched. Exit code 3 if some pages could not be read, 1 if "
        "none could. Needs transformers 5.21 or newer and, for PDFs, pypdfium2 (extra `encode`).",
        epilog="deepseek-ocr-vision read scan.png report.pdf --model deepseek-ai/DeepSeek-OCR > text.md",
    )
    parser.add_argument("pages", nargs="+", metavar="PAGE", help="image, PDF, or folder of them")
    parser.add_argument("--model", required=True, help="a whole model, released or trained: folder or Hub id")
    parser.add_argument(
        "--prompt",
        default="markdown",
        help="text, markdown, ocr, figure or describe, for one of the released prompts, or a prompt in full, with "
        "<image> (default: %(default)s)",
    )
    parser.add_argument("--mode", choices=list(MODES), default="gundam", help="resolution (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    parser.add_argument("--device", help="such as cuda:1 (default: the accelerator there is)")
    parser.add_argument("--max-new-tokens", type=int, help="of a page (default: as many as the model has room for)")
    parser.add_argument(
        "--ngram-size", type=int, default=20, help="tokens that are not written twice, or 0 (default: %(default)s)"
    )
    parser.add_argument("--window-size", type=int, help="how many tokens back that counts (default: all)")
    parser.add_argument("--dpi", type=float, default=DPI, help="that PDFs are rendered with (default: %(default)s)")
    _add_hub_options(parser)
    parser.set_defaults(run=read)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write an encoder as a file for another runtime",
        description="Write an encoder as ONNX, pt2 (torch.export) or OpenVINO, for pages of one size, in batches of "
        "any. The file is run in its own runtime, and kept only if it gives the model's tokens. Needs the extra "
        "`export`, but for pt2.",
        epilog="deepseek-ocr-vision export encoder --format onnx --out encoder.onnx",
    )
    parser.add_argument("model", help="the encoder, or a released checkpoint: folder or Hub id")
    parser.add_argument("--format", choices=FORMATS, required=True, help="of the file")
    parser.add_argument("--out", required=True, help="file to write, ending in .onnx, .pt2 or, for OpenVINO, .xml")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of a page, or height and width (default: the encoder's own)",
    )
    parser.add_argument("--feature-mode", choices=FEATURE_MODES, help="other features than the checkpoint's")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="to compute in (default: %(default)s)"
    )
    parser.add_argument(
        "--raw-images", action="store_true", help="take images of uint8, which the file normalises, not pixels"
    )
    parser.set_defaults(run=export)


def _add_encoder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), help="other preprocessing than the checkpoint's")
    parser.add_argument("--mode", choices=list(MODES), help="one of the released model's resolutions")
    parser.add_argument("--feature-mode", choices=FEATURE_MODES, help="other features than the checkpoint's")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in (default: the checkpoint's own)",
    )


def _add_hub_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--cache-dir", help="the Hub's cache (default: huggingface_hub's own)")


if __name__ == "__main__":
    sys.exit(main())
