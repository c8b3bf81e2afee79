"""The chain of `Hamiltonian` in whole numbers, which runs backwards bit for bit: its gradient keeps only what is lost.

A leapfrog is undone by subtracting what it added. In floats that loses bits; here positions and momenta are whole
numbers on a grid, what is added is rounded to it, and nothing is lost. Only the refreshment u <- gamma u + noise loses
information, log2(1/gamma) bits a step, and these are kept (`whole_numbers.py`). The backward pass reconstructs each
step from its end, and adds the adjoints of the step, in floats.

Where a number leaves its grid, the grid is too coarse for a step, persistence is nearer to 0 or 1 than a fraction, or
the reconstruction does not arrive at the start, the chain in floats takes the place of this one: for all particles at
once, in a loop of no iterations or one, so that it costs nothing under `vmap` either.

Source: Maclaurin, Duvenaud, Adams 2015, section 3; Zhang, Hsu, Li, Finn, Grosse 2021, section 3.2.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, UInt

from lehr import whole_numbers
from lehr.chunked_scan import group_keys, in_groups, scan_groups, scan_with_noise
from lehr.numerics import compensated_add
from lehr.reversible_step import (
    Chains,
    Inputs,
    Rates,
    Row,
    differ_by_step,
    grid_of,
    largest,
    limit_of,
    plan_of_buffer,
    resolved,
    rounded_drift,
    rounded_kick,
    rounded_noise,
    rows_of_steps,
    unit_of_positions,
)
from lehr.whole_numbers import Fraction


class State(NamedTuple):
    """All particles, in whole numbers."""

    x: Int[Array, "num_particles dim"]
    u: Int[Array, "num_particles dim"]
    head: UInt[Array, "num_particles dim"]


class Kept(NamedTuple):
    """What the backward pass needs: two ends, the bits that were lost, and no step."""

    keys: Array
    inputs: Inputs
    stepped: Row
    fixed: Row
    x_unit: Float[Array, " dim"]
    trips: Int[Array, ""]
    start: State
    end: State
    buffer: UInt[Array, "num_rows num_particles dim"]
    fits: Bool[Array, ""]


class Differentiated(eqx.Module):
    """Which of `Inputs.seen` a gradient is taken in: adjoints of data would be as large as the data, for nothing."""

    seen: tuple[bool, ...] = eqx.field(static=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(chains: Chains, keys: Array, fraction: Fraction, inputs: Inputs) -> tuple[Array, Array]:
    """Last positions `(num_particles, dim)` and sums of the log ratios `(num_particles,)`.

    **Gradient**: of the chain in floats, along the positions of the chain in whole numbers; in reverse mode.
    """
    return _forwards(chains, keys, fraction, inputs)[0]


def _forwards(chains: Chains, keys: Array, fraction: Fraction, inputs: Inputs) -> tuple[tuple[Array, Array], Kept]:
    key_momentum, key_noise = _split(keys)
    real, seen = inputs.x.dtype, inputs.seen
    whole, unit = grid_of(real)
    trips = whole_numbers.one_at_run_time(inputs)
    x_unit = unit_of_positions(inputs)
    plan = plan_of_buffer(chains, fraction)
    stepped, fixed = rows_of_steps(inputs, fraction, plan, (x_unit, unit), trips)
    x, u = jnp.rint(inputs.x / x_unit), jnp.rint(jax.vmap(chains.momentum)(key_momentum, inputs.x) / unit)
    x_whole, u_whole = whole_numbers.pinned(trips, (x.astype(whole), u.astype(whole)))
    start = State(x_whole, u_whole, jnp.zeros(x.shape, jnp.uint32))
    buffer = whole_numbers.empty_buffer(chains.num_rows, x.shape)
    # Summed over dimensions, and looked at, once after all steps.
    zeros = jnp.zeros_like(x)

    def step(carry, inputs_of_step):
        (x, u, head), buffer, total, lost, farthest = carry
        row, noise = eqx.combine(inputs_of_step[0], fixed), inputs_of_step[1]
        first = rounded_drift(u, row, real)
        half = x + first.astype(whole)
        kick = rounded_kick(chains, trips, x_unit, half, row, seen)
        kicked = u + kick.astype(whole)
        last = rounded_drift(kicked, row, real)
        # log N(after) - log N(before), as a product: squares would cancel
        log_ratio = -(kick * unit) * (u.astype(real) * unit + kicked.astype(real) * unit) / 2
        buffer, head = whole_numbers.push(buffer, head, row.push, row.slot)
        refreshed, head = whole_numbers.multiply(kicked, head, row.fraction)
        new = State(half + last.astype(whole), refreshed + noise, head)
        farthest = largest(farthest, first, kick, last, half, kicked, noise, new.x, new.u)
        return (new, buffer, *compensated_add(total, lost, log_ratio), farthest), None

    def group(carry, inputs_of_group):
        keys, rows = inputs_of_group
        return jax.lax.scan(step, carry, (rows, rounded_noise(chains, trips, keys, rows, fixed, real)))

    groups = in_groups(stepped, _keys_of_groups(key_noise, chains.num_steps))
    carry = (start, buffer, zeros, zeros, largest(x, u))
    (end, buffer, total, lost, farthest), _ = scan_groups(group, carry, *groups)
    near = jnp.all(whole_numbers.is_near(inputs.rates.gamma))
    # The sum of two numbers below the limit is in range; beyond it would wrap without a word. False for NaN.
    fits = jnp.all(farthest < limit_of(real)) & resolved(inputs.rates, x_unit) & near & ~plan.overflows

    def instead(_):
        return jnp.ones_like(fits), _in_floats(chains, keys, inputs)

    found = (end.x.astype(real) * x_unit, jnp.sum(total + lost, axis=1))
    found = jax.lax.while_loop(lambda carry: ~carry[0], instead, (fits, found))[1]
    return found, Kept(keys, inputs, stepped, fixed, x_unit, trips, start, end, buffer, fits)


def _forwards_for_reverse(chains: Chains, *primals: Any) -> tuple[tuple[Array, Array], tuple[Kept, Differentiated]]:
    seen = tuple(leaf.perturbed and eqx.is_inexact_array(leaf.value) for leaf in primals[-1].seen)
    values = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    found, kept = _forwards(chains, *values)
    return found, (kept, Differentiated(seen))


def _backwards(
    chains: Chains, residuals: tuple[Kept, Differentiated], cotangents: tuple[Any, Any]
) -> tuple[None, None, Inputs]:
    kept, differentiated = residuals
    cotangents = jax.tree.map(_instantiated, cotangents, is_leaf=lambda a: isinstance(a, SymbolicZero))
    inputs, fixed, x_unit, trips = kept.inputs, kept.fixed, kept.x_unit, kept.trips
    real = inputs.x.dtype
    whole, unit = grid_of(real)
    of_end, of_ratio = cotangents[0], cotangents[1][:, None]
    floats, others = eqx.partition(inputs.seen, differentiated.seen)

    def gradients(x, beta):
        """Of the sum over particles, so that no particle has adjoints of a matrix to itself."""

        def log_densities(x, beta, floats):
            seen = eqx.combine(floats, others)
            return jnp.sum(jax.vmap(lambda x: chains.log_density(x, beta, *seen))(x))

        return jax.grad(log_densities, argnums=(0, 1, 2))(x, beta, floats)

    def step(carry, inputs_of_step):
        state, of_x, of_u, of_fixed, of_seen = carry
        row, noise = eqx.combine(inputs_of_step[0], fixed), inputs_of_step[1]
        # What `_forwards` did, from its end to its start.
        kicked, head = whole_numbers.divide(state.u - noise, state.head, row.fraction)
        head = whole_numbers.pop(kept.buffer, head, row.push, row.slot)
        half = state.x - rounded_drift(kicked, row, real).astype(whole)
        kick = rounded_kick(chains, trips, x_unit, half, row, inputs.seen)
        u = kicked - kick.astype(whole)
        start = State(half - rounded_drift(u, row, real).astype(whole), u, head)
        # And its adjoints, of  u' = gamma u_hat + spread xi,  x' = x_half + (h/2) u_hat,
        before, after, rates = u.astype(real) * unit, kicked.astype(real) * unit, row.rates
        of_gamma, of_spread = of_u * after, of_u * (noise.astype(real) * unit / rates.spread)
        of_h = of_x * after / 2
        of_u = rates.gamma * of_u + rates.h / 2 * of_x
        # log ratio = -(u_hat^2 - u^2)/2,  u_hat = u + h grad log f(x_half),
        of_u -= of_ratio * after
        of_h += of_u * (kick * unit / rates.h)
        along = functools.partial(gradients, beta=row.beta)
        bend, of_beta, change = jax.jvp(along, (half.astype(real) * x_unit,), (rates.h * of_u,))[1]
        of_x += bend
        of_u += of_ratio * before
        # x_half = x + (h/2) u.
        of_h += of_x * before / 2
        of_u += rates.h / 2 * of_x
        # Summed over particles once, after all steps, where that can wait.
        of_stepped, of_fixed_here = eqx.partition(Rates(of_h, of_gamma, of_spread), by_step)
        of_stepped = jax.tree.map(_sum_to, of_stepped, eqx.filter(rates, by_step))
        of_fixed, of_seen = jax.tree.map(jnp.add, (of_fixed, of_seen), (of_fixed_here, change))
        return (start, of_x, of_u, of_fixed, of_seen), (of_beta, of_stepped)

    def group(carry, inputs_of_group):
        keys, rows = inputs_of_group
        noise = rounded_noise(chains, trips, keys, rows, fixed, real)
        return jax.lax.scan(step, carry, (rows, noise), reverse=True)

    by_step = differ_by_step(inputs.rates)
    fixed_rates = eqx.filter(inputs.rates, by_step, inverse=True)
    zeros = (
        jnp.zeros_like(of_end),
        jax.tree.map(lambda _: jnp.zeros_like(of_end), fixed_rates),
        jax.tree.map(jnp.zeros_like, floats),
    )
    groups = in_groups(kept.stepped, _keys_of_groups(_split(kept.keys)[1], chains.num_steps))
    carry, (of_betas, of_stepped) = scan_groups(group, (kept.end, of_end, *zeros), *groups, reverse=True)
    start, of_x, _, of_fixed, of_seen = carry
    of_fixed = jax.tree.map(_sum_to, of_fixed, fixed_rates)
    arrived = kept.fits & jnp.all((start.x == kept.start.x) & (start.u == kept.start.u) & (start.head == 0))

    def instead(_):
        def in_floats(inputs):
            return _in_floats(chains, kept.keys, inputs._replace(seen=eqx.combine(inputs.seen, others)))

        return jnp.ones_like(arrived), jax.vjp(in_floats, inputs._replace(seen=floats))[1](cotangents)[0]

    adjoints = Inputs(of_x, of_betas, eqx.combine(of_stepped, of_fixed), of_seen)
    return None, None, jax.lax.while_loop(lambda carry: ~carry[0], instead, (arrived, adjoints))[1]


run.defvjp(_forwards_for_reverse, _backwards, symbolic_zeros=True)


def _instantiated(cotangent: Any) -> Array:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _in_floats(chains: Chains, keys: Array, inputs: Inputs) -> tuple[Array, Array]:
    """The same chains in floats, with the same random numbers."""
    stepped, fixed = eqx.partition(inputs.rates, differ_by_step(inputs.rates))

    def chain(key, x):
        key_momentum, key_noise = jax.random.split(key)

        def step(carry, inputs_of_step):
            x, u, total, lost = carry
            (beta, stepped), noise = inputs_of_step
            h, gamma, spread = eqx.combine(stepped, fixed)
            x = x + h / 2 * u
            change = h * jax.grad(lambda x: chains.log_density(x, beta, *inputs.seen))(x)
            after = u + change
            total, lost = compensated_add(total, lost, -jnp.sum(change * (u + after)) / 2)
            return (x + h / 2 * after, gamma * after + spread * noise, total, lost), None

        zero = jnp.zeros((), x.dtype)
        carry = (x, chains.momentum(key_momentum, x), zero, zero)
        steps = (inputs.betas, stepped)
        (x, _, total, lost), _ = scan_with_noise(step, chains.noise, carry, key_noise, steps, memory="checkpoint twice")
        return x, total + lost

    return jax.vmap(chain)(keys, inputs.x)


def _sum_to(a: Float[Array, "num_particles dim"], like: Array) -> Array:
    """The adjoint of broadcasting `like` against all particles."""
    a = jnp.sum(a, axis=0)
    return a if like.shape == a.shape else jnp.sum(a).reshape(like.shape)


def _split(keys: Array) -> tuple[Array, Array]:
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


def _keys_of_groups(keys: Array, num_steps: int) -> tuple[Array, Array]:
    return jax.vmap(lambda key: group_keys(key, num_steps), out_axes=(1, 0))(keys)
