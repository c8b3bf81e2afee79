"""The user's files: a model in Python as a problem, and its data in JSON."""

import contextlib
import importlib
import inspect
import json
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lehr.errors import InputError
from lehr.path import Problem

_EXTRAS = ("numpyro", "pymc")


def load(place: str, data: Path | None) -> Problem:
    """The problem of the model at a place FILE.py:NAME, with the data of a JSON file.

    NAME is in that file, which is run as Python runs it, with its folder among those that are searched for imports, but
    not as `__main__`. It may be

    - a `lehr.Problem` or a `pymc.Model`, which has its data already;
    - a function that returns one of these, called with the data by name;
    - a NumPyro model, called with the data by name.

    To tell the last two apart the function is called once under a handler that stops at the first statement of NumPyro:
    nothing is drawn, and a function without such a statement is what it returns.

    Raises `InputError` for a file that is missing or fails, names and data that do not fit, and whatever the adapters
    refuse.
    """
    path, name = split(place)
    module = _module(path)
    try:
        model = getattr(module, name)
    except AttributeError:
        raise InputError(f"there is no {name!r} in {path}: {_found(module)}") from None
    ready = _ready(model)
    if ready is not None:
        if data is not None:
            raise InputError(f"{place} has its data already: leave --data out, or make it a function of the data")
        return ready
    if not callable(model):
        raise InputError(f"{place} is of type {type(model).__name__}, neither a model nor a problem: {_found(module)}")
    return _call(place, path, model, {} if data is None else read(data))


def read(path: Path) -> dict[str, Any]:
    """The arguments in a JSON file: lists of numbers as arrays, all else as it is.

    Raises `InputError` for a file that is missing, no JSON, or no object, and lists that make no array.
    """
    if not path.is_file():
        raise InputError(f"there is no data file {path}: give a JSON file with the model's arguments by name")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({_first_line(error)}): mend it") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds something of type {type(content).__name__} and no JSON object: give the model's arguments "
            'by name, as in {"x": [1.0, 2.0], "y": [0, 1]}'
        )
    return {name: _array(value, f"{name!r} in {path}") for name, value in content.items()}


def _array(value: Any, what: str) -> Any:
    if not isinstance(value, list):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f"the rows of {what} differ in length: give them the same, or pad them") from None
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} is a list of other things than numbers: write numbers, and NaN for a missing one")
    result = jnp.asarray(array)
    if array.dtype.kind in "iu" and not np.array_equal(np.asarray(result), array):
        raise InputError(f"{what} has integers beyond 32 bits: write them as 1.0, or give --x64")
    return result


def split(place: str) -> tuple[Path, str]:
    """FILE.py and NAME. Raises `InputError` if one of them is missing."""
    file, colon, name = place.rpartition(":")
    if not colon or not file or not name:
        raise InputError(f"a model is given as FILE.py:NAME, but this is {place!r}")
    return Path(file), name


def _module(path: Path) -> types.ModuleType:
    """The user's file as a module, run once however many models are taken from it."""
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the Python file that holds the model, as in FILE.py:NAME")
    # By its full path, which is no other module's name.
    key = str(path.resolve())
    if key in sys.modules:
        return sys.modules[key]
    source = path.read_bytes()
    module = types.ModuleType(key)
    module.__file__ = key
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Dataclasses look for the module of their class there.
    sys.modules[key] = module
    try:
        exec(compile(source, key, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        raise _fault(error, path, str(path)) from error
    return module


def _ready(value: Any) -> Problem | None:
    """A problem as it is, and that of a PyMC model; None for anything else."""
    if isinstance(value, Problem):
        return value
    # Where nobody has imported PyMC there is no model of its either, and importing it takes seconds.
    pymc: Any = sys.modules.get("pymc")
    if pymc is not None and isinstance(value, pymc.Model):
        from lehr.adapters.pymc import from_pymc

        return from_pymc(value)
    return None


def _call(place: str, path: Path, model: Callable[..., Any], data: dict[str, Any]) -> Problem:
    """The problem that a function makes of the data, or that of a NumPyro model."""
    _check_arguments(place, model, data)
    given, value = partial(model, **data), None
    try:
        with _stop_at_numpyro() as sees_numpyro:
            value = given()
    except InputError:
        raise
    except Exception as error:
        raise _fault(error, path, place) from error
    if sees_numpyro:
        from lehr.adapters.numpyro import from_numpyro

        return from_numpyro(given)
    ready = _ready(value)
    if ready is None:
        raise InputError(
            f"{place} has no statement of NumPyro and returns something of type {type(value).__name__}: a function "
            "must be a NumPyro model, or return a lehr.Problem (from lehr.from_function, for example) or a PyMC model"
        )
    return ready


def _check_arguments(place: str, model: Callable[..., Any], data: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(model)
    except (ValueError, TypeError):  # of some callables nothing is known
        return
    try:
        signature.bind(**data)
    except TypeError as error:
        names = ", ".join(data) or "nothing"
        raise InputError(
            f"{place} takes the arguments {signature}, and the data are {names} ({error}): give in --data a JSON "
            "object with those names"
        ) from None


class _Statement(BaseException):
    """Leaves a NumPyro model, past every `except Exception` in it."""


@contextlib.contextmanager
def _stop_at_numpyro() -> Iterator[list[str]]:
    """Leaves the block at the first statement of NumPyro in it; the list it gives is then no longer empty.

    Statements of a model that the block itself runs, for example in `lehr.from_numpyro`, do not count: whoever runs a
    model traces it.
    """
    seen: list[str] = []
    try:
        primitives: Any = importlib.import_module("numpyro.primitives")
        handlers: Any = importlib.import_module("numpyro.handlers")
    except ImportError:
        yield seen
        return

    class Stop(primitives.Messenger):
        def process_message(self, msg: Any) -> None:
            inner = primitives._PYRO_STACK[primitives._PYRO_STACK.index(self) + 1 :]
            if not any(isinstance(handler, handlers.trace) for handler in inner):
                seen.append(msg["type"])
                raise _Statement

    with contextlib.suppress(_Statement), Stop():
        yield seen


def _fault(error: BaseException, path: Path, what: str) -> InputError:
    """What went wrong in the user's file, and in which line of it."""
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return InputError(f"{what} needs {error.name}: pip install 'lehr[{error.name}]'")
    if isinstance(error, InputError):
        return error
    file = str(path.resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    where = f" in line {lines[-1]} of {path.name}" if lines and lines[-1] else ""
    return InputError(f"{what} fails with {type(error).__name__}{where} ({_first_line(error)}): mend it")


def _first_line(error: BaseException) -> str:
    # Of a syntax error without the place, which is said beside it.
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return (message.strip().splitlines() or ["no message"])[0]


def _found(module: types.ModuleType) -> str:
    """The models that the file may be meant to offer: its own functions, and problems."""
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (_is_own_function(value, module) or isinstance(value, Problem))
    ]
    return f"it has {', '.join(names)}" if names else "it has no functions; define the model in it"


def _is_own_function(value: Any, module: types.ModuleType) -> bool:
    own = (module.__name__, "functools", "numpyro.handlers")
    return callable(value) and not isinstance(value, type) and getattr(value, "__module__", None) in own
