"""Reference targets with verified log evidence, by name: what estimates are scored against."""

import csv
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flowjax.distributions import MultivariateNormal, Normal
from jax.scipy.special import gammaln
from jaxtyping import Array

from lehr.errors import InputError
from lehr.numerics import bernoulli_log_prob, softplus
from lehr.path import Problem


class Reference(NamedTuple):
    """A problem, its log evidence, the error of that in nats (0 where it is exact), and how it was found."""

    problem: Problem
    log_evidence: float
    error: float
    how: str


def reference(name: str, *, data_dir: Path | None = None) -> Reference:
    """The reference target of that name.

    Arguments:
        name: one of `NAMES`.
        data_dir: folder of sonar.csv, ionosphere.csv, seeds.csv, brownian.csv, lorenz.csv and pines.csv (default: the
            folder `bayes` in LEHR_DATA).

    Raises `lehr.errors.InputError` for an unknown name, or a data file that is missing or malformed.
    """
    if name not in _TARGETS:
        near = difflib.get_close_matches(name, _TARGETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"there is no reference target {name!r}: {hint}they are {', '.join(_TARGETS)}")
    if data_dir is None and os.environ.get("LEHR_DATA"):
        data_dir = Path(os.environ["LEHR_DATA"]) / "bayes"
    return _TARGETS[name](lambda file: _read(data_dir, file))


_Read = Callable[[str], np.ndarray]


def _read(folder: Path | None, name: str) -> np.ndarray:
    if folder is None:
        raise InputError(
            f"{name} is not part of lehr: set LEHR_DATA to the folder that holds bayes/{name}, or give --data-dir"
        )
    try:
        with (folder / name).open() as file:
            rows = list(csv.reader(file))[1:]
        table = np.array([[float(cell or "nan") for cell in row] for row in rows])
    except FileNotFoundError:
        raise InputError(f"there is no {folder / name}: give the folder that holds it with --data-dir") from None
    except ValueError as error:
        raise InputError(f"{folder / name} is not a table of numbers under one header line ({error})") from None
    if table.ndim != 2 or len(table) == 0:
        raise InputError(f"{folder / name} is empty: it should be a table of numbers under one header line")
    return table


def _standard(dimension: int, scale: float = 1.0) -> Normal:
    return Normal(jnp.zeros(dimension), scale)


def _normal(x: Array, scale: Array | float) -> Array:
    """sum log N(x; 0, scale^2)."""
    return jnp.sum(-0.5 * (x / scale) ** 2 - jnp.log(scale) - 0.5 * np.log(2 * np.pi))


def _logistic(features: np.ndarray, labels: np.ndarray) -> Problem:
    spread = features.std(axis=0)
    standardised = (features - features.mean(axis=0)) / np.where(spread == 0, 1, spread)
    design = jnp.asarray(np.column_stack([np.ones(len(features)), standardised]), jnp.result_type(float))
    labels_ = jnp.asarray(labels, design.dtype)

    def log_target(w: Array) -> Array:
        return _normal(w, 1.0) + jnp.sum(bernoulli_log_prob(design @ w, labels_))

    return Problem(_standard(design.shape[1]), log_target)


def _sonar(read: _Read) -> Reference:
    table = read("sonar.csv")
    return Reference(
        _logistic(table[:, :-1], table[:, -1]), -108.385, 0.01, "tempered SMC from a Laplace base, repeated"
    )


def _ionosphere(read: _Read) -> Reference:
    table = read("ionosphere.csv")
    return Reference(
        _logistic(table[:, :-1], table[:, -1]), -111.608, 0.005, "tempered SMC from a Laplace base, repeated"
    )


def _breast_cancer(read: _Read) -> Reference:
    from sklearn.datasets import load_breast_cancer

    table: Any = load_breast_cancer()
    return Reference(
        _logistic(table.data, table.target),
        -55.2223,
        0.0007,
        "importance sampling, 900,000 effective draws, and bridge sampling (benchmarks/truth.py)",
    )


def _seeds(read: _Read) -> Reference:
    table = jnp.asarray(read("seeds.csv"), jnp.result_type(float))
    count, total, kind, extract = table.T
    choose = gammaln(total + 1) - gammaln(count + 1) - gammaln(total - count + 1)
    shape = rate = 0.01

    def log_target(x: Array) -> Array:
        log_tau, a, b = x[0], x[1:5], x[5:]
        tau = jnp.exp(log_tau)
        log_prior = shape * np.log(rate) - gammaln(shape) + shape * log_tau - rate * tau + _normal(a, 10.0)
        log_prior += jnp.sum(0.5 * log_tau - 0.5 * tau * b**2 - 0.5 * np.log(2 * np.pi))
        logits = a[0] + a[1] * kind + a[2] * extract + a[3] * kind * extract + b
        return log_prior + jnp.sum(choose + count * logits - total * softplus(logits))

    return Reference(
        Problem(_standard(5 + len(table)), log_target),
        -73.406,
        0.01,
        "grid over log precision, importance sampling over coefficients, Gauss-Hermite over random effects",
    )


def _brownian(read: _Read) -> Reference:
    table = read("brownian.csv")
    seen = ~np.isnan(table[:, 1])
    observed = jnp.asarray(np.where(seen, table[:, 1], 0), jnp.result_type(float))
    mask = jnp.asarray(seen)

    def log_target(x: Array) -> Array:
        log_scales, path = x[:2], x[2:]
        innovation, noise = jnp.exp(log_scales)
        steps = jnp.diff(path, prepend=0)
        log_lik = -0.5 * ((observed - path) / noise) ** 2 - log_scales[1] - 0.5 * np.log(2 * np.pi)
        # LogNormal(0, 2) scales in the coordinate log scale are N(0, 2^2).
        return _normal(log_scales, 2.0) + _normal(steps, innovation) + jnp.sum(jnp.where(mask, log_lik, 0))

    return Reference(
        Problem(_standard(2 + len(table)), log_target),
        1.18775,
        1e-5,
        "Kalman marginalisation of the path, quadrature over the two log scales",
    )


def _lorenz(read: _Read) -> Reference:
    table = read("lorenz.csv")
    num_steps, h, spread = len(table), 0.02, 0.1
    seen = ~np.isnan(table[:, 1])
    observed = jnp.asarray(np.where(seen, table[:, 1], 0), jnp.result_type(float))
    mask = jnp.asarray(seen)

    def drift(x: Array) -> Array:
        return jnp.stack(
            [
                10 * (x[..., 1] - x[..., 0]),
                x[..., 0] * (28 - x[..., 2]) - x[..., 1],
                x[..., 0] * x[..., 1] - 8 / 3 * x[..., 2],
            ],
            axis=-1,
        )

    def log_target(flat: Array) -> Array:
        x = flat.reshape(num_steps, 3)
        transitions = _normal(x[1:] - x[:-1] - h * drift(x[:-1]), np.sqrt(h) * spread)
        log_lik = -0.5 * (observed - x[:, 0]) ** 2 - 0.5 * np.log(2 * np.pi)
        return _normal(x[0], 1.0) + transitions + jnp.sum(jnp.where(mask, log_lik, 0))

    return Reference(
        Problem(_standard(3 * num_steps), log_target),
        -29.193,
        0.005,
        "5 million prior draws, effective sample size 36,000",
    )


def _pines(read: _Read) -> Reference:
    points = read("pines.csv")
    side, variance = 40, 1.91
    cells = np.floor(points * side).astype(int).clip(0, side - 1)
    counts = np.zeros((side, side))
    np.add.at(counts, (cells[:, 0], cells[:, 1]), 1)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2)
    distance = np.linalg.norm(grid[:, None] - grid[None], axis=-1)
    covariance = variance * np.exp(-distance / (side / 33))
    mean = np.log(126) - variance / 2
    precision = jnp.asarray(np.linalg.inv(covariance), jnp.result_type(float))
    constant = float(-0.5 * np.linalg.slogdet(covariance)[1] - 0.5 * side**2 * np.log(2 * np.pi))
    count = jnp.asarray(counts.reshape(-1), jnp.result_type(float))

    def log_target(f: Array) -> Array:
        centred = f - mean
        return constant - 0.5 * centred @ (precision @ centred) + jnp.sum(f * count - jnp.exp(f) / side**2)

    base = Normal(jnp.full(side**2, mean), np.sqrt(variance))
    return Reference(Problem(base, log_target), 501.75, 0.1, "tempered SMC from a Laplace base")


def _funnel(read: _Read) -> Reference:
    def log_target(x: Array) -> Array:
        return _normal(x[:1], 3.0) + _normal(x[1:], jnp.exp(x[0] / 2))

    return Reference(Problem(_standard(10, 3.0), log_target), 0.0, 0.0, "normalised")


def _many_well(read: _Read) -> Reference:
    def log_target(x: Array) -> Array:
        a, b = x[::2], x[1::2]
        return jnp.sum(-(a**4) + 6 * a**2 + 0.5 * a - 0.5 * b**2)

    log_evidence = 16 * (np.log(11784.50927) + 0.5 * np.log(2 * np.pi))
    return Reference(Problem(_standard(32, 2.0), log_target), float(log_evidence), 0.0, "closed form")


def _gaussian(read: _Read) -> Reference:
    """N(0, I) prior, 40 noisy sums of correlated features: a conjugate Gaussian with correlations up to 0.95."""
    dimension, num_data, noise = 20, 40, 0.5
    rng = np.random.default_rng(0)
    design = rng.normal(size=(num_data, dimension)) + 2 * rng.normal(size=(num_data, 1))
    y = design @ rng.normal(size=dimension) + noise * rng.normal(size=num_data)
    return _conjugate(design, y, np.eye(dimension), noise, "closed form")


def _diabetes(read: _Read) -> Reference:
    from sklearn.datasets import load_diabetes

    table: Any = load_diabetes()
    features, y = table.data, table.target
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    design = np.column_stack([np.ones(len(y)), features])
    return _conjugate(design, (y - y.mean()) / y.std(), np.eye(design.shape[1]), 0.7, "closed form")


def _conjugate(design: np.ndarray, y: np.ndarray, prior: np.ndarray, noise: float, how: str) -> Reference:
    """w ~ N(0, prior), y ~ N(design w, noise^2): log Z = log N(y; 0, design prior design^T + noise^2 I)."""
    covariance = design @ prior @ design.T + noise**2 * np.eye(len(y))
    log_evidence = -0.5 * (
        y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(covariance)[1] + len(y) * np.log(2 * np.pi)
    )
    x, t = jnp.asarray(design, jnp.result_type(float)), jnp.asarray(y, jnp.result_type(float))
    base = MultivariateNormal(jnp.zeros(design.shape[1]), jnp.asarray(prior))

    def log_target(w: Array) -> Array:
        return base.log_prob(w) + _normal(t - x @ w, noise)

    return Reference(Problem(base, log_target), float(log_evidence), 0.0, how)


_TARGETS: dict[str, Callable[[_Read], Reference]] = {
    "sonar": _sonar,
    "ionosphere": _ionosphere,
    "breast-cancer": _breast_cancer,
    "seeds": _seeds,
    "brownian": _brownian,
    "lorenz": _lorenz,
    "pines": _pines,
    "diabetes": _diabetes,
    "gaussian": _gaussian,
    "funnel": _funnel,
    "many-well": _many_well,
}

#: the names that `reference` knows
NAMES = tuple(_TARGETS)
