"""safetensors files that are not what they should be: each is refused before anything is made of it, and says why."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import run_python
from safetensors import safe_open
from safetensors.torch import save_file

from deepseek_ocr_vision.weights.safetensors_files import DTYPES, read_local_header, read_tensor


TENSORS = {"first": torch.arange(6.0).view(2, 3), "second": torch.arange(4, dtype=torch.float16)}


@pytest.fixture
def file(tmp_path) -> Path:
    """A sound file of two tensors."""
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def write(path: Path, header: object, data: bytes = b"") -> None:
    """Write a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def field(dtype: object = "F32", shape: object = (2,), data_offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_tensors_are_read_as_the_library_reads_them(tmp_path, dtype, shape):
    """Pins places, dtypes and shapes, empty and single values included."""
    tensors = {"b": torch.randn(shape).to(dtype), "a": torch.randn(3).to(dtype), "c": torch.arange(2)}
    save_file(tensors, tmp_path / "file")
    entries = read_local_header(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as library, open(tmp_path / "file", "rb") as own:
        assert set(entries) == set(library.keys())
        for name in ("a", "b"):
            assert torch.equal(read_tensor(own, entries[name]), library.get_tensor(name))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data[: len(data) // 2], "cut"),
        (lambda data: data[:-1], r"cut: 1\d\d bytes expected, 1\d\d found; fetch it again"),
        (lambda data: data + b"\0", r"too long: 1\d\d bytes expected, 1\d\d found; fetch it again"),
        (lambda data: data[:20], "cut"),
        (lambda data: data[:4], "header as"),
        (lambda data: b"", "is empty; fetch it again"),
        (lambda data: b"<!DOCTYPE html><html><body>502</body></html>", "HTML"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
        (lambda data: b"PK\x03\x04" + bytes(100), "zip archive"),
        (lambda data: b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (lambda data: b"GGUF" + bytes(100), "GGUF"),
        (lambda data: (2**40).to_bytes(8, "little") + data[8:], "1,099,511,627,776"),
        (lambda data: (100_000_001).to_bytes(8, "little") + data[8:], "100,000,001"),
    ],
)
def test_a_damaged_or_foreign_file_is_called_that(file, change, expected):
    """Pins the first look at a file: where it is, what is wrong, what it looks like, what to do."""
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=expected) as error:
        read_local_header(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": field(), "b": field(data_offsets=(4, 12))}, "'b' overlaps"),
        ({"a": field(), "b": field(data_offsets=(12, 20))}, "gap"),
        ({"a": field(shape=(3,))}, "takes 12 bytes, its data_offsets .* span 8"),
        ({"a": field(dtype="F31")}, "unknown dtype 'F31'"),
        ({"a": field(dtype=["F32"])}, "unknown dtype"),
        ({"a": field(shape=(-2,))}, "shape"),
        ({"a": field(shape=(2.0,))}, "shape"),
        ({"a": field(shape="2")}, "shape"),
        ({"a": field(data_offsets=(8, 0))}, "data_offsets"),
        ({"a": field(data_offsets=(0, 8, 8))}, "data_offsets"),
        ({"a": field(data_offsets=(0, 2**70))}, "data_offsets"),
        ({"a": {"dtype": "F32"}}, "no dtype, shape and data_offsets for 'a'"),
        ({"a": None}, "for 'a'"),
        ([1, 2], "not an object"),
        (b'{"a": 1', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        ("{}".encode("utf-16"), "no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"a": ' + b"[" * 50_000 + b"]}", "no JSON"),
        ({"__metadata__": {"format": 1}}, "`__metadata__` has to hold texts"),
        ({"__metadata__": ["pt"]}, "`__metadata__` has to hold texts"),
        ({"a": field(shape=[1] * 9 + [2])}, "a shape has at most 8 sizes"),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "names 'a' twice"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, header, expected):
    """Pins headers made to mislead, one of which the library accepts."""
    write(tmp_path / "file", header, bytes(8))
    with pytest.raises(ValueError, match=expected):
        read_local_header(tmp_path / "file")


def test_a_path_that_safetensors_cannot_open_is_named(file):
    """Pins a sound file that was called corrupt, with the advice to fetch it again."""
    odd = file.rename(os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9.safetensors"))
    with pytest.raises(ValueError, match="path is not UTF-8; rename it"):
        read_local_header(odd)


def test_an_absurd_header_length_allocates_nothing(tmp_path):
    """Pins a length that is plausible to the eye: under the limit of the format, over the size of the file."""
    (tmp_path / "file").write_bytes((99_999_999).to_bytes(8, "little") + bytes(100))
    output = run_python(f"""
        import resource, pathlib
        from deepseek_ocr_vision.weights.safetensors_files import read_local_header
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_local_header(pathlib.Path({str(tmp_path / "file")!r}))
        except ValueError as error:
            print("cut" in str(error), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000)
    """)
    assert output.split() == ["True", "True"]


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b",".join(b'"name%d": {}' % index for index in range(20_000)) + b', "name0": {}}',
        json.dumps({"a": field(shape=[3] * 200_000)}).encode(),
        json.dumps({"a": field(shape=[2**62] * 200_000)}).encode(),
        json.dumps({"x" * 1_000_000: field(dtype="F31")}).encode(),
    ],
)
def test_a_small_header_does_not_hang_and_its_error_is_short(tmp_path, header):
    """Pins a search for duplicates that takes the square of their number, and products of 200,000 sizes."""
    write(tmp_path / "file", header, bytes(8))
    started = time.process_time()
    with pytest.raises(ValueError, match="file") as error:
        read_local_header(tmp_path / "file")
    assert time.process_time() - started < 1
    assert len(str(error.value)) < 1000
