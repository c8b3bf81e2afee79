"""Annealed sequential Monte Carlo: the annealing loop over a population that is resampled on the way."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lehr.annealer import Annealer, prepare
from lehr.errors import InputError
from lehr.kernels.contract import AbstractKernel, State
from lehr.path import LogDensity, Problem
from lehr.weighted import log_mean_exp


class PathStatistics(eqx.Module):
    """What a run saw along the path, by step k = 1..K (averages are over the weighted particles).

    `log_increment` estimates log(Z_k / Z_{k-1}): their sum is the stepping-stone estimate of log Z. `discrepancy` is

        D_k = log E[g_k^2] - 2 log E[g_k],   g_k = (target / base)^(beta_k - beta_{k-1}),   E under f_{k-1},

    the incremental discrepancy, whose square roots sum to the barrier of the path (Syed, Bouchard-Cote, Chern, Doucet
    2024). `mean_log_ratio` and `var_log_ratio` are the moments of log(target / base) at beta_0..beta_K; `scale` is the
    standard deviation of each coordinate at beta_k; `effective_sample_size` is that before resampling.
    """

    log_increment: Float[Array, " num_steps"]
    discrepancy: Float[Array, " num_steps"]
    effective_sample_size: Float[Array, " num_steps"]
    acceptance: Float[Array, " num_steps"]
    scale: Float[Array, "num_steps dim"]
    mean_log_ratio: Float[Array, " num_betas"]
    var_log_ratio: Float[Array, " num_betas"]


class Population(eqx.Module):
    """N particles of one run, dependent through resampling.

    `log_weights` carry the whole estimate: E[(1/N) sum_i w_i] = Z. `num_resampled` says how often the population was
    resampled. A standard error comes from the spread of independent populations (`jax.vmap` over keys): one population
    does not hold it, for estimators by genealogy need multinomial resampling, which costs more than it tells.
    """

    positions: Float[Array, "num_particles dim"]
    log_weights: Float[Array, " num_particles"]
    num_resampled: Int[Array, ""]
    path: PathStatistics

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """log (1/N) sum_i w_i, in nats; the estimate of Z is unbiased, its logarithm low on average."""
        return log_mean_exp(self.log_weights)


@eqx.filter_jit
def smc(
    key: PRNGKeyArray,
    annealer: Annealer,
    log_target: LogDensity,
    num_particles: int,
    *,
    resample_below: float = 0.5,
) -> Population:
    """Anneals a population of particles, and resamples it whenever its effective sample size is small.

    At each step: weigh by (target / base)^(beta_k - beta_{k-1}); resample (systematically) if the effective sample size
    is below `resample_below` times N; move by the kernel that leaves f_k invariant. E[(1/N) sum w] = Z for any
    schedule, kernel and threshold; `resample_below=0` is AIS, or HAIS with a persistent momentum.

    Arguments:
        key: a PRNG key.
        annealer: base, schedule (K steps) and an exact kernel (`lehr.Metropolis`).
        log_target: maps a position `(dim,)` to the log unnormalised density, a scalar, in nats.
        num_particles: N, at least 2.
        resample_below: in [0, 1]; at 1 every step resamples.

    **Gradient**: raises `TypeError`, as for every Metropolis-corrected chain.

    Raises `lehr.errors.InputError` for an uncorrected kernel, fewer than two particles, a threshold outside [0, 1], or
    shapes that do not fit.

    Source: Del Moral, Doucet, Jasra 2006, section 3.3; Neal 2001.
    """
    if not 0 <= resample_below <= 1:
        raise InputError(f"resample_below is a share of the particles, in [0, 1], but it is {resample_below}")
    problem, annealer = _prepare(annealer, log_target, num_particles)
    key_first, key_steps = jax.random.split(key)
    first = _Generation.first(key_first, annealer, problem, num_particles)
    identity = jnp.arange(num_particles)

    def step(generation: "_Generation", kernel: AbstractKernel, beta: Array, increment: Array, key: PRNGKeyArray):
        key_resample, key_move = jax.random.split(key)
        generation, seen = generation.reweighted(increment)
        resample = seen.effective_sample_size < resample_below * num_particles
        chosen = jnp.where(resample, systematic(key_resample, jax.nn.softmax(generation.log_weights)), identity)
        generation = generation.resampled(chosen, resample)
        states, acceptance = _move(key_move, kernel, problem, beta, generation.states)
        generation = eqx.tree_at(lambda g: g.states, generation, states)
        return generation, seen, jnp.sum(jax.nn.softmax(generation.log_weights) * acceptance)

    return _run(key_steps, step, first, annealer)


@eqx.filter_jit
def waste_free_smc(
    key: PRNGKeyArray, annealer: Annealer, log_target: LogDensity, num_chains: int, chain_length: int
) -> Population:
    """Sequential Monte Carlo whose particles are all the states that its moves visit.

    At each step N = M P particles are weighed, M = `num_chains` of them are drawn (systematically), and each starts a
    chain of P = `chain_length` states under the kernel that leaves f_k invariant, itself the first. Again
    E[(1/N) sum w] = Z. Work: M (P - 1) moves a step, where `smc` takes one a particle.

    Arguments, gradient and errors as `smc`, with `chain_length` at least 2.

    Source: Dau, Chopin 2022, algorithm 2.
    """
    if num_chains < 1 or chain_length < 2:
        raise InputError(
            f"waste-free sampling needs at least 1 chain of at least 2 states, not {num_chains} of {chain_length}"
        )
    num_particles = num_chains * chain_length
    problem, annealer = _prepare(annealer, log_target, num_particles)
    key_first, key_steps = jax.random.split(key)
    first = _Generation.first(key_first, annealer, problem, num_particles)

    def step(generation: "_Generation", kernel: AbstractKernel, beta: Array, increment: Array, key: PRNGKeyArray):
        key_resample, key_moves = jax.random.split(key)
        generation, seen = generation.reweighted(increment)
        chosen = systematic(key_resample, jax.nn.softmax(generation.log_weights), num_chains)
        heads = jax.tree.map(lambda leaf: leaf[chosen], generation.states)

        def extend(states: State, key: PRNGKeyArray):
            states, acceptance = _move(key, kernel, problem, beta, states)
            return states, (states, acceptance)

        _, (rest, acceptance) = jax.lax.scan(extend, heads, jax.random.split(key_moves, chain_length - 1))
        generation = generation.resampled(jnp.tile(chosen, chain_length), True)
        states = jax.tree.map(
            lambda head, rest: jnp.concatenate([head[None], rest]).reshape(num_particles, *head.shape[1:]),
            heads,
            rest,
        )
        return eqx.tree_at(lambda g: g.states, generation, states), seen, jnp.mean(acceptance)

    return _run(key_steps, step, first, annealer)


def systematic(key: PRNGKeyArray, weights: Float[Array, " n"], num_draws: int | None = None) -> Int[Array, " m"]:
    """Indices drawn in proportion to normalised weights, index i floor(m W_i) or ceil(m W_i) times.

    Arguments:
        weights: `(n,)`, summing to 1.
        num_draws: m, by default n.

    Source: Kitagawa 1996; Douc, Cappe, Moulines 2005, section 2.4.
    """
    n = weights.shape[0]
    m = n if num_draws is None else num_draws
    points = (jnp.arange(m) + jax.random.uniform(key, dtype=weights.dtype)) / m
    # Rounding may leave the last sum below the last point.
    return jnp.minimum(jnp.searchsorted(jnp.cumsum(weights), points), n - 1)


def thermodynamic_integral(betas: Float[Array, " num_betas"], path: PathStatistics) -> Float[Array, ""]:
    """log Z by integrating E_beta[log(target / base)] over beta: the trapezoid with a correction of its error,

        sum_k (d_k / 2) (m_{k-1} + m_k) - (d_k^2 / 12) (v_k - v_{k-1}),   d_k = beta_k - beta_{k-1},

    because the variance v is the derivative of the mean m. Biased by what is left of the error: a cross-check.

    Source: Friel, Hurn, Wyse 2014, equation (10).
    """
    d, m, v = jnp.diff(betas), path.mean_log_ratio, path.var_log_ratio
    return jnp.sum(d / 2 * (m[1:] + m[:-1]) - d**2 / 12 * jnp.diff(v))


class _Seen(eqx.Module):
    """One row of the statistics that a weighing sees."""

    log_increment: Array
    discrepancy: Array
    effective_sample_size: Array
    mean_log_ratio: Array
    var_log_ratio: Array


class _Generation(eqx.Module):
    """The population at one temperature; `log_evidence` is what resampling took out of the weights."""

    states: State
    log_weights: Array
    num_resampled: Array
    log_evidence: Array

    @classmethod
    def first(cls, key: PRNGKeyArray, annealer: Annealer, problem: Problem, num_particles: int) -> "_Generation":
        key_base, key_init = jax.random.split(key)
        density, zero = problem.at(annealer.schedule.betas[0]), jnp.zeros((), problem.position.dtype)
        positions = annealer.base.sample(key_base, (num_particles,)).astype(zero.dtype)
        states = jax.vmap(lambda key, x: annealer.kernel.init(key, density, x))(
            jax.random.split(key_init, num_particles), positions
        )
        equal = jnp.zeros(num_particles, zero.dtype)
        return cls(states, equal, jnp.zeros((), jnp.int32), zero)

    @property
    def log_ratios(self) -> Array:
        return jax.vmap(lambda state: state.point.log_ratio)(self.states)

    def reweighted(self, increment: Array) -> tuple["_Generation", _Seen]:
        log_ratio = self.log_ratios
        first = _log_mean(self.log_weights, increment * log_ratio)
        second = _log_mean(self.log_weights, 2 * increment * log_ratio)
        mean, variance = self.moments(log_ratio)
        new = eqx.tree_at(lambda g: g.log_weights, self, self.log_weights + increment * log_ratio)
        size = 1 / jnp.sum(jax.nn.softmax(new.log_weights) ** 2)
        return new, _Seen(first, second - 2 * first, size, mean, variance)

    def resampled(self, chosen: Array, happens: Array | bool) -> "_Generation":
        """The chosen particles, with equal weights if resampling happens."""
        states = jax.tree.map(lambda leaf: leaf[chosen], self.states)
        total = self.log_evidence + log_mean_exp(self.log_weights)
        return _Generation(
            states,
            jnp.where(happens, 0, self.log_weights),
            self.num_resampled + happens,
            jnp.where(happens, total, self.log_evidence),
        )

    def moments(self, values: Array) -> tuple[Array, Array]:
        """Weighted mean and variance; a particle without weight says nothing, even of infinity."""
        weights = jax.nn.softmax(self.log_weights)
        values = jnp.where(weights > 0, values, 0)
        mean = jnp.sum(weights * values)
        return mean, jnp.sum(weights * (values - mean) ** 2)


def _prepare(annealer: Annealer, log_target: LogDensity, num_particles: int) -> tuple[Problem, Annealer]:
    if num_particles < 2:
        raise InputError(f"a population needs at least 2 particles, but num_particles is {num_particles}")
    if not annealer.kernel.exact:
        raise InputError(
            "sequential Monte Carlo needs a kernel that leaves the densities of the path invariant: wrap it, as in "
            "lehr.Metropolis(lehr.Hamiltonian(0.1))"
        )
    return prepare(annealer, log_target)


def _run(key: PRNGKeyArray, step: Any, generation: _Generation, annealer: Annealer) -> Population:
    """Scans a step over the schedule, and collects what it saw."""
    schedule = annealer.schedule
    dimension = generation.states.point.position.shape[1]
    stepped, fixed = annealer.kernel.split_steps(schedule.num_steps, dimension)

    def body(generation: _Generation, inputs: Any):
        key, beta, increment, stepped = inputs
        generation, seen, acceptance = step(generation, eqx.combine(stepped, fixed), beta, increment, key)
        _, variance = jax.vmap(generation.moments, in_axes=1)(generation.states.point.position)
        return generation, (seen, acceptance, jnp.sqrt(variance))

    keys = jax.random.split(key, schedule.num_steps)
    inputs = (keys, schedule.betas[1:], jnp.diff(schedule.betas), stepped)
    generation, (seen, acceptance, scale) = jax.lax.scan(body, generation, inputs)
    mean, variance = generation.moments(generation.log_ratios)
    path = PathStatistics(
        seen.log_increment,
        seen.discrepancy,
        seen.effective_sample_size,
        acceptance,
        scale,
        jnp.append(seen.mean_log_ratio, mean),
        jnp.append(seen.var_log_ratio, variance),
    )
    return Population(
        generation.states.point.position,
        generation.log_weights + generation.log_evidence,
        generation.num_resampled,
        path,
    )


def _move(
    key: PRNGKeyArray, kernel: AbstractKernel, problem: Problem, beta: Array, states: State
) -> tuple[State, Array]:
    """One step of the kernel for each particle, with the refreshment of its momentum, and the acceptance."""
    density = problem.at(beta)

    def one(key: PRNGKeyArray, state: State) -> tuple[State, Array]:
        noise = jax.tree.map(lambda leaf: leaf[0], kernel.noise(key, 1, problem.position))
        moved = kernel.move(density, state, noise)
        # An exact kernel that reports no acceptance rejects nothing.
        acceptance = jnp.ones((), state.point.position.dtype) if moved.acceptance is None else moved.acceptance
        return kernel.refresh(moved.state, noise), acceptance

    num_particles = states.point.position.shape[0]
    return jax.vmap(one)(jax.random.split(key, num_particles), states)


def _log_mean(log_weights: Array, log_values: Array) -> Array:
    """log of the weighted mean of exp(log_values)."""
    return jax.nn.logsumexp(log_weights + log_values) - jax.nn.logsumexp(log_weights)
