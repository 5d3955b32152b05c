"""The versions: what is tested, and what the command that tests both ends of them says."""

import importlib.util
import re
import sys

import pytest
from helpers import ROOT


def load_command():
    spec = importlib.util.spec_from_file_location("test_versions_command", ROOT / ".ci" / "test_versions.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


command = load_command()
VERSIONS = {"Python": "3.11.7"} | {name: str(number) for number, name in enumerate(command.SHOWN, 1)}


def passed(name: str):
    return command.Leg(name, VERSIONS, "9 passed, 0 failed, 1 skipped", "passed", minutes=1.0)


def failed(name: str):
    return command.Leg(name, VERSIONS, "8 passed, 1 failed, 1 skipped", failure="exit code 1 of pytest")


def test_the_constraints_have_one_exact_version_of_every_requirement():
    """Pins a requirement that was added to setup.cfg and not to the versions that the tests are run with."""
    required = command.lower_bounds((ROOT / "setup.cfg").read_text(), [*command.EXTRAS, "docs", "demo", "dev"])
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+( ; python_full_version .*)?", line) for line in lines)
    assert {name.lower().replace("_", "-") for name in required} <= {line.partition("==")[0] for line in lines}


def test_the_oldest_versions_are_those_that_setup_cfg_allows():
    """Pins a leg that calls itself the oldest and takes what pip finds."""
    versions = command.constraints_of("oldest", "ranges")
    assert {"torch", "transformers", "huggingface_hub", "numpy", "peft", "datasets"} <= versions.keys()
    assert (versions["torch"], versions["transformers"]) == ("2.6", "5.0")
    assert command.constraints_of("newest", "ranges") == {}


def test_the_tested_torch_is_that_of_the_constraints_in_both_legs():
    """Pins `TORCH=tested`, which spares each run a second torch."""
    tested = command.tested_versions("numpy==1\ntorch==2.14.1\ntorchvision==0.29.1\n")
    assert tested == {"torch": "2.14.1", "torchvision": "0.29.1"}
    assert command.constraints_of("newest", "tested").keys() == {"torch", "torchvision"}
    assert command.constraints_of("oldest", "tested")["torch"] != "2.6"


@pytest.mark.parametrize(
    ("legs", "strict", "code"),
    [
        ([passed("oldest"), passed("newest")], True, 0),
        ([failed("oldest"), passed("newest")], False, 1),
        ([passed("oldest"), failed("newest")], False, 0),
        ([passed("oldest"), failed("newest")], True, 1),
    ],
)
def test_the_newest_versions_fail_a_run_only_where_that_is_asked_for(legs, strict, code):
    """Pins what others release: said last, with the versions, and an error for the nightly run alone."""
    result, last = command.verdict(legs, strict=strict)
    assert result == code
    if legs[1].failure:
        assert last.splitlines()[-1].startswith("NEWEST FAILED: Python 3.11.7, torch 1, transformers 2")


def test_the_table_has_a_row_for_each_leg_with_its_versions():
    """Pins the table of the README, which is written and not typed."""
    text = command.table([passed("oldest"), failed("newest")], "make test-versions", "2026-01-31")
    header, rule, oldest, newest, *_, last = text.splitlines()
    assert header.count("|") == rule.count("|") == oldest.count("|") == newest.count("|")
    assert oldest.startswith("| oldest | 3.11.7 | 1 | 2 |")
    assert "8 passed, 1 failed, 1 skipped" in newest
    assert last == "Written on 2026-01-31 by `make test-versions`."


def test_what_is_tested_at_both_ends_is_there():
    """Pins a file of tests that moved, for which pytest would stop with a usage error an hour later."""
    for test in (*command.SUBSET, command.FINETUNE[0]):
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file()
        assert name.partition("[")[0] in (ROOT / file).read_text()


def test_readme_has_the_place_where_the_table_is_written():
    """Pins `--readme`, which would otherwise write nothing and not say so."""
    assert command.README_BLOCK.search((ROOT / "README.md").read_text())
