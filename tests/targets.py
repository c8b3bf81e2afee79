"""Targets with closed-form evidence and exact samples. None is symmetric about zero: that would hide sign errors.

Each maps a position to its log unnormalised density and has `log_evidence` and `sample(key, shape)`.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

import lehr
from lehr.numerics import inverse_of_lower


class Gaussian(eqx.Module):
    """N(loc, L L^T): a normalised base, with L = `scale_tril` lower triangular."""

    loc: jax.Array
    scale_tril: jax.Array

    def sample(self, key, shape=()):
        noise = jax.random.normal(key, (*shape, *self.loc.shape), self.loc.dtype)
        return self.loc + noise @ jnp.tril(self.scale_tril).T

    def log_prob(self, x):
        # The inverse, because it is the same for all particles: batched triangular solves are slow, and may hang.
        u = inverse_of_lower(self.scale_tril) @ (x - self.loc)
        half_log_det = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(self.scale_tril))))
        return -jnp.sum(u**2) / 2 - half_log_det - len(self.loc) * math.log(2 * math.pi) / 2


class ConjugateGaussian(eqx.Module):
    """x ~ prior, y | x ~ N(A x, noise^2 I): the target is p(x) p(y | x), the evidence p(y), both Gaussian."""

    prior: Gaussian
    design: jax.Array
    noise: jax.Array
    y: jax.Array

    def __call__(self, x):
        residual = (self.y - self.design @ x) / self.noise
        log_likelihood = -jnp.sum(residual**2) / 2 - len(self.y) * jnp.log(self.noise * math.sqrt(2 * math.pi))
        return self.prior.log_prob(x) + log_likelihood

    @property
    def _prior_covariance(self):
        return self.prior.scale_tril @ self.prior.scale_tril.T

    @property
    def log_evidence(self):
        covariance = self.design @ self._prior_covariance @ self.design.T + self.noise**2 * jnp.eye(len(self.y))
        return Gaussian(self.design @ self.prior.loc, jnp.linalg.cholesky(covariance)).log_prob(self.y)

    @property
    def posterior(self):
        precision = jnp.linalg.inv(self._prior_covariance)
        covariance = jnp.linalg.inv(precision + self.design.T @ self.design / self.noise**2)
        loc = covariance @ (precision @ self.prior.loc + self.design.T @ self.y / self.noise**2)
        return Gaussian(loc, jnp.linalg.cholesky(covariance))

    def sample(self, key, shape=()):
        return self.posterior.sample(key, shape)


class Mixture(eqx.Module):
    """sum_j exp(log_mass_j) N(x; loc_j, L_j L_j^T): skewed, but with Gaussian tails on all sides.

    So for a base of similar width the weights have a finite variance both forwards and in reverse.
    """

    log_mass: jax.Array
    components: Gaussian  # with a leading axis

    def __call__(self, x):
        return jax.nn.logsumexp(self.log_mass + jax.vmap(lambda component: component.log_prob(x))(self.components))

    @property
    def log_evidence(self):
        return jax.nn.logsumexp(self.log_mass)

    def sample(self, key, shape=()):
        key_component, key_noise = jax.random.split(key)
        chosen = jax.random.categorical(key_component, self.log_mass, shape=shape)
        noise = jax.random.normal(key_noise, (*shape, self.components.loc.shape[-1]))
        return self.components.loc[chosen] + jnp.einsum("...ij,...j->...i", self.components.scale_tril[chosen], noise)


class ShearedLogGamma(eqx.Module):
    """sum_i [shape_i y_i - rate_i exp(y_i)] with y = (x_0, x_1 + shear x_0, ...): an exponential tail to the left, a
    doubly exponential one to the right. Z = prod_i Gamma(shape_i) / rate_i^shape_i, because the shear has volume one.
    """

    shape: jax.Array
    rate: jax.Array
    shear: float = 0.5

    def __call__(self, x):
        y = x.at[1:].add(self.shear * x[:-1])
        return jnp.sum(self.shape * y - self.rate * jnp.exp(y))

    @property
    def log_evidence(self):
        return jnp.sum(gammaln(self.shape) - self.shape * jnp.log(self.rate))


# Functions, not constants: so that they are made in the dtype of the caller's `jax.enable_x64`.


def base_2d():
    return Gaussian(jnp.array([0.3, -0.2]), jnp.array([[1.0, 0.0], [-0.3, 0.9]]))


def mixture_2d():
    return Mixture(
        jnp.log(jnp.array([1.5, 0.8])),
        Gaussian(
            jnp.array([[-0.4, 0.5], [0.9, -0.7]]),
            jnp.array([[[0.85, 0.0], [0.35, 0.9]], [[0.95, 0.0], [-0.2, 0.8]]]),
        ),
    )


def mixture_1d():
    return Mixture(
        jnp.log(jnp.array([2.0, 0.7, 0.3])),
        Gaussian(jnp.array([[-1.0], [0.5], [2.0]]), jnp.array([[[0.7]], [[0.4]], [[1.1]]])),
    )


def conjugate_2d():
    return ConjugateGaussian(
        Gaussian(jnp.array([0.5, -1.0]), jnp.array([[1.1, 0.0], [0.5, 0.8]])),
        jnp.array([[1.0, 0.4], [-0.3, 1.2], [0.6, 0.6]]),
        jnp.array(0.8),
        jnp.array([1.0, -0.7, 0.4]),
    )


def log_gamma_2d():
    return ShearedLogGamma(jnp.array([1.3, 2.5]), jnp.array([0.7, 1.6]))


class Setting(eqx.Module):
    """A base, a target of similar width and a few coarse temperatures: what weights are tested on.

    Weights have a finite variance forwards and in reverse, and one particle costs next to nothing.
    """

    base: Gaussian
    target: Mixture
    num_particles: int = eqx.field(static=True, default=100_000)

    def forward(self, key, kernel, betas=(0.0, 0.2, 0.6, 1.0)):
        annealer = lehr.Annealer(self.base, lehr.Schedule.from_betas(np.array(betas)), kernel)
        return lehr.anneal(key, annealer, self.target, self.num_particles)

    def reverse(self, key, kernel, betas=(0.0, 0.2, 0.6, 1.0)):
        key_samples, key_chain = jax.random.split(key)
        samples = self.target.sample(key_samples, (self.num_particles,))
        annealer = lehr.Annealer(self.base, lehr.Schedule.from_betas(np.array(betas)), kernel)
        return lehr.anneal_reverse(key_chain, annealer, self.target, samples)


def coarse_setting():
    return Setting(base_2d(), mixture_2d())


#: the square root of the diagonal of a mass matrix that is not the identity
MOMENTUM_SCALE = np.array([0.6, 1.5])


def quadrature(log_density, low, high, num=20001):
    """log of the integral of a 1-D density by the trapezoid rule, accurate where it vanishes at both ends."""
    grid = np.linspace(low, high, num)
    with jax.enable_x64(True):
        values = np.asarray(jax.vmap(log_density)(jnp.asarray(grid)[:, None]), np.float64)
    return float(np.log(np.sum(np.exp(values))) + np.log(grid[1] - grid[0]))
