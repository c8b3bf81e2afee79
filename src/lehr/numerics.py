"""Small pieces of arithmetic that float32 and the speed of a gradient depend on."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.random import threefry_2x32
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """`jax.random.normal`, the same numbers, drawn as one row.

    On the CPU a generator's loop over a short last axis is unrolled by the compiler, to megabytes of code: 100 chains
    of `(100, 10)` compile in 0.35 s so, in 1.9 s else, and are drawn in two thirds of the time.
    """
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def uniform_pairs(key: PRNGKeyArray, num: int, dtype: DTypeLike) -> Float[Array, "2 num"]:
    """Uniform numbers in [0, 1), two at a time.

    Threefry makes two words at once. For one number `jax.random.uniform` takes both (so that numbers do not depend on
    how many are drawn); here each is a number, for half the time. Other generators, and other precisions, are those of
    `jax.random.uniform`.

    Source: Salmon, Moraes, Dror, Shaw 2011 (Threefry).
    """
    if dtype != jnp.float32 or jax.random.key_impl(key) != "threefry2x32":
        return jax.random.uniform(key, (2, num), dtype)
    words = threefry_2x32(jax.random.key_data(key), jnp.arange(2 * num, dtype=jnp.uint32)).reshape(2, num)
    # 23 bits, as the fraction of a number from 1 to 2.
    return jax.lax.bitcast_convert_type((words >> 9) | 0x3F800000, jnp.float32) - 1


@jax.custom_jvp
def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 + exp(x)), whose derivative is one sigmoid.

    `jax.nn.softplus` has the same value; its derivative drags the logarithm into every gradient and
    about doubles the time of a logistic gradient.

    **Gradient**: exact, sigmoid(x), to any order.
    """
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(x) * t


def bernoulli_log_prob(logits: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log Bernoulli(x | sigmoid(logits)) = x logits - softplus(logits), elementwise, stable for any logit.

    **Gradient**: exact, x - sigmoid(logits).
    """
    return x * logits - softplus(logits)


def compensated_add(total: Array, lost: Array, term: Array) -> tuple[Array, Array]:
    """One step of Neumaier's compensated sum: `total + lost` is the sum, with an error of one rounding, not of many.

    Log weights of order 1e5 are sums of thousands of terms, and each plain float32 addition would round at 0.008.

    Source: Neumaier 1974, "Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen".
    """
    new = total + term
    # The rounding error of an addition is exactly what is left of the smaller summand. An infinite total (a particle
    # out of the support) has none, and inf - inf must not become NaN.
    error = jnp.where(jnp.abs(total) >= jnp.abs(term), (total - new) + term, (term - new) + total)
    return new, lost + jnp.where(jnp.isfinite(new), error, 0)


def inverse_of_lower(scale: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """The inverse of a lower triangular matrix, by products alone; what is above the diagonal is not read.

    With L = D (I - N), N is strictly lower, so that N^dim = 0 and the series of (I - N)^-1 ends:
    I + N + N^2 + ... = (I + N) (I + N^2) (I + N^4) ... in log2(dim) factors. Its rounding errors grow faster with the
    condition of L than those of substitution: it is meant for tens of dimensions.

    Not `solve_triangular`, because LAPACK's, batched, may never end on a processor: two such solves that are
    independent of each other each hold a thread of XLA's pool and wait for the same pool to do their parts
    (jaxlib 0.10.2; `python -m benchmarks.deadlock`).

    **Gradient**: exact.
    """
    dim = scale.shape[0]
    diagonal = jnp.diagonal(scale)
    power = -jnp.tril(scale, -1) / diagonal[:, None]
    inverse = jnp.eye(dim, dtype=scale.dtype) + power
    for _ in range(max(dim - 1, 1).bit_length() - 1):
        power = power @ power
        inverse = inverse + inverse @ power
    return inverse / diagonal


def is_concrete(x: object) -> bool:
    """Whether the value of `x` can be looked at (it is not being traced)."""
    return not isinstance(x, Tracer)


def stop_gradient(tree: Any) -> Any:
    """The tree with the gradient of its arrays stopped; what is no array stays."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, tree)
