"""Staging folders: what is written appears complete under its name, and what killed processes left is removed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import run_python, tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.__main__ import main
from deepseek_ocr_vision.hub_upload import upload
from deepseek_ocr_vision.saving.staging import PREFIX, atomic_write, staging_folder


pytest.importorskip("fcntl", reason="this system has no locks that end with their process")

WRITE_UNTIL_KILLED = """
    import os, signal, sys
    from deepseek_ocr_vision.saving.staging import staging_folder
    with staging_folder(sys.argv[1]) as folder:
        (folder / "weights").write_bytes(bytes(1000))
        print(folder, flush=True)
        os.kill(os.getpid(), {signal})
        sys.stdin.read()
"""


def staging_folders(place: Path) -> list[Path]:
    return list(place.glob(f"{PREFIX}*"))


def start_writing(place: Path, *, then: str) -> subprocess.Popen:
    """A process that is in the middle of writing into a staging folder, and then waits or is killed."""
    program = "import textwrap\n" + f"exec(textwrap.dedent({WRITE_UNTIL_KILLED.format(signal=then)!r}))"
    command = [sys.executable, "-c", program, str(place)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    """Pins gigabytes that stay for ever after a SIGKILL, and a run that takes another's files away."""
    killed = start_writing(tmp_path, then="signal.SIGKILL")
    assert killed.wait() == -signal.SIGKILL
    living = start_writing(tmp_path, then="0")
    folder = Path(living.stdout.readline().strip())
    assert staging_folders(tmp_path) == [folder]
    with staging_folder(tmp_path) as ours:
        assert set(staging_folders(tmp_path)) == {folder, ours}
    assert (folder / "weights").stat().st_size == 1000
    living.communicate("")
    assert staging_folders(tmp_path) == []


def test_a_link_in_a_shared_temporary_folder_is_not_followed(tmp_path):
    """Pins somebody's files, removed through a link that has the name of a staging folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "mine")
    (tmp_path / f"{PREFIX}file").write_text("mine")
    with staging_folder(tmp_path):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    assert (tmp_path / f"{PREFIX}file").read_text() == "mine"


def test_an_error_leaves_nothing_and_a_name_that_is_taken_is_one(tmp_path):
    """Pins half a folder under the target's name, and somebody's file that is replaced."""

    def write_half() -> None:
        with atomic_write(tmp_path / "target") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "target").write_text("mine")
    with pytest.raises(FileExistsError, match="target is there already"), atomic_write(tmp_path / "target"):
        pass
    assert (tmp_path / "target").read_text() == "mine"


def leave_behind(place: Path) -> None:
    """What a process that was killed leaves in a place."""
    (place / f"{PREFIX}killed" / "encoder").mkdir(parents=True)


def test_the_next_extract_write_back_and_upload_tidy_up(tmp_path, monkeypatch):
    """Pins each command that makes a staging folder: the next run of it removes what a killed one left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    encoder, out = tmp_path / "encoder", tmp_path / "out"
    (tmp_path / "temporary").mkdir()
    DeepSeekOCRVisionModel(tiny_config()).save_pretrained(encoder)
    leave_behind(out)
    assert main(["extract", str(encoder), str(out / "extracted")]) == 0
    assert staging_folders(out) == []
    leave_behind(out)
    assert main(["write-back", str(encoder), str(encoder), str(out / "written")]) == 0
    assert staging_folders(out) == []
    leave_behind(tmp_path / "temporary")
    upload(encoder, "me/encoder", dry_run=True)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_an_error_that_names_it(tmp_path):
    """Pins a TMPDIR that is not there."""
    with pytest.raises(OSError, match="nowhere"), staging_folder(tmp_path / "nowhere"):
        pass


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path):
    """Pins the worker of a data loader, which inherits an open lock."""
    code = f"""
        import os, time
        from deepseek_ocr_vision.saving.staging import locked, staging_folder
        from pathlib import Path
        with locked(Path({os.fspath(tmp_path)!r})):
            child = os.fork()
            if child == 0:
                time.sleep(60)
        with locked(Path({os.fspath(tmp_path)!r})):
            os.kill(child, 9)
        print("locked again")
    """
    assert run_python(code) == "locked again\n"
