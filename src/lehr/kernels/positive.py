"""Parameters that must stay positive are kept as logarithms: a gradient step cannot make them negative."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from lehr.errors import InputError
from lehr.numerics import is_concrete


def log_of_positive(name: str, value: ArrayLike) -> Array:
    """The logarithm of a parameter, in the default float type.

    Raises `InputError` if it is not positive and finite.
    """
    if is_concrete(value) and not (np.all(np.asarray(value) > 0) and np.all(np.isfinite(np.asarray(value)))):
        raise InputError(f"{name} must be positive and finite, but it is {value}")
    value = jnp.asarray(value, dtype=jnp.result_type(float))
    return jnp.log(eqx.error_if(value, ~((value > 0) & (value < jnp.inf)), f"{name} must be positive and finite"))
