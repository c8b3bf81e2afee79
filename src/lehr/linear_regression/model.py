"""Bayesian linear regression: its evidence, its posterior, and every density between prior and posterior."""

import math
from dataclasses import dataclass
from functools import cached_property

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from lehr.errors import InputError
from lehr.gaussian import Gaussian
from lehr.path import Problem

_LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class LinearRegression:
    """theta ~ N(prior_mean, prior_precision^-1),  y | theta ~ N(X theta, noise_scale^2 I).

    The path from prior to posterior, p_b = prior likelihood^b / Z_b, is Gaussian, of precision and natural mean

        Lambda_b = Lambda_p + b Lambda_l,     Lambda_b mu_b = Lambda_p mu_p + b X^T y / s^2,     Lambda_l = X^T X / s^2.

    Everything is computed in float64, on the processor.

    Arguments:
        design: X, `(n, d)`, of rank d.
        y: `(n,)`.
        noise_scale: s > 0, in units of y.
        prior_mean: a number, or `(d,)`.
        prior_precision: Lambda_p: a positive number (times the identity), `(d,)` (a diagonal), or `(d, d)`.

    Raises `lehr.errors.InputError` for shapes that do not fit, no data, values that are not finite, a scale that is not
    positive, a prior precision that is not symmetric and positive definite, and a design whose columns are dependent.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, section 4.
    """

    design: np.ndarray
    y: np.ndarray
    noise_scale: float
    prior_mean: np.ndarray
    prior_precision: np.ndarray

    def __init__(
        self,
        design: ArrayLike,
        y: ArrayLike,
        noise_scale: float = 1.0,
        *,
        prior_mean: ArrayLike = 0.0,
        prior_precision: ArrayLike = 1.0,
    ):
        X, y = np.asarray(design, np.float64), np.asarray(y, np.float64)
        if X.ndim != 2 or y.shape != X.shape[:1]:
            raise InputError(f"design must be (n, d) and y (n,), but they have shapes {X.shape} and {y.shape}")
        n, d = X.shape
        if n == 0 or d == 0:
            raise InputError(f"a linear regression needs at least one observation and one column, not {n} and {d}")
        if not (np.all(np.isfinite(X)) and np.all(np.isfinite(y))):
            raise InputError("design and y must be finite: remove the observations with missing or infinite values")
        if not (np.ndim(noise_scale) == 0 and np.isfinite(noise_scale) and noise_scale > 0):
            raise InputError(f"noise_scale must be one positive number, but it is {noise_scale}")
        rank = np.linalg.matrix_rank(X)
        if rank < d:
            raise InputError(
                f"the {d} columns of the design have rank {rank}: remove the {d - rank} that the others determine"
            )
        with np.errstate(all="ignore"):
            precision = X.T @ X / np.square(float(noise_scale))
        if not np.all(np.isfinite(precision)):
            raise InputError(f"noise_scale = {noise_scale} is too small beside the design: scale both")
        set_ = object.__setattr__  # the instance is frozen
        set_(self, "design", X)
        set_(self, "y", y)
        set_(self, "noise_scale", float(noise_scale))
        set_(self, "prior_mean", _vector("prior_mean", prior_mean, d))
        set_(self, "prior_precision", _precision(prior_precision, d))

    @property
    def dimension(self) -> int:
        """d."""
        return self.design.shape[1]

    @cached_property
    def likelihood_precision(self) -> Float[np.ndarray, "d d"]:
        """Lambda_l = X^T X / s^2."""
        return self.design.T @ self.design / self.noise_scale**2

    @cached_property
    def likelihood_linear(self) -> Float[np.ndarray, " d"]:
        """X^T y / s^2: the gradient of the log likelihood is this less Lambda_l theta."""
        return self.design.T @ self.y / self.noise_scale**2

    def precision(self, beta: float = 1.0) -> Float[np.ndarray, "d d"]:
        """Lambda_b."""
        return self.prior_precision + beta * self.likelihood_precision

    def mean(self, beta: float = 1.0) -> Float[np.ndarray, " d"]:
        """mu_b."""
        natural = self.prior_precision @ self.prior_mean + beta * self.likelihood_linear
        return np.linalg.solve(self.precision(beta), natural)

    @cached_property
    def log_evidence(self) -> float:
        """log p(y), in nats.

        By log p(y) = log p(y | mu_1) + log p(mu_1) - log p(mu_1 | y) at the posterior mean.
        """
        mean = self.mean()
        residual, shift = (self.y - self.design @ mean) / self.noise_scale, mean - self.prior_mean
        log_likelihood = -residual @ residual / 2 - len(self.y) * (math.log(self.noise_scale) + _LOG_TWO_PI / 2)
        log_det_ratio = np.linalg.slogdet(self.prior_precision)[1] - np.linalg.slogdet(self.precision())[1]
        return float(log_likelihood - shift @ self.prior_precision @ shift / 2 + log_det_ratio / 2)

    @property
    def problem(self) -> Problem:
        """The same for `lehr.anneal`: the prior as base, prior times likelihood as target, in JAX's default precision.

        The target is log Z + log p(theta | y), which loses no digits to a log likelihood of thousands of nats.
        """
        prior = Gaussian.from_covariance(jnp.asarray(self.prior_mean), jnp.asarray(np.linalg.inv(self.prior_precision)))
        precision = self.precision()
        log_peak = self.log_evidence + np.linalg.slogdet(precision)[1] / 2 - self.dimension * _LOG_TWO_PI / 2
        return Problem(prior, _Posterior(*map(jnp.asarray, (self.mean(), precision, log_peak))))


class _Posterior(eqx.Module):
    """Prior times likelihood."""

    mean: Float[Array, " d"]
    precision: Float[Array, "d d"]
    log_peak: Float[Array, ""]

    def __call__(self, theta: Float[Array, " d"]) -> Float[Array, ""]:
        shift = theta - self.mean
        return self.log_peak - shift @ self.precision @ shift / 2


def _vector(name: str, value: ArrayLike, d: int) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.shape not in ((), (d,)) or not np.all(np.isfinite(array)):
        raise InputError(f"{name} must be a finite number or {d} of them, but its shape is {array.shape}")
    return np.broadcast_to(array, (d,)).copy()


def _precision(value: ArrayLike, d: int) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.shape not in ((), (d,), (d, d)):
        raise InputError(f"prior_precision must have shape (), ({d},) or ({d}, {d}), but it has {array.shape}")
    matrix = array if array.ndim == 2 else np.diag(np.broadcast_to(array, (d,)))
    if not (np.all(np.isfinite(matrix)) and is_symmetric(matrix) and np.linalg.eigvalsh(matrix)[0] > 0):
        raise InputError("prior_precision must be positive: positive numbers, or a symmetric positive definite matrix")
    return (matrix + matrix.T) / 2


def is_symmetric(matrix: np.ndarray) -> bool:
    """Up to rounding of its largest entry."""
    return bool(np.abs(matrix - matrix.T).max() <= 1e-10 * np.abs(matrix).max())
