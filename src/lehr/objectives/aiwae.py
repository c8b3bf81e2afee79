"""The annealed importance weighted auto-encoder: corrected chains, no gradient through them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer
from lehr.annealing import anneal
from lehr.errors import InputError
from lehr.numerics import stop_gradient
from lehr.objectives.elbo import elbo
from lehr.path import LogDensity
from lehr.weighted import WeightedParticles


def aiwae(
    annealer: Annealer, log_target: LogDensity, key: PRNGKeyArray, *, num_particles: int
) -> tuple[Float[Array, ""], WeightedParticles]:
    """The AIWAE bound log (1/K) sum_k w_k, (z_k, w_k) annealed from base to target, with the gradients of the paper:

        target parameters:  sum_k w~_k grad log target(z_k),   w~ = w / sum w,   z_k and w_k held fixed;
        base parameters:    that of the ELBO with K reparameterised samples, the target held fixed.

    The first is Fisher's identity, grad log Z = E_posterior[grad log target]: consistent, with a bias that shrinks as
    the annealed particles approach the posterior. The chain is not differentiated, so its kernel is corrected (the
    paper's is HMC with L leapfrogs) and memory does not grow with the number of steps.

    Arguments:
        annealer: base with a reparameterised `sample`, schedule (T temperatures), corrected kernel.
        log_target: a **pytree** that maps a position `(dim,)` to the log unnormalised density, in nats (an
            `equinox.Module`, a `jax.tree_util.Partial`): its leaves are the target parameters.
        num_particles: K.

    Returns the bound, and the weighted particles (with the acceptance by temperature, for `lehr.tuning`).

    **Gradient**: biased for the bound, as above; zero for schedule and kernel. A `log_target` that closes over what is
    differentiated raises `TypeError`.

    Raises `lehr.errors.InputError` for an uncorrected kernel.

    Source: Ding, Freedman 2019, "Learning deep generative models with annealed importance sampling", algorithm 1.
    """
    if not annealer.kernel.exact:
        raise InputError("AIWAE needs a kernel made exact by lehr.Metropolis; for uncorrected ones use davi")
    key_chain, key_elbo = jax.random.split(key)
    fixed_annealer, fixed_target = stop_gradient((annealer, log_target))
    particles = stop_gradient(anneal(key_chain, fixed_annealer, fixed_target, num_particles))
    fisher = jnp.sum(particles.weights * jax.vmap(log_target)(particles.positions))
    reparameterised = elbo(annealer.base, fixed_target, key_elbo, num_samples=num_particles)
    surrogate = fisher + reparameterised
    return particles.log_evidence + surrogate - jax.lax.stop_gradient(surrogate), particles
