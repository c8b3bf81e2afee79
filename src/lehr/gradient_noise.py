"""How much of the bound mini-batches cost, predicted from the noise of their gradients."""

import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer, base_draws, prepare
from lehr.chunked_scan import scan_with_noise
from lehr.errors import InputError
from lehr.kernels import Hamiltonian, LearnedReverse
from lehr.numerics import is_concrete
from lehr.path import LogDensity
from lehr.subsampled import MiniBatches, Subsampled

#: nats
_WORTH_A_WARNING = 0.05


class NoiseGap(NamedTuple):
    """A gap in nats, and its standard error over the chains that it was measured on."""

    value: float
    error: float


def noise_gap(key: PRNGKeyArray, annealer: Annealer, log_target: LogDensity, *, num_particles: int = 16) -> NoiseGap:
    """By how much mini-batches lower the bound E[log w], to leading order in the step size:

        sum_k (l h_k)^2 . beta_k^2 diag C_k / 2,     h = step size / momentum scale,  l the leapfrogs of a step,

    C_k the covariance of the noise of the log likelihood's gradient. Each step adds its noise to the momentum, whose
    energy enters the weight, and no later step takes it back. With step sizes h ~ K^-c the sum is of order K^(1 - 2c),
    and what a chain lags behind its path of order K^(2c - 1): the product does not depend on K, and their sum
    has a floor (theorem 2).

    C_k is measured where the chains are, from two more data a step: half their squared difference, times n^2 / B.

    Arguments:
        key: a PRNG key.
        annealer: with `lehr.Hamiltonian`, alone or in `lehr.LearnedReverse`.
        log_target: a `lehr.Subsampled`.
        num_particles: chains to measure on.

    Returns the gap, in nats, with its standard error.

    **Gradient**: none.

    Raises `lehr.errors.InputError` for another target or kernel, or fewer than two particles.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, theorem 2 and equation (22): its leading term.
    """
    if not isinstance(log_target, Subsampled):
        raise InputError(f"noise_gap needs a lehr.Subsampled target, not a {type(log_target).__name__}")
    if annealer.kernel.exact:
        raise InputError("noise_gap is for uncorrected kernels: a lehr.Metropolis kernel sees all data")
    if num_particles < 2:
        raise InputError(f"noise_gap needs at least 2 particles for its error, but num_particles is {num_particles}")
    gaps = _gaps(key, annealer, log_target, num_particles)
    return NoiseGap(float(jnp.mean(gaps)), float(jnp.std(gaps, ddof=1)) / num_particles**0.5)


def warn_of_noise(key: PRNGKeyArray, annealer: Annealer, log_target: Subsampled) -> None:
    """Warns of a gap that is worth it, where the arguments have values, and the target wants it checked."""
    known = all(map(is_concrete, jax.tree.leaves((key, annealer, log_target))))
    if annealer.kernel.exact or not log_target.check or not known:
        return
    gap = noise_gap(jax.random.fold_in(key, 0), annealer, log_target)
    if gap.value > _WORTH_A_WARNING:
        warnings.warn(
            f"mini-batches of {_in_words(log_target.batch_sizes)} of {log_target.num_data} data lower the bound by "
            f"about {gap.value:.3g} +- {gap.error:.1g} nats, and more steps do not mend it: use Subsampled.around "
            "(see docs/gradient-noise.md)",
            RuntimeWarning,
            stacklevel=3,
        )


def _in_words(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


@eqx.filter_jit
def _gaps(key: PRNGKeyArray, annealer: Annealer, target: Subsampled, num_particles: int) -> Float[Array, " num"]:
    """Of each chain."""
    problem, annealer = prepare(annealer, target)
    kernel, schedule = annealer.kernel, annealer.schedule
    mini_batches = MiniBatches(problem, kernel)
    num_steps, betas = schedule.num_steps, schedule.betas
    stepped, fixed = kernel.split_steps(num_steps, problem.position.shape[0])
    per_datum = jnp.asarray([_variance_of_batch(target, size) for size in target.batch_sizes], problem.position.dtype)

    def noise(key, num_steps):
        key_steps, key_pairs = jax.random.split(key)
        key_noise, batches = mini_batches.keys(key_steps, num_steps)
        return kernel.noise(key_noise, num_steps, problem.position), batches, jax.random.split(key_pairs, num_steps)

    def step(carry, inputs):
        state, total = carry
        (beta, stepped, part), (noise, batch, key_pair) = inputs
        kernel = eqx.combine(stepped, fixed)
        after = kernel.forwards(mini_batches.at(beta, batch, part), state, noise).state
        # The gradient was taken half-way.
        x = (state.point.position + after.point.position) / 2
        pair = jax.vmap(jax.grad(target.residual), in_axes=(None, 0))(x, target.some(key_pair, 2, replace=True))
        squares = (_reach(kernel) * (pair[0] - pair[1])) ** 2 / 2
        return (after, total + beta**2 * per_datum[part] * jnp.sum(squares) / 2), None

    def chain(key, x):
        key_init, key_noise = jax.random.split(key)
        start = kernel.init(key_init, problem.at(betas[0]), x), jnp.zeros((), x.dtype)
        steps = betas[1:], stepped, mini_batches.parts(num_steps)
        return scan_with_noise(step, noise, start, key_noise, steps, memory=None)[0][1]

    return jax.vmap(chain)(*base_draws(key, annealer.base, num_particles))


def _variance_of_batch(target: Subsampled, size: int) -> float:
    """The variance of (n / B) sum_batch over that of one datum."""
    n = target.num_data
    if size == 0:
        return 0.0
    return n**2 / size * (1.0 if target.replace else (n - size) / max(n - 1, 1))


def _reach(kernel: Hamiltonian | LearnedReverse) -> Array:
    """l h: how far a constant force moves the momentum in a step."""
    move = kernel.kernel if isinstance(kernel, LearnedReverse) else kernel
    assert isinstance(move, Hamiltonian)
    return move.num_leapfrog * move.h
