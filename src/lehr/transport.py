"""A density pulled back along a bijection: the same evidence in coordinates where the base is standard."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection, Affine, TriangularAffine
from jaxtyping import Array, Float

from lehr.path import LogDensity


class PulledBack(eqx.Module):
    """The log density of z = T^-1(x) for x with log density `log_target`,

        log target(T(z)) + log |det dT/dz|,

    whose integral over z is that of the target over x. Where x = T(z) with z ~ N(0, I) is near the target, this density
    is near a standard Gaussian, whatever the scales and correlations of x.

    Arguments:
        log_target: maps a position `(dim,)` to the log unnormalised density, a scalar, in nats.
        bijection: T, any FlowJAX bijection of shape `(dim,)`.

    **Gradient**: exact, in z and in the parameters of both.
    """

    log_target: LogDensity
    bijection: AbstractBijection

    def __call__(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        # In the dtype of z: a float64 map must not widen float32 positions.
        x, log_det = self.bijection.transform_and_log_det(z)
        return self.log_target(x.astype(z.dtype)) + log_det.astype(z.dtype)

    def push(self, z: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
        """T of each row: positions of this density become positions of the target."""
        return jax.vmap(self.bijection.transform)(z).astype(z.dtype)


def gaussian_map(loc: Any, scale: Any) -> AbstractBijection:
    """The affine map under which z ~ N(0, I) becomes N(loc, S S^T), or N(loc, diag(scale^2)) for a 1-D scale.

    Arguments:
        loc: `(dim,)`.
        scale: S, lower triangular `(dim, dim)`, or standard deviations `(dim,)`.
    """
    return Affine(loc, scale) if jnp.ndim(scale) == 1 else TriangularAffine(loc, scale)
