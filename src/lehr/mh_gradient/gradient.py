"""From births to gradients: one pass over the decisions that count, in any number of parameters.

(Over all decisions, if the log density is so cheap that to find those that count would take longer.)
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Float, Int

from lehr.chunked_scan import in_chunks, scan_groups
from lehr.errors import InputError

#: rows in one call of the log density's gradient: many of a cheap one, so that a loop costs little, and few of a dear
#: one, of which the last call wastes some
_SMALLEST, _LARGEST, _NUMBERS = 128, 4096, 1_000_000
#: numbers in these rows, as they are kept: a density makes several such arrays, which are to fit a cache
_IN_ROWS = 2**18
#: up to so many numbers a row, to take all gradients costs less than to find the rows that count; and rows at once
_FEW, _AT_ONCE = 100, 2**16
#: of 32 bits
_LARGEST_INDEX = 2**31 - 1


def weighted_gradient(
    of: Callable[[Any, Any], Array],
    params: Any,
    rows: Any,
    weights: Float[Array, "num_steps num_chains"],
    axis: Literal[0, -1] = -1,
) -> Any:
    """sum_i weights_i grad_params of(params, row_i), over the rows with weights that are not 0, in chunks.

    Rows are leaves `(num_steps, ..., num_chains)`, or with axis 0 `(num_steps, num_chains, ...)`.
    """
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    # A parameter that is not used has a gradient too: one for each row, if all are taken.
    row = row_of(rows, jnp.asarray(0), axis)
    if num_params + numbers_in(of, params, row) <= _FEW:
        return _over_all(of, params, rows, weights, axis)
    width = sum(leaf.size for leaf in jax.tree.leaves(row))
    size = max(_SMALLEST, min(_LARGEST, weights.size // 16, _NUMBERS // max(num_params, 1), _IN_ROWS // width))

    def add(total: Any, rows: Any, weight: Array) -> Any:
        def summed(params: Any) -> Array:
            return jnp.vdot(weight, jax.vmap(lambda row: of(params, row))(rows))

        return jax.tree.map(jnp.add, total, jax.grad(summed)(params))

    return _over_used(add, jax.tree.map(_none, params), rows, weights, axis, size)


def _none(leaf: Any) -> Array:
    """0, of the leaf's type also where that is a number of Python's."""
    return jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf))


def _over_all(of: Callable[[Any, Any], Array], params: Any, rows: Any, weights: Array, axis: Literal[0, -1]) -> Any:
    """`weighted_gradient` with a gradient of every row."""
    of_step = jax.vmap(jax.grad(of), in_axes=(None, axis), out_axes=-1)

    def add(total: Any, some: Any) -> tuple[Any, None]:
        rows, weights = some

        def weighted(total: Array, leaf: Array) -> Array:
            weight = weights.reshape(len(weights), *(1 for _ in total.shape), -1)
            # A gradient that does not count may be no number.
            return total + jnp.sum(jnp.where(weight != 0, weight * leaf, 0), axis=(0, -1))

        return jax.tree.map(weighted, total, jax.vmap(of_step, in_axes=(None, 0))(params, rows)), None

    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.result_type(leaf, weights)), params)
    total, _ = scan_groups(add, total, *in_chunks((rows, weights), max(1, _AT_ONCE // weights.shape[1])))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, params)


def numbers_in(of: Callable[..., Any], *arguments: Any) -> int | float:
    """How many numbers of(*arguments) reads and writes, in its largest arrays.

    Infinity, if it has loops or effects, or calls what cannot be looked into.
    """

    def in_jaxpr(jaxpr: Any) -> int | float:
        return sum(map(of_equation, jaxpr.eqns))

    def of_equation(equation: Any) -> int | float:
        name = equation.primitive.name
        if name in ("while", "scan") or equation.effects or "callback" in name or "ffi" in name:
            return math.inf
        inner = [in_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        return max(inner) if inner else max(getattr(v.aval, "size", 0) for v in (*equation.invars, *equation.outvars))

    return in_jaxpr(jax.make_jaxpr(of)(*arguments).jaxpr)


def largest_gradient(
    of: Callable[[Any, Any], Array],
    params: Any,
    rows: Any,
    weights: Float[Array, "num_steps num_chains"],
    axis: Literal[0, -1],
) -> Float[Array, ""]:
    """max_i |weights_i| |grad_params of(params, row_i)|, over the rows with weights that are not 0, if any; else 0."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))

    def norm(row: Any) -> Array:
        return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(of)(params, row))))

    def add(largest: Array, rows: Any, weight: Array) -> Array:
        # What fills a chunk has no weight, and its gradient is that of another row.
        return jnp.maximum(largest, jnp.max(jnp.abs(weight) * jax.vmap(norm)(rows)))

    # Here each row has a gradient of its own in memory.
    size = max(1, min(_LARGEST, _NUMBERS // max(num_params, 1)))
    return _over_used(add, jnp.zeros(()), rows, weights, axis, size)


def _over_used(
    add: Callable[[Any, Any, Array], Any], total: Any, rows: Any, weights: Array, axis: Literal[0, -1], size: int
) -> Any:
    """`total = add(total, rows, weights)` over chunks of the rows with weights that are not 0, with one first axis."""
    num, flat = weights.size, jnp.ravel(weights)
    size = min(num, size)
    count = jnp.cumsum(flat != 0)
    # The indices of the used rows, one after another; a last place takes all others.
    places = -(-num // size) * size
    place = jnp.where(flat != 0, count - 1, places)
    rising = jnp.arange(num, dtype=jnp.int32)
    used = jnp.zeros(places + 1, jnp.int32).at[place].set(rising, mode="promise_in_bounds")
    # What fills the last chunk repeats the first, with weight 0.
    used = jnp.where(jnp.arange(places + 1) < count[-1], used, used[0])

    def chunk(i: Array, total: Any) -> Any:
        index = jax.lax.dynamic_slice_in_dim(used, i * size, size, allow_negative_indices=False)
        weight = jnp.where(i * size + jnp.arange(size) < count[-1], flat[index], 0)
        # Always true; but the compiler does not know, and gives the branch the index as an array: else it finds a row's
        # number again for each of the numbers in the row.
        return jax.lax.cond(i >= 0, lambda: add(total, row_of(rows, index, axis), weight), lambda: total)

    return jax.lax.fori_loop(0, -(-count[-1] // size), chunk, total)


def row_of(rows: Any, index: Int[Array, "*size"], axis: Literal[0, -1]) -> Any:
    """The rows of these numbers, step * num_chains + chain: leaves `(*size, ...)`."""

    def taken(leaf: Array) -> Array:
        if axis == 0:
            return (
                leaf.reshape(-1, *leaf.shape[2:]).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
            )
        num_chains = leaf.shape[-1]
        shape = leaf.shape[1:-1]
        step, chain = jnp.divmod(index, num_chains)
        if leaf.size > _LARGEST_INDEX:
            return leaf[step, ..., chain]
        # One index a number: pairs of them take longer.
        first = step * (leaf.size // leaf.shape[0]) + chain
        at = first[..., None] + num_chains * jnp.arange(math.prod(shape))
        return (
            jnp.ravel(leaf)
            .at[at]
            .get(mode="promise_in_bounds", wrap_negative_indices=False)
            .reshape(*index.shape, *shape)
        )

    return jax.tree.map(taken, rows)


def not_again(tree: Any) -> Any:
    """The same parameters, or what is known of the chains: a derivative in them of what is made of these raises.

    (How the chains depend on the parameters is not differentiated: a second derivative would miss it.)
    """
    floats, others = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(_constant(floats), others)


@jax.custom_jvp
def _constant(floats: Any) -> Any:
    return floats


@_constant.defjvp
def _again(primals: Any, tangents: Any) -> Any:
    raise InputError(
        "the gradient of an expectation over chains cannot be differentiated again in its parameters: take differences "
        "of gradients with the same key"
    )


def support_moves(log_density: Callable[[Any, Array], Array], params: Any, inside: Array, outside: Array) -> Array:
    """Whether positions `outside` where the density is 0 have some for parameters a little off.

    `inside` are positions of positive density, beside which it must count for something.
    """
    zero = jax.vmap(log_density, in_axes=(None, 0))(params, outside) == -jnp.inf

    def moved(change: float) -> Array:
        def shift(leaf: Any) -> Any:
            return leaf + change * (jnp.abs(leaf) + 1e-2) if eqx.is_inexact_array(leaf) else leaf

        near = jax.tree.map(shift, params)
        both = jax.vmap(lambda x, y: log_density(near, y) - log_density(near, x))(inside, outside)
        return jnp.any((both > -50.0) & zero)

    return moved(0.01) | moved(-0.01)
