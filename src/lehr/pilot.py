"""An adaptive run along a path that nothing is known of: it finds temperatures, scales and step sizes to use there."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lehr.kernels import Hamiltonian, Metropolis, State
from lehr.path import Problem
from lehr.smc import systematic
from lehr.weighted import log_mean_exp

#: the next temperature is as far away as leaves this share of the particles effective
_EFFECTIVE_SHARE = 0.7


class Pilot(eqx.Module):
    """What an adaptive run learnt, one row per temperature beta_1..; the first `num_steps` rows are filled.

    `barrier` is the sum of the square roots of the incremental discrepancies up to beta_k: the length of the path, in
    the units in which equal steps cost equal variance. `log_step_size` is in standard deviations of the coordinates,
    whose logarithms are `log_scale`. `finished` says whether it reached beta = 1. `draws` are the particles' positions
    after each of the moves at the end, dependent draws of the target; `positions` are the last of them.
    """

    betas: Float[Array, " max_steps"]
    barrier: Float[Array, " max_steps"]
    log_step_size: Float[Array, " max_steps"]
    log_scale: Float[Array, "max_steps dim"]
    num_steps: Int[Array, ""]
    num_gradients: Int[Array, ""]
    finished: Bool[Array, ""]
    positions: Float[Array, "num_particles dim"]
    draws: Float[Array, "num_final_moves num_particles dim"]
    log_evidence: Float[Array, ""]


@eqx.filter_jit
def pilot(
    key: PRNGKeyArray,
    problem: Problem,
    *,
    num_particles: int = 256,
    num_leapfrog: int = 4,
    num_moves: int = 2,
    num_final_moves: int = 8,
    max_steps: int = 200,
    target_acceptance: float = 0.8,
) -> Pilot:
    """Adaptive annealed sequential Monte Carlo with HMC moves, to learn a path.

    At each step it goes to the temperature at which the effective sample size of the incremental weights is 0.7 N,
    resamples, takes the particles' variances for the inverse mass, and moves; after each move the logarithm of the step
    size goes up or down by the mean acceptance less its target. Because the path depends on the particles,
    `log_evidence` is biased (little): it serves to tune an independent run, and to compare paths.

    Arguments:
        key: a PRNG key.
        problem: base and target.
        num_particles: N.
        num_leapfrog: gradients a move.
        num_moves: moves at each temperature.
        num_final_moves: further moves at beta = 1, at least 1: draws to fit a base to.
        max_steps: the last of them goes to beta = 1, however far that is.
        target_acceptance: in (0, 1).

    Returns a `Pilot`. A position where the log density is NaN counts as one of density zero.

    **Gradient**: not meant to be differentiated.

    Source: Jasra, Stephens, Doucet, Tsagaris 2011 (temperatures); Buchholz, Chopin, Jacob 2021 (HMC tuned by the
    particles).
    """
    dtype, dimension = problem.position.dtype, problem.position.shape[0]
    key_base, key_init, key_steps, key_final = jax.random.split(key, 4)
    template = Metropolis(
        Hamiltonian(jnp.ones((), dtype), momentum_scale=jnp.ones(dimension, dtype), num_leapfrog=num_leapfrog)
    )

    def kernel(log_step_size: Array, log_scale: Array) -> Metropolis:
        new = (log_step_size.astype(dtype), -log_scale.astype(dtype))
        return eqx.tree_at(lambda k: (k.kernel.log_step_size, k.kernel.log_momentum_scale), template, new)

    def move(states: State, beta: Array, log_step_size: Array, log_scale: Array, key: PRNGKeyArray):
        metropolis, density = kernel(log_step_size, log_scale), problem.at(beta)

        def one(key: PRNGKeyArray, state: State):
            noise = jax.tree.map(lambda leaf: leaf[0], metropolis.noise(key, 1, problem.position))
            moved = metropolis.move(density, state, noise)
            assert moved.acceptance is not None
            return metropolis.refresh(moved.state, noise), moved.acceptance

        return jax.vmap(one)(jax.random.split(key, num_particles), states)

    def temperature(carry: Any) -> Any:
        step, beta, states, log_step_size, log_evidence, rows = carry
        key_resample, key_moves = jax.random.split(jax.random.fold_in(key_steps, step))
        log_ratio = jax.vmap(lambda state: state.point.log_ratio)(states)
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
        increment = jnp.where(step == max_steps - 1, 1 - beta, _next_increment(log_ratio, 1 - beta))
        # Exactly 1 at the end, where beta + (1 - beta) may round.
        beta = jnp.where(increment >= 1 - beta, 1, beta + increment)
        log_weights = increment * log_ratio
        weights = jax.nn.softmax(log_weights)
        states = jax.tree.map(lambda leaf: leaf[systematic(key_resample, weights)], states)
        log_scale = jnp.log(jnp.std(states.point.position, axis=0) + jnp.finfo(dtype).tiny)

        def adapt(carry, key):
            states, log_step_size = carry
            states, acceptance = move(states, beta, log_step_size, log_scale, key)
            return (states, log_step_size + jnp.mean(acceptance) - target_acceptance), None

        (states, log_step_size), _ = jax.lax.scan(
            adapt, (states, log_step_size), jax.random.split(key_moves, num_moves)
        )
        discrepancy = jnp.maximum(jnp.log(num_particles * jnp.sum(weights**2)), 0)
        row = (beta, jnp.sqrt(discrepancy), log_step_size, log_scale)
        rows = jax.tree.map(lambda all_rows, row: all_rows.at[step].set(row), rows, row)
        return step + 1, beta, states, log_step_size, log_evidence + log_mean_exp(log_weights), rows

    positions = problem.base.sample(key_base, (num_particles,)).astype(dtype)
    zero = jnp.zeros((), dtype)
    states = jax.vmap(lambda key, x: template.init(key, problem.at(zero), x))(
        jax.random.split(key_init, num_particles), positions
    )
    empty = jnp.zeros(max_steps, dtype)
    rows = (empty + 1, empty, empty, jnp.zeros((max_steps, dimension), dtype))
    # The step size that keeps the acceptance constant in the dimension (Beskos et al. 2013).
    log_step_size = jnp.log(jnp.asarray(0.8 * dimension**-0.25, dtype))
    carry = (jnp.zeros((), jnp.int32), zero, states, log_step_size, zero, rows)
    carry = jax.lax.while_loop(lambda carry: (carry[1] < 1) & (carry[0] < max_steps), temperature, carry)
    num_steps, beta, states, log_step_size, log_evidence, (betas, steps, log_step_sizes, log_scales) = carry
    log_scale = log_scales[num_steps - 1]

    def move_on(states: State, key: PRNGKeyArray):
        states, _ = move(states, beta, log_step_size, log_scale, key)
        return states, states.point.position

    _, draws = jax.lax.scan(move_on, states, jax.random.split(key_final, num_final_moves))
    return Pilot(
        betas,
        jnp.cumsum(steps),
        log_step_sizes,
        log_scales,
        num_steps,
        num_particles * (1 + (num_steps * num_moves + num_final_moves) * num_leapfrog),
        num_steps < max_steps,
        draws[-1],
        draws,
        log_evidence,
    )


def _next_increment(log_ratio: Float[Array, " n"], left: Float[Array, ""]) -> Float[Array, ""]:
    """The largest increment of beta, at most `left`, that leaves the wanted share of the particles effective."""

    def share(increment: Array) -> Array:
        weights = jax.nn.softmax(increment * log_ratio)
        return 1 / (jnp.sum(weights**2) * log_ratio.shape[0])

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = share(middle) > _EFFECTIVE_SHARE
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(left), left))
    # However steep the path, beta must move on.
    return jnp.where(share(left) > _EFFECTIVE_SHARE, left, jnp.maximum(low, 1e-6 * left))
