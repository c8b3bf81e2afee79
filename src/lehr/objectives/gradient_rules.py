"""Gradient rules: bounds with the value of `elbo`, `iwae` and `davi`, and a gradient in the base of less variance.

The gradient in a base q with reparameterised draws x is a path derivative and a score,

    d/dphi log q(x(phi); phi) = d log q / dx  dx/dphi + s(x),     s(x) = d/dphi log q(x; phi) at fixed x,   E[s] = 0.

At an exact posterior the path derivative of log target - log q vanishes for every draw, and the score is all of the
variance. What may be done with it depends on what multiplies it: see each objective, and docs/gradients.md. Here it is
left out; control_variates.py scales it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer, base_draws
from lehr.annealing import anneal_from
from lehr.errors import InputError
from lehr.numerics import stop_gradient
from lehr.objectives.annealed import refuse_exact
from lehr.objectives.elbo import draws
from lehr.path import LogDensity, Problem
from lehr.reversible import Memory, memory_of
from lehr.subsampled import Subsampled
from lehr.weighted import log_mean_exp


def elbo_stl(base: Any, log_target: LogDensity, key: PRNGKeyArray, *, num_samples: int = 1) -> Float[Array, ""]:
    """The value of `elbo`, with the path derivative for its gradient in the base ("sticking the landing").

    The score is left out. Its expectation is zero, so the gradient stays unbiased; where the base is the posterior up
    to a constant the gradient is zero for every draw. Far from there it may have more variance than that of `elbo`:
    then use `elbo_control_variate`.

    Arguments as `elbo`.

    **Gradient**: unbiased for the bound, in the base and the target. Its own derivative is not that of a second
    derivative of the bound.

    Raises `lehr.errors.InputError` as `elbo`.

    Source: Roeder, Wu, Duvenaud 2017, equation (8).
    """
    return jnp.mean(_path_log_weights(base, log_target, draws(base, key, num_samples)))


def iwae_stl(base: Any, log_target: LogDensity, key: PRNGKeyArray, *, num_samples: int) -> Float[Array, ""]:
    """The value of `iwae`, with the path derivative for its gradient in the base.

    Arguments as `iwae`.

    **Gradient**: in the base **biased** for more than one sample, because the score is multiplied by normalised weights
    that depend on the draw, and its expectation is then not zero (`iwae_dreg` accounts for it); unbiased in the target.

    Raises `lehr.errors.InputError` as `iwae`.

    Source: Roeder, Wu, Duvenaud 2017, section 5; the bias: Tucker, Lawson, Gu, Maddison 2019, section 4.
    """
    return log_mean_exp(_path_log_weights(base, log_target, draws(base, key, num_samples)))


def iwae_dreg(base: Any, log_target: LogDensity, key: PRNGKeyArray, *, num_samples: int) -> Float[Array, ""]:
    """The value of `iwae`, with the doubly reparameterised gradient in the base:

        sum_i w~_i^2  d(log target - log base)/dx (x_i)  dx_i/dphi,     w~ = w / sum w.

    The score that `iwae_stl` leaves out has, for each draw and given the others, by reparameterising once more,

        E[w~_i s(x_i)] = E[w~_i (1 - w~_i)  d log w_i/dx_i  dx_i/dphi],

    and the path derivative less that is the equation above. One sample: `elbo_stl`.

    Arguments as `iwae`. The value costs a gradient too: for values alone use `iwae`.

    **Gradient**: unbiased for the bound, in the base and (as in `iwae`) in the target; its signal does not fall behind
    its noise as the number of samples grows. Reverse and forward mode; no second derivatives.

    Raises `lehr.errors.InputError` as `iwae`.

    Source: Tucker, Lawson, Gu, Maddison 2019, equation (8).
    """
    return _doubly_reparameterised(
        lambda ends, x: _path_log_weights(ends[0], ends[1], x), (base, log_target), draws(base, key, num_samples)
    )


def davi_stl(
    annealer: Annealer,
    log_target: LogDensity,
    key: PRNGKeyArray,
    *,
    num_particles: int = 1,
    memory: Memory = "checkpoint",
) -> Float[Array, ""]:
    """The value of `davi`, without the score of the base at x_0 in its gradient.

    What base parameters do to the draw x_0, to the path's densities and through them to the chain stays: only
    d/dphi log base(x_0; phi) at fixed x_0 is left out.

    Arguments as `davi`.

    **Gradient**: unbiased for one particle; for more **biased** in the base, as `iwae_stl`, and unbiased in the rest.

    Raises `lehr.errors.InputError` as `davi`.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, equation (15), with Roeder, Wu, Duvenaud 2017: docs/gradients.md.
    """
    refuse_exact(annealer)
    keys, x = base_draws(key, annealer.base, num_particles)
    return log_mean_exp(_path_annealed_log_weights(annealer, log_target, keys, x, memory))


def davi_dreg(
    annealer: Annealer,
    log_target: LogDensity,
    key: PRNGKeyArray,
    *,
    num_particles: int,
    memory: Memory = "checkpoint",
) -> Float[Array, ""]:
    """The value of `davi`, with the doubly reparameterised gradient in the base: every chain's gradient with respect to
    its first position x_0 is multiplied by w~_i^2 and not w~_i, and the score of the base at x_0 left out.

    Arguments as `davi`. The value costs a gradient too: for values alone use `davi`.

    **Gradient**: unbiased for the bound in everything. One particle: `davi_stl`. Reverse and forward mode; no second
    derivatives.

    Raises `lehr.errors.InputError` as `davi`, and for a `lehr.Subsampled` target.

    Source: Tucker, Lawson, Gu, Maddison 2019, equation (8), for the chain as a function of x_0: docs/gradients.md.
    """
    refuse_exact(annealer)
    # While the persistence may have a value to look at.
    memory = memory_of(memory, annealer.kernel)
    if isinstance(log_target, Subsampled):
        raise InputError("davi_dreg has no mini-batches: use lehr.objectives.davi, or give the log density of all data")
    keys, x = base_draws(key, annealer.base, num_particles)
    # What the target closes over is differentiated as its leaves are: a gradient taken here must not be differentiated
    # once more on the way to it.
    leaves, rest = eqx.partition(log_target, eqx.is_inexact_array)
    target, seen = jax.closure_convert(lambda leaves, x: eqx.combine(leaves, rest)(x), leaves, x[0])

    def log_weights(parts: Any, x: Array) -> Array:
        annealer, leaves, seen = parts
        return _path_annealed_log_weights(annealer, lambda x: target(leaves, x, *seen), keys, x, memory)

    return _doubly_reparameterised(log_weights, (annealer, leaves, seen), x)


def _path_log_weights(base: Any, log_target: LogDensity, x: Float[Array, "n dim"]) -> Float[Array, " n"]:
    """Log weights of draws of the base, without the score in their gradient."""
    problem, fixed = Problem(base, log_target), Problem(stop_gradient(base), log_target)
    return jax.vmap(lambda x: problem.log_prob(x) - fixed.log_base(x))(x)


def _path_annealed_log_weights(
    annealer: Annealer, log_target: LogDensity, keys: Array, x: Float[Array, "n dim"], memory: Memory
) -> Float[Array, " n"]:
    """Log weights of chains from draws of the base, without the score of the base there in their gradient.

    The path's densities depend on the base too, and keep that dependence; so the score is added, not stopped.
    """
    score = jax.vmap(Problem(annealer.base, log_target).log_base)(jax.lax.stop_gradient(x))
    return anneal_from(annealer, log_target, keys, x, memory=memory).log_weights + score - jax.lax.stop_gradient(score)


def _doubly_reparameterised(
    log_weights_of: Callable[[Any, Array], Array], parts: Any, x: Float[Array, "n dim"]
) -> Float[Array, ""]:
    """log-mean-exp of the weights, with gradient sum_i w~_i d log w_i/d parts + w~_i^2 d log w_i/dx_i dx_i."""
    trained, rest = eqx.partition(parts, eqx.is_inexact_array)
    log_weights, pull = jax.vjp(
        lambda trained, x: log_weights_of(eqx.combine(trained, rest), x), *stop_gradient((trained, x))
    )
    weights = jax.nn.softmax(log_weights)
    of_trained, of_x = pull(weights)
    of_x = weights[:, None] * of_x
    gradient = ravelled((of_trained, of_x))
    return log_mean_exp(log_weights) + zero_with_gradient(ravelled((trained, x)), gradient)


def zero_with_gradient(values: Float[Array, " size"], gradient: Float[Array, " size"]) -> Float[Array, ""]:
    """Zero, whose gradient in `values` is `gradient`."""
    return jnp.sum(jax.lax.stop_gradient(gradient) * (values - jax.lax.stop_gradient(values)))


def ravelled(tree: Any) -> Float[Array, " size"]:
    """All leaves in one array."""
    return jax.flatten_util.ravel_pytree(tree)[0]
