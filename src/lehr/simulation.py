"""Bidirectional Monte Carlo on simulated data, where an exact posterior draw is known: does the bracket hold?"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.estimation import evidence
from lehr.path import Problem
from lehr.progress import Progress
from lehr.report import in_words, jsonable, table

Simulate = Callable[[PRNGKeyArray], tuple[Problem, Array]]


class SimulationCheck(NamedTuple):
    """What `simulate_check` found on S simulated data sets, in nats; every array is `(S,)`.

    Attributes:
        lower: the log evidence as estimated: below log Z in expectation.
        upper: from an exact posterior draw: above log Z in expectation.
        approximate_upper: from the run's own draws, as it is for real data.
        converged: whether the estimation on that data set converged.
        num_gradients: of everything.
    """

    lower: Float[np.ndarray, " num_simulations"]
    upper: Float[np.ndarray, " num_simulations"]
    approximate_upper: Float[np.ndarray, " num_simulations"]
    converged: np.ndarray
    num_gradients: int

    @property
    def gap(self) -> tuple[float, float]:
        """Mean of `upper - lower` with its standard error: at least the mean of log Z - `lower`, which is its bias."""
        return _mean(self.upper - self.lower)

    @property
    def approximate_gap(self) -> tuple[float, float]:
        """Mean of `approximate_upper - lower` with its standard error: far below `gap` if own draws miss something."""
        return _mean(self.approximate_upper - self.lower)

    def __str__(self) -> str:
        (gap, error), approximate = self.gap, self.approximate_gap
        rows = [
            ("simulated data sets", f"{len(self.lower)}, of which {int(np.sum(self.converged))} converged"),
            ("gap", f"{in_words(gap, error)} nats: at most so much is the log evidence too low on average"),
            ("approximate gap", f"{in_words(*approximate)} nats, from the draws of the runs themselves"),
            ("work", f"{self.num_gradients:,} gradients"),
        ]
        if gap < -4 * error:
            rows.append(("CAUTION", "the gap is negative, which exact draws cannot give: check the simulator"))
        return table(rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        gaps = {"gap": self.gap, "approximate_gap": self.approximate_gap}
        return jsonable(gaps | self._asdict())


def simulate_check(
    key: PRNGKeyArray,
    simulate: Simulate,
    *,
    num_simulations: int = 8,
    progress: bool = True,
    **options: Any,
) -> SimulationCheck:
    """Whether `evidence` can be trusted with a model: its lower and upper bounds on data simulated from the model.

    Where parameters are drawn from the prior and data from the likelihood, the parameters are an exact draw from the
    posterior given these data, and

        E[log Z_lower] <= log Z <= E[log Z_upper]

    with Z_upper from annealing that draw back. On real data no such draw is known; if the gap is small on simulated
    data, and the approximate gap agrees, the bracket on real data that resemble them can be believed.

    Arguments:
        key: a PRNG key.
        simulate: maps a key to a `Problem` and an exact draw of its posterior, `(dim,)`:
            `lehr.adapters.numpyro.simulator(model, *args)`, or your own. If the data are leaves of the problem, it is
            compiled once.
        num_simulations: data sets, at least 2.
        progress: whether to show a progress bar on standard error.
        **options: of `lehr.evidence`, which runs on each data set as it would on real data, and then on the first
            populations with the exact draw.

    **Gradient**: not meant to be differentiated.

    Raises `lehr.errors.InputError` for fewer than 2 simulations, or as `lehr.evidence`.

    Source: Grosse, Ghahramani, Adams 2015, "Sandwiching the marginal likelihood using bidirectional Monte Carlo".
    """
    if num_simulations < 2:
        raise InputError(f"num_simulations must be at least 2, to tell an error, but it is {num_simulations}")
    rows, num_gradients = [], 0
    with Progress(num_simulations, show=progress) as display:
        for i in range(num_simulations):
            key_data, key_run = jax.random.split(jax.random.fold_in(key, i))
            problem, draw = simulate(key_data)
            own = evidence(key_run, problem, progress=False, **options)
            # The same key, and so the same path, but what is annealed back. One draw gives a bound only on average over
            # draws, and no bracket to close: the first populations suffice.
            few: dict[str, Any] = options | {"tolerance": math.inf}
            exact = evidence(key_run, problem, posterior_draws=draw[None], progress=False, **few)
            num_gradients += exact.num_gradients + own.num_gradients
            rows.append((float(own.log_evidence), exact.upper.value, own.upper.value, own.converged))
            display.at(i + 1, f"lower {own.lower.value:.2f}, upper {exact.upper.value:.2f}")
    lower, upper, approximate, converged = map(np.array, zip(*rows))
    return SimulationCheck(lower, upper, approximate, converged, num_gradients)


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
