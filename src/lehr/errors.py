"""The one exception for faults that the user can mend."""

import operator


class InputError(ValueError):
    """A fault in what the user gave; its message is one sentence that says what to do.

    The command line prints the message alone and exits with code 2.
    """


def check_whole(name: str, value: object, smallest: int, largest: int | None = None) -> int:
    """The whole number that `value` is; raises `InputError` if it is none from `smallest` to `largest`."""
    try:
        whole = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool) or whole < smallest or (largest is not None and whole > largest):
        what = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"
        raise InputError(f"{name} must be a whole number {what}, but it is {str(value)[:40]!r}")
    return whole
