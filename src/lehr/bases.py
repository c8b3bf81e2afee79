"""Bases fitted to a target: Gaussians from the curvature at its modes or the moments of draws, flows from draws."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.bijections import AbstractBijection, Affine
from flowjax.distributions import StandardNormal, Transformed
from flowjax.flows import coupling_flow
from flowjax.train import fit_to_data
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import Parameterize
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf

from lehr.errors import InputError
from lehr.path import LogDensity
from lehr.transport import gaussian_map

#: up to here the Hessian is computed, stored and factorised whole (2,000 dimensions: 16 MB, 2,000 products)
LARGEST_FULL_RANK = 2000
#: of a flow's fit
_NUM_EPOCHS = 50


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


def flow_matched(
    key: PRNGKeyArray,
    draws: Float[Array, "num_draws size"],
    *,
    start: AbstractBijection | None = None,
    num_layers: int = 6,
) -> AbstractBijection:
    """The map from N(0, I) to a coupling flow fitted by maximum likelihood to draws, in at least 2 dimensions.

    In each layer half of the coordinates shift the other half, and scale it by exp(3 tanh(a / 3)), with the shift and a
    from a network of one hidden layer that is nearly linear in the first half: its units bend by 30 % at most. So it
    follows necks, where the scale of some coordinates is log-linear in others, bends with bananas, and goes on
    log-linearly where there were no draws.

    Arguments:
        key: a PRNG key, of the order of the draws.
        draws: `(num_draws, dim)`, of scales near 1, which may repeat; a tenth of them says which epoch was the best.
        start: a flow that this function made, to go on from.
        num_layers: coupling layers of a new flow.

    **Gradient**: not meant to be differentiated.

    Raises `lehr.errors.InputError` for draws that are not finite.

    Source: Dinh, Sohl-Dickstein, Bengio 2017 (coupling layers).
    """
    if not bool(jnp.all(jnp.isfinite(draws))):
        raise InputError("a flow cannot be fitted to draws that are not finite")
    bijection = _near_identity(draws.shape[1], num_layers, jnp.result_type(draws)) if start is None else start
    flow, _ = fit_to_data(
        key,
        Transformed(StandardNormal(draws.shape[1:]), bijection),
        draws,
        optimizer=_decaying(_NUM_EPOCHS * (len(draws) // 128)),
        max_epochs=_NUM_EPOCHS,
        max_patience=_NUM_EPOCHS,
        batch_size=128,
        show_progress=False,
    )
    return flow.bijection


# One object for each size: a flow holds functions, and new ones would be compiled anew.
@functools.cache
def _near_identity(dimension: int, num_layers: int, dtype: Any) -> AbstractBijection:
    transformer = eqx.tree_at(lambda affine: affine.scale, Affine(), Parameterize(_bounded_exp, jnp.zeros(())))
    flow = coupling_flow(
        jax.random.key(0),
        base_dist=StandardNormal((dimension,)),
        transformer=transformer,
        flow_layers=num_layers,
        nn_width=max(32, dimension),
        nn_depth=1,
        nn_activation=_bent,
    )
    return jax.tree.map(lambda x: (0.1 * x).astype(dtype) if eqx.is_inexact_array(x) else x, flow.bijection)


@functools.cache
def _decaying(num_steps: int) -> optax.GradientTransformation:
    # Weights decay, so that no scale depends on what it need not depend on, and explodes where there are no draws.
    return optax.adamw(optax.cosine_decay_schedule(5e-3, num_steps), weight_decay=0.1)


def _bent(h: Array) -> Array:
    # More bend (silu alone) fits as well where there are draws, and loses the end of a neck, where there are few.
    return 0.7 * h + 0.3 * jax.nn.silu(h)


def _bounded_exp(a: Array) -> Array:
    # Unbounded, a far draw would make a scale overflow.
    return jnp.exp(3 * jnp.tanh(a / 3))


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
