"""What an estimation of the evidence reports: the estimate, its error and bracket, and what speaks against it."""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from scipy.stats import t as student

from lehr.smc import PathStatistics
from lehr.weighted import log_mean_exp, pareto_k


class Bound(NamedTuple):
    """A stochastic bound of log Z and its standard error, in nats."""

    value: float
    error: float


class Round(NamedTuple):
    """The estimate after some of the work; the work doubles from round to round."""

    num_populations: int
    num_gradients: int
    log_evidence: float
    standard_error: float
    lower: Bound
    upper: Bound


class Evidence(eqx.Module):
    """The log evidence of a problem as R independent populations of N particles estimate it.

    Every population r gives an unbiased estimate exp(forward_r) of Z, and by annealing back from its own draws an
    estimate exp(-backward_r) of 1/Z. From these

        log_evidence = lower = log (1/R) sum_r exp(forward_r),     upper = -log (1/R) sum_r exp(-backward_r),

    with standard errors from the spread over populations. `lower` is below log Z in expectation; `upper` is above it in
    expectation if the draws that were annealed back are exact, and approximately if they come from the run itself
    (`exact_upper` says which).

    Attributes:
        forward: `(R,)`, log estimates of Z, in nats.
        backward: `(R,)`, minus the log estimates of 1/Z, in nats.
        positions: `(R, N, dim)`, draws of the posterior, in the coordinates of the problem.
        log_weights: `(R, N)`, their log weights; exp averages to Z.
        draws: the same draws as `Problem.unravel` names them: a pytree whose leaves lead with `(R, N)`.
        betas: `(K + 1,)`, the schedule of inverse temperatures from 0 to 1.
        path: statistics by temperature, averaged over populations.
        thermodynamic: `(R,)`, log Z by thermodynamic integration over the same particles: a cross-check.
        base: what the path started from, in words.
        rounds: the estimate as the work doubled.
        num_gradients: gradients of the target that everything took, tuning included.
        seconds: wall-clock time, compilation included.
        num_invalid: base draws at which the density was NaN; they counted as density zero.
        exact_upper: whether `upper` is a bound (exact posterior draws) or an approximation.
        converged: whether both ends of the bracket are within `tolerance` of the estimate, with no warning.
        tolerance: the tolerance asked for, in nats.
        warnings: one sentence for each thing that speaks against the estimate.
    """

    forward: Float[Array, " num_populations"]
    backward: Float[Array, " num_populations"]
    positions: Float[Array, "num_populations num_particles dim"]
    log_weights: Float[Array, "num_populations num_particles"]
    draws: Any
    betas: Float[Array, " num_betas"]
    path: PathStatistics
    thermodynamic: Float[Array, " num_populations"]
    base: str = eqx.field(static=True)
    rounds: tuple[Round, ...] = eqx.field(static=True)
    num_gradients: int = eqx.field(static=True)
    seconds: float = eqx.field(static=True)
    num_invalid: int = eqx.field(static=True)
    exact_upper: bool = eqx.field(static=True)
    converged: bool = eqx.field(static=True)
    tolerance: float = eqx.field(static=True)
    warnings: tuple[str, ...] = eqx.field(static=True)

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """log Z, in nats."""
        return log_mean_exp(self.forward)

    @property
    def standard_error(self) -> Float[Array, ""]:
        """The standard error of `log_evidence`, in nats, by the delta method on the populations' estimates of Z."""
        return jnp.asarray(_error(self.forward))

    @property
    def lower(self) -> Bound:
        """`log_evidence` with its error, as the lower end of the bracket."""
        return Bound(float(self.log_evidence), _error(self.forward))

    @property
    def upper(self) -> Bound:
        """-log of the mean of the populations' estimates of 1/Z, with its error: the upper end of the bracket."""
        return Bound(-float(log_mean_exp(-self.backward)), _error(-self.backward))

    @property
    def bracket(self) -> tuple[float, float]:
        """[lower - t se, upper + t se], in nats: each end at 97.5 %, and so both at 95 % or more; infinite if R = 1.

        t is the 97.5 % quantile of Student's distribution with R - 1 degrees of freedom. The interval of the estimate
        itself, lower +- t se, is always inside: noise or draws that miss something may put `upper` below `lower`.
        """
        n = self.forward.shape[0]
        t = float(student.ppf(0.975, n - 1)) if n > 1 else math.inf
        low, high = (end.value + sign * t * end.error for sign, end in ((-1, self.lower), (1, self.upper)))
        own = self.lower.value + t * self.lower.error
        # A NaN goes on; max would lose it.
        high = max(high, own) if not math.isnan(high + own) else math.nan
        return -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high

    @property
    def reach(self) -> float:
        """How far the farther end of the bracket is from `log_evidence`, in nats."""
        low, high = self.bracket
        return max(float(self.log_evidence) - low, high - float(self.log_evidence))

    @property
    def effective_sample_size(self) -> Float[Array, ""]:
        """(sum w)^2 / sum w^2 over the draws of all populations; too large where draws share ancestors (Kong 1992)."""
        return 1 / jnp.sum(jax.nn.softmax(self.log_weights.reshape(-1)) ** 2)

    @property
    def pareto_k(self) -> float:
        """How heavy the tail of the weights of all draws is (`lehr.weighted.pareto_k`): above 0.7 do not trust them."""
        return pareto_k(self.log_weights.reshape(-1))

    @property
    def stepping_stone(self) -> Float[Array, ""]:
        """sum_k log(Z_k / Z_{k-1}), in nats, with every ratio averaged over populations on the log scale.

        The mean of `forward` if all is right, and so below `log_evidence` by about half their variance.
        """
        return jnp.sum(self.path.log_increment)

    @property
    def thermodynamic_mean(self) -> Float[Array, ""]:
        """The mean over populations of log Z by thermodynamic integration, in nats."""
        return jnp.mean(self.thermodynamic)

    @property
    def thermodynamic_error(self) -> float:
        """The standard error of `thermodynamic_mean`, in nats: sd / sqrt R, without the bias; infinite if R = 1."""
        n = self.thermodynamic.shape[0]
        return float(jnp.std(self.thermodynamic, ddof=1)) / math.sqrt(n) if n > 1 else math.inf

    @property
    def barrier(self) -> Float[Array, " num_betas"]:
        """The length of the path up to each beta: the sum of the square roots of the incremental discrepancies."""
        steps = jnp.sqrt(jnp.maximum(self.path.discrepancy, 0))
        return jnp.concatenate([jnp.zeros(1, steps.dtype), jnp.cumsum(steps)])

    @property
    def acceptance(self) -> Float[Array, " num_steps"]:
        """Mean acceptance probability by temperature."""
        return self.path.acceptance

    def __str__(self) -> str:
        low, high = self.bracket
        digits = _decimals(self.lower.error)
        bracket = f"[{low:.{digits}f}, {high:.{digits}f}] nats at 95 %, {high - low:.{digits}f} nats wide"
        upper = "exact: from posterior draws" if self.exact_upper else "approximate: from the draws of the run itself"
        reasons = list(self.warnings)
        rows = [
            ("log evidence", f"{in_words(float(self.log_evidence), float(self.standard_error))} nats"),
            ("bracket", f"{bracket}\nits upper end is {upper}"),
            ("converged", "\n".join(["yes", *reasons])) if self.converged else ("NOT CONVERGED", "\n".join(reasons)),
            ("base", self.base + (f"; density NaN at {self.num_invalid:,} draws" if self.num_invalid else "")),
            ("schedule", f"K = {len(self.betas) - 1}, barrier {float(self.barrier[-1]):.2f}"),
            ("populations", "{} x {:,} particles".format(*self.log_weights.shape)),
            ("draws", f"effective sample size {float(self.effective_sample_size):,.0f}, {_tail(self.pareto_k)}"),
            ("acceptance", f"{float(jnp.min(self.acceptance)):.2f} to {float(jnp.max(self.acceptance)):.2f}"),
            ("work", f"{self.num_gradients:,} gradients, {self.seconds:.1f} s"),
            ("cross-checks", f"thermodynamic {in_words(float(self.thermodynamic_mean), self.thermodynamic_error)}"),
            ("", f"stepping stone {float(self.stepping_stone):.{digits}f}"),
        ]
        return table(rows)

    def to_dict(self) -> dict[str, Any]:
        """What is known, without the draws, for JSON: numbers that are not finite become "inf", "-inf" or "nan"."""
        own = ("log_evidence", "standard_error", "bracket", "lower", "upper", "exact_upper", "converged", "tolerance")
        own += ("warnings", "base", "betas", "barrier", "acceptance", "effective_sample_size", "pareto_k", "forward")
        own += ("backward", "stepping_stone", "rounds", "num_gradients", "seconds", "num_invalid")
        sizes = dict(zip(("num_populations", "num_particles", "dim"), self.positions.shape))
        thermodynamic = {"value": self.thermodynamic_mean, "error": self.thermodynamic_error}
        return jsonable({name: getattr(self, name) for name in own} | sizes | {"thermodynamic": thermodynamic})

    def to_arviz(self) -> Any:
        """The posterior for ArviZ: see `lehr.adapters.arviz.to_inference_data`."""
        from lehr.adapters.arviz import to_inference_data

        return to_inference_data(self)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Four pictures, of the path, acceptance, populations and rounds; written to `path` (PNG, PDF) if given."""
        from lehr.report_plot import draw_evidence

        return draw_evidence(self, path)


def in_words(value: float, error: float) -> str:
    """value ± error, with two digits of the error."""
    digits = _decimals(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}" if math.isfinite(error) else f"{value:.{digits}f} ± unknown"


def table(rows: list[tuple[str, str]]) -> str:
    """Names on the left, texts on the right, wrapped at 100 columns."""
    indent = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        wrapped = [line for part in text.split("\n") for line in textwrap.wrap(part, 100 - indent) or [""]]
        lines += [f"{label:<{indent}}{line}".rstrip() for label, line in zip([name] + [""] * len(wrapped), wrapped)]
    return "\n".join(lines)


def jsonable(value: Any) -> Any:
    """Lists, dicts, strings and finite numbers only: "inf", "-inf" and "nan", which `float` reads back, for others."""
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return jsonable(value.tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decimals(error: float) -> int:
    """Digits after the point that show two digits of an error, up to what float32 can tell of a few nats."""
    return min(max(1 - math.floor(math.log10(error)), 0), 5) if 0 < error < math.inf else 3


def _tail(k: float) -> str:
    if math.isfinite(k):
        return f"Pareto k {k:.2f}"
    return "Pareto k -inf (the largest weights are equal)" if k < 0 else "Pareto k unknown (too few draws)"


def _error(log_estimates: Array) -> float:
    """Standard error of the log of the mean of R independent estimates: sd(w) / (mean(w) sqrt R)."""
    n = log_estimates.shape[0]
    if n < 2:
        return math.inf
    relative = jnp.exp(log_estimates - log_mean_exp(log_estimates))
    return float(jnp.std(relative, ddof=1)) / math.sqrt(n)
