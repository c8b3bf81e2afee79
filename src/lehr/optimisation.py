"""Training: any objective, parameters and optax optimiser, in one compiled loop that can be stopped and resumed."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from lehr.errors import InputError
from lehr.progress import Progress
from lehr.report import in_words
from lehr.trained import Trained, report
from lehr.training_checkpoint import Checkpoint
from lehr.training_loop import LONGEST_BLOCK, Rules, State, Task, block, evaluate, goes_on, split, start

#: of one call of the compiled loop, after which there is news, and Ctrl-C is heard
_BLOCK_SECONDS = 0.5
#: at least this long between checkpoints; the end of a run, or its interruption, is always saved
_CHECKPOINT_SECONDS = 20.0


def fit(
    key: PRNGKeyArray,
    objective: Callable[[Any, Array], Any],
    params: Any,
    optimiser: optax.GradientTransformation,
    num_iterations: int,
    *,
    has_aux: bool = False,
    window: int | None = None,
    num_evaluations: int = 32,
    stop_when_diverged: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Trained:
    """Maximises the expectation of a random objective by stochastic gradient steps,

        theta_{t+1} = theta_t + optimiser(grad objective(theta_t, key_t)),     key_t derived from key and t.

    Two iterates are kept: the last, and the one at which the smoothed objective (the mean over about `window`
    iterations) was highest. The highest of many noisy values is too high, and rather lucky than good, so that it
    decides nothing by itself: both are evaluated on `num_evaluations` fresh keys, the same for both, and `params` are
    the last, unless the other is better there by more than two standard errors. The start counts as an iterate.

    An iteration after which the objective, its gradient, the parameters or the optimiser's state would not be finite
    is skipped: it changes nothing, and is counted. After 20 of them in a row the run stops. A run whose objective falls
    far below its best, and stays there for `window` iterations, is said to have diverged: every value more than 5 of
    its own standard deviations, and more than 1 nat, below. That is said at once, by a `RuntimeWarning` and on the
    progress bar, and both are said in the result's warnings.

    Arguments:
        key: a PRNG key.
        objective: maps `(params, key)` to a scalar to be maximised, a bound in nats; data may be drawn by the key.
        params: a pytree. Its float arrays are trained, but those inside `paramax.NonTrainable` are not.
        optimiser: any optax optimiser, with its learning rates; it is handed the loss (minus the objective) as `value`.
        num_iterations: of the whole run, also of one that is resumed.
        has_aux: the objective returns `(scalar, anything)`, as `lehr.objectives.aiwae` does; the rest is dropped.
        window: iterations that the objective is smoothed over (default: a tenth of them, 100 at most).
        num_evaluations: fresh values of the objective, at the start and for each of the two iterates.
        stop_when_diverged: whether to stop then; by default a run may yet recover.
        checkpoint: a folder for the state of the run, written every 20 seconds. If it holds one, the run goes on from
            there, to the same numbers as without the interruption, to the last digit (on the same kind of machine).
            `num_iterations` may be raised; with fewer than 1,000 give the same `window`. A run is known by its key, its
            shapes, and its numbers and objective at the start: it may go on with another learning rate.
        progress: whether to show a progress bar, with the smoothed objective, on standard error.

    Returns a `Trained`. Ctrl-C, once there is an iteration, ends the run and returns what there is, with a warning.

    Two programs are compiled, the loop and the evaluation, for each `objective` and `optimiser` (the objects: another
    lambda is another objective) and each shape of `params`; numbers of iterations, and values, cost no compilation.
    Arrays that an objective closes over become constants of the program: make large data leaves of an objective that
    is an `equinox.Module` or a `jax.tree_util.Partial`.

    **Gradient**: not meant to be differentiated; that of the objective, which may be biased, is what is followed.

    Raises `lehr.errors.InputError` for options out of range, parameters without float arrays, an objective that is not
    a scalar float or not finite for any of the keys at the start, and a checkpoint that is damaged or of another run.

    Source: Robbins, Monro 1951 (stochastic gradient steps).
    """
    started = time.monotonic()
    _check(optimiser, num_iterations, window, num_evaluations)
    window = max(1, min(100, num_iterations // 10)) if window is None else window
    trained, rest = split(params)
    if not jax.tree.leaves(trained):
        raise InputError("params have no float arrays to train: make numbers arrays, for example jnp.asarray(0.5)")
    optimiser_state, static = eqx.partition(optimiser.init(trained), eqx.is_array)
    task = Task(objective, optimiser, has_aux, rest, static)
    key_run, key_start, key_end = jax.random.split(key, 3)
    _check_value(task, trained, key_start)
    at_start = evaluate(task, trained, jax.random.split(key_start, num_evaluations))
    if not np.any(np.isfinite(at_start)):
        raise InputError(
            f"the objective is not finite at the start: it is {at_start[0]} for the first key and finite for none of "
            f"{num_evaluations}; begin with other params"
        )
    rules = Rules(jnp.asarray(window), jnp.asarray(stop_when_diverged))
    state, values, spent = start(trained, optimiser_state, at_start), np.zeros(0, at_start.dtype), 0.0
    saved = None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, key, window, state, np.asarray(at_start))
        state, values, spent = saved.restore(num_iterations) or (state, values, spent)
        saved.save(state, values, spent)
    size, saved_at, interruption, faults = 1, time.monotonic(), [], []

    def save() -> None:
        """Writes the checkpoint. A disk that is full by now is no reason to lose the run, but one to warn."""
        if saved is None:
            return
        try:
            saved.save(state, values, spent + time.monotonic() - started)
            faults[:] = []
        except InputError as error:
            faults[:] = [f"The checkpoint is not that of the end: {error}."]

    warned = False
    with Progress(num_iterations, show=progress) as display:
        try:
            while len(values) < num_iterations and goes_on(state, rules):
                began = time.monotonic()
                stop = min(len(values) + size, num_iterations)
                new, latest = jax.block_until_ready(block(task, key_run, rules, state, jnp.asarray(stop)))
                joined = np.concatenate([values, latest[: int(new.iteration) - len(values)]])
                # Both, or neither: an interruption must find them together.
                state, values = new, joined
                display.at(len(values), _line(state, window))
                is_over = len(values) == num_iterations or not goes_on(state, rules)
                if int(state.fallen) >= window and not (warned or is_over):
                    warned = True
                    warnings.warn(_fallen(state, window), RuntimeWarning, stacklevel=2)
                now = time.monotonic()
                size = max(1, size // 2) if now - began > _BLOCK_SECONDS else min(2 * size, LONGEST_BLOCK)
                if now - saved_at > _CHECKPOINT_SECONDS:
                    save()
                    saved_at = now
        except KeyboardInterrupt:
            if not len(values):
                raise
            interruption = [f"It was interrupted after {len(values):,} of {num_iterations:,} iterations."]
    save()
    keys = jax.random.split(key_end, num_evaluations)
    evaluations = at_start, evaluate(task, state.trained, keys), evaluate(task, state.best, keys)
    return report(
        state,
        rest,
        values,
        evaluations,
        window=window,
        planned=num_iterations,
        warnings=interruption + faults,
        seconds=spent + time.monotonic() - started,
    )


def _line(state: State, window: int) -> str:
    """The smoothed objective, for the progress bar."""
    error = float(jnp.sqrt(state.variance / window))
    skipped, fallen = int(state.num_skipped), int(state.fallen)
    return (
        f"objective {in_words(float(state.mean), error)}"
        + (f", {skipped:,} iterations skipped" if skipped else "")
        + (f", far below its best for {fallen:,} iterations" if fallen >= window else "")
    )


def _fallen(state: State, window: int) -> str:
    """What is said while a run diverges, and not only after it."""
    return (
        f"the objective has been far below its best ({float(state.best_mean):.4g}, at iteration "
        f"{int(state.best_iteration):,}) for {window:,} iterations, at iteration {int(state.iteration):,}: stop and "
        "take a lower learning rate, or give stop_when_diverged=True; the best iterate is kept"
    )


def _check(optimiser: Any, num_iterations: int, window: int | None, num_evaluations: int) -> None:
    """Raises for options out of their range."""
    if not (hasattr(optimiser, "init") and hasattr(optimiser, "update")):
        raise InputError(
            f"the optimiser must be one of optax, for example optax.adam(1e-2), not a {type(optimiser).__name__}"
        )
    if num_iterations < 1:
        raise InputError(f"num_iterations must be at least 1, but it is {num_iterations}")
    if window is not None and window < 1:
        raise InputError(f"window must be at least 1, but it is {window}")
    if num_evaluations < 2:
        raise InputError(f"num_evaluations must be at least 2, to tell their error, but it is {num_evaluations}")


def _check_value(task: Task, trained: Any, key: PRNGKeyArray) -> None:
    """Raises unless the objective is a scalar float."""
    found = eqx.filter_eval_shape(task.objective, eqx.combine(trained, task.rest), key)
    if task.has_aux:
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise InputError(f"with has_aux the objective must return (scalar, anything), but it returns {found}")
        found = found[0]
    if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, jnp.floating):
        pair = isinstance(found, tuple | list) and len(found) == 2
        hint = "give has_aux=True if it returns (scalar, anything)" if pair else "sum it, or take its mean"
        raise InputError(f"objective(params, key) must be one float, but it is {found}; {hint}")
