"""`lehr evidence` and `lehr compare`: the log evidence of models in the user's files, or of a reference target."""

import contextlib
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from matplotlib.backend_bases import FigureCanvasBase

from lehr.comparison import compare
from lehr.errors import InputError
from lehr.estimation import evidence
from lehr.model_file import load, split
from lehr.path import Problem
from lehr.reference import NAMES, Reference, reference
from lehr.report import Evidence, in_words, jsonable
from lehr.vae.setting import check_seed

if TYPE_CHECKING:
    from lehr import commands

_DONE, _NOT_CONVERGED = 0, 3


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
    parts = [split(place) for place in places]
    names = [name for _, name in parts]
    longer = [f"{path.stem}:{name}" for path, name in parts]
    return [
        short if names.count(short) == 1 else long if longer.count(long) == 1 else place
        for short, long, place in zip(names, longer, places)
    ]
