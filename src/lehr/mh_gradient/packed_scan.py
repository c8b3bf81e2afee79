"""A loop over the steps of chains that writes the few numbers of a step as one row.

On a CPU the body of a loop is a list of kernels, one for every array that it writes. XLA runs a list of more than eight
through a scheduler, which takes longer for a kernel than the kernel for a few chains. So there are few arrays; and the
step is the branch of a conditional, which is a list of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

#: numbers a chain, up to which an output is written in the row: a wide one takes longer there than alone
_NARROW = 4
#: numbers a chain, up to which a conditional, which copies what the loop carries, is worth it
_SMALL = 16


def scan_chains(
    step: Callable[[Any, Array, Any], tuple[Any, Any]], carry: Any, steps: Array, inputs: Any, axis: Literal[0, -1]
) -> Any:
    """`lax.scan` of `step(carry, k, input)`, a function of one chain, for all chains at once, k = steps[0], ...

    Inputs and outputs have a first axis of steps. `axis` is that of the chains, in the carry, and in what is left of an
    input or an output when its step is taken.
    """
    of_all = jax.vmap(step, in_axes=(axis, None, axis), out_axes=axis)
    # No index is below 0: to look for one would be another kernel.
    of_step = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    set_step = functools.partial(jax.lax.dynamic_update_index_in_dim, allow_negative_indices=False)
    first = jax.eval_shape(lambda inputs: jax.tree.map(lambda leaf: leaf[0], inputs), inputs)
    like = jax.eval_shape(of_all, carry, steps[0], first)[1]
    packing = _Packing(like, axis)
    packed = jax.eval_shape(packing.pack, like)

    def body(carry: Any, i: Array) -> tuple[Any, Any]:
        now = jax.tree.map(lambda leaf: of_step(leaf, i), inputs)
        carry, out = of_all(carry, steps[0] + i, now)
        return carry, packing.pack(out)

    def body_on_cpu(carry: Any, i: Array) -> tuple[Any, Any]:
        # Always true; but the compiler does not know.
        return jax.lax.cond(i >= 0, body, lambda carry, _: (carry, _zeros(packed)), carry, i)

    is_small = all(leaf.size <= _SMALL * leaf.shape[axis] for leaf in jax.tree.leaves(carry))

    def write(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, written = state
        if is_small:
            carry, out = jax.lax.platform_dependent(carry, i, cpu=body_on_cpu, default=body)
        else:
            carry, out = body(carry, i)
        return carry, jax.tree.map(lambda whole, leaf: set_step(whole, leaf, i, 0), written, out)

    written = jax.tree.map(lambda leaf: jnp.zeros((len(steps), *leaf.shape), leaf.dtype), packed)
    carry, written = jax.lax.fori_loop(0, len(steps), write, (carry, written))
    return carry, packing.unpack(written)


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def _is_narrow(leaf: Any, axis: int) -> bool:
    return leaf.size <= _NARROW * leaf.shape[axis]


class _Packing:
    """How the narrow leaves of a tree are written as one row of floats, with chains last, beside what is left.

    Whole numbers as wide as these floats keep their bits. (Other widths are left: they might not be what they were.)
    """

    def __init__(self, like: Any, axis: int):
        self.axis = axis
        self.leaves, self.tree = jax.tree.flatten(like)
        self.dtype = jnp.result_type(float)
        self.in_row = [
            (leaf.dtype in (self.dtype, bool) or self._keeps_bits(leaf)) and leaf.size > 0 and _is_narrow(leaf, axis)
            for leaf in self.leaves
        ]
        narrow = [i for i, is_in in enumerate(self.in_row) if is_in]
        #: the numbers of leaves of the same width
        self.groups = [
            [i for i in narrow if self._width(i) == width] for width in sorted({self._width(i) for i in narrow})
        ]

    def _keeps_bits(self, leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype.itemsize == self.dtype.itemsize

    def _width(self, i: int) -> int:
        return self.leaves[i].size // self.leaves[i].shape[self.axis]

    def pack(self, tree: Any) -> tuple[list[Array], list[Array]]:
        """A row, if any, and what is left."""
        found = jax.tree.leaves(tree)

        def part(i: int) -> Array:
            leaf = jnp.moveaxis(found[i], self.axis, -1).reshape(self._width(i), -1)
            if self._keeps_bits(leaf):
                return jax.lax.bitcast_convert_type(leaf, self.dtype)
            return leaf.astype(self.dtype)

        groups = [_stacked([part(i) for i in group]) for group in self.groups]
        row = [jnp.concatenate([group.reshape(-1, group.shape[-1]) for group in groups])] if groups else []
        return row, [leaf for leaf, is_in in zip(found, self.in_row) if not is_in]

    def unpack(self, packed: tuple[list[Array], list[Array]]) -> Any:
        """The tree, of packed arrays with an axis of steps."""
        rows, left = packed[0], iter(packed[1])
        found: list[Any] = [None if is_in else next(left) for is_in in self.in_row]
        at = 0
        for i in (i for group in self.groups for i in group):
            like, width = self.leaves[i], self._width(i)
            shape = jax.eval_shape(lambda leaf: jnp.moveaxis(leaf, self.axis, -1), like).shape
            part = rows[0][:, at : at + width].reshape(-1, *shape)
            as_before = jax.lax.bitcast_convert_type if self._keeps_bits(like) else jax.lax.convert_element_type
            part = as_before(part, like.dtype)
            found[i] = jax.vmap(lambda leaf: jnp.moveaxis(leaf, -1, self.axis))(part)
            at += width
        return jax.tree.unflatten(self.tree, found)


def _stacked(leaves: list[Array]) -> Float[Array, "num_leaves width num_chains"]:
    """`jnp.stack`, by selects: a loop of these is vectorised by the compiler, and a concatenation is not."""
    number = jax.lax.broadcasted_iota(jnp.int32, (len(leaves), 1, 1), 0)
    stacked = leaves[-1][None]
    for i, leaf in enumerate(leaves[:-1]):
        stacked = jnp.where(number == i, leaf, stacked)
    return stacked
