"""A loop over the steps of chains that writes the few numbers of a step as one row.

On a CPU the body of a loop is a list of kernels, and every array that it writes is one of them. A list of up to eight
runs without a scheduler, that costs each kernel more than to compute a few chains.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

#: numbers a chain, up to which an output is written in the row: a wide one takes longer there than alone
_NARROW = 4


def scan_chains(step: Callable[[Any, Array, Any], tuple[Any, Any]], carry: Any, steps: Array, inputs: Any) -> Any:
    """`lax.scan` of `step(carry, k, input)`, a function of one chain, for all chains at once.

    The carry has a leading axis of chains, inputs and outputs `(num_steps, num_chains, ...)`.
    """
    of_chains = jax.vmap(step, in_axes=(0, None, 0))
    first = jax.eval_shape(lambda of_steps: jax.tree.map(lambda leaf: leaf[0], of_steps), (steps, inputs))
    like, tree = jax.tree.flatten(jax.eval_shape(of_chains, carry, *first)[1])
    dtype = jnp.result_type(float)
    in_row = [leaf.dtype in (dtype, bool) and leaf.size <= _NARROW * leaf.shape[0] for leaf in like]

    def write(carry: Any, of_step: Any) -> tuple[Any, Any]:
        carry, out = of_chains(carry, *of_step)
        out = jax.tree.leaves(out)
        row = [leaf.reshape(len(leaf), -1).astype(dtype) for leaf, narrow in zip(out, in_row) if narrow]
        alone = [leaf for leaf, narrow in zip(out, in_row) if not narrow]
        return carry, (jnp.concatenate(row, axis=1) if row else None, alone)

    carry, (rows, alone) = jax.lax.scan(write, carry, (steps, inputs))
    found, at, alone = [], 0, iter(alone)
    for leaf, narrow in zip(like, in_row):
        if not narrow:
            found.append(next(alone))
            continue
        width = leaf.size // leaf.shape[0]
        found.append(rows[..., at : at + width].reshape(len(steps), *leaf.shape).astype(leaf.dtype))
        at += width
    return carry, jax.tree.unflatten(tree, found)
