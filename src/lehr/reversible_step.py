"""What both directions of the chain in whole numbers must see to the same bit: its grids, its rows, and what is added.

A number is on a grid, in units of a power of two. What moves it is computed in floats, rounded to the grid, and added:
whoever computes the same rounding again can subtract it. `whole_numbers.compiled_apart` sees to it that the compiler
does the same both times.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lehr import whole_numbers
from lehr.whole_numbers import Fraction


class Chains(NamedTuple):
    """What is known before the chains run."""

    #: (x, beta, *seen) -> log f_beta(x), which closes over nothing
    log_density: Callable[..., Array]
    #: (key, x) -> the momentum to start with
    momentum: Callable[[Array, Array], Array]
    #: (key, num_steps) -> the noise of that many steps
    noise: Callable[[Array, int], Array]
    num_steps: int
    #: rows of the buffer of bits
    num_rows: int


class Rates(NamedTuple):
    """Parameters of a step; those with two axes have one row per step."""

    #: step size over momentum scale
    h: Any
    #: persistence, and sqrt(1 - persistence^2)
    gamma: Any
    spread: Any


class Inputs(NamedTuple):
    """What is differentiated."""

    x: Float[Array, "num_particles dim"]
    betas: Float[Array, " num_steps"]
    rates: Rates
    #: what the density sees besides x and beta
    seen: tuple[Any, ...]


class Row(NamedTuple):
    """A step, or with a leading axis all of them. Both directions must see the same bits: computed once, and kept."""

    beta: Any
    rates: Rates
    #: factors to whole numbers: of the momentum (h/2 times its unit, per unit of positions), the gradient and the noise
    drift: Any
    per_unit: Float[Array, " dim"]
    kick: Any
    spread: Any
    fraction: Fraction
    push: Any
    slot: Any


def rounded_drift(u: Array, row: Row, real: Any) -> Array:
    """h/2 u, rounded, in units of the grid."""
    # The last factor is a power of two: its product is exact, and may be fused with anything.
    return jnp.rint(u.astype(real) * row.drift * row.per_unit)


def rounded_kick(chains: Chains, trips: Array, x_unit: Array, x: Array, row: Row, seen: tuple[Any, ...]) -> Array:
    """h grad log f, rounded, in units of the grid."""

    def rounded(x, x_unit, beta, kick, seen):
        def gradient(x):
            return jax.grad(chains.log_density)(x, beta, *seen)

        return jnp.rint(jax.vmap(gradient)(x.astype(x_unit.dtype) * x_unit) * kick)

    return whole_numbers.compiled_apart(trips, rounded, x, x_unit, row.beta, row.kick, seen)


def rounded_noise(chains: Chains, trips: Array, keys: Array, rows: Row, fixed: Row, real: Any) -> Array:
    """The noise of a group of steps, `(size, num_particles, dim)`, rounded, in units of the grid."""
    size, typed = rows.beta.shape[0], jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)

    def rounded(data, spread):
        wrapped = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys)) if typed else data
        noise = jax.vmap(lambda key: chains.noise(key, size), out_axes=1)(wrapped)
        return jnp.rint(noise * spread).astype(grid_of(real)[0])

    spread = fixed.spread if rows.spread is None else rows.spread[:, None]
    return whole_numbers.compiled_apart(trips, rounded, jax.random.key_data(keys) if typed else keys, spread)


def plan_of_buffer(chains: Chains, fraction: Fraction) -> whole_numbers.Plan:
    """When bits go to the buffer, for persistence that is one number, or one for each step."""

    def fraction_of(k):
        return Fraction(*(part[k] if part.ndim == 2 else part for part in fraction))

    return whole_numbers.plan(fraction_of, chains.num_steps, chains.num_rows)


def rows_of_steps(
    inputs: Inputs, fraction: Fraction, plan: whole_numbers.Plan, units: tuple[Array, float], trips: Array
) -> tuple[Row, Row]:
    """All steps, divided into what differs by step and what does not."""
    x_unit, unit = units
    h, _, spread = inputs.rates
    beta, drift, kick, spread = whole_numbers.pinned(trips, (inputs.betas, h / 2 * unit, h / unit, spread / unit))
    row = Row(beta, inputs.rates, drift, 1 / x_unit, kick, spread, fraction, plan.push, plan.row)
    by_step = jax.tree.map(lambda leaf: leaf.ndim == 2, row)._replace(beta=True, push=True, slot=True)
    return eqx.partition(row, by_step)


def differ_by_step(rates: Rates) -> Rates:
    """Of each parameter, whether it has a row for each step."""
    return Rates(*(leaf.ndim == 2 for leaf in rates))


def unit_of_positions(inputs: Inputs) -> Float[Array, " dim"]:
    """The grid of positions, in each dimension a power of two.

    Its range is 16 times the farthest start, or what a momentum of one drifts in 1024 of the longest steps, if that is
    more. A unit then is less than what a float of the start's size can resolve, or 2^-18 of the drift in a step.
    """
    real = inputs.x.dtype
    longest = jnp.max(inputs.rates.h.reshape(-1, inputs.rates.h.shape[-1] if inputs.rates.h.ndim else 1), axis=0)
    reach = jnp.maximum(16 * jnp.max(jnp.abs(inputs.x), axis=0), 1024 * longest)
    # Small enough that nothing underflows; such a drift is not resolved.
    reach = jnp.maximum(reach, jnp.asarray(2.0**-60, real))
    # Without the bits of its fraction a float is the power of two at or below it.
    words, exponent = (jnp.uint64, 0x7FF << 52) if real == jnp.float64 else (jnp.uint32, 0xFF << 23)
    power = jax.lax.bitcast_convert_type(reach, words) & jnp.asarray(exponent, words)
    return jax.lax.bitcast_convert_type(power, real) * (2 / limit_of(real))


def resolved(rates: Rates, x_unit: Array) -> Bool[Array, ""]:
    """Whether a momentum of one drifts by many units in every step, so that rounding does not change the chain."""
    return jnp.all(rates.h / 2 >= (2.0**24 if x_unit.dtype == jnp.float64 else 2.0**10) * x_unit)


def grid_of(real: Any) -> tuple[Any, float]:
    """The type of whole numbers, and the unit of momenta."""
    return (jnp.int64, 2.0**-52) if real == jnp.float64 else (jnp.int32, 2.0**-24)


def limit_of(real: Any) -> float:
    """The sum of two whole numbers below it is in range."""
    return 2.0**62 if real == jnp.float64 else 2.0**30


def largest(*numbers: Array) -> Float[Array, "..."]:
    """The largest magnitude, elementwise; NaN where there is one."""
    real = numbers[0].dtype
    return functools.reduce(jnp.maximum, (jnp.abs(a.astype(real)) for a in numbers))
