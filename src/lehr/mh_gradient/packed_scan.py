"""A loop over the steps of chains that writes all numbers of a step as one row.

On a CPU the body of a loop is a list of kernels, and every array that it writes is one of them. A list of up to eight
runs without a scheduler, that costs each kernel more than to compute a few chains.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def scan_chains(step: Callable[[Any, Array, Any], tuple[Any, Any]], carry: Any, steps: Array, inputs: Any) -> Any:
    """`lax.scan` of `step(carry, k, input)`, a function of one chain, for all chains at once.

    The carry has a leading axis of chains, inputs and outputs `(num_steps, num_chains, ...)`.
    """
    of_chains = jax.vmap(step, in_axes=(0, None, 0))
    row = jax.tree.map(lambda leaf: leaf[0], (steps, inputs))
    leaves, tree = jax.tree.flatten(jax.eval_shape(of_chains, carry, *row)[1])
    dtype = jnp.result_type(float)
    is_packed = [leaf.dtype in (dtype, bool) for leaf in leaves]

    def packed(carry: Any, of_step: Any) -> tuple[Any, Any]:
        carry, out = of_chains(carry, *of_step)
        out = jax.tree.leaves(out)
        rows = [leaf.reshape(len(leaf), -1).astype(dtype) for leaf, packs in zip(out, is_packed) if packs]
        others = [leaf for leaf, packs in zip(out, is_packed) if not packs]
        return carry, (jnp.concatenate(rows, axis=1) if rows else None, others)

    carry, (rows, others) = jax.lax.scan(packed, carry, (steps, inputs))
    found, at, others = [], 0, iter(others)
    for leaf, packs in zip(leaves, is_packed):
        if packs:
            width = leaf.size // leaf.shape[0]
            part = rows[..., at : at + width].reshape(len(steps), *leaf.shape)
            found.append(part.astype(leaf.dtype))
            at += width
        else:
            found.append(next(others))
    return carry, jax.tree.unflatten(tree, found)
