"""How much of the bound mini-batches cost, predicted from the noise of their gradients."""

import math
import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer, base_draws, prepare
from lehr.chunked_scan import scan_with_noise
from lehr.errors import InputError, check_whole
from lehr.mini_batches import MiniBatches
from lehr.numerics import is_concrete
from lehr.path import LogDensity
from lehr.subsampled import Subsampled

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

    It is measured where the chains are: two batches take each step from the same state, and differ in the momentum and
    position that they lead to; half the mean square of that, as energy, is what a step's noise adds. (For one leapfrog
    that is the term above and the next order; for several it holds while l h is within a period of the fastest
    direction.) It costs four gradients a step.

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
    check_whole("num_particles", num_particles, 2)
    gaps = _gaps(key, annealer, log_target, num_particles)
    if not is_concrete(gaps):
        raise InputError("noise_gap gives numbers, not arrays: call it outside of jax.jit and other transformations")
    return _with_error(gaps)


def warn_of_noise(key: PRNGKeyArray, annealer: Annealer, log_target: Subsampled) -> None:
    """Warns of a gap that is worth it, where the arguments have values, and the target wants it checked."""
    known = all(map(is_concrete, jax.tree.leaves((key, annealer, log_target))))
    if annealer.kernel.exact or not log_target.check or not log_target.is_noisy or not known:
        return
    gaps = _gaps(jax.random.fold_in(key, 0), annealer, log_target, 16)
    if not is_concrete(gaps):  # inside of a transformation that none of the arguments shows
        return
    gap = _with_error(gaps)
    if not math.isfinite(gap.value):
        text = "chains with these steps and mini-batches leave the finite numbers: give smaller steps"
    elif gap.value > _WORTH_A_WARNING:
        text = (
            f"mini-batches of {_in_words(log_target.batch_sizes)} of {log_target.num_data} data lower the bound by "
            f"about {gap.value:.3g} +- {gap.error:.1g} nats, and more steps do not mend it: use Subsampled.around "
            "(see docs/gradient-noise.md)"
        )
    else:
        return
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _with_error(gaps: Float[Array, " num"]) -> NoiseGap:
    return NoiseGap(float(jnp.mean(gaps)), float(jnp.std(gaps, ddof=1)) / len(gaps) ** 0.5)


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

    def noise(key, num_steps):
        key_steps, key_others = jax.random.split(key)
        key_noise, batches = mini_batches.keys(key_steps, num_steps)
        return kernel.noise(key_noise, num_steps, problem.position), batches, jax.random.split(key_others, num_steps)

    def step(carry, inputs):
        state, total = carry
        (beta, stepped, part), (noise, batch, other) = inputs
        kernel, density = eqx.combine(stepped, fixed), mini_batches.at(beta, batch, part)
        one = kernel.move(density, state, noise).state
        two = kernel.move(mini_batches.at(beta, other, part), state, noise).state
        (x, u), (y, v) = (one.point.position, one.momentum), (two.point.position, two.momentum)
        # The noise of either is independent: half of the mean square of their difference is its variance.
        kinetic = jnp.sum((u - v) ** 2) / 2
        potential = -jnp.sum((x - y) * (density.gradient(x) - density.gradient(y))) / 2
        return (kernel.refresh(one, noise), total + (kinetic + potential) / 2), None

    def chain(key, x):
        key_init, key_noise = jax.random.split(key)
        start = kernel.init(key_init, problem.at(betas[0]), x), jnp.zeros((), x.dtype)
        steps = betas[1:], stepped, mini_batches.parts(num_steps)
        return scan_with_noise(step, noise, start, key_noise, steps, memory=None)[0][1]

    return jax.vmap(chain)(*base_draws(key, annealer.base, num_particles))
