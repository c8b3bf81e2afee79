"""Step sizes and schedule of an uncorrected annealer, found greedily along the path before any gradient step."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer, prepare
from lehr.errors import InputError
from lehr.kernels import AbstractKernel, AbstractMove, LearnedReverse, State
from lehr.kernels.contract import rows
from lehr.path import LogDensity, Problem, Schedule

#: candidates for a step size, up to a factor exp(width) from the one before; a round for each width
_NUM_CANDIDATES, _WIDTHS = 7, (1.5, 1.0, 0.5)
#: the energy error that all steps together may make, in nats: of these the best, and then of these factors around it
_ERRORS, _FACTORS = np.geomspace(0.03, 30, 7), np.geomspace(1 / 3, 3, 5)


class Tuned(NamedTuple):
    """What `tune` found, and the gradients that it took."""

    annealer: Annealer
    num_gradients: int


def tune(key: PRNGKeyArray, annealer: Annealer, log_target: LogDensity, *, num_particles: int = 64) -> Tuned:
    """The annealer with a step size for each step, and a schedule, that make the bound high before any gradient step.

    The log weight of a chain is the sum of its steps' increments,

        log w_k = (beta_k - beta_{k-1}) log [target / base](x_{k-1}) + d_k,
        d_k = log f_k(x_k) - log f_k(x_{k-1}) + log [L_k(x_{k-1} | x_k) / T_k(x_k | x_{k-1})],

    where d_k is the energy error of the move, whose mean in equilibrium is -E[d_k^2] / 2 to leading order. Particles
    are taken along the path, and at each step in turn the largest size is chosen for which E[d_k^2] / 2 over them is at
    most a share C / K; of several C, each with particles of its own, that with the highest bound E[log w] is kept. Then
    the temperatures are spaced anew, to equal standard deviations of log w_k; three rounds of it. (The mean of log w_k
    alone says nothing of a leapfrog's size: energy is conserved, and what a move gains shows in the steps after it.)

    The sizes keep their proportions over dimensions. From here go on by gradient (`lehr.fit` with
    `lehr.objectives.davi`): it does not begin with steps that diverge, or do nothing.

    Arguments:
        key: a PRNG key.
        annealer: with an uncorrected kernel (`lehr.Hamiltonian`, `lehr.Langevin`, or `lehr.LearnedReverse` of one); its
            step sizes and schedule are where the search begins.
        log_target: maps a position `(dim,)` to the log unnormalised density, in nats.
        num_particles: N, for each C.

    Returns a `Tuned`: the annealer, whose step sizes have shape `(num_steps, 1)` or `(num_steps, dim)`, and the number
    of gradients that it took, 119 N a step and leapfrog (and as many values).

    **Gradient**: not meant to be differentiated.

    Raises `lehr.errors.InputError` for a Metropolis-corrected kernel (`lehr.evidence` tunes those), fewer than 8
    particles, or a density that is not finite along the path however small the steps.

    Source: after Kim, Xu, Gardner, Campbell 2025 (arXiv 2503.15704), who tune steps greedily along the path; Syed,
    Bouchard-Cote, Chern, Doucet 2024, section 4 (the spacing).
    """
    if annealer.kernel.exact:
        raise InputError(
            "tune is for uncorrected kernels such as lehr.Hamiltonian: wrap it in lehr.Metropolis after it"
        )
    if num_particles < 8:
        raise InputError(f"tune needs at least 8 particles to tell steps apart, but num_particles is {num_particles}")
    problem, annealer = prepare(annealer, log_target)
    num_steps, dtype = annealer.schedule.num_steps, problem.position.dtype
    annealer = _with_step_sizes(annealer, jnp.zeros(num_steps, dtype))
    errors, num_sweeps = _ERRORS, 0
    for i, width in enumerate(_WIDTHS):
        limits = jnp.asarray(errors / num_steps, dtype)
        found = _sweeps(jax.random.fold_in(key, i), annealer, problem, num_particles, limits, jnp.asarray(width, dtype))
        bound, log_factor, spread = (np.asarray(values, np.float64) for values in found)
        if not np.any(np.isfinite(bound)):
            raise InputError("no step size gave a finite log weight: check the density along the path from the base")
        best = int(np.argmax(np.where(np.isfinite(bound), bound, -np.inf)))
        annealer = _with_step_sizes(annealer, jnp.asarray(log_factor[best], dtype))
        annealer = _respaced(annealer, spread[best])
        num_sweeps += len(errors)
        errors = errors[best] * _FACTORS
    gradients = num_sweeps * num_steps * num_particles * _NUM_CANDIDATES
    return Tuned(annealer, gradients * getattr(_move(annealer.kernel), "num_leapfrog", 1))


@eqx.filter_jit
def _sweeps(
    key: PRNGKeyArray,
    annealer: Annealer,
    problem: Problem,
    num_particles: int,
    limits: Float[Array, " num_limits"],
    width: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """For each limit of E[d_k^2] / 2: the bound, the log factor of each step's size, the sd of each log w_k."""
    kernel, schedule = annealer.kernel, annealer.schedule
    key_base, key_init, key_noise = jax.random.split(key, 3)
    positions = jax.vmap(problem.base.sample)(jax.random.split(key_base, num_particles)).astype(width.dtype)
    starts = jax.vmap(lambda key, x: kernel.init(key, problem.at(schedule.betas[0]), x))(
        jax.random.split(key_init, num_particles), positions
    )
    stepped, fixed = kernel.split_steps(schedule.num_steps, positions.shape[1])
    candidates = width * jnp.linspace(-1, 1, _NUM_CANDIDATES, dtype=width.dtype)

    def sweep(limit: Array):
        def step(carry: Any, inputs: Any):
            states, centre = carry
            before, beta, stepped, key = inputs
            keys, kernel = jax.random.split(key, num_particles), eqx.combine(stepped, fixed)

            def of_size(log_factor: Array):
                scaled = _scaled(kernel, log_factor)
                return jax.vmap(lambda key, state: _step(key, scaled, problem, before, beta, state))(keys, states)

            tried, log_weights, errors = jax.vmap(of_size)(centre + candidates)
            small = jnp.mean(errors**2, axis=1) / 2 <= limit
            # All below the largest that is too large; NaN is not small.
            best = jnp.maximum(jnp.sum(jnp.cumprod(small)) - 1, 0)
            states, log_weights = jax.tree.map(lambda leaf: leaf[best], (tried, log_weights))
            centre = centre + candidates[best]
            return (states, centre), (jnp.mean(log_weights), centre, jnp.std(log_weights))

        keys = jax.random.split(key_noise, schedule.num_steps)
        inputs = (schedule.betas[:-1], schedule.betas[1:], stepped, keys)
        mean, log_factor, spread = jax.lax.scan(step, (starts, jnp.zeros((), width.dtype)), inputs)[1]
        return jnp.sum(mean), log_factor, spread

    return jax.vmap(sweep)(limits)


def _step(
    key: PRNGKeyArray, kernel: AbstractKernel, problem: Problem, before: Array, beta: Array, state: State
) -> tuple[State, Array, Array]:
    """One particle's step, its log w_k, and its d_k."""
    noise = jax.tree.map(lambda leaf: leaf[0], kernel.noise(key, 1, problem.position))
    density = problem.at(beta)
    moved = kernel.forwards(density, state, noise)
    assert moved.log_ratio is not None
    old, new = (density.evaluate(s.point.position, gradient=False) for s in (state, moved.state))
    error = density.log_prob_at(new) - density.log_prob_at(old) + moved.log_ratio
    return moved.state, (beta - before) * old.log_ratio + error, error


def _respaced(annealer: Annealer, spread: np.ndarray) -> Annealer:
    """Equal sums of the standard deviations a step, with what differs by step interpolated along them."""
    betas = np.asarray(annealer.schedule.betas, np.float64)
    spread = np.where(np.isfinite(spread), spread, np.nanmax(np.where(np.isfinite(spread), spread, 0)))
    length = np.concatenate([[0.0], np.cumsum(spread)])
    # A straight floor keeps the spacing bounded where there is (almost) no spread.
    length += 0.05 * max(length[-1], 1e-6) * betas
    at = np.linspace(0, length[-1], len(betas))
    new = np.interp(at, length, betas)
    new[0], new[-1] = 0, 1
    dtype = annealer.schedule.logits.dtype

    def interpolated(leaf: Any) -> Any:
        if not (eqx.is_inexact_array(leaf) and leaf.ndim == 2):
            return leaf
        columns = [np.interp(at[1:], length[1:], column) for column in np.asarray(leaf, np.float64).T]
        return jnp.asarray(np.stack(columns, axis=1), dtype)

    # Whatever a move has for each step stays at its place on the path: persistence and momentum scale too.
    annealer = eqx.tree_at(
        lambda a: _move(a.kernel), annealer, replace_fn=lambda move: jax.tree.map(interpolated, move)
    )
    increments = np.log(np.maximum(np.diff(new), 1e-30))
    return eqx.tree_at(lambda a: a.schedule, annealer, Schedule(jnp.asarray(increments, dtype)))


def _with_step_sizes(annealer: Annealer, log_factor: Float[Array, " num_steps"]) -> Annealer:
    """The step sizes times a factor for each step, in a shape with a row for each."""
    log_step_size = jnp.atleast_1d(rows(_move(annealer.kernel).log_step_size)) + log_factor[:, None]
    return eqx.tree_at(lambda a: _move(a.kernel).log_step_size, annealer, log_step_size)


def _scaled(kernel: AbstractKernel, log_factor: Array) -> AbstractKernel:
    return eqx.tree_at(lambda k: _move(k).log_step_size, kernel, rows(_move(kernel).log_step_size) + log_factor)


def _move(kernel: Any) -> AbstractMove:
    return kernel.kernel if isinstance(kernel, LearnedReverse) else kernel
