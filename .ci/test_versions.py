"""The most telling tests with the oldest and with the newest versions that setup.cfg allows.

    make test-versions                        # both, each in a new environment in build/versions
    make test-versions TORCH=tested           # the same, with torch and torchvision as constraints.txt has them
    make test-versions ARGS="--whole --readme"

The oldest versions have to pass. The newest depend on what others release: their failure is said in the last line, and
is an error with --strict alone.
"""

import argparse
import configparser
import json
import re
import shlex
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "versions"
OLDEST, NEWEST = "oldest", "newest"
EXTRAS = ("train", "encode", "encoder")
TEST_PACKAGES = ("pytest", "pytest-xdist", "peft")
TORCH = ("torch", "torchvision")
PYTEST = ("-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
SHOWN = ("torch", "transformers", "huggingface_hub", "accelerate", "numpy", "pillow")
GOLDEN = "tests/test_golden.py::test_"
SUBSET = (
    "tests/test_contract.py",
    "tests/test_model.py",
    "tests/test_gradients.py",
    f"{GOLDEN}residual_features_are_those_of_deepseek_ocr_encoder[512]",
    f"{GOLDEN}gradients_are_those_of_the_original_code[concat-512-sdpa]",
    "tests/test_composites.py",
    "tests/test_image_processing.py",
    "tests/test_checkpoint_code.py",
    "tests/test_saving_and_loading.py",
)
FINETUNE = ("examples/finetune.py", "--max_steps", "20", "--num_held_out_pages", "20", "--overwrite", "true")
README_BLOCK = re.compile(r"(<!-- make test-versions writes this -->\n).*?(<!-- up to here -->)", re.DOTALL)


@dataclass
class Leg:
    """What came of one set of versions.

    Attributes:
        name: "oldest" or "newest".
        versions: The version of each package that is shown, and of Python.
        tests: What pytest counted.
        finetune: Whether the example ran to its end.
        failure: What went wrong, or nothing.
        minutes: How long it took, without the installation.
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: str = "not run"
    finetune: str = "not run"
    failure: str = ""
    minutes: float = 0.0


def lower_bounds(setup: str, extras: Sequence[str]) -> dict[str, str]:
    """The lowest version of each package that the text of a setup.cfg requires, itself aside, and of its extras."""
    parser = configparser.ConfigParser()
    parser.read_string(setup)
    packages = [parser["options"]["install_requires"], *(parser["options.extras_require"][name] for name in extras)]
    found = (re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", line) for text in packages for line in text.split("\n"))
    return {match[1]: match[2] for match in found if match}


def tested_versions(constraints: str) -> dict[str, str]:
    """The versions of torch and torchvision in the text of a constraints file."""
    return {name: re.search(rf"^{name}==(\S+)", constraints, re.MULTILINE)[1] for name in TORCH}


def constraints_of(name: str, torch: str) -> dict[str, str]:
    """The exact versions that a leg is held to: all lowest ones, or none; torch may be the tested one in both."""
    versions = {}
    if name == OLDEST:
        setup = (ROOT / "setup.cfg").read_text()
        test_packages = {
            each: version for each, version in lower_bounds(setup, ["dev"]).items() if each in TEST_PACKAGES
        }
        versions = lower_bounds(setup, EXTRAS) | test_packages
    if torch == "tested":
        versions |= tested_versions((ROOT / "constraints.txt").read_text())
    return versions


def install(name: str, torch: str) -> Path:
    """Make the environment of a leg, and return its interpreter."""
    folder = FOLDER / name
    venv.create(folder, clear=True, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{each}=={version}\n" for each, version in constraints_of(name, torch).items()))
    python = folder / "bin" / "python"
    # Python compiles what is imported, once, as make lets it; to compile all of torch beforehand takes minutes.
    command = ("-m", "pip", "install", "--quiet", "--no-compile", "--constraint", str(constraints))
    run(python, *command, *TEST_PACKAGES, "--editable", f".[{','.join(EXTRAS)}]")
    return python


def run(python: Path, *arguments: str) -> None:
    """Run a command of an environment; an exit code other than 0 is a `CalledProcessError`."""
    sys.stdout.write(f"$ {shlex.join([str(python), *arguments])}\n")
    sys.stdout.flush()
    subprocess.run([python, *arguments], cwd=ROOT, check=True)


def installed_versions(python: Path) -> dict[str, str]:
    """The versions that are shown, as pip lists them."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    versions = {package["name"].lower().replace("-", "_"): package["version"] for package in listed}
    return {"Python": sys.version.split()[0]} | {name: versions[name] for name in SHOWN}


def count_tests(report: Path) -> str:
    """What a JUnit report of pytest counts, in words."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        counts = {name: count + int(suite.get(name, 0)) for name, count in counts.items()}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return f"{passed} passed, {failed} failed, {counts['skipped']} skipped"


def try_versions(name: str, torch: str, *, whole: bool) -> Leg:
    """Install the versions of a leg, and run its tests and the example, each to its end."""
    leg = Leg(name)
    report = FOLDER / f"{name}.xml"
    try:
        python = install(name, torch)
        leg.versions = installed_versions(python)
    except subprocess.CalledProcessError as error:
        leg.failure = failure_of(error)
        return leg
    sys.stdout.write(f"{name}: {in_words(leg.versions)}\n")
    started = time.monotonic()
    report.unlink(missing_ok=True)
    try:
        run(python, *PYTEST, f"--junitxml={report}", *(() if whole else SUBSET))
    except subprocess.CalledProcessError as error:
        leg.failure = failure_of(error)
    leg.tests = count_tests(report) if report.is_file() else "not run"
    try:
        run(python, *FINETUNE, "--output_dir", str(FOLDER / name / "finetune"))
        leg.finetune = "passed"
    except subprocess.CalledProcessError as error:
        leg.failure, leg.finetune = leg.failure or failure_of(error), "failed"
    leg.minutes = (time.monotonic() - started) / 60
    return leg


def failure_of(error: subprocess.CalledProcessError) -> str:
    """What went wrong, in a line."""
    return f"exit code {error.returncode} of {shlex.join(map(str, error.cmd))}"


def in_words(versions: dict[str, str]) -> str:
    """Versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def table(legs: Sequence[Leg], command: str, date: str) -> str:
    """The legs as a table in Markdown, with the command that gives it again."""
    columns = ("Python", *SHOWN)
    lines = [f"| versions | {' | '.join(columns)} | tests | `make finetune`, 20 steps |", "|---" * 10 + "|"]
    for leg in legs:
        versions = " | ".join(leg.versions.get(name, "?") for name in columns)
        lines.append(f"| {leg.name} | {versions} | {leg.tests} | {leg.finetune} |")
    return "\n".join([*lines, "", f"Written on {date} by `{command}`.", ""])


def verdict(legs: Sequence[Leg], *, strict: bool) -> tuple[int, str]:
    """The exit code, and what to say last: a leg that failed, with its versions."""
    failed = [leg for leg in legs if leg.failure]
    code = 1 if any(leg.name == OLDEST or strict for leg in failed) else 0
    return code, "".join(
        f"{leg.failure}\n{leg.name.upper()} FAILED: {in_words(leg.versions) or 'the installation'}\n" for leg in failed
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make test-versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", choices=("ranges", "tested"), default="ranges", help="which versions of torch")
    parser.add_argument("--only", choices=(OLDEST, NEWEST), help="one of the two")
    parser.add_argument("--whole", action="store_true", help="all tests, and not the most telling ones alone")
    parser.add_argument("--strict", action="store_true", help="that the newest fail is an error too")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Try both ends of the versions."""
    options = parse_arguments()
    names = (options.only,) if options.only else (OLDEST, NEWEST)
    legs = [try_versions(name, options.torch, whole=options.whole) for name in names]
    arguments = [each for each in ("--whole" * options.whole, f"--only {options.only}" * bool(options.only)) if each]
    command = "make test-versions" + " TORCH=tested" * (options.torch == "tested")
    command += f' ARGS="{" ".join(arguments)}"' if arguments else ""
    text = table(legs, command, datetime.now(tz=UTC).date().isoformat())
    (FOLDER / "versions.md").write_text(text)
    if options.readme:
        readme = ROOT / "README.md"
        readme.write_text(README_BLOCK.sub(lambda match: f"{match[1]}{text}{match[2]}", readme.read_text()))
    minutes = "".join(f"{leg.name}: {leg.minutes:.1f} minutes\n" for leg in legs)
    code, last = verdict(legs, strict=options.strict)
    sys.stdout.write(f"\n{text}\n{minutes}{last}")
    return code


if __name__ == "__main__":
    sys.exit(main())
