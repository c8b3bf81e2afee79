"""Arithmetic that loses nothing: the product of a whole number and a fraction, which keeps what it divides away.

With gamma = n/d, and a second whole number for each number, the head,

    head <- head d + (u mod d),    u <- (u div d) n + (head mod n),    head <- head div n

multiplies u by gamma to the nearest unit or so, and has an inverse of the same form: the head takes the log2(d/n) bits
that the product loses. It grows at most so fast that all heads can hand 16 bits together to a buffer at steps that n
and d alone decide.

Source: Maclaurin, Duvenaud, Adams 2015, section 3.3 and algorithm 3.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

#: A product is off by up to n units, so that small n and d are best; as gamma nears an end, 1/d or 1 - 1/d takes larger
#: d. A head has 32 bits, hands on 16 of them, and holds what is left times d: that would allow d up to 2^15.
LARGEST_DENOMINATOR, LARGEST_AT_ENDS = 128, 1024
_PUSHED = 16


class Fraction(NamedTuple):
    """n/d, elementwise."""

    n: Array
    d: Array

    def value(self, dtype: Any) -> Array:
        """As a float."""
        return self.n.astype(dtype) / self.d.astype(dtype)


def nearest_fraction(gamma: Float[Array, "*shape"], dtype: Any) -> Fraction:
    """The n/d nearest to gamma in (0, 1) with 1 <= n < d <= `LARGEST_DENOMINATOR`, of all such the smallest d.

    Where gamma is nearer to 0 or 1 than all of these, 1/d or 1 - 1/d with d <= `LARGEST_AT_ENDS`. So 1 - gamma
    is off by at most 1/128 of it, and gamma likewise, except beyond 1/1024 and 1023/1024: see `is_near`.
    """
    d = jnp.arange(2, LARGEST_DENOMINATOR + 1, dtype=dtype)
    n = jnp.clip(jnp.rint(gamma[..., None] * d).astype(dtype), 1, d - 1)
    # Equal fractions must not differ in the last bit: 9/10 and 18/20.
    best = jnp.argmin(jnp.rint(jnp.abs(n / d - gamma[..., None]) * 2**20), axis=-1)
    to_end = jnp.minimum(gamma, 1 - gamma)
    at_end = jnp.clip(jnp.rint(1 / to_end), 2, LARGEST_AT_ENDS).astype(dtype)
    beyond = to_end < 1 / LARGEST_DENOMINATOR
    n = jnp.where(beyond, jnp.where(gamma < 0.5, 1, at_end - 1), jnp.take_along_axis(n, best[..., None], -1)[..., 0])
    return Fraction(n, jnp.where(beyond, at_end, d[best]))


def is_near(gamma: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Whether `nearest_fraction` is near to gamma, and not at the end of its range. False for NaN."""
    return jnp.minimum(gamma, 1 - gamma) * (LARGEST_AT_ENDS + 0.5) > 1


def multiply(u: Int[Array, "..."], head: UInt[Array, "..."], by: Fraction) -> tuple[Array, Array]:
    """u n/d, rounded, and the head that has taken what was lost."""
    n, d = (part.astype(head.dtype) for part in by)
    quotient = jax.lax.div(u, jnp.broadcast_to(by.d, u.shape).astype(u.dtype))
    quotient -= (quotient * by.d > u).astype(u.dtype)  # towards minus infinity, not zero
    head = head * d + (u - quotient * by.d).astype(head.dtype)
    kept = head // n
    return quotient * by.n + (head - kept * n).astype(u.dtype), kept


def divide(u: Int[Array, "..."], head: UInt[Array, "..."], by: Fraction) -> tuple[Array, Array]:
    """Undoes `multiply`, exactly: it is the same map, with d/n."""
    return multiply(u, head, Fraction(by.d, by.n))


class Plan(NamedTuple):
    """When the heads hand on their low bits, and to which row: both known from the fractions alone."""

    push: Bool[Array, " num_steps"]
    row: Int[Array, " num_steps"]
    overflows: Bool[Array, ""]


def plan(fractions: Callable[[int | Array], Fraction], num_steps: int, num_rows: int) -> Plan:
    """All heads hand on bits before the first step in which one of them could pass 32 bits."""

    def step(bound, k):
        n, d = (part.astype(jnp.uint32) for part in fractions(k))
        push = jnp.any(bound > (np.uint32(0xFFFFFFFF) - (d - 1)) // d)
        bound = jnp.where(push, bound >> _PUSHED, bound)
        return jnp.max((bound * d + (d - 1)) // n), push

    _, push = jax.lax.scan(step, jnp.zeros((), jnp.uint32), jnp.arange(num_steps))
    count = jnp.cumsum(push)
    return Plan(push, jnp.minimum(count - push, num_rows - 1), count[-1] > num_rows)


def rows_of_buffer(num_steps: int, smallest_persistence: float) -> int:
    """How often the heads hand on bits in `num_steps` steps of this persistence, at most."""
    with jax.ensure_compile_time_eval():
        n, d = map(int, nearest_fraction(jnp.asarray(smallest_persistence), jnp.int32))
    # A step takes a bound b of the heads to b' <= (b d + d - 1)/n, so that with c = d/(d - n)
    #     b' + c <= (d/n) (b + c):
    # log2(b + c) rises by at most log2(d/n) a step, from log2(c). It falls when bits are handed on, from b > 2^32/d - 1
    # to b/2^16, by at least `fall`, and ends at least where the last fall did.
    high, c = 2.0**32 / max(d, LARGEST_DENOMINATOR) - 1, d / (d - n)
    low = high / 2**_PUSHED
    fall = math.log2((high + c) / (low + c))
    return max(1, math.floor((num_steps * math.log2(d / n) - math.log2((low + c) / c)) / fall))


def empty_buffer(num_rows: int, shape: tuple[int, ...]) -> UInt[Array, "num_rows *shape"]:
    """A row for each time the heads hand on bits."""
    return jnp.zeros((num_rows, *shape), jnp.uint16)


def push(buffer: UInt[Array, "num_rows ..."], head: UInt[Array, "..."], push: Array, row: Array) -> tuple[Array, Array]:
    """The buffer, and the heads after they handed on their low bits to its `row` if `push`."""
    # A select of one row, and not a conditional, which would copy the buffer under vmap.
    low = jnp.where(push, head.astype(jnp.uint16), jax.lax.dynamic_index_in_dim(buffer, row, 0, keepdims=False))
    buffer = jax.lax.dynamic_update_index_in_dim(buffer, low, row, 0)
    return buffer, jnp.where(push, head >> _PUSHED, head)


def pop(buffer: UInt[Array, "num_rows ..."], head: UInt[Array, "..."], push: Array, row: Array) -> Array:
    """The heads as they were before `push`."""
    low = jax.lax.dynamic_index_in_dim(buffer, row, 0, keepdims=False).astype(head.dtype)
    return jnp.where(push, (head << _PUSHED) | low, head)


def compiled_apart(trips: Int[Array, ""], function: Callable[..., Array], whole: Array, *rest: Any) -> Array:
    """function(whole, *rest), the same bits wherever it is compiled, for whole numbers `whole`.

    A compiler fuses an expression with its neighbours, and the last bit depends on how. The body of a loop whose trip
    count (one) is known only at run time has no neighbours. (An optimisation barrier is dropped on CPUs, and a
    conditional becomes a select under vmap.) The index of the loop enters, for else its body would be moved out of it.
    """

    def body(i, _):
        return function(whole + jnp.minimum(i, 0).astype(whole.dtype), *rest)

    out = jax.eval_shape(function, whole, *rest)
    return jax.lax.fori_loop(0, trips, body, jnp.zeros(out.shape, out.dtype))


def pinned(trips: Int[Array, ""], tree: Any) -> Any:
    """The tree, whose leaves have one memory each: a compiler may compute a cheap expression once for each use."""
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return jax.lax.fori_loop(
        0, trips, lambda i, _: jax.tree.map(lambda a: a + jnp.minimum(i, 0).astype(a.dtype), tree), zeros
    )


def one_at_run_time(tree: Any) -> Int[Array, ""]:
    """The number one, which no compiler can know before it sees the values in `tree`."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size]
    first = [jnp.ravel(leaf)[0] for leaf in floats]
    return 1 + (sum(first[1:], first[0]) == 0.7310585786).astype(jnp.int32)
