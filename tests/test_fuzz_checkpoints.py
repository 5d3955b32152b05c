"""A small number of mutated checkpoints; `python tests/fuzz_checkpoints.py` runs thousands."""

from fuzz_checkpoints import run


def test_a_mutated_checkpoint_is_refused_in_words_or_loads_as_it_is():
    """Pins raw exceptions of the libraries below, wrong weights, and files of a few bytes that hang."""
    outcome = run(files=120, configs=60)
    assert outcome.failures == []
    assert outcome.counts["refused"] > 60
    assert outcome.counts["loaded"] > 5
