"""The score as a control variate: the values of `elbo`, `iwae` and `davi`, and a gradient with the best multiple of it.

For B independent replicates of a bound, with gradients g_b in the base q and scores s_b,

    (1/B) sum_b [g_b + c_b s_b],     c_b = - sum_{a != b} <g_a - g_bar, s_a - s_bar> / sum_{a != b} |s_a - s_bar|^2,

g_bar and s_bar the means of the others. The c that minimises the trace of the variance is -E<g - E g, s> / E|s|^2. It
is estimated from the other replicates, of which s_b is independent: E[c_b s_b] = E[c_b] E[s_b] = 0.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer, base_draws
from lehr.annealing import anneal_from
from lehr.errors import InputError
from lehr.numerics import stop_gradient
from lehr.objectives.annealed import refuse_exact
from lehr.objectives.elbo import sample_keys
from lehr.objectives.gradient_rules import ravelled, zero_with_gradient
from lehr.path import LogDensity, Problem
from lehr.reversible import Memory, memory_of
from lehr.weighted import log_mean_exp


def elbo_control_variate(base: Any, log_target: LogDensity, key: PRNGKeyArray, *, num_samples: int) -> Float[Array, ""]:
    """The value of `elbo`, with the score as a control variate of the gradient in the base:

        (1/S) sum_i [g_i + c_i s_i],     c_i = - sum_{j != i} <g_j - g_bar, s_j - s_bar> / sum_{j != i} |s_j - s_bar|^2,

    g_i the gradient of one sample's term of `elbo`, s_i its score, and g_bar and s_bar the means of the others. c = 0
    is `elbo`, c = 1 is `elbo_stl`. The c that minimises the trace of the variance is -E<g - E g, s> / E|s|^2: it is
    estimated from the other samples, of which s_i is independent. At an exact posterior g = -s, and every c_i is 1.

    Arguments:
        num_samples: S, at least 3. Each sample's gradient is kept: memory is S times that of the base.

    **Gradient**: unbiased for the bound, in the base and the target. Reverse and forward mode; no second derivatives.

    Raises `lehr.errors.InputError` as `elbo`, and for fewer than three samples.

    Source: Roeder, Wu, Duvenaud 2017, section 6 (the idea).
    """
    _refuse_few("samples", "num_samples", num_samples)
    return _controlled(base, log_target, _importance_bound, sample_keys(key, num_samples)[:, None])


def iwae_control_variate(
    base: Any, log_target: LogDensity, key: PRNGKeyArray, *, num_samples: int, num_replicates: int
) -> Float[Array, ""]:
    """The mean of B independent values of `iwae`, with the score as a control variate of the gradient in the base:

        (1/B) sum_b [g_b + c_b s_b],     s_b = (1/S) sum_i d/dphi log base(x_i^b; phi) at fixed x_i^b,

    g_b the gradient of the b-th bound. The score of each draw has mean zero as it stands, without the weight that
    multiplies it in g_b; its multiple c_b is estimated from the other bounds, as in `elbo_control_variate`. At an exact
    posterior the S weights are equal, g = -s, and every c_b is 1. Elsewhere g has the scores with unequal weights, of
    which s_b explains only a part.

    Arguments:
        num_samples: S, of each bound.
        num_replicates: B, at least 3. Each bound's gradient is kept: memory is B times that of the base.

    **Gradient**: unbiased for the bound, in the base and the target. Reverse and forward mode; no second derivatives.

    Raises `lehr.errors.InputError` as `iwae`, and for fewer than three replicates.

    Source: Roeder, Wu, Duvenaud 2017, section 6 (the idea): docs/gradients.md.
    """
    _refuse_few("replicates", "num_replicates", num_replicates)
    keys = jax.vmap(lambda key: sample_keys(key, num_samples))(jax.random.split(key, num_replicates))
    return _controlled(base, log_target, _importance_bound, keys)


def davi_control_variate(
    annealer: Annealer,
    log_target: LogDensity,
    key: PRNGKeyArray,
    *,
    num_particles: int = 1,
    num_replicates: int,
    memory: Memory = "checkpoint",
) -> Float[Array, ""]:
    """The mean of B independent values of `davi`, with the score at x_0 as a control variate of the base's gradient:

        (1/B) sum_b [g_b + c_b s_b],     s_b = (1/S) sum_i d/dphi log base(x_0^{b,i}; phi) at fixed x_0^{b,i},

    g_b the gradient of the b-th bound in the base, through the whole chain. s_b is a function of the first positions
    alone and has mean zero whatever the chain does; c_b is estimated from the other bounds, as in
    `elbo_control_variate`. The noise of the chain after x_0 stays.

    Arguments:
        num_particles: S, of each bound.
        num_replicates: B, at least 3. Each bound's gradient in the base is kept. Each chain is run twice: for that, and
            for the value with its gradient in the rest.
        memory: as `davi`.

    **Gradient**: unbiased for the bound; in schedule, kernel and target that of `davi`. Reverse and forward mode; no
    second derivatives.

    Raises `lehr.errors.InputError` as `davi`, and for fewer than three replicates.

    Source: Roeder, Wu, Duvenaud 2017, section 6 (the idea), at the chain's first position: docs/gradients.md.
    """
    refuse_exact(annealer)
    _refuse_few("replicates", "num_replicates", num_replicates)
    # While the persistence may have a value to look at.
    memory = memory_of(memory, annealer.kernel)

    def bound(base: Any, rest: tuple[Annealer, LogDensity], key: Array) -> tuple[Array, Array]:
        annealer, log_target = rest
        keys, x = base_draws(key, base, num_particles)
        annealer = Annealer(base, annealer.schedule, annealer.kernel)
        return anneal_from(annealer, log_target, keys, x, memory=memory).log_evidence, x

    rest = (eqx.tree_at(lambda annealer: annealer.base, annealer, None), log_target)
    return _controlled(annealer.base, rest, bound, jax.random.split(key, num_replicates))


#: (base, rest, key) -> one replicate of a bound, and the draws of the base in it
_Bound = Callable[[Any, Any, Array], tuple[Float[Array, ""], Float[Array, "n dim"]]]


def _importance_bound(base: Any, log_target: LogDensity, keys: Array) -> tuple[Array, Array]:
    """`iwae` of one replicate, whose draws have these keys; of one draw, its term of `elbo`."""
    problem, x = Problem(base, log_target), jax.vmap(base.sample)(keys)
    return log_mean_exp(jax.vmap(lambda x: problem.log_prob(x) - problem.log_base(x))(x)), x


def _controlled(base: Any, rest: Any, bound: _Bound, keys: Array) -> Float[Array, ""]:
    """The mean of the bound over the keys; its gradient in the base is controlled, in the rest that of the bound."""
    trained, static = eqx.partition(base, eqx.is_inexact_array)
    fixed, fixed_rest = stop_gradient((trained, rest))

    def one(trained: Any, key: Array) -> tuple[Array, Array]:
        return bound(eqx.combine(trained, static), fixed_rest, key)

    def mean_log_base(trained: Any, x: Array) -> Array:
        return jnp.mean(jax.vmap(eqx.combine(trained, static).log_prob)(x))

    # What a target closes over is held as its leaves are: the gradient taken here is not to be differentiated.
    one, seen = jax.closure_convert(one, fixed, keys[0])
    seen = stop_gradient(seen)

    def gradient_and_score(key: Array) -> tuple[Array, Array]:
        g, x = jax.grad(one, has_aux=True)(fixed, key, *seen)
        return ravelled(g), ravelled(jax.grad(mean_log_base)(fixed, x))

    g, s = jax.vmap(gradient_and_score)(keys)
    gradient = jnp.mean(g + _leave_one_out_scale(g, s)[:, None] * s, axis=0)
    value = jnp.mean(jax.vmap(lambda key: bound(eqx.combine(fixed, static), rest, key)[0])(keys))
    return value + zero_with_gradient(ravelled(trained), gradient)


def _leave_one_out_scale(g: Float[Array, "n size"], s: Float[Array, "n size"]) -> Float[Array, " n"]:
    n = g.shape[0]

    def of_others(a: Array, b: Array) -> Array:
        """(n - 1) times the covariance of a and b, without each row in turn."""
        products, others_a, others_b = jnp.sum(a * b, axis=1), jnp.sum(a, axis=0) - a, jnp.sum(b, axis=0) - b
        return jnp.sum(products) - products - jnp.sum(others_a * others_b, axis=1) / (n - 1)

    return -of_others(g, s) / of_others(s, s)


def _refuse_few(what: str, option: str, number: int) -> None:
    if number < 3:
        raise InputError(f"a control variate's scale needs at least 3 {what} to estimate, but {option} is {number}")
