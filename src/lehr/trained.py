"""What a training run reports: the iterates, their objective on fresh keys, and what speaks against them."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lehr.report import Bound, in_words, table
from lehr.training_loop import MOST_SKIPPED, State


class Trained(eqx.Module):
    """Trained parameters, and how their training went.

    Values of the objective during training are noisy, and the best of them are best by luck too. What is said of an
    iterate is therefore measured again, on n fresh keys that training has not seen and that all iterates share.

    Attributes:
        params: the iterate to use: the last, unless the best is better on fresh keys by more than two standard errors.
        last_params: the last iterate.
        best_params: that at which the smoothed objective was highest, the start included.
        values: `(num_iterations,)`, the objective at each iteration, before its step, in nats; as it was, where the
            iteration was skipped.
        at_start: `(n,)`, the objective at the start, on fresh keys of its own.
        at_last: `(n,)`, that of `last_params`.
        at_best: `(n,)`, that of `best_params`, on the same keys.
        best_iteration: steps before `best_params`.
        took_best: whether `params` are `best_params`.
        num_iterations: iterations that were done, the skipped ones too.
        num_skipped: iterations that changed nothing, because something in them was not finite.
        diverged: whether the objective was far below its best at the end, and had been for a whole window.
        seconds: wall-clock time, compilation included, of all parts of a resumed run.
        warnings: one sentence for each thing that speaks against the run.
    """

    params: Any
    last_params: Any
    best_params: Any
    values: Float[Array, " num_iterations"]
    at_start: Float[Array, " n"]
    at_last: Float[Array, " n"]
    at_best: Float[Array, " n"]
    best_iteration: int = eqx.field(static=True)
    took_best: bool = eqx.field(static=True)
    num_iterations: int = eqx.field(static=True)
    num_skipped: int = eqx.field(static=True)
    diverged: bool = eqx.field(static=True)
    seconds: float = eqx.field(static=True)
    warnings: tuple[str, ...] = eqx.field(static=True)

    @property
    def bound(self) -> Bound:
        """The objective at `params` and its standard error, over fresh keys."""
        return _mean(self.at_best if self.took_best else self.at_last)

    @property
    def last_bound(self) -> Bound:
        """The same at `last_params`."""
        return _mean(self.at_last)

    @property
    def best_bound(self) -> Bound:
        """The same at `best_params`."""
        return _mean(self.at_best)

    @property
    def trend(self) -> Bound:
        """The mean of the last tenth of the values less that of the tenth before, and its standard error.

        Well above zero the objective was still rising. About zero it may have converged, or learn too slowly to tell.
        """
        tenth = len(self.values) // 10
        if tenth < 2:
            return Bound(math.nan, math.inf)
        before, last = (_mean(_finite(part)) for part in (self.values[-2 * tenth : -tenth], self.values[-tenth:]))
        return Bound(last.value - before.value, math.hypot(last.error, before.error))

    def __str__(self) -> str:
        n, last, best = len(self.at_last), self.last_bound, self.best_bound
        at = f"after {self.best_iteration:,} iterations"
        taken = f"the best, {at}; the last: " if self.took_best else f"the last; the best smoothed, {at}: "
        other = last if self.took_best else best
        rows = [
            ("objective", f"{in_words(*self.bound)} ({n} fresh keys)"),
            ("params", taken + in_words(*other)),
            ("at the start", in_words(*_mean(self.at_start))),
            ("trend", f"{in_words(*self.trend)} from the last tenth but one to the last"),
            ("iterations", f"{self.num_iterations:,}, of which {self.num_skipped:,} were skipped"),
            ("time", f"{self.seconds:.1f} s"),
            ("warnings", "\n".join(self.warnings) or "none"),
        ]
        return table(rows)


def report(
    state: State,
    rest: Any,
    values: Float[np.ndarray, " num_iterations"],
    evaluations: tuple[Array, Array, Array],
    *,
    window: int,
    planned: int,
    warnings: list[str],
    seconds: float,
) -> Trained:
    """The result of a run that ended in `state`; `evaluations` at the start, the last and the best iterate."""
    at_start, at_last, at_best = evaluations
    last, best = eqx.combine(state.trained, rest), eqx.combine(state.best, rest)
    gain = _mean(at_best - at_last)
    # What is not finite at one of them is for the other; the last if it is neither.
    took_best = gain.value > 2 * gain.error if math.isfinite(gain.value) else math.isfinite(_mean(at_best).value)
    diverged = int(state.fallen) >= window
    return Trained(
        params=best if took_best else last,
        last_params=last,
        best_params=best,
        values=jnp.asarray(values),
        at_start=at_start,
        at_last=at_last,
        at_best=at_best,
        best_iteration=int(state.best_iteration),
        took_best=took_best,
        num_iterations=len(values),
        num_skipped=int(state.num_skipped),
        diverged=diverged,
        seconds=seconds,
        warnings=(
            *_doubts(state, evaluations, len(values), planned, diverged=diverged, took_best=took_best),
            *warnings,
        ),
    )


def _doubts(
    state: State, evaluations: tuple[Array, Array, Array], done: int, planned: int, *, diverged: bool, took_best: bool
) -> list[str]:
    """One sentence on each thing that speaks against a run."""
    doubts = []
    num_skipped, best = int(state.num_skipped), int(state.best_iteration)
    if num_skipped:
        doubts.append(
            f"{num_skipped:,} of {done:,} iterations were skipped, because the objective, its gradient or the step was "
            "not finite: mend the objective, or give a smaller learning rate."
        )
    if int(state.skipped_in_a_row) >= MOST_SKIPPED:
        doubts.append(f"It stopped after {done:,} of {planned:,} iterations, the last {MOST_SKIPPED} of them skipped.")
    if diverged:
        where = f"{float(state.best_mean):.4g}" + (f" after {best:,} iterations" if best else " at the start")
        doubts.append(
            f"It diverged: the objective was {where} and fell to {float(state.mean):.4g} (smoothed), where the last "
            f"{int(state.fallen):,} values stayed: give a smaller learning rate"
            + ("; params are those of before." if took_best else ".")
        )
        if done < planned and int(state.skipped_in_a_row) < MOST_SKIPPED:
            doubts.append(f"So it stopped after {done:,} of {planned:,} iterations.")
    for name, values in zip(("the start", "the last iterate", "the best iterate"), evaluations):
        invalid = int(np.sum(~np.isfinite(np.asarray(values))))
        if invalid:
            doubts.append(f"The objective is not finite at {name} for {invalid} of {len(values)} fresh keys.")
    gain = _mean(evaluations[2 if took_best else 1]).value - _mean(evaluations[0]).value
    error = math.hypot(_mean(evaluations[2 if took_best else 1]).error, _mean(evaluations[0]).error)
    if gain < -3 * error:
        doubts.append(f"The objective is {-gain:.3g} lower than at the start: give a smaller learning rate.")
    return doubts


def _mean(values: Array | np.ndarray) -> Bound:
    """Mean and standard error, in float64."""
    x = np.asarray(values, np.float64)
    if not len(x):
        return Bound(math.nan, math.inf)
    if not np.all(np.isfinite(x)):
        return Bound(float(x.mean()), math.nan)
    return Bound(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.inf)


def _finite(values: Array) -> np.ndarray:
    x = np.asarray(values, np.float64)
    return x[np.isfinite(x)]
