"""The checks of arguments that every folder shares."""

import numpy as np
import pytest

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import (
    list_some,
    require_choice,
    require_flag,
    require_integer,
    require_number,
)


@pytest.mark.parametrize("value", [True, None, "3", 3.0, [3]])
def test_what_is_no_integer_is_a_type_error(value):
    """Pins True, which Python counts as 1, and 3.0, which fails later in a range."""
    with pytest.raises(TypeError, match=r"`width` is .*; it has to be an integer of at least 1"):
        require_integer("width", value, at_least=1)


@pytest.mark.parametrize("value", [False, None, "3", 1j])
def test_what_is_no_number_is_a_type_error(value):
    """Pins a number from a file, left as text."""
    with pytest.raises(TypeError, match=r"`scale` is .*; it has to be a finite number above 0"):
        require_number("scale", value, above=0)


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf"), np.float32("inf")])
def test_a_number_out_of_range_is_a_value_error(value):
    """Pins NaN, which is neither above nor below anything."""
    with pytest.raises(ValueError, match=r"`scale` is .*; it has to be a finite number above 0"):
        require_number("scale", value, above=0)


@pytest.mark.parametrize(
    ("limits", "allowed"), [({"at_least": 0, "at_most": 0}, "from 0 to 0"), ({"at_most": 0}, "0")]
)
def test_a_limit_of_zero_is_a_limit(limits, allowed):
    """Pins a check by truth, which forgets a limit of 0."""
    with pytest.raises(ValueError, match=f"an integer .*{allowed}"):
        require_integer("index", 1, **limits)


def test_numpy_s_numbers_become_python_s():
    """Pins a width computed with numpy, which JSON cannot hold."""
    assert type(require_integer("width", np.int64(3))) is int
    assert type(require_number("width", np.float32(0.5))) is float
    assert type(require_number("width", np.int64(3))) is int


def test_a_choice_of_another_type_is_a_type_error_and_another_of_the_type_a_value_error():
    """Pins a list in a name's place, which a set or a dictionary fails on obscurely."""
    with pytest.raises(TypeError, match=r"`mode` is \[\]; it has to be one of \['tiny'\]"):
        require_choice("mode", [], ["tiny"])
    with pytest.raises(ValueError, match=r"`mode` is 'huge'; it has to be one of \['tiny'\]"):
        require_choice("mode", "huge", {"tiny": 64})
    assert require_choice("mode", "tiny", ("tiny",)) == "tiny"


def test_a_flag_is_true_or_false():
    """Pins "no", which is true."""
    assert require_flag("pad", False) is False
    with pytest.raises(TypeError, match="`pad` is 'no'"):
        require_flag("pad", "no")


def test_many_names_are_cut_short_and_counted():
    """Pins a message of 400 keys, and one that says "and 0 more"."""
    assert list_some(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert list_some(["a", "b"], most=2, separator="; ") == "a; b"
