"""The one annealing loop, forwards from the base and backwards from target samples."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer, base_draws, prepare
from lehr.chunked_scan import scan_with_noise
from lehr.errors import InputError
from lehr.gradient_noise import warn_of_noise
from lehr.kernels.contract import State
from lehr.mini_batches import MiniBatches
from lehr.numerics import compensated_add
from lehr.path import LogDensity, Problem
from lehr.reversible import Memory, Reversible, anneal_reversibly, memory_of
from lehr.subsampled import Subsampled
from lehr.weighted import WeightedParticles


def anneal(
    key: PRNGKeyArray,
    annealer: Annealer,
    log_target: LogDensity,
    num_particles: int,
    *,
    memory: Memory = "checkpoint",
) -> WeightedParticles:
    """Anneals `num_particles` independent particles from the base to the target.

        x_0 ~ base,   x_k ~ T_k(. | x_{k-1}),
        log w = log f_K(x_K) - log f_0(x_0) + sum_k log [L_k(x_{k-1} | x_k) / T_k(x_k | x_{k-1})],   E[w] = Z.

    Uncorrected kernels are summed as written (`Hamiltonian` needs one value of the target and one of the base in all,
    the others one a step). Exact kernels are summed in the equal but incremental form

        sum_k (beta_k - beta_{k-1}) [log target - log base](x_{k-1}).

    Arguments:
        key: a PRNG key.
        annealer: base, schedule (K steps) and kernel.
        log_target: maps a position `(dim,)` to the log unnormalised density, a scalar, in nats. Of a
            `lehr.Subsampled` the steps of `Hamiltonian` see mini-batches; what that costs is warned of
            (`lehr.noise_gap`), where it is more than 0.05 nats and the arguments have values.
        num_particles: N.
        memory: what the gradient keeps of an uncorrected chain. "store": every step. "checkpoint": of order sqrt(K)
            steps, for one more run of the chain. "reversible": the bits that persistence g loses, log2(1/g) a
            parameter and step, and no step; for `Hamiltonian` with one leapfrog and g from 1/1024 to 1023/1024. Inside
            of `jax.jit` or a gradient (and so of `lehr.fit`) g has no value when that is decided, and at least 0.89 is
            assumed: where g may go down to 0.7, give `lehr.Reversible(0.7)`. For a smaller g every call is right, but
            takes the chain in floats after the other, and its memory and time.

    Returns weighted particles: positions `(N, dim)`, log weights `(N,)`, acceptance by step `(K,)` for exact kernels.

    **Gradient**: exact (reparameterised) for base, schedule, kernel and target with uncorrected kernels, and the same
    for every `memory` up to rounding; raises `TypeError` through `Metropolis`, for which `memory` means nothing.
    "reversible" rounds positions (in each dimension) and momenta to about the precision of their type, and g to the
    nearest n/d with d up to 128, or to 1/d or 1 - 1/d with d up to 1024 nearer to 0 or 1 (with the gradient of g
    itself); its values are those of the rounded chain, and its gradient, in reverse mode only, is along that chain,
    exactly reconstructed. Where positions or momenta leave the range of its numbers, a step drifts by fewer than a
    thousand units of them, or g is beyond 1/1024 or 1023/1024, value and gradient are those of the chain in floats.
    Under an outer `jax.vmap` it holds adjoints of parameters that are shared for each row: for networks prefer
    "checkpoint" there.

    Raises `lehr.errors.InputError` for shapes that do not fit, fewer than one particle, an unknown `memory`, or a
    kernel that is not reversible (of those with a learned reverse none is), or whose persistence is beyond 1/1024 or
    1023/1024, where "reversible" is asked for.

    Source: Neal 2001; Zhang, Hsu, Li, Finn, Grosse 2021, equation (12); Sohl-Dickstein, Culpepper 2012.
    """
    if num_particles < 1:
        raise InputError(f"num_particles must be at least 1, but it is {num_particles}")
    # Outside of the compiled part, where the persistence may have a value to look at.
    checked = memory_of(memory, annealer.kernel)
    if isinstance(log_target, Subsampled):
        warn_of_noise(key, annealer, log_target)
    return _anneal(key, annealer, log_target, num_particles, checked)


@eqx.filter_jit
def _anneal(
    key: PRNGKeyArray, annealer: Annealer, log_target: LogDensity, num_particles: int, memory: Any
) -> WeightedParticles:
    return anneal_from(annealer, log_target, *base_draws(key, annealer.base, num_particles), memory=memory)


def anneal_from(
    annealer: Annealer,
    log_target: LogDensity,
    keys: Array,
    positions: Float[Array, "num_particles dim"],
    *,
    memory: Memory = "checkpoint",
) -> WeightedParticles:
    """`anneal` from given draws of the base: for gradients that treat the draws apart from the rest of the chain."""
    problem, annealer = prepare(annealer, log_target)
    checked = memory_of(memory, annealer.kernel)
    if isinstance(checked, Reversible):
        if isinstance(log_target, Subsampled):
            raise InputError('memory="reversible" has no mini-batches: use memory="checkpoint"')
        kernel, schedule = annealer.kernel, annealer.schedule
        return WeightedParticles(*anneal_reversibly(kernel, schedule, problem, keys, positions, memory=checked))

    def one_particle(key, position):
        return _chain(key, annealer, problem, position, reverse=False, memory=checked)

    return _weighted(jax.vmap(one_particle)(keys, positions))


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


def _weighted(result: tuple[Array, Array, Array | None]) -> WeightedParticles:
    positions, log_weights, acceptance = result
    return WeightedParticles(positions, log_weights, None if acceptance is None else acceptance.mean(axis=0))


def _chain(
    key: PRNGKeyArray,
    annealer: Annealer,
    problem: Problem,
    position: Float[Array, " dim"],
    *,
    reverse: bool,
    memory: Literal["store", "checkpoint"] = "checkpoint",
) -> tuple[Array, Array, Array | None]:
    """One particle: its last position, log weight, and acceptance by step.

    The reverse chain runs the steps in reverse order, and each step backwards.
    """
    kernel, schedule = annealer.kernel, annealer.schedule
    num_steps, betas = schedule.num_steps, schedule.betas
    stepped, fixed = kernel.split_steps(num_steps, position.shape[0])
    key_init, key_noise = jax.random.split(key)
    mini_batches = MiniBatches(problem, kernel)

    def step(carry, inputs):
        state, total, lost = carry
        (beta, increment, stepped, part), (noise, batch) = inputs
        kernel, density = eqx.combine(stepped, fixed), mini_batches.at(beta, batch, part)
        transition = (kernel.backwards if reverse else kernel.forwards)(density, state, noise)
        if kernel.exact:
            log_ratio = -increment * transition.state.point.log_ratio if reverse else increment * state.point.log_ratio
        else:
            log_ratio = transition.log_ratio
            assert log_ratio is not None
        return (transition.state, *compensated_add(total, lost, log_ratio)), transition.acceptance

    def noise(key, num_steps):
        key, batches = mini_batches.keys(key, num_steps)
        return kernel.noise(key, num_steps, problem.position), batches

    def end_values(state: State, *, base_end: bool) -> Array:
        point = state.point
        if base_end:
            return problem.log_base(point.position) if point.log_base is None else point.log_base
        return problem.log_prob(point.position) if point.log_target is None else point.log_target

    density = problem.at(betas[-1] if reverse else betas[0])
    start = kernel.init(key_init, density, position)
    zero = jnp.zeros((), position.dtype)
    steps = (betas[1:], jnp.diff(betas), stepped, mini_batches.parts(num_steps))
    if reverse:
        steps = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), steps)
    carry, acceptance = scan_with_noise(
        step, noise, (start, zero, zero), key_noise, steps, memory=None if kernel.exact else memory
    )
    state, total, lost = carry
    log_weight = total + lost
    if not kernel.exact:
        log_weight += end_values(state, base_end=reverse) - end_values(start, base_end=not reverse)
    if acceptance is not None and reverse:
        acceptance = jnp.flip(acceptance, axis=0)
    return state.point.position, log_weight, acceptance
