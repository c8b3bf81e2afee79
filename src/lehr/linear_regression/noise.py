"""Noise of the gradient of a log likelihood: what its covariance is where theta has a given mean and covariance.

Only second moments of theta enter the bound of DAIS, and the covariance of mini-batch gradients of a linear regression
is quadratic in theta. So the moments close, and the bound is exact even where theta is no longer Gaussian.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from lehr.errors import InputError, check_whole
from lehr.linear_regression.model import LinearRegression, is_symmetric


class AdditiveNoise(eqx.Module):
    """Noise N(0, covariance) on the gradient of the log likelihood, the same at every theta; at beta, times beta.

    Arguments:
        covariance: `(d, d)`, in units of 1 / theta^2; symmetric, and with no negative eigenvalue.

    Raises `lehr.errors.InputError` for other matrices.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, section 4.3.
    """

    covariance: Float[np.ndarray, "d d"]

    def __init__(self, covariance: ArrayLike):
        array = np.asarray(covariance, np.float64)
        if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size or not np.all(np.isfinite(array)):
            raise InputError(f"gradient noise must have a finite covariance (d, d), but its shape is {array.shape}")
        if not is_symmetric(array) or np.linalg.eigvalsh(array)[0] < -1e-10 * np.abs(array).max():
            raise InputError("the covariance of gradient noise must be symmetric, with no negative eigenvalue")
        self.covariance = array

    @property
    def dimension(self) -> int:
        """d."""
        return len(self.covariance)

    def at(self, mean: Float[Array, " d"], covariance: Float[Array, "d d"]) -> Float[Array, "d d"]:
        """The expected covariance of the gradient of the log likelihood, for theta of these moments."""
        del mean, covariance
        return jnp.asarray(self.covariance)


class MiniBatchNoise(eqx.Module):
    """The noise of (n / B) sum_{i in batch} grad log p(y_i | theta), for batches drawn anew in every step.

    With g_i(theta) = x_i (y_i - x_i . theta) / s^2 the gradient of one datum, and C the covariance of g_i over the
    data (with 1/n), it is n^2 C / B with replacement, and n^2 C (n - B) / (B (n - 1)) without; its multiplicative
    part is that C depends on theta. Of theta with mean m and covariance S,

        E[C] = E_i[x_i x_i^T ((y_i - x_i . m)^2 + x_i^T S x_i)] / s^4 - (g g^T + G S G),

    g the mean of g_i(m), and G that of x_i x_i^T / s^2.

    Make one with `MiniBatchNoise.of(regression, batch_size, replace=True)`.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, section 4.3; Cochran 1977, theorem 2.2, for the finite population.
    """

    #: n^2 / B over s^4, and the correction of a finite population
    factor: float
    #: theta of least squares, where the residuals are taken
    reference: Float[np.ndarray, " d"]
    #: (x_i, residual_i), or where that is smaller the mean of x x^T (x) (x, r) (x, r)^T over the data
    rows: Float[np.ndarray, "n d_plus_1"] | None
    fourth: Float[np.ndarray, "d d d_plus_1 d_plus_1"] | None
    #: X^T X / n
    curvature: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, regression: LinearRegression, batch_size: int, *, replace: bool = True) -> "MiniBatchNoise":
        """For batches of `batch_size`, drawn with or without replacement.

        Raises `lehr.errors.InputError` for a batch size that is no whole number from 1 to n.
        """
        n, d = regression.design.shape
        check_whole("batch_size", batch_size, 1, n)
        finite = 1.0 if replace else (n - batch_size) / max(n - 1, 1)
        X = regression.design
        reference = np.linalg.lstsq(X, regression.y)[0]
        rows = np.column_stack([X, regression.y - X @ reference])
        by_moments = n * (d + 1) > d**2 * (d + 1) ** 2
        return cls(
            factor=n**2 / batch_size * finite / regression.noise_scale**4,
            reference=reference,
            rows=None if by_moments else rows,
            fourth=_fourth_moments(rows) if by_moments else None,
            curvature=X.T @ X / n,
        )

    @property
    def dimension(self) -> int:
        """d."""
        return len(self.reference)

    def at(self, mean: Float[Array, " d"], covariance: Float[Array, "d d"]) -> Float[Array, "d d"]:
        """The expected covariance of the gradient of the log likelihood, for theta of these moments."""
        # r - x . delta = (x, r) . w with w = (-delta, 1); `second` is E[w w^T].
        delta = mean - self.reference
        second = jnp.block(
            [[covariance + jnp.outer(delta, delta), -delta[:, None]], [-delta[None, :], jnp.ones((1, 1))]]
        )
        if self.fourth is not None:
            raw = jnp.tensordot(jnp.asarray(self.fourth), second, 2)
        else:
            assert self.rows is not None
            x, squares = self.rows[:, :-1], jnp.sum((self.rows @ second) * self.rows, axis=1)
            raw = (x.T * squares) @ jnp.asarray(x) / len(x)
        # The residuals of least squares are orthogonal to x: the mean of g_i is -G delta.
        moved = self.curvature @ second[:-1, :-1] @ self.curvature
        return jnp.asarray(self.factor * (raw - moved))


def _fourth_moments(rows: np.ndarray) -> np.ndarray:
    """The mean of x x^T (x) (x, r) (x, r)^T, in blocks of data of a few megabytes."""
    n, d = len(rows), rows.shape[1] - 1
    total = np.zeros((d * d, (d + 1) ** 2))
    for block in np.array_split(rows, -(-n * (d + 1) ** 2 // 1_000_000)):
        x = block[:, :-1]
        squares = (x[:, :, None] * x[:, None, :]).reshape(len(block), -1)
        total += squares.T @ (block[:, :, None] * block[:, None, :]).reshape(len(block), -1)
    return (total / n).reshape(d, d, d + 1, d + 1)
