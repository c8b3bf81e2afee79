"""The one annealing loop, forwards from the base and backwards from target samples."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels.contract import AbstractKernel, State
from lehr.numerics import compensated_add
from lehr.path import LogDensity, Problem, Schedule
from lehr.weighted import WeightedParticles


class Annealer(eqx.Module):
    """A base, a schedule and a kernel: everything about annealing that can be trained, each float leaf of it.

    Raises `lehr.errors.InputError` if the parts are not a `Schedule` and a kernel.
    """

    base: Any
    schedule: Schedule
    kernel: AbstractKernel

    def __check_init__(self):
        if not isinstance(self.schedule, Schedule):
            raise InputError("an Annealer's schedule must be a lehr.Schedule, for example lehr.Schedule.linear(10)")
        if not isinstance(self.kernel, AbstractKernel):
            raise InputError("an Annealer's kernel must be a lehr kernel, for example lehr.Hamiltonian(0.1)")


@eqx.filter_jit
def anneal(key: PRNGKeyArray, annealer: Annealer, log_target: LogDensity, num_particles: int) -> WeightedParticles:
    """Anneals `num_particles` independent particles from the base to the target.

        x_0 ~ base,   x_k ~ T_k(. | x_{k-1}),
        log w = log f_K(x_K) - log f_0(x_0) + sum_k log [L_k(x_{k-1} | x_k) / T_k(x_k | x_{k-1})],   E[w] = Z.

    Uncorrected kernels are summed as written (`Hamiltonian` needs one value of the target and one of the base in all,
    the others one a step). Exact kernels are summed in the equal but incremental form
    sum_k (beta_k - beta_{k-1}) [log target - log base](x_{k-1}).

    Arguments:
        key: a PRNG key.
        annealer: base, schedule (K steps) and kernel.
        log_target: maps a position `(dim,)` to the log unnormalised density, a scalar, in nats.
        num_particles: N.

    Returns weighted particles: positions `(N, dim)`, log weights `(N,)`, acceptance by step `(K,)` for exact kernels.

    **Gradient**: exact (reparameterised) for base, schedule, kernel and target with uncorrected kernels; raises
    `TypeError` through `Metropolis`.

    Raises `lehr.errors.InputError` for shapes that do not fit or fewer than one particle.

    Source: Neal 2001; Zhang, Hsu, Li, Finn, Grosse 2021, equation (12); Sohl-Dickstein, Culpepper 2012.
    """
    if num_particles < 1:
        raise InputError(f"num_particles must be at least 1, but it is {num_particles}")
    return anneal_from(annealer, log_target, *base_draws(key, annealer.base, num_particles))


def base_draws(key: PRNGKeyArray, base: Any, num_particles: int) -> tuple[Array, Float[Array, "num_particles dim"]]:
    """Independent draws of the base, and with each a key for the chain that goes on from it."""
    keys = jax.vmap(jax.random.split)(jax.random.split(key, num_particles))
    return keys[:, 1], jax.vmap(base.sample)(keys[:, 0])


def anneal_from(
    annealer: Annealer, log_target: LogDensity, keys: Array, positions: Float[Array, "num_particles dim"]
) -> WeightedParticles:
    """`anneal` from given draws of the base: for gradients that treat the draws apart from the rest of the chain."""
    problem, annealer = prepare(annealer, log_target)
    return _weighted(jax.vmap(lambda key, x: _chain(key, annealer, problem, x, reverse=False))(keys, positions))


@eqx.filter_jit
def anneal_reverse(
    key: PRNGKeyArray, annealer: Annealer, log_target: LogDensity, samples: Float[Array, "num_particles dim"]
) -> WeightedParticles:
    """Anneals given samples of the target back to the base, by the reverse kernels L_K, ..., L_1.

        x_K ~ target / Z,   x_{k-1} ~ L_k(. | x_k),   log w = minus the log weight of `anneal`,   E[w] = 1/Z.

    So `-result.log_evidence` estimates log Z, from above in expectation; with `anneal` it brackets log Z (Grosse,
    Ghahramani, Adams 2015: bidirectional Monte Carlo). The bound holds if the samples are exact.

    Arguments:
        samples: `(N, dim)`, draws of the target; they may repeat (the weights then are not independent).

    Returns weighted particles at the base end: positions `(N, dim)`, log weights of 1/Z `(N,)`, and acceptance `(K,)`
    in the order of the schedule.

    **Gradient**: as `anneal`, for given samples.

    Raises `lehr.errors.InputError` if the samples do not have the base's dimension.
    """
    problem, annealer = prepare(annealer, log_target)
    if samples.ndim != 2 or samples.shape[1:] != problem.position.shape or samples.shape[0] < 1:
        raise InputError(
            f"samples must have shape (num_particles, {problem.position.shape[0]}), but they have {samples.shape}"
        )

    def one_particle(key, sample):
        return _chain(key, annealer, problem, sample.astype(problem.position.dtype), reverse=True)

    return _weighted(jax.vmap(one_particle)(jax.random.split(key, samples.shape[0]), samples))


def prepare(annealer: Annealer, log_target: LogDensity) -> tuple[Problem, Annealer]:
    """Checks the problem, and brings schedule and kernel to its dtype: float32 stays float32 under x64."""
    problem = Problem(annealer.base, log_target)
    cast = jax.tree.map(
        lambda leaf: leaf.astype(problem.position.dtype) if eqx.is_inexact_array(leaf) else leaf,
        (annealer.schedule, annealer.kernel),
    )
    return problem, Annealer(annealer.base, *cast)


def _weighted(result: tuple[Array, Array, Array | None]) -> WeightedParticles:
    positions, log_weights, acceptance = result
    return WeightedParticles(positions, log_weights, None if acceptance is None else acceptance.mean(axis=0))


def _chain(
    key: PRNGKeyArray, annealer: Annealer, problem: Problem, position: Float[Array, " dim"], *, reverse: bool
) -> tuple[Array, Array, Array | None]:
    """One particle: its last position, log weight, and acceptance by step.

    The reverse chain runs the steps in reverse order, and each step backwards.
    """
    kernel, schedule = annealer.kernel, annealer.schedule
    num_steps, betas = schedule.num_steps, schedule.betas
    stepped, fixed = kernel.split_steps(num_steps, position.shape[0])
    key_init, key_noise = jax.random.split(key)

    def step(carry, inputs):
        state, total, lost = carry
        (beta, increment, stepped), noise = inputs
        kernel, density = eqx.combine(stepped, fixed), problem.at(beta)
        transition = (kernel.backwards if reverse else kernel.forwards)(density, state, noise)
        if kernel.exact:
            log_ratio = -increment * transition.state.point.log_ratio if reverse else increment * state.point.log_ratio
        else:
            log_ratio = transition.log_ratio
            assert log_ratio is not None
        return (transition.state, *compensated_add(total, lost, log_ratio)), transition.acceptance

    def chunk(carry, inputs):
        key, steps = inputs
        noise = kernel.noise(key, jax.tree.leaves(steps)[0].shape[0], problem.position)
        return jax.lax.scan(step, carry, (steps, noise))

    def end_values(state: State, *, base_end: bool) -> Array:
        point = state.point
        if base_end:
            return problem.log_base(point.position) if point.log_base is None else point.log_base
        return problem.log_prob(point.position) if point.log_target is None else point.log_target

    start = kernel.init(key_init, problem.at(betas[-1] if reverse else betas[0]), position)
    zero = jnp.zeros((), position.dtype)
    steps = (betas[1:], jnp.diff(betas), stepped)
    if reverse:
        steps = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), steps)
    carry, acceptance = _scan_in_chunks(chunk, (start, zero, zero), key_noise, steps, num_steps)
    state, total, lost = carry
    log_weight = total + lost
    if not kernel.exact:
        log_weight += end_values(state, base_end=reverse) - end_values(start, base_end=not reverse)
    if acceptance is not None and reverse:
        acceptance = jnp.flip(acceptance, axis=0)
    return state.point.position, log_weight, acceptance


def _scan_in_chunks(chunk: Any, carry: Any, key: PRNGKeyArray, steps: Any, num_steps: int) -> tuple[Any, Any]:
    """Runs `chunk` over equal groups of steps, and over what is left.

    Random numbers cost less in one large draw than step by step (measured: 1.19, 1.31 and 1.40 times a gradient for all
    at once, chunks of 20, and singly), but all of them at once would hold num_steps times dim numbers a particle.
    """
    size = _chunk_size(num_steps)
    num_chunks, left = divmod(num_steps, size)
    key_chunks, key_left = jax.random.split(key)
    if num_chunks == 1 and not left:
        return chunk(carry, (key_chunks, steps))
    whole = jax.tree.map(lambda leaf: leaf[: num_chunks * size].reshape(num_chunks, size, *leaf.shape[1:]), steps)
    carry, out = jax.lax.scan(chunk, carry, (jax.random.split(key_chunks, num_chunks), whole))
    out = jax.tree.map(lambda leaf: leaf.reshape(num_chunks * size, *leaf.shape[2:]), out)
    if left:
        carry, rest = chunk(carry, (key_left, jax.tree.map(lambda leaf: leaf[num_chunks * size :], steps)))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
    return carry, out


def _chunk_size(num_steps: int, largest: int = 100) -> int:
    """All steps if they are few, else a divisor of their number (so that one loop is compiled), else `largest`."""
    if num_steps <= largest:
        return num_steps
    return next((size for size in range(largest, largest // 3, -1) if num_steps % size == 0), largest)
