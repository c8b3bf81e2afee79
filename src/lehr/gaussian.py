"""A full-rank Gaussian base to train."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels.positive import log_of_positive
from lehr.numerics import inverse_of_lower, is_concrete, normal


class Gaussian(eqx.Module):
    """N(loc, L L^T), full-rank, with L lower triangular:

        x = loc + L z,  z ~ N(0, I),     log p(x) = -|L^-1 (x - loc)|^2 / 2 - log det L - (dim / 2) log 2 pi.

    FlowJAX's `MultivariateNormal` is the same distribution; its density solves a triangular system, which batched may
    never end on a processor (`lehr.numerics.inverse_of_lower`). This one takes the inverse of L by products, once for
    all draws: for tens of dimensions, and an L that is not too ill-conditioned.

    Arguments:
        loc: `(dim,)`.
        scale_tril: L, `(dim, dim)`, zero above its diagonal, and positive on it.

    What is trained: `loc`, `log_diagonal` (the logarithm of L's diagonal, so that it stays positive) and `lower` (what
    is below it; the rest of that array is not read).

    **Gradient**: exact, in positions and parameters; draws are reparameterised.

    Raises `lehr.errors.InputError` for shapes that do not fit, and an L that is not lower triangular with a positive,
    finite diagonal.

    Source: Pinheiro, Bates 1996, "Unconstrained parametrizations for variance-covariance matrices" (log-Cholesky).
    """

    loc: Float[Array, " dim"]
    log_diagonal: Float[Array, " dim"]
    lower: Float[Array, "dim dim"]

    def __init__(self, loc: ArrayLike, scale_tril: ArrayLike):
        loc, scale_tril = jnp.asarray(loc), jnp.asarray(scale_tril)
        if loc.ndim != 1 or loc.size == 0 or scale_tril.shape != (loc.size, loc.size):
            raise InputError(
                "a Gaussian needs loc of shape (dim,) and scale_tril of shape (dim, dim), "
                f"but they have {loc.shape} and {scale_tril.shape}"
            )
        if is_concrete(scale_tril) and np.any(np.triu(np.asarray(scale_tril), 1)):
            raise InputError(
                "scale_tril must be zero above its diagonal: give a Cholesky factor, or use Gaussian.from_covariance"
            )
        dtype = jnp.result_type(loc, scale_tril)
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
        self.loc = loc.astype(dtype)
        self.log_diagonal = log_of_positive("the diagonal of scale_tril", jnp.diagonal(scale_tril)).astype(dtype)
        self.lower = jnp.tril(scale_tril, -1).astype(dtype)

    @classmethod
    def from_covariance(cls, loc: ArrayLike, covariance: ArrayLike) -> "Gaussian":
        """The Gaussian with these moments, by the Cholesky factor of `covariance` in float64.

        Arguments:
            loc: `(dim,)`.
            covariance: `(dim, dim)`, symmetric and positive definite, of known values (outside of `jax.jit`).

        **Gradient**: none in `covariance`; to train the result needs none.

        Raises `lehr.errors.InputError` for another covariance.
        """
        matrix: Any = np.asarray(covariance, np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"a covariance must have shape (dim, dim), but it has {matrix.shape}")
        # Some roundings of float32, relative to the two scales: a covariance that was computed in it is symmetric.
        spread = np.sqrt(np.abs(np.diagonal(matrix)))
        if not np.all(np.abs(matrix - matrix.T) <= 1e-6 * np.outer(spread, spread)):
            raise InputError("a covariance must be symmetric and finite, but this is not")
        try:
            scale_tril = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            raise InputError(
                "a covariance must be positive definite, but this is not: look for a dimension that is a "
                "combination of others"
            ) from None
        return cls(loc, scale_tril)

    @property
    def scale_tril(self) -> Float[Array, "dim dim"]:
        """L."""
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diagonal))

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape dim"]:
        """loc + L z: draws of shape `(*shape, dim)`. **Gradient**: exact (reparameterised)."""
        return self.loc + normal(key, (*shape, *self.loc.shape), self.loc.dtype) @ self.scale_tril.T

    def log_prob(self, x: Array) -> Float[Array, ""]:
        """The log density of one position `(dim,)`, in nats. **Gradient**: exact.

        Raises `lehr.errors.InputError` for another shape.
        """
        if x.shape != self.loc.shape:
            raise InputError(
                f"a position must have shape {self.loc.shape}, but it has {x.shape}: for many positions use jax.vmap"
            )
        u = inverse_of_lower(self.scale_tril) @ (x - self.loc)
        return -jnp.sum(u**2 + math.log(2 * math.pi)) / 2 - jnp.sum(self.log_diagonal)

    def entropy(self) -> Float[Array, ""]:
        """-E[log p(x)] = (dim / 2) log(2 pi e) + log det L, in nats. **Gradient**: exact."""
        return self.loc.size / 2 * (1 + math.log(2 * math.pi)) + jnp.sum(self.log_diagonal)
