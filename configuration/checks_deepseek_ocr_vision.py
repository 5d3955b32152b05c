"""Checks of arguments: a wrong type is a `TypeError`, a wrong value a `ValueError`; both name the argument."""

from collections.abc import Iterable, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any


def require_integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """An integer of any kind, numpy's among them, as an `int`; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` is {value!r}; it has to be an integer{_range(at_least, at_most)}.")
    number = int(value)
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        raise ValueError(f"`{name}` is {value!r}; it has to be an integer{_range(at_least, at_most)}.")
    return number


def require_number(
    name: str, value: Any, *, at_least: float | None = None, at_most: float | None = None, above: float | None = None
) -> float:
    """A finite number of any kind, as an `int` or a `float`; booleans are none."""
    allowed = f"a finite number{_range(at_least, at_most)}" + (f" above {above}" if above is not None else "")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` is {value!r}; it has to be {allowed}.")
    number = int(value) if isinstance(value, Integral) else float(value)
    is_low = (at_least is not None and number < at_least) or (above is not None and number <= above)
    if not isfinite(number) or is_low or (at_most is not None and number > at_most):
        raise ValueError(f"`{name}` is {value!r}; it has to be {allowed}.")
    return number


def require_choice(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """One of several values, which are of one type."""
    allowed = list(allowed)
    if not isinstance(value, tuple({type(choice) for choice in allowed})):
        raise TypeError(f"`{name}` is {value!r}; it has to be one of {allowed}.")
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; it has to be one of {allowed}.")
    return value


def require_flag(name: str, value: Any) -> bool:
    """True or False; numbers and other things that have a truth value are neither."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}; it has to be True or False.")
    return value


def require_whole_tokens(name: str, height: int, width: int, *, token_size: int) -> None:
    """Sides in pixels that are positive multiples of the side of the square that a token stands for."""
    if height % token_size or width % token_size or height < 1 or width < 1:
        nearest = [max(1, round(side / token_size)) * token_size for side in (height, width)]
        raise ValueError(
            f"{name} is {height} x {width} pixels (height x width); both have to be positive multiples of "
            f"{token_size}, the pixels a token. The nearest size is {nearest[0]} x {nearest[1]}."
        )


def list_some(items: Sequence[Any], *, most: int = 10, separator: str = ", ") -> str:
    """The first few of many items, and how many there are besides."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(map(str, items[:most])) + more


def _range(at_least: float | None, at_most: float | None) -> str:
    if at_least is None:
        return "" if at_most is None else f" of at most {at_most}"
    return f" of at least {at_least}" if at_most is None else f" from {at_least} to {at_most}"
