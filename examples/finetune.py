"""Teach a DeepSeek-OCR vision encoder to read: inside transformers' own LLaVA, with transformers' own `Trainer`.

    python examples/finetune.py            # a small encoder and a small Llama learn to read handwritten digits
    python examples/finetune.py --help

It trains twice from the same start, on the same pages in the same order: once all of the model, and once with the
encoder frozen as it started, so that the difference is what the encoder learned. What it leaves in `--output_dir`:

    encoder/            the trained encoder with its image processor, for `AutoModel` and `AutoProcessor`
    composite/          the whole model with its processor, for `LlavaForConditionalGeneration` and `LlavaProcessor`
    report.html         what was read on held-out pages, and how well: open it in a browser
    report.md           what was measured, and the command that measured it
    loss.png            both runs' losses and learning rates
    predictions.png     held-out pages, what was read on them and what is written there
    trained/, frozen/   the two runs: checkpoints to resume from, and `result.json` once a run is finished

Your own pages, your own encoder, your own language model:

    python examples/finetune.py --data my_pages/ --encoder deepseek-ocr-encoder/ --language_model my_llama/ \\
        --freeze sam.patch_embed sam.blocks --page_size 1024 --num_train_epochs 3

Before the first step all pages are checked, and whatever the end needs is tried once. With several processes:
`accelerate launch --config_file examples/accelerate/one_node.yaml examples/finetune.py ...`. The parts of this script
are in `finetuning/`.
"""

import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from files import write_text
from finetuning.arguments import FROZEN, TRAINED, FinetuneArguments, ModelArguments, PageArguments, parse_arguments
from finetuning.data import Plan, load_pages
from finetuning.drawings import draw_losses
from finetuning.html_report import write_html
from finetuning.output import (
    ARGUMENTS_FILE,
    checkpoint_content,
    claim_output_folder,
    refuse_unusable_folder,
    what_decides_losses,
)
from finetuning.page_view import draw_predictions
from finetuning.processes import on_main_process, require_processes_that_meet
from finetuning.runs import TOLERANCE, Job, check_encoder, run
from finetuning.schedule import fit_to_data
from finetuning.scores import Circumstances, RunResult, format_report, score_rows
from pages import CREDIT
from report import markdown_table
from torch.utils.data import Dataset


logger = logging.getLogger("finetune")


def main(argv: list[str] | None = None) -> None:
    """Look at the pages, train, compare, save, report, and check what was saved."""
    started = time.perf_counter()
    page_arguments, model_arguments, arguments = parse_arguments(argv, description=__doc__)
    require_processes_that_meet(arguments)
    log_in_main_process()
    output = Path(arguments.output_dir)
    may_resume = arguments.resume_from_checkpoint is not None
    on_main_process(lambda: refuse_unusable_folder(output, resume=may_resume, overwrite=arguments.overwrite))
    is_quiet = arguments.disable_tqdm
    pages, processor, plan = load_pages(
        page_arguments, model_arguments, seed=arguments.seed, show_progress=not is_quiet
    )
    is_own = page_arguments.data is not None
    fit_to_data(arguments, num_pages=len(pages["train"]), page_size=plan.page_size, is_own=is_own)
    asked = what_is_asked(page_arguments, model_arguments, arguments, plan)
    is_resumed = may_resume and (output / ARGUMENTS_FILE).is_file()
    on_main_process(lambda: claim_output_folder(output, asked, resume=may_resume, overwrite=arguments.overwrite))

    def circumstances() -> Circumstances:
        return Circumstances(
            data=page_arguments.data or CREDIT,
            pages=[*plan.notes, *plan.warnings],
            command=shlex.join(["python", *sys.argv]),
            seed=arguments.seed,
            seconds=time.perf_counter() - started,
            is_resumed=is_resumed,
            num_processes=arguments.world_size,
        )

    job = Job(pages, processor, model_arguments, arguments, reporter(pages["held_out"], circumstances))
    names = [TRAINED, FROZEN] if model_arguments.compare_frozen else [TRAINED]
    results = [run(name, job) for name in names]
    check = on_main_process(lambda: finish(results, job))
    PartialState().destroy_process_group()
    if "error" in check or check["difference"] > TOLERANCE:
        sys.exit(f"The loaded encoder's tokens differ from the trained one's: {check}.")


def log_in_main_process() -> None:
    """Let the main process say what happens, and the others only what goes wrong."""
    logging.basicConfig(format="%(message)s")
    for name in (logger.name, "deepseek_ocr_vision"):
        logging.getLogger(name).setLevel(logging.INFO if PartialState().is_main_process else logging.ERROR)


def what_is_asked(
    page_arguments: PageArguments, model_arguments: ModelArguments, arguments: FinetuneArguments, plan: Plan
) -> dict[str, Any]:
    """What decides the results, the content of data and checkpoints included."""
    content = {
        "data": plan.content,
        "encoder": checkpoint_content(model_arguments.encoder),
        "language_model": checkpoint_content(model_arguments.language_model),
    }
    return what_decides_losses(arguments, page_arguments, model_arguments, content=content)


def reporter(
    pages: Dataset, circumstances: Callable[[], Circumstances]
) -> Callable[[list[RunResult], Path, dict[str, Any] | None], None]:
    """What writes everything that people look at into a folder, from results and the check of the encoder."""

    def write(results: list[RunResult], folder: Path, check: dict[str, Any] | None = None) -> None:
        how = circumstances()
        draw_losses(results, folder / "loss.png")
        draw_predictions(results[0], pages, folder / "predictions.png")
        write_html(results, pages, how, check, folder)
        write_text(folder / "report.md", format_report(results, how, check))

    return write


def finish(results: list[RunResult], job: Job) -> dict[str, Any]:
    """Check the saved encoder, write the report, and say where everything is."""
    logger.info("Loading %s in a fresh process.", job.output / "encoder")
    check = check_encoder(job.output)
    job.report(results, job.output, check)
    table = markdown_table(score_rows(results))
    sys.stdout.write(f"\n{table}\n\nEverything is in {job.output}; open report.html there.\n")
    return check


if __name__ == "__main__":
    main()
