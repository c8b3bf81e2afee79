"""Gaussian bases fitted to a target: from the curvature at its modes, or the moments of draws."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import AbstractBijection
from jaxtyping import Array, Float
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf

from lehr.errors import InputError
from lehr.path import LogDensity
from lehr.transport import gaussian_map

#: up to here the Hessian is computed, stored and factorised whole (2,000 dimensions: 16 MB, 2,000 products)
LARGEST_FULL_RANK = 2000


class Mode(NamedTuple):
    """A local maximum of a log density, and the Gaussian of the curvature there.

    `covariance` is `(dim, dim)`, or `(dim,)` where only its diagonal was computed. `log_evidence` is Laplace's,

        log target(mode) + (dim / 2) log 2 pi + (1/2) log det covariance.
    """

    loc: np.ndarray
    covariance: np.ndarray
    log_evidence: float

    def bijection(self) -> AbstractBijection:
        """The map under which N(0, I) becomes this Gaussian."""
        return gaussian_map(self.loc, _square_root(self.covariance))


class Modes(NamedTuple):
    """The distinct modes that a search found, the best (by Laplace's evidence) first, and the gradients it took."""

    modes: list[Mode]
    num_gradients: int


def find_modes(log_target: LogDensity, starts: Float[Array, "num_starts dim"], *, max_iterations: int = 1000) -> Modes:
    """The modes that L-BFGS reaches from the given starts, each with its Laplace approximation.

    The covariance is the inverse of minus the Hessian, full-rank up to 2,000 dimensions (one gradient a column), of its
    diagonal above. A direction without downward curvature (the search stopped on a plateau or a saddle) gets unit
    variance.

    Arguments:
        log_target: maps a position `(dim,)` to the log unnormalised density, a scalar, in nats.
        starts: positions to search from.
        max_iterations: of each search.

    Raises `lehr.errors.InputError` if the log density, or its second derivative at a mode, is not finite anywhere.

    **Gradient**: not meant to be differentiated.

    Source: Liu, Nocedal 1989 (the search); Tierney, Kadane 1986 (the approximation).
    """
    value_and_grad = jax.jit(jax.value_and_grad(log_target))
    num_gradients = 0

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal num_gradients
        num_gradients += 1
        value, gradient = value_and_grad(jnp.asarray(x, starts.dtype))
        return -float(value), -np.asarray(gradient, np.float64)

    places = []
    for start in np.asarray(starts, np.float64):
        if np.isfinite(loss(start)[0]):
            found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": max_iterations})
            if np.isfinite(found.fun) and np.all(np.isfinite(found.x)):
                places.append((float(found.fun), found.x))
    if not places:
        raise InputError(
            f"the log density is not finite at any of the {len(starts)} starts drawn from the base: "
            "give a base that covers the target's support"
        )
    precision_at = jax.jit(_precision(log_target))
    modes: list[Mode] = []
    for value, place in sorted(places, key=lambda pair: pair[0]):
        if any(_same(place, mode) for mode in modes):
            continue
        num_gradients += len(place)
        covariance = _inverse(np.asarray(precision_at(jnp.asarray(place, starts.dtype)), np.float64))
        half_log_det = np.sum(np.log(np.diagonal(scale) if (scale := _square_root(covariance)).ndim == 2 else scale))
        modes.append(Mode(place, covariance, -value + len(place) / 2 * np.log(2 * np.pi) + half_log_det))
    return Modes(sorted(modes, key=lambda mode: -mode.log_evidence), num_gradients)


def laplace(modes: list[Mode], *, within: float = 10.0) -> AbstractBijection:
    """The map from N(0, I) to one Gaussian for all modes: that of the only one, or the moments of their equal mixture.

    Modes whose Laplace evidence is more than `within` nats below the best are left out.
    """
    kept = [mode for mode in modes if mode.log_evidence > modes[0].log_evidence - within]
    if len(kept) == 1:
        return kept[0].bijection()
    locs = np.stack([mode.loc for mode in kept])
    covariance = np.mean([mode.covariance for mode in kept], axis=0)
    apart = np.cov(locs.T, bias=True) if covariance.ndim == 2 else np.var(locs, axis=0)
    return gaussian_map(locs.mean(axis=0), _square_root(covariance + apart))


def moment_matched(draws: Float[Array, "num_draws dim"]) -> AbstractBijection:
    """The map from N(0, I) to the Gaussian with the mean and covariance of draws, shrunk the more the fewer they are.

    Raises `lehr.errors.InputError` for draws that are not finite, or do not vary.

    Source: Ledoit, Wolf 2004 (the shrinkage).
    """
    values = np.asarray(draws, np.float64)
    if not np.all(np.isfinite(values)) or np.any(values.std(axis=0) == 0):
        raise InputError("a Gaussian cannot be fitted to draws that are not finite, or that do not vary in a dimension")
    # Shrinkage is towards equal variances, so that the coordinates must first be brought to one scale.
    spread = values.std(axis=0)
    covariance, _ = ledoit_wolf(values / spread)
    return gaussian_map(values.mean(axis=0), spread[:, None] * np.linalg.cholesky(covariance))


def _precision(log_target: LogDensity) -> Callable[[Array], Array]:
    """Minus the Hessian, column by column; in high dimension only its diagonal."""

    def precision(x: Array) -> Array:
        def column(direction: Array) -> Array:
            return -jax.jvp(jax.grad(log_target), (x,), (direction,))[1]

        if x.shape[0] <= LARGEST_FULL_RANK:
            return jax.lax.map(column, jnp.eye(x.shape[0], dtype=x.dtype), batch_size=64)
        return jax.lax.map(lambda i: column(jnp.zeros_like(x).at[i].set(1))[i], jnp.arange(x.shape[0]), batch_size=64)

    return precision


def _inverse(precision: np.ndarray) -> np.ndarray:
    """The covariance of a precision matrix, or of its diagonal."""
    if not np.all(np.isfinite(precision)):
        raise InputError(
            "the second derivative of the log density is not finite at its mode: "
            "use another parametrisation, or fit_base=False"
        )
    if precision.ndim == 1:
        return 1 / np.where(precision > 0, precision, 1)
    values, vectors = np.linalg.eigh((precision + precision.T) / 2)
    # Curvature below the rounding of the largest is not known to be there.
    values = np.where(values > 1e-7 * max(values[-1], 0), values, 1)
    return (vectors / values) @ vectors.T


def _square_root(covariance: np.ndarray) -> np.ndarray:
    return np.sqrt(covariance) if covariance.ndim == 1 else np.linalg.cholesky(covariance)


def _same(place: np.ndarray, mode: Mode) -> bool:
    """Whether a place is within a tenth of a standard deviation per dimension of a mode."""
    step, scale = place - mode.loc, _square_root(mode.covariance)
    z = step / scale if scale.ndim == 1 else np.linalg.solve(scale, step)
    return float(np.sqrt(np.mean(z**2))) < 0.1
