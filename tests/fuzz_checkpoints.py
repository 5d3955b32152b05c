"""Mutated checkpoints through every way in: each is refused in words, or loads as it was, and soon.

    python tests/fuzz_checkpoints.py --files 10000 --configs 2000

Each case has a seed of its own, so it can be run again by its number: `--first 4711 --files 1`. The suite runs a small
number (`tests/test_fuzz_checkpoints.py`). A raw exception is one that is no `ValueError`, `TypeError` or `OSError`. A
wrong load is one with weights that are neither those of the sound file nor those that the mutated file holds. A hang
is a call that takes longer than two seconds of this process's time.
"""

import argparse
import copy
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import released_tensors, tiny_config, write_checkpoint
from safetensors.torch import load_file
from transformers.utils import logging

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel
from deepseek_ocr_vision.weights import check_checkpoint, image_size_of, load_encoder


EXPECTED = (OSError, TypeError, ValueError)
MAX_SECONDS = 2.0
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F31", "", None, 3]
VALUES = [None, True, -1, 0, 1, 2, 3, 7, 10**3, 50_000_000, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, math.nan, math.inf]
VALUES += ["", "x", "16", "../../x", "\ud800", [], [0], [1, 2], [[]], {}, {"a": 1}, "gelu", "float16", "deepseek-ocr"]


@dataclass
class Outcome:
    """What a run of many cases found.

    Attributes:
        counts: How many calls ended in which way.
        failures: What has to be mended, in words, with the number of the case.
        slowest: The longest time that a call took, in seconds.
    """

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def try_one(self, case: str, way: str, load: Callable[[], Any], check: Callable[[Any], bool]) -> None:
        """Load once, and note how that ended."""
        started = time.process_time()
        try:
            loaded = load()
            how = "loaded" if check(loaded) else "wrong"
        except EXPECTED as error:
            how = "refused"
            if not str(error):
                self.failures.append(f"{case} by {way}: {type(error).__name__} without a message")
        except Exception as error:
            how = "raw"
            self.failures.append(f"{case} by {way}: {type(error).__name__}: {error}")
        taken = time.process_time() - started
        self.slowest = max(self.slowest, taken)
        self.counts[how] += 1
        if how == "wrong":
            self.failures.append(f"{case} by {way}: other weights than those of the file")
        if taken > MAX_SECONDS:
            self.counts["slow"] += 1
            self.failures.append(f"{case} by {way}: {taken:.1f} s")


# Files


def split(contents: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a sound file."""
    size = int.from_bytes(contents[:8], "little")
    return json.loads(contents[8 : 8 + size]), contents[8 + size :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def dump(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode("utf-8", errors="surrogatepass")


def mutate_bytes(contents: bytes, draw: random.Random) -> bytes:
    """Cut, lengthen, overwrite or exchange bytes anywhere."""
    position = draw.randrange(len(contents))
    return draw.choice(
        [
            lambda: contents[:position],
            lambda: contents + draw.randbytes(draw.choice([1, 8, 100])),
            lambda: contents[:position] + draw.randbytes(8) + contents[position + 8 :],
            lambda: (
                draw.choice([0, 7, 2**16, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
                + contents[8:]
            ),
            lambda: b"",
            lambda: b"<!DOCTYPE html>" + contents[: position % 200],
            lambda: contents[:8] + bytes(draw.choice(b' {}[]",:0x\xff') for _ in range(20)) + contents[28:],
        ]
    )()


def mutate_text(contents: bytes, draw: random.Random) -> bytes:
    """Another encoding, another beginning, duplicates, depth and length in the header's text."""
    header, data = split(contents)
    text = dump(header)
    name = draw.choice(sorted(header))
    position = draw.randrange(len(text))
    return draw.choice(
        [
            lambda: join(b"\xef\xbb\xbf" + text, data),
            lambda: join(text.decode().encode("utf-16"), data),
            lambda: join(text.decode().encode("utf-32-le"), data),
            lambda: join(b"  " + text, data),
            lambda: join(text + b"\0\0", data),
            lambda: join(b"[" + text + b"]", data),
            lambda: join(text[:-1] + b"," + dump({name: header[name]})[1:], data),
            lambda: join(text[:-1] + b',"x":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}', data),
            lambda: join(b'{"x":' + b"[" * draw.choice([100, 20_000]) + b"]}", data),
            lambda: join(text[:-1] + b"".join(b',"a":%d' % index for index in range(20_000)) + b"}", data),
            lambda: join(text.replace(b"0", b"9" * draw.choice([20, 5000]), 1), data),
            lambda: join(text[:position] + draw.randbytes(1) + text[position + 1 :], data),
            lambda: join(text.replace(b'"', b"'", 1), data),
        ]
    )()


def mutate_header(contents: bytes, draw: random.Random) -> bytes:
    """One field of the header that says something else, with the data as they were."""
    header, data = split(contents)
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    draw.choice(
        [
            lambda: entry.update(dtype=draw.choice(DTYPES)),
            lambda: entry.update(
                shape=draw.choice([[*entry["shape"], 1], [], [-1], [2**62, 4], [1] * 200_000, "x", [0.5]])
            ),
            lambda: entry.update(shape=entry["shape"][::-1]),
            lambda: entry.update(data_offsets=[draw.choice(VALUES), draw.choice(VALUES)]),
            lambda: entry.update(data_offsets=[0, entry["data_offsets"][1] - entry["data_offsets"][0]]),
            lambda: entry.pop(draw.choice(sorted(entry))),
            lambda: entry.update(more=draw.choice([[[[]]], 1])),
            lambda: header.update({name: draw.choice([None, [], 3, "x", {}])}),
            lambda: header.update({draw.choice(["", "../x", "\ud800", name + ".x"]): header.pop(name)}),
            lambda: header.update({"model." + name: copy.deepcopy(entry)}),
            lambda: header.update(
                __metadata__=draw.choice([None, 3, [], {"a": 1}, {"a": None}, {"format": "tf"}, {"": ""}])
            ),
            lambda: header.pop(name),
            lambda: [part.update(dtype="I32") for key, part in header.items() if key != "__metadata__"],
        ]
    )()
    return join(dump(header), data)


def exchange_dtype(contents: bytes, draw: random.Random) -> bytes:
    """One or all tensors under another dtype of the same width, so that no size tells."""
    header, data = split(contents)
    widths = {"F32": ["I32", "U32"], "F16": ["BF16", "I16", "U16"], "I64": ["F64", "U64"]}
    names = sorted(header.keys() - {"__metadata__"})
    for name in draw.choice([names, [draw.choice(names)]]):
        header[name]["dtype"] = draw.choice(widths.get(header[name]["dtype"], ["I32"]))
    return join(dump(header), data)


FILE_MUTATIONS = (mutate_bytes, mutate_text, mutate_header, exchange_dtype)


# Configurations


def mutate_config(config: dict[str, Any], draw: random.Random) -> Any:
    """One or two fields, at any depth, that are missing or hold something else; seldom the file as a whole."""
    if draw.random() < 0.02:
        return draw.choice([[], "x", None, 3, [config]])
    config = copy.deepcopy(config)
    for _ in range(draw.choice([1, 1, 2])):
        places = [config, *(part for part in _dictionaries(config))]
        place = draw.choice(places)
        if not place:
            continue
        name = draw.choice(sorted(place))
        if draw.random() < 0.2:
            del place[name]
        else:
            more = ["transformers_weights", "dtype", "quantization_config", "architectures", "auto_map", "id2label"]
            place[draw.choice([name, name, name, draw.choice(more)])] = draw.choice(VALUES)
    return config


def _dictionaries(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for value in config.values():
        if isinstance(value, dict):
            yield value
            yield from _dictionaries(value)


# The run


class Fuzzer:
    """Sound checkpoints in a folder, and the ways in.

    Attributes:
        folder: Where the checkpoints are made.
        outcome: What was found so far.
    """

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.folder, self.outcome = folder, Outcome()
        model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
        self.expected = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.save_pretrained(folder / "own")
        model.save_pretrained(folder / "own", variant="other")
        write_checkpoint(folder / "whole", released_tensors(model), model.config)
        (folder / "whole" / "model.safetensors.index.json").unlink()
        (folder / "whole" / "model-00001-of-00001.safetensors").rename(folder / "whole" / "model.safetensors")
        self.sound = {name: (folder / name / "model.safetensors").read_bytes() for name in ("own", "whole")}
        self.configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("own", "whole")}
        from_pretrained, from_whole = DeepSeekOCRVisionModel.from_pretrained, DeepSeekOCRVisionModel.from_deepseek_ocr
        own, whole = folder / "own", folder / "whole"
        self.ways: dict[str, list[tuple[str, Callable[[], Any]]]] = {
            "own": [
                ("from_pretrained", lambda: from_pretrained(own)),
                ("from_pretrained of a variant", lambda: from_pretrained(own, variant="other")),
                ("from_pretrained without strict", lambda: from_pretrained(own, strict=False)),
                ("from_deepseek_ocr", lambda: from_whole(own, feature_mode="projected")),
                ("load_encoder", lambda: load_encoder(own)[0]),
                ("verify", lambda: check_checkpoint(own)),
            ],
            "whole": [
                ("from_deepseek_ocr", lambda: from_whole(whole, feature_mode="projected")),
                ("from_deepseek_ocr of the file", lambda: from_whole(whole / "model.safetensors")),
                ("from_pretrained", lambda: from_pretrained(whole, config=tiny_config(feature_mode="projected"))),
                ("verify", lambda: check_checkpoint(whole)),
            ],
        }

    def fuzz_files(self, *, first: int, number: int) -> None:
        """Mutate the weights of the two checkpoints in turn, each case by one way in turn."""
        for case in range(first, first + number):
            draw = random.Random(f"file {case}")
            name = draw.choice(["own", "whole"])
            mutation = draw.choice(FILE_MUTATIONS)
            contents = mutation(self.sound[name], draw)
            for file in ("model.safetensors", "model.other.safetensors"):
                if name == "own" or file == "model.safetensors":
                    (self.folder / name / file).write_bytes(contents)
            way, load = draw.choice(self.ways[name])
            check = partial(self._is_right, allows_shapes=way.endswith("without strict"))
            self.outcome.try_one(f"file {case} ({mutation.__name__}, {name})", way, load, check)
        self._restore()

    def fuzz_configs(self, *, first: int, number: int) -> None:
        """Mutate the configurations of the two checkpoints."""
        for case in range(first, first + number):
            draw = random.Random(f"config {case}")
            name = draw.choice(["own", "whole"])
            config = mutate_config(self.configs[name], draw)
            text = json.dumps(config)
            if draw.random() < 0.02:
                text = text[: draw.randrange(len(text))]
            (self.folder / name / "config.json").write_text(text)
            ways = [way for way in self.ways[name] if name == "own" or way[0] != "from_pretrained"]
            more = [("the configuration", lambda: DeepSeekOCRVisionConfig.from_pretrained(self.folder / name))]  # noqa: B023
            more.append(("image_size_of", lambda: image_size_of(self.folder / name)))  # noqa: B023
            way, load = draw.choice([*ways, *more])
            self.outcome.try_one(f"config {case} ({name})", way, load, lambda _: True)
        self._restore()

    def _restore(self) -> None:
        for name, contents in self.sound.items():
            (self.folder / name / "model.safetensors").write_bytes(contents)
            (self.folder / name / "config.json").write_text(json.dumps(self.configs[name]))
        (self.folder / "own" / "model.other.safetensors").write_bytes(self.sound["own"])

    def _is_right(self, loaded: Any, *, allows_shapes: bool) -> bool:
        """Whether the weights are those of the sound file, or those of the mutated file as the library reads it.

        Without `strict` a tensor of another shape is newly initialised, as documented.
        """
        if not isinstance(loaded, DeepSeekOCRVisionModel):
            return True
        weights = loaded.state_dict()
        if all(torch.equal(weight, self.expected[name].to(weight.dtype)) for name, weight in weights.items()):
            return True
        name = "own" if (loaded.config.name_or_path or "").endswith("own") else None
        names = [name] if name else ["own", "whole"]
        files = [self.folder / name / "model.safetensors" for name in names]
        return any(self._are_of_file(weights, file, allows_shapes=allows_shapes) for file in files)

    def _are_of_file(self, weights: dict[str, torch.Tensor], path: Path, *, allows_shapes: bool) -> bool:
        """Whether all weights that a file has are the file's, and are floating-point numbers there."""
        try:
            tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
        except Exception:  # whatever the library finds wrong with it
            return False
        found = [(weight, tensors[name]) for name, weight in weights.items() if name in tensors]
        if allows_shapes:
            found = [(weight, tensor) for weight, tensor in found if weight.shape == tensor.shape]
        return all(
            tensor.is_floating_point() and torch.equal(weight.nan_to_num(), tensor.to(weight.dtype).nan_to_num())
            for weight, tensor in found
        )


def run(*, files: int, configs: int, first: int = 0) -> Outcome:
    """Run cases in a temporary folder.

    Args:
        files: How many mutated safetensors files.
        configs: How many mutated configurations.
        first: The number of the first of each.
    """
    folder = Path(tempfile.mkdtemp())
    try:
        fuzzer = Fuzzer(folder)
        fuzzer.fuzz_files(first=first, number=files)
        fuzzer.fuzz_configs(first=first, number=configs)
        return fuzzer.outcome
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run the command line: exit code 1 if there is anything to mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--configs", type=int, default=2_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcome = run(files=options.files, configs=options.configs, first=options.first)
    sys.stdout.write("\n".join([*outcome.failures, f"{dict(outcome.counts)}, slowest {outcome.slowest:.2f} s"]) + "\n")
    return bool(outcome.failures)


if __name__ == "__main__":
    sys.exit(main())
