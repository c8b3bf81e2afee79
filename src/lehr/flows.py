"""Coupling flows fitted to draws that depend on each other: bases that follow necks and bends."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.bijections import AbstractBijection, Affine
from flowjax.distributions import StandardNormal, Transformed
from flowjax.flows import coupling_flow
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import Parameterize

from lehr.errors import InputError

#: a fit has blocks of so many steps, each on a batch of so many draws; after each the held-out draws are looked at
_NUM_BLOCKS, _BLOCK, _BATCH = 128, 32, 128
#: families held out of a fit, at most
_HELD_OUT = 64


def flow_matched(
    key: PRNGKeyArray,
    draws: Float[Array, "num_families num_draws dim"],
    *,
    start: AbstractBijection | None = None,
    num_layers: int = 6,
) -> AbstractBijection:
    """The map from N(0, I) to a coupling flow fitted by maximum likelihood to draws, in at least 2 dimensions.

    In each layer half of the coordinates shift the other half, and scale it by exp(3 tanh(a / 3)), with the shift and a
    from a network of one hidden layer that is nearly linear in the first half: its units bend by 30 % at most. So it
    follows necks, where the scale of some coordinates is log-linear in others, bends with bananas, and goes on
    log-linearly where there were no draws.

    Of 128 stages of the fit that one is taken at which draws held out had the highest likelihood. They are whole
    families: a draw's siblings, states of one Markov chain, would betray it, and a flow be taken that is far off
    between the chains it was fitted to.

    Arguments:
        key: a PRNG key, of what is held out and the order of the rest.
        draws: of scales near 1, in families within which they may depend on each other, such as `(n, 1, dim)`.
        start: a flow that this function made, to go on from.
        num_layers: coupling layers of a new flow.

    **Gradient**: not meant to be differentiated.

    Raises `lehr.errors.InputError` for draws that are not finite, or of fewer than 16 families.

    Source: Dinh, Sohl-Dickstein, Bengio 2017 (coupling layers).
    """
    values = np.asarray(draws)
    num_families, _, dimension = values.shape
    if not np.all(np.isfinite(values)):
        raise InputError("a flow cannot be fitted to draws that are not finite")
    if num_families < 16:
        raise InputError(f"a flow needs at least 16 families of draws to hold some out, but there are {num_families}")
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (2,))))
    values = rng.permutation(values)
    num_held = min(_HELD_OUT, num_families // 8)
    held_out, rest = jnp.asarray(values[:num_held].reshape(-1, dimension)), values[num_held:].reshape(-1, dimension)
    flow = near_identity(dimension, num_layers, draws.dtype) if start is None else start
    best, highest, moments = flow, float(_mean_log_prob(flow, held_out)), _init(flow)
    for _ in range(_NUM_BLOCKS):
        batches = jnp.asarray(rest[rng.integers(len(rest), size=(_BLOCK, _BATCH))])
        flow, moments, found = _fit_block(flow, moments, batches, held_out)
        if float(found) > highest:
            best, highest = flow, float(found)
    return best


def _mean_log_prob(flow: AbstractBijection, draws: Array) -> Array:
    return jnp.mean(Transformed(StandardNormal(draws.shape[1:]), flow).log_prob(draws))


# Weights decay, so that no scale depends on what it need not depend on, and explodes where there are no draws.
_OPTIMISER = optax.adamw(optax.cosine_decay_schedule(5e-3, _NUM_BLOCKS * _BLOCK), weight_decay=0.1)


def _init(flow: AbstractBijection) -> Any:
    return _OPTIMISER.init(eqx.filter(flow, eqx.is_inexact_array))  # pyright: ignore[reportArgumentType]


@eqx.filter_jit
def _fit_block(
    flow: AbstractBijection, moments: Any, batches: Array, held_out: Array
) -> tuple[AbstractBijection, Any, Array]:
    """One step for each batch, and then the mean log density of the draws held out."""
    trained, fixed = eqx.partition(flow, eqx.is_inexact_array)

    def step(carry: Any, batch: Array):
        trained, moments = carry
        gradient = jax.grad(lambda trained: -_mean_log_prob(eqx.combine(trained, fixed), batch))(trained)
        updates, moments = _OPTIMISER.update(gradient, moments, trained)
        return (eqx.apply_updates(trained, updates), moments), None

    (trained, moments), _ = jax.lax.scan(step, (trained, moments), batches)
    flow = eqx.combine(trained, fixed)
    return flow, moments, _mean_log_prob(flow, held_out)


# One object for each size: a flow holds functions, and new ones would be compiled anew.
@functools.cache
def near_identity(dimension: int, num_layers: int, dtype: Any) -> AbstractBijection:
    """A coupling flow that changes little yet."""
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


def _bent(h: Array) -> Array:
    # More bend (silu alone) fits as well where there are draws, and loses the end of a neck, where there are few.
    return 0.7 * h + 0.3 * jax.nn.silu(h)


def _bounded_exp(a: Array) -> Array:
    # Unbounded, a far draw would make a scale overflow.
    return jnp.exp(3 * jnp.tanh(a / 3))
