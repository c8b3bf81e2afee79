"""Expansions of a log likelihood, datum by datum, around one position."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lehr.errors import InputError
from lehr.numerics import stop_gradient
from lehr.path import LogDensity


class Taylor(eqx.Module):
    """The Taylor expansions t_i of log p(y_i | x) around one x, and their sum: a control variate, or a surrogate.

        t_i(x) = l_i + g_i . delta (+ delta . H_i delta / 2),    delta = x - reference,    l_i = log p(y_i | reference)

    Make it by `Subsampled.around`.
    """

    reference: Float[Array, " dim"]
    value: Float[Array, ""]
    slope: Float[Array, " dim"]
    curvature: Float[Array, "dim dim"] | None

    def total(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """sum_i t_i(x): no data are touched.

        Raises `lehr.errors.InputError` for a position of another dimension than the reference.
        """
        if x.shape != self.reference.shape:
            raise InputError(
                f"the reference of the expansions has shape {self.reference.shape}, but a position has {x.shape}"
            )
        taylor = stop_gradient(self)
        delta = x - taylor.reference
        linear = taylor.value + taylor.slope @ delta
        return linear if taylor.curvature is None else linear + delta @ taylor.curvature @ delta / 2

    def of_one(self, function: LogDensity, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """t_i(x), with log p(y_i | .) for `function`."""
        reference = jax.lax.stop_gradient(self.reference).astype(jnp.result_type(x, self.reference))
        delta = x - reference

        def value_and_slope(at):
            return jax.jvp(function, (at,), (delta,))

        if self.curvature is None:
            value, slope = value_and_slope(reference)
            return value + slope
        (value, slope), (_, bend) = jax.jvp(value_and_slope, (reference,), (delta,))
        return value + slope + bend / 2
