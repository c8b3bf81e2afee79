"""Targets whose evidence is known exactly, of 2 to 20 dimensions, none symmetric about zero.

A class is a log density without its constant, maps a position `(dim,)` to a scalar, and has the `log_evidence` that
this leaves. Their parameters are arrays of any dimension, so that the constants can be checked by quadrature.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import Normal
from jaxtyping import Array, Float
from scipy.special import betaln, gammaln, logsumexp

from lehr.path import Problem
from lehr.reference import Reference


class LogGamma(eqx.Module):
    """y = W (x - loc), y_i the logarithm of a Gamma(shape_i, 1) variate: skewed and correlated.

        log target = sum_i shape_i y_i - exp(y_i),      Z = prod_i Gamma(shape_i) / |det W|.

    An exponential tail to one side, a doubly exponential one to the other. W is lower triangular here as below.
    """

    loc: Float[Array, " dim"]
    whiten: Float[Array, "dim dim"]
    shape: Float[Array, " dim"]

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        y = self.whiten @ (x - self.loc)
        return jnp.sum(self.shape * y - jnp.exp(y))

    @property
    def log_evidence(self) -> float:
        return float(np.sum(gammaln(self.shape)) - _log_det(self.whiten))


class LogitBeta(eqx.Module):
    """y = W (x - loc), y_i the logit of a Beta(a_i, b_i) variate: the posterior of log odds after a_i and b_i counts.

    log target = sum_i a_i y_i - (a_i + b_i) log(1 + exp(y_i)),      Z = prod_i Beta(a_i, b_i) / |det W|.
    """

    loc: Float[Array, " dim"]
    whiten: Float[Array, "dim dim"]
    a: Float[Array, " dim"]
    b: Float[Array, " dim"]

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        y = self.whiten @ (x - self.loc)
        return jnp.sum(self.a * y - (self.a + self.b) * jax.nn.softplus(y))

    @property
    def log_evidence(self) -> float:
        return float(np.sum(betaln(self.a, self.b)) - _log_det(self.whiten))


class Mixture(eqx.Module):
    """sum_j exp(log_height_j - |W_j (x - loc_j)|^2 / 2): Gaussian components.

    Z = (2 pi)^(dim / 2) sum_j exp(log_height_j) / |det W_j|.
    """

    log_height: Float[Array, " components"]
    loc: Float[Array, "components dim"]
    whiten: Float[Array, "components dim dim"]

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        u = jnp.einsum("jab,jb->ja", self.whiten, x - self.loc)
        return jax.nn.logsumexp(self.log_height - jnp.sum(u**2, axis=1) / 2)

    @property
    def log_mass(self) -> np.ndarray:
        """`(components,)`: the log of the integral of each."""
        log_det = np.array([_log_det(whiten) for whiten in self.whiten])
        return np.asarray(self.log_height, np.float64) - log_det + self.loc.shape[1] / 2 * np.log(2 * np.pi)

    @property
    def log_evidence(self) -> float:
        return float(logsumexp(self.log_mass))


class Student(eqx.Module):
    """(1 + |W (x - loc)|^2 / nu)^(-(nu + dim) / 2): a multivariate Student-t, nu = `freedom`.

    Z = (nu pi)^(dim / 2) Gamma(nu / 2) / Gamma((nu + dim) / 2) / |det W|.
    """

    loc: Float[Array, " dim"]
    whiten: Float[Array, "dim dim"]
    freedom: float = eqx.field(static=True, default=5.0)

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        u = self.whiten @ (x - self.loc)
        return -(self.freedom + len(self.loc)) / 2 * jnp.log1p(jnp.sum(u**2) / self.freedom)

    @property
    def log_evidence(self) -> float:
        half, nu = len(self.loc) / 2, self.freedom
        return float(half * np.log(nu * np.pi) + gammaln(nu / 2) - gammaln(nu / 2 + half) - _log_det(self.whiten))


class Banana(eqx.Module):
    """Pairs (a, b): -(a - loc)^2 / 2 - (b - bend a^2)^2 / (2 width^2), Z = (2 pi width) to the number of pairs."""

    num_pairs: int = eqx.field(static=True, default=5)
    loc: float = eqx.field(static=True, default=1.0)
    bend: float = eqx.field(static=True, default=0.5)
    width: float = eqx.field(static=True, default=0.5)

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        a, b = x[: self.num_pairs], x[self.num_pairs :]
        return -jnp.sum((a - self.loc) ** 2 + ((b - self.bend * a**2) / self.width) ** 2) / 2

    @property
    def log_evidence(self) -> float:
        return float(self.num_pairs * np.log(2 * np.pi * self.width))


Density = LogGamma | LogitBeta | Mixture | Student | Banana


def _log_det(whiten: Float[Array, "dim dim"]) -> float:
    return float(np.sum(np.log(np.diagonal(np.asarray(whiten, np.float64)))))


def _whiten(scale: list[float], below: float) -> np.ndarray:
    """The inverse of a lower triangular matrix: `scale` on its diagonal, `below` times the row's scale next to it."""
    matrix = np.diag(scale)
    matrix[1:, :-1] += below * np.diag(scale[1:])
    return np.linalg.inv(matrix)


def _reference(density: Density, dimension: int, scale: float) -> Reference:
    density = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), density)
    base = Normal(jnp.zeros(dimension), scale)
    return Reference(Problem(base, density), density.log_evidence, 0.0, "closed form")


def log_gamma() -> Reference:
    """Eight correlated log-gammas, from strongly to hardly skewed."""
    whiten = _whiten([0.6, 1.5, 0.4, 1.0, 0.8, 1.2, 0.5, 0.9], 0.6)
    return _reference(LogGamma(np.linspace(-1, 2, 8), whiten, np.geomspace(0.7, 6, 8)), 8, 3.0)


def logit_beta() -> Reference:
    """Ten correlated log odds, after few counts and many."""
    whiten = _whiten([1.2, 0.5, 0.8, 1.5, 1.0, 0.6, 0.9, 0.7, 1.1, 1.3], -0.5)
    a, b = np.geomspace(0.5, 20, 10), np.geomspace(8, 0.8, 10)
    return _reference(LogitBeta(np.linspace(1, -1.5, 10), whiten, a, b), 10, 3.0)


def mixture() -> Reference:
    """Two Gaussians in six dimensions, about seven standard deviations apart, with 70 % and 30 % of the mass."""
    loc = np.array([[2.0, -1.0, 1.5, 0.0, -2.0, 1.0], [-2.0, 2.0, -1.0, 1.0, 0.5, -2.0]])
    whiten = np.stack([_whiten([0.7, 0.9, 0.8, 1.0, 0.6, 0.9], 0.5), _whiten([1.0, 0.8, 1.1, 0.7, 0.9, 1.0], -0.4)])
    log_height = np.log([0.7, 0.3]) + [_log_det(w) for w in whiten]
    return _reference(Mixture(log_height, loc, whiten), 6, 2.5)


def student() -> Reference:
    """A correlated Student-t with 5 degrees of freedom in eight dimensions."""
    whiten = _whiten([0.5, 1.4, 0.8, 1.0, 0.7, 1.2, 0.9, 0.6], 0.7)
    return _reference(Student(np.linspace(-1.5, 2, 8), whiten), 8, 3.0)


def banana() -> Reference:
    """Five bent pairs."""
    return _reference(Banana(), 10, 3.0)


def gmm40() -> Reference:
    """Forty Gaussians of sd 1.31 in the square from -40 to 40, normalised, from a base of sd 30.

    The locations are of this file's own seed: those in circulation come from another generator, with the same evidence.
    """
    loc, scale = np.random.default_rng(0).uniform(-40, 40, (40, 2)), np.log1p(np.e)
    log_height = np.full(40, -np.log(40 * 2 * np.pi * scale**2))
    return _reference(Mixture(log_height, loc, np.tile(np.eye(2) / scale, (40, 1, 1))), 2, 30.0)
