"""`tests/kill_encoding.py` with few kills."""

import sys

import pytest
from kill_encoding import kill


pytest.importorskip("pypdfium2")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize(("kind", "num_points"), [("driver", 2), ("worker", 1)])
def test_kills_at_random_points_lose_nothing(tmp_path, kind, num_points):
    """Pins SIGKILL of the process that encodes and of one that prepares pages for it: each page is there once in the
    end, bit for bit, and nothing is left over.
    """
    kill(tmp_path, kind, num_points, num_pages=40, seed=1)
