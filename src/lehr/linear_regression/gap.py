"""The gap of the bound of DAIS on linear regression, in closed form, and with perfect transitions."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from lehr.errors import InputError
from lehr.linear_regression.model import LinearRegression
from lehr.linear_regression.moments import Moments, Path, propagate, propagate_each, start_at
from lehr.linear_regression.noise import AdditiveNoise, MiniBatchNoise


@dataclass(frozen=True)
class Gap:
    """log Z less the bound E[log w], in nats, in three parts, each zero for a chain of small steps that keeps up.

        gap = |E theta_K - mu_1|^2_Lambda / 2              mean lag
            + [tr(Lambda Cov theta_K) - d] / 2             covariance lag
            + sum_k E[|v_hat_k|^2 - |v_{k-1}|^2]_{M^-1} / 2 - log det(Lambda_p^-1 Lambda) / 2      kinetic term

    with Lambda the precision of the posterior: log Z - log w is the quadratic form of theta_K, whose expectation is the
    first two, the difference of log determinants, and what momentum gained in the steps. The last two are signed.

    `mean` and `covariance` are of (theta_K, v_K) after the last step, `(2 d,)` and `(2 d, 2 d)`.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, equation (17); regrouped so that each part goes to zero.
    """

    mean_lag: float
    covariance_lag: float
    kinetic: float
    log_evidence: float
    mean: Float[np.ndarray, " two_d"]
    covariance: Float[np.ndarray, "two_d two_d"]

    @property
    def total(self) -> float:
        """log Z - E[log w], at least 0."""
        return self.mean_lag + self.covariance_lag + self.kinetic

    @property
    def bound(self) -> float:
        """E[log w]."""
        return self.log_evidence - self.total


def dais_gap(
    regression: LinearRegression,
    betas: ArrayLike,
    step_size: ArrayLike,
    *,
    persistence: ArrayLike = 0.0,
    momentum_scale: ArrayLike = 1.0,
    noise: AdditiveNoise | MiniBatchNoise | None = None,
) -> Gap:
    """The gap of the bound of DAIS (`lehr.anneal` with `lehr.Hamiltonian`, from the prior), to about 1e-12 nats a step.

    On Gaussians a step is affine in (theta, v): with L = Lambda_b, m = mu_b, unit M, and noise xi of the gradient,

        v_hat  = -e L theta + (I - e^2/2 L) v + e L m + e xi,
        theta' = (I - e^2/2 L) theta + (e I - e^3/4 L) v + e^2/2 L m + e^2/2 xi,
        v'     = g v_hat + sqrt(1 - g^2) N(0, I).

    The joint mean and covariance are propagated through all K steps, in float64. Where there is no noise and one basis
    diagonalises every step (always for a step size that is one number for each step and a prior precision
    that is a multiple of M), each direction is on its own: a million steps take seconds. Else a step costs a few
    products of `(d, d)`.

    Arguments:
        betas: the K + 1 inverse temperatures, increasing from 0 to 1.
        step_size: e > 0: a number, `(d,)`, `(K, 1)` or `(K, d)`, as that of `lehr.Hamiltonian`.
        persistence: g in [0, 1), a number, `(K,)` or `(K, 1)`.
        momentum_scale: sqrt(diag M) > 0, a number or `(d,)`.
        noise: of the gradient of the log likelihood, which enters a step times beta; drawn anew in every step. (It may
            be that of another regression in the same dimensions, for gradients that are estimated otherwise.)

    Returns a `Gap`.

    **Gradient**: none (NumPy arrays).

    Raises `lehr.errors.InputError` for shapes that do not fit, values out of range, and a step size at or beyond
    stability: 2 / sqrt(largest eigenvalue of M^-1 Lambda_b) at some step, or with which the noise of
    mini-batches, which grows with theta, makes second moments diverge.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, equations (16), (17), (19).
    """
    d, betas = regression.dimension, _betas(betas)
    num_steps = len(betas) - 1
    scale = _positive("momentum_scale", momentum_scale, [(), (d,)])
    sizes = _positive("step_size", step_size, [(), (d,), (num_steps, 1), (num_steps, d)])
    persistence = np.asarray(persistence, np.float64)
    if persistence.shape not in ((), (num_steps,), (num_steps, 1)):
        raise InputError(f"persistence must be one number or {num_steps}, but its shape is {persistence.shape}")
    if not np.all((persistence >= 0) & (persistence < 1)):
        raise InputError(
            f"persistence must be in [0, 1), but it reaches from {persistence.min()} to {persistence.max()}"
        )
    if not isinstance(noise, AdditiveNoise | MiniBatchNoise | None):
        raise InputError(f"noise must be an AdditiveNoise or a MiniBatchNoise, not a {type(noise).__name__}")
    if noise is not None and noise.dimension != d:
        raise InputError(f"the noise is of {noise.dimension} dimensions, but the regression has {d}")
    gammas = np.broadcast_to(persistence.reshape(-1), (num_steps,))
    # h = e / sqrt(M), of shape (K, d) or (K, 1), is all of M and e in units of momentum where u ~ N(0, I).
    h = np.broadcast_to(sizes / scale, (num_steps, np.shape(sizes / scale)[-1] if np.ndim(sizes / scale) else 1))
    _check_stability(regression, betas, h)
    directions = _directions(regression, h) if noise is None else None
    with jax.enable_x64(True):
        if directions is None:
            moments, kinetic, moved = _dense(regression, betas[1:], np.broadcast_to(h, (num_steps, d)), gammas, noise)
        else:
            moments, kinetic, moved = _by_direction(regression, betas[1:], h, gammas, directions)
    gap = _gap(regression, moments, kinetic, np.broadcast_to(scale, (d,)))
    # Multiplicative noise amplifies second moments, step by step; the parts of a gap then cancel to less than rounding.
    if noise is not None and not (moved < min(1e9 * max(1.0, gap.total), 1e15) and gap.total > -1e-6):
        raise InputError(
            f"the noise makes the second moments of the chain diverge (energies of {moved:.1g} nats): give a smaller "
            "step_size, or larger batches"
        )
    return gap


def perfect_gap(regression: LinearRegression, betas: ArrayLike) -> float:
    """The gap of annealed importance sampling with perfect transitions: sum_k KL(p_{b_{k-1}} || p_{b_k}), of order 1/K.

    Source: Grosse, Maddison, Salakhutdinov 2013, section 3 (with linear spacing of the natural parameters).
    """
    betas = _betas(betas)
    # In units of the prior, and of the likelihood's own axes, every precision is diagonal: 1 + b eigenvalue.
    root = np.linalg.inv(np.linalg.cholesky(regression.prior_precision))
    eigenvalues, axes = np.linalg.eigh(root @ regression.likelihood_precision @ root.T)
    gradient = regression.likelihood_linear - regression.likelihood_precision @ regression.prior_mean
    precision = 1 + betas[:, None] * eigenvalues
    mean = betas[:, None] * (axes.T @ root @ gradient) / precision
    growth = np.diff(betas)[:, None] * eigenvalues / precision[:-1]
    return float(np.sum(growth - np.log1p(growth) + precision[1:] * np.diff(mean, axis=0) ** 2) / 2)


def _dense(
    regression: LinearRegression, betas: np.ndarray, h: np.ndarray, gammas: np.ndarray, noise: Any
) -> tuple[Moments, float, float]:
    path = _path(regression)
    start = start_at(regression.prior_mean, np.linalg.inv(regression.prior_precision))
    moments, kinetic, moved = propagate(start, path, noise, betas, h, gammas)
    return Moments(*map(np.asarray, moments)), float(kinetic), float(moved)


def _by_direction(
    regression: LinearRegression, betas: np.ndarray, h: np.ndarray, gammas: np.ndarray, directions: np.ndarray
) -> tuple[Moments, float, float]:
    """In coordinates z = Q^T x / c, each a problem of one dimension; h is c times one number for each step."""
    d = regression.dimension
    along = np.broadcast_to(h[0] / h[0, 0], (d,))
    to_x = along[:, None] * directions  # x = to_x z
    to_z = directions.T / along
    path = _path(regression)
    diagonal = [np.sum(to_x * (p @ to_x), axis=0) for p in (path.precision0, path.precision1)]
    linear = [to_x.T @ r for r in (path.linear0, path.linear1)]
    of_prior = np.sum(to_z * (to_z @ np.linalg.inv(regression.prior_precision)), axis=1)
    starts = jax.vmap(start_at)((to_z @ regression.prior_mean)[:, None], of_prior[:, None, None])
    paths = Path(*(p[:, None, None] for p in diagonal), *(r[:, None] for r in linear))
    moments, kinetic, moved = propagate_each(starts, paths, None, betas, h[:, :1], gammas)
    z = Moments(*(np.asarray(leaf).reshape(d) for leaf in moments))
    # u is in the coordinates of z too: u = Q^T u_x, since  z_half = z + (s/2) Q^T u_x.
    found = Moments(
        to_x @ z.x,
        directions @ z.u,
        (to_x * z.xx) @ to_x.T,
        (to_x * z.xu) @ directions.T,
        (directions * z.uu) @ directions.T,
    )
    return found, float(np.sum(kinetic)), float(np.sum(moved))


def _path(regression: LinearRegression) -> Path:
    prior, likelihood = regression.prior_precision, regression.likelihood_precision
    return Path(prior, likelihood, prior @ regression.prior_mean, regression.likelihood_linear)


def _gap(regression: LinearRegression, moments: Moments, kinetic: float, scale: np.ndarray) -> Gap:
    precision = regression.precision()
    shift = moments.x - regression.mean()
    log_det_ratio = np.linalg.slogdet(precision)[1] - np.linalg.slogdet(regression.prior_precision)[1]
    to_v = moments.xu * scale
    return Gap(
        mean_lag=float(shift @ precision @ shift / 2),
        covariance_lag=float((np.sum(precision * moments.xx) - len(shift)) / 2),
        kinetic=kinetic - float(log_det_ratio) / 2,
        log_evidence=regression.log_evidence,
        mean=np.concatenate([moments.x, scale * moments.u]),
        covariance=np.block([[moments.xx, to_v], [to_v.T, scale[:, None] * moments.uu * scale]]),
    )


def _directions(regression: LinearRegression, h: np.ndarray) -> np.ndarray | None:
    """Q whose columns diagonalise every step, in coordinates x / c with h = c times a number for each step; or None."""
    along = h / h[:, :1]
    if not np.allclose(along, along[0], rtol=1e-14, atol=0):
        return None
    pair = [np.outer(along[0], along[0]) * p for p in (regression.prior_precision, regression.likelihood_precision)]
    prior, likelihood = (matrix / np.linalg.norm(matrix) for matrix in pair)
    # Of matrices that commute, the eigenvectors of a sum that no accident makes degenerate are those of both.
    axes = np.linalg.eigh(prior + 0.6180339887 * likelihood)[1]
    left = [axes.T @ matrix @ axes for matrix in (prior, likelihood)]
    is_diagonal = all(np.abs(matrix - np.diag(np.diag(matrix))).max() < 1e-13 for matrix in left)
    return axes if is_diagonal else None


def _check_stability(regression: LinearRegression, betas: np.ndarray, h: np.ndarray) -> None:
    """Raises `InputError` at the first step of which the leapfrog, |h^2 L| < 4, is unstable."""
    # Precision grows with beta: what is stable at the end is stable everywhere.
    largest = np.linalg.eigvalsh(regression.precision())[-1]
    doubtful = np.flatnonzero(h.max(axis=1) ** 2 * largest >= 4)
    for block in np.array_split(doubtful, -(-len(doubtful) // 10_000)) if len(doubtful) else []:
        beta, each = betas[1:][block, None, None], np.broadcast_to(h[block], (len(block), regression.dimension))
        L = regression.prior_precision + beta * regression.likelihood_precision
        eigenvalue = np.linalg.eigvalsh(each[:, :, None] * L * each[:, None, :])[:, -1]
        if np.any(eigenvalue >= 4):
            k = int(np.argmax(eigenvalue >= 4))
            factor = 2 / np.sqrt(eigenvalue[k])
            raise InputError(
                f"the step size is unstable at step {block[k] + 1}, of beta = {betas[1:][block[k]]:.3g}: step_size / "
                f"momentum_scale must be below 2 / sqrt(largest eigenvalue of the precision) = "
                f"{factor * h[block[k]].max():.4g} there, so multiply it by less than {factor:.3g}"
            )


def _betas(betas: ArrayLike) -> np.ndarray:
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not np.all(np.diff(betas) > 0):
        raise InputError("betas must increase strictly from 0 to 1, for example numpy.linspace(0, 1, 11)")
    return betas


def _positive(name: str, value: ArrayLike, shapes: list[tuple[int, ...]]) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.shape not in shapes:
        raise InputError(f"{name} must have one of the shapes {shapes}, but it has {array.shape}")
    if not (np.all(np.isfinite(array)) and np.all(array > 0)):
        raise InputError(f"{name} must be positive, but its smallest value is {array.min()}")
    return array
