"""`lehr evidence` and `lehr compare`: the log evidence of models in the user's files, or of a reference target."""

import contextlib
import importlib
import inspect
import json
import math
import os
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase

from lehr.comparison import compare
from lehr.errors import InputError
from lehr.estimation import evidence
from lehr.path import Problem
from lehr.reference import NAMES, Reference, reference
from lehr.report import Evidence, in_words, jsonable
from lehr.vae.setting import check_seed

if TYPE_CHECKING:
    from lehr import commands

_DONE, _NOT_CONVERGED = 0, 3
_EXTRAS = ("numpyro", "pymc")


def estimate(options: "commands.Evidence") -> int:
    """Runs `lehr evidence`; returns the exit code. Raises `InputError` for faults of the user's."""
    _prepare(options)
    # What the user's file prints must not get between the lines of the result.
    with contextlib.redirect_stdout(sys.stderr):
        truth = None
        if ":" in options.target:
            problem = load(options.target, options.data)
        else:
            truth = _reference(options)
            problem = truth.problem
        result = _evidence(jax.random.key(options.seed), problem, options)
    known = {} if truth is None else {"reference": _against(truth, result)}
    if options.json:
        print(json.dumps(result.to_dict() | known, allow_nan=False))
    else:
        print(result)
        if truth is not None:
            difference = float(result.log_evidence) - truth.log_evidence
            error = f" ± {truth.error:g}" if truth.error else ""
            print(f"reference     {truth.log_evidence:.8g}{error} nats ({truth.how})")
            print(f"difference    {difference:+.4f} nats")
    # After the result: if the disk is full by now, the numbers are not lost.
    if options.plot is not None:
        result.plot(options.plot)
    return _DONE if result.converged else _NOT_CONVERGED


def rank(options: "commands.Compare") -> int:
    """Runs `lehr compare`; returns the exit code.

    Raises `InputError` for faults of the user's, all of them before the first estimation, and `KeyboardInterrupt` if
    interrupted: of the models that were done, standard error has the estimates.
    """
    _prepare(options)
    names = _names(options.models)
    with contextlib.redirect_stdout(sys.stderr):
        problems = {name: load(place, options.data) for name, place in zip(names, options.models)}
        results: dict[str, Evidence] = {}
        for i, (name, problem) in enumerate(problems.items()):
            # A key of its own for each: their errors must be independent.
            key = jax.random.fold_in(jax.random.key(options.seed), i)
            results[name] = result = _evidence(key, problem, options)
            value = in_words(float(result.log_evidence), float(result.standard_error))
            print(" ".join([f"{name}: log evidence {value} nats.", *result.warnings]))
            if "It was interrupted." in result.warnings:
                raise KeyboardInterrupt
    comparison = compare(results)
    if options.json:
        each = {name: result.to_dict() for name, result in results.items()}
        print(json.dumps(comparison.to_dict() | {"results": each}, allow_nan=False))
    else:
        print(comparison)
    if options.plot is not None:
        comparison.plot(options.plot)
    return _DONE if all(result.converged for result in results.values()) else _NOT_CONVERGED


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
    path, name = _split(place)
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


def _prepare(options: "commands.Evidence | commands.Compare") -> None:
    """Checks what the estimation does not check itself, or only after minutes; sets the precision of all arrays."""
    check_seed(options.seed)
    if not options.tolerance > 0:
        raise InputError(f"the tolerance must be a positive number of nats, but it is {options.tolerance:g}")
    if not 1 <= options.max_gradients < math.inf:
        raise InputError(f"max_gradients must be at least 1 and finite, but it is {options.max_gradients:g}")
    if options.plot is not None:
        _check_picture(options.plot)
    if options.x64:
        jax.config.update("jax_enable_x64", True)


def _check_picture(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for the picture {path.name}: make it, or give another")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"the picture cannot be written to {path}: give a file in a folder that you may write to")
    if path.suffix.removeprefix(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"a picture cannot be written as {path.name!r}: end its name with .png, .pdf or .svg")


def _evidence(key: Any, problem: Problem, options: "commands.Evidence | commands.Compare") -> Evidence:
    return evidence(
        key,
        problem,
        tolerance=options.tolerance,
        max_gradients=int(options.max_gradients),
        batch_size=options.batch_size,
    )


def _reference(options: "commands.Evidence") -> Reference:
    name = options.target
    if name not in NAMES and name.endswith(".py"):
        raise InputError(f"{name} needs the name of a model in it: give {name}:NAME")
    if name in NAMES and options.data is not None:
        raise InputError(f"--data is for a model of your own, but {name} is a reference target: leave it out")
    try:
        return reference(name, data_dir=options.data_dir)
    except InputError as error:
        if name in NAMES:
            raise
        raise InputError(f"{error}; a model of your own is given as FILE.py:NAME") from None


def _against(truth: Reference, result: Evidence) -> dict[str, Any]:
    difference = float(result.log_evidence) - truth.log_evidence
    value = {"log_evidence": truth.log_evidence, "error": truth.error, "difference": difference, "how": truth.how}
    return jsonable(value)


def _names(places: tuple[str, ...]) -> list[str]:
    """What to call each model: its name, with its file in front as far as that is needed to tell it from others."""
    if len(places) < 2:
        raise InputError(f"a comparison needs two models or more, but {len(places)} is given: FILE.py:NAME for each")
    twice = [place for place, count in Counter(places).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice: give each model once")
    parts = [_split(place) for place in places]
    names = [name for _, name in parts]
    longer = [f"{path.stem}:{name}" for path, name in parts]
    return [
        short if names.count(short) == 1 else long if longer.count(long) == 1 else place
        for short, long, place in zip(names, longer, places)
    ]


def _split(place: str) -> tuple[Path, str]:
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
