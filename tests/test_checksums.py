"""Checksums of a checkpoint: a byte that flipped is found wherever they were published."""

import subprocess

import pytest
from transformers import AutoModel

from deepseek_ocr_vision.saving.checksums import (
    read_checksums,
    verify_checksums,
    write_checksums,
)


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    """A saved model with checksums."""
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    write_checksums(tmp_path)
    return tmp_path


def flip_last_byte(path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def test_the_sums_are_those_of_sha256sum(checkpoint):
    """Pins the format: whoever has no Python checks a folder with a tool that every system has."""
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(command, cwd=checkpoint, check=True)
    assert {"model.safetensors", "config.json", "modeling_deepseek_ocr_vision.py"} <= set(read_checksums(checkpoint))
    assert "README.md" not in read_checksums(checkpoint)


def test_a_flipped_byte_is_found_when_loading_is_asked_to_look(checkpoint):
    """Pins the one fault that safetensors cannot see."""
    assert AutoModel.from_pretrained(checkpoint, verify_checksums=True)
    flip_last_byte(checkpoint / "model.safetensors")
    AutoModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what SHA256SUMS says"):
        AutoModel.from_pretrained(checkpoint, verify_checksums=True)


def test_no_sums_and_no_file_are_errors(checkpoint):
    """Pins a check that finds nothing to check, and says all is well."""
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        verify_checksums(checkpoint)
    (checkpoint / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match="empty"):
        verify_checksums(checkpoint)
    (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS"):
        verify_checksums(checkpoint)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "sub/file"])
def test_sums_of_files_elsewhere_are_refused(checkpoint, name):
    """Pins a list that makes the check read outside of the folder."""
    (checkpoint / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match="line 1"):
        verify_checksums(checkpoint)


def test_saving_again_takes_the_old_sums_away(checkpoint, tiny_model):
    """Pins sums that accuse a file which its owner has saved anew."""
    tiny_model.save_pretrained(checkpoint)
    assert not (checkpoint / "SHA256SUMS").exists()
