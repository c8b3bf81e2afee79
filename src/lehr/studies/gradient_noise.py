"""What mini-batches cost, and what helps: the gap of the bound against data touched, on regressions of 10^5 data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from lehr.annealer import Annealer
from lehr.annealing import anneal
from lehr.bases import find_modes
from lehr.errors import InputError
from lehr.gaussian import Gaussian
from lehr.gradient_noise import noise_gap
from lehr.kernels import Hamiltonian
from lehr.linear_regression import LinearRegression, MiniBatchNoise, dais_gap
from lehr.path import LogDensity, Schedule
from lehr.studies.output import write
from lehr.studies.regression_data import per_datum, per_label
from lehr.subsampled import Subsampled
from lehr.weighted import log_mean_exp

if TYPE_CHECKING:
    from lehr.commands import GradientNoise

_BATCH, _PARTS = 100, (4, 36, 100, 260)
_DIMENSION = 10
#: data that the steps of a chain touch, in passes over all of them
_PASSES = (1, 4, 10)
#: passes to find a mode and expand there, shared by all chains
_SETUP = 12
#: step sizes tried before the run, over the stability limit of each step
_FACTORS = np.geomspace(3e-3, 0.6, 11)


@dataclass(frozen=True)
class Method:
    """How a step sees the data."""

    name: str
    target: Callable[[Subsampled, Any], LogDensity]
    #: data a step, of n
    batch: Callable[[int], float]
    #: what the exact analysis takes for its noise, to choose a step size: from (regression, at the reference)
    noise: Callable[[LinearRegression, LinearRegression], MiniBatchNoise | None]
    setup: bool = False
    #: whether a step of the logistic regression sees less than all that it needs, and the linear noise is exact
    noisy: bool = True
    exact: bool = True


METHODS = (
    Method(
        "all data",
        lambda target, mode: target.__call__,
        lambda n: n,
        lambda r, residual: None,
        noisy=False,
    ),
    Method("batches of 100", lambda target, mode: target, lambda n: _BATCH, lambda r, _: MiniBatchNoise.of(r, _BATCH)),
    Method(
        "larger batches late",
        lambda target, mode: target.with_batches(_PARTS),
        lambda n: float(np.mean(_PARTS)),
        lambda r, _: MiniBatchNoise.of(r, max(_PARTS)),
        exact=False,
    ),
    Method(
        "control variate, order 1",
        lambda target, mode: target.around(mode, order=1),
        lambda n: _BATCH,
        lambda _, residual: MiniBatchNoise.of(residual, _BATCH),
        setup=True,
    ),
    Method(
        "control variate, order 2",
        lambda target, mode: target.around(mode),
        lambda n: _BATCH,
        lambda r, residual: None,
        setup=True,
    ),
    Method(
        "surrogate",
        lambda target, mode: target.around(mode).with_batches(0),
        lambda n: 0,
        lambda r, residual: None,
        setup=True,
        noisy=False,
    ),
)


@dataclass(frozen=True)
class Setting:
    """A regression, and the linear one whose exact analysis chooses its step sizes."""

    name: str
    target: Subsampled
    base: Gaussian
    stand_in: LinearRegression
    mode: jax.Array
    log_evidence: float
    log_evidence_error: float


def gradient_noise(options: "GradientNoise") -> int:
    """Runs the study, writes gradient-noise.json and gradient-noise.png; returns the exit code."""
    if options.num_data < 1000 or options.num_chains < 10:
        raise InputError("gradient-noise needs at least 1,000 data and 10 chains: give larger numbers")
    console, rows = Console(stderr=True), []
    with jax.enable_x64(True):  # sums of 10^5 terms, whose differences are compared
        for setting in settings(options.seed, options.num_data):
            for method in METHODS:
                found = [measure(setting, method, passes, options.num_chains) for passes in _PASSES]
                rows += found
                gaps = ", ".join(f"{row['gap']:.3g} +- {row['error']:.1g}" for row in found)
                console.print(f"{setting.name}, {method.name}: gap {gaps}", highlight=False, soft_wrap=True)
    result = {"num_data": options.num_data, "num_chains": options.num_chains, "rows": rows, "ratios": ratios(rows)}
    for row in result["ratios"]:
        text = f"{row['setting']}, {row['passes']} passes: {row['best']} over naive batches {row['ratio']:.2g}"
        console.print(text, highlight=False, soft_wrap=True)
    write(options.out, "gradient-noise", result, draw(result), to_stdout=options.json)
    return 0


def settings(seed: int, n: int) -> list[Setting]:
    """Linear and logistic regression on features as of land cover: correlated measurements, and rare indicators."""
    rng = np.random.default_rng(seed)
    num_continuous = _DIMENSION - 4
    mixing = rng.normal(size=(num_continuous, num_continuous))
    continuous = rng.normal(size=(n, num_continuous)) @ mixing + 0.3 * rng.exponential(size=(n, num_continuous))
    indicators = rng.uniform(size=(n, 3)) < np.array([0.3, 0.1, 0.02])
    raw = np.column_stack([np.ones(n), continuous, indicators])
    # Orthogonal columns of unit square, as a user would make them: one step size then serves all directions.
    X = np.linalg.qr(raw)[0] * np.sqrt(n)
    theta = rng.normal(size=_DIMENSION) / 3
    y = X @ theta + rng.normal(size=n)
    labels = (rng.uniform(size=n) < 1 / (1 + np.exp(-X @ theta))).astype(float)
    base = Gaussian(jnp.zeros(_DIMENSION), jnp.eye(_DIMENSION))
    linear = LinearRegression(X, y)
    data = Subsampled(base.log_prob, per_datum, (X, y), _BATCH, check=False)
    first = Setting("linear", data, base, linear, jnp.asarray(linear.mean()), linear.log_evidence, 0.0)
    classes = Subsampled(base.log_prob, per_label, (X, labels), _BATCH, check=False)
    found = find_modes(classes, jnp.zeros((1, _DIMENSION))).modes[0]
    # Of the same curvature, on average.
    p = 1 / (1 + np.exp(-X @ found.loc))
    stand_in = LinearRegression(X, X @ found.loc + (labels - p) / np.mean(p * (1 - p)), np.mean(p * (1 - p)) ** -0.5)
    log_evidence, error = _by_importance(classes, found.loc, found.covariance)
    return [first, Setting("logistic", classes, base, stand_in, jnp.asarray(found.loc), log_evidence, error)]


def _by_importance(target: Subsampled, loc: Any, covariance: Any) -> tuple[float, float]:
    """log Z by draws of the Laplace approximation, widened; with 10^5 data it is nearly exact."""
    proposal = Gaussian.from_covariance(jnp.asarray(loc), 1.2 * jnp.asarray(covariance))
    draws = proposal.sample(jax.random.key(0), (2000,))
    log_weights = jax.lax.map(lambda x: target(x) - proposal.log_prob(x), draws, batch_size=50)
    weights = jnp.exp(log_weights - jnp.max(log_weights))
    return float(log_mean_exp(log_weights)), float(jnp.std(weights) / jnp.mean(weights) / len(weights) ** 0.5)


def measure(setting: Setting, method: Method, passes: int, num_chains: int) -> dict[str, Any]:
    """The gap of a method whose steps touch `passes` times n data (the surrogate: as many steps as batches of 100)."""
    n = setting.target.num_data
    num_steps = max(1, round(passes * n / (method.batch(n) or _BATCH)))
    precision = setting.stand_in.precision()[0, 0] - 1
    # Equal factors between the curvatures of neighbouring steps; step sizes at a constant share of the limit.
    curvature = (1 + precision) ** np.linspace(0, 1, num_steps + 1)
    betas = (curvature - 1) / precision
    betas[-1] = 1.0
    shape = 2 / np.sqrt(1 + betas[1:] * precision)[:, None]
    target = method.target(setting.target, setting.mode)

    is_linear = setting.name == "linear"
    noise = method.noise(setting.stand_in, _without_residuals(setting)) if is_linear else None

    def annealer(factor: float) -> Annealer:
        return Annealer(setting.base, Schedule.from_betas(betas), Hamiltonian(factor * shape))

    def expected(factor: float) -> float:
        """The gap of the linear stand-in; of the logistic one with the noise that is measured."""
        try:
            gap = dais_gap(setting.stand_in, betas, factor * shape, noise=noise).total
        except InputError:  # the noise makes moments diverge
            return np.inf
        if is_linear or not method.noisy:
            return gap
        measured = noise_gap(jax.random.key(passes), annealer(factor), target).value
        return gap + measured if np.isfinite(measured) else np.inf

    exact, factor = min((expected(factor), factor) for factor in _FACTORS)
    found = anneal(jax.random.key(passes), annealer(factor), target, num_chains)
    gaps = setting.log_evidence - np.asarray(found.log_weights, np.float64)
    touched = num_steps * method.batch(n) + n + (_SETUP * n / num_chains if method.setup else 0)
    return {
        "setting": setting.name,
        "method": method.name,
        "passes": passes,
        "num_steps": num_steps,
        "touched": touched,
        "step": factor,
        "gap": gaps.mean(),
        "error": float(np.hypot(gaps.std(ddof=1) / num_chains**0.5, setting.log_evidence_error)),
        "exact": exact if is_linear and method.exact else None,
    }


def _without_residuals(setting: Setting) -> LinearRegression:
    """The linear regression whose data are all on the line of the reference: what expansions of first order leave."""
    r = setting.stand_in
    return LinearRegression(r.design, r.design @ np.asarray(setting.mode), r.noise_scale)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best gap with at most as many data touched as naive batches, over theirs."""
    found = []
    for naive in (row for row in rows if row["method"] == "batches of 100"):
        rivals = [r for r in rows if r["setting"] == naive["setting"] and r["touched"] <= 1.13 * naive["touched"]]
        best = min(rivals, key=lambda row: row["gap"])
        found.append(
            {
                "setting": naive["setting"], "passes": naive["passes"], "best": best["method"],
                "ratio": best["gap"] / naive["gap"],
            }
        )  # fmt: skip
    return found


def draw(result: dict[str, Any]) -> Figure:
    """A panel a regression: the gap against data touched a chain, in passes."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    names = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    panels = figure.subplots(1, len(names), sharey=True)
    for panel, name in zip(panels, names):
        for i, method in enumerate(METHODS):
            rows = [row for row in result["rows"] if (row["setting"], row["method"]) == (name, method.name)]
            passes = [row["touched"] / result["num_data"] for row in rows]
            gaps, errors = (np.array([row[key] for row in rows]) for key in ("gap", "error"))
            panel.errorbar(passes, gaps, yerr=errors, fmt="o-", ms=4, lw=1.2, color=f"C{i}", label=method.name)
        panel.set(title=f"{name} regression", xscale="log", yscale="log", xlabel="passes over the data, a chain")
    panels[0].set_ylabel("log Z - bound (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
