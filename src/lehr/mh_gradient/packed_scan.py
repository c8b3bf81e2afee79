"""A loop over the steps of chains: chains are the last axis of all arrays, and the few numbers of a step are one row.

So operations on chains in a few dimensions run along the chains, many at once (chains in three dimensions take half the
time that they take as rows).

On a CPU the body of a loop is a list of kernels, and every array that it writes is one of them. A list of up to eight
runs without a scheduler, that costs each kernel more than to compute a few chains. The branch of a conditional is a
list of its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

#: numbers a chain, up to which an output is written in the row: a wide one takes longer there than alone
_NARROW = 4


def of_chains(function: Callable[..., Any], in_axes: Any = -1) -> Callable[..., Any]:
    """A function of one chain, for all at once: chains are the last axis."""
    return jax.vmap(function, in_axes, out_axes=-1)


def scan_chains(step: Callable[[Any, Array, Any], tuple[Any, Any]], carry: Any, steps: Array, inputs: Any) -> Any:
    """`lax.scan` of `step(carry, k, input)`, a function of one chain, for all chains at once, k = steps[0], ...

    The carry has a last axis of chains, inputs and outputs are `(num_steps, ..., num_chains)`.
    """
    of_all = of_chains(step, in_axes=(-1, None, -1))
    # An index below 0 would be looked for.
    of_step = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    set_step = functools.partial(jax.lax.dynamic_update_index_in_dim, allow_negative_indices=False)
    first = jax.eval_shape(lambda inputs: jax.tree.map(lambda leaf: leaf[0], inputs), inputs)
    packing = _Packing(jax.eval_shape(of_all, carry, steps[0], first)[1])

    def body(carry: Any, i: Array) -> tuple[Any, Any]:
        now = jax.tree.map(lambda leaf: of_step(leaf, i), inputs)
        carry, out = of_all(carry, steps[0] + i, now)
        return carry, packing.pack(out)

    like = jax.eval_shape(body, carry, steps[0])[1]

    def body_on_cpu(carry: Any, i: Array) -> tuple[Any, Any]:
        # Always true; but the compiler does not know.
        return jax.lax.cond(i >= 0, body, lambda carry, _: (carry, _zeros(like)), carry, i)

    # The conditional takes a copy of the carry.
    is_narrow = all(map(_is_narrow, jax.tree.leaves(carry)))

    def write(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, written = state
        if is_narrow:
            carry, out = jax.lax.platform_dependent(carry, i, cpu=body_on_cpu, default=body)
        else:
            carry, out = body(carry, i)
        return carry, jax.tree.map(lambda whole, leaf: set_step(whole, leaf, i, 0), written, out)

    written = _zeros(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(steps), *leaf.shape), leaf.dtype), like))
    carry, written = jax.lax.fori_loop(0, len(steps), write, (carry, written))
    return carry, packing.unpack(written)


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def _is_narrow(leaf: Any) -> bool:
    return leaf.size <= _NARROW * leaf.shape[-1]


class _Packing:
    """How the narrow floats and flags of a tree are written as one row, beside what is left."""

    def __init__(self, like: Any):
        self.leaves, self.tree = jax.tree.flatten(like)
        self.dtype = jnp.result_type(float)
        self.in_row = [leaf.dtype in (self.dtype, bool) and _is_narrow(leaf) for leaf in self.leaves]
        narrow = [i for i, is_in in enumerate(self.in_row) if is_in]
        #: the numbers of leaves of the same width
        self.groups = [
            [i for i in narrow if self._width(i) == width] for width in sorted({self._width(i) for i in narrow})
        ]

    def _width(self, i: int) -> int:
        return self.leaves[i].size // self.leaves[i].shape[-1]

    def pack(self, tree: Any) -> tuple[list[Array], list[Array]]:
        """A row, if any, and what is left."""
        found = jax.tree.leaves(tree)
        groups = [
            _stacked([found[i].reshape(self._width(i), -1).astype(self.dtype) for i in group]) for group in self.groups
        ]
        row = [jnp.concatenate([group.reshape(-1, group.shape[-1]) for group in groups])] if groups else []
        return row, [leaf for leaf, is_in in zip(found, self.in_row) if not is_in]

    def unpack(self, packed: tuple[list[Array], list[Array]]) -> Any:
        """The tree, of packed arrays with an axis of steps."""
        rows, left = packed[0], iter(packed[1])
        found: list[Any] = [None if is_in else next(left) for is_in in self.in_row]
        at = 0
        for i in (i for group in self.groups for i in group):
            like, width = self.leaves[i], self._width(i)
            found[i] = rows[0][:, at : at + width].reshape(-1, *like.shape).astype(like.dtype)
            at += width
        return jax.tree.unflatten(self.tree, found)


def _stacked(leaves: list[Array]) -> Float[Array, "num_leaves width num_chains"]:
    """`jnp.stack`, by selects: a loop of these is vectorised by the compiler, and a concatenation is not."""
    number = jax.lax.broadcasted_iota(jnp.int32, (len(leaves), 1, 1), 0)
    stacked = leaves[-1][None]
    for i, leaf in enumerate(leaves[:-1]):
        stacked = jnp.where(number == i, leaf, stacked)
    return stacked
