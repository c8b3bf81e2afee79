"""Entropies and divergences against scipy and against independent formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from flowjax.bijections import Affine, Chain, Flip, TriangularAffine
from flowjax.distributions import MultivariateNormal, Normal, StandardNormal, StudentT, Transformed

from lehr import Gaussian, InputError
from lehr.divergences import entropy, kl_divergence

LOC, COVARIANCE = np.array([1.0, -0.5, 0.3]), np.array([[1.0, 0.3, 0.0], [0.3, 0.7, -0.2], [0.0, -0.2, 2.0]])
TRIANGULAR = np.array([[1.2, 0, 0], [0.5, 0.6, 0], [-0.4, 0.1, 0.9]])


def gaussians():
    """Each with its mean and covariance."""
    chained = Chain([Affine(jnp.ones(3), jnp.array([2.0, 0.5, 1.0])), Flip((3,)), TriangularAffine(LOC, TRIANGULAR)])
    flipped = np.eye(3)[::-1]
    linear = TRIANGULAR @ flipped @ np.diag([2.0, 0.5, 1.0])
    return {
        "standard": (StandardNormal((3,)), np.zeros(3), np.eye(3)),
        "diagonal": (Normal(jnp.asarray(LOC), jnp.array([0.5, 2.0, 1.5])), LOC, np.diag([0.25, 4.0, 2.25])),
        "full": (MultivariateNormal(jnp.asarray(LOC), jnp.asarray(COVARIANCE)), LOC, COVARIANCE),
        "chained": (
            Transformed(StandardNormal((3,)), chained),
            LOC + TRIANGULAR @ flipped @ np.ones(3),
            linear @ linear.T,
        ),
        "lehr's": (Gaussian.from_covariance(LOC, COVARIANCE + np.eye(3)), LOC, COVARIANCE + np.eye(3)),
    }


@pytest.mark.parametrize("name", gaussians())
def test_entropy_is_scipys(name):
    base, loc, covariance = gaussians()[name]
    np.testing.assert_allclose(entropy(base), scipy.stats.multivariate_normal(loc, covariance).entropy(), rtol=1e-5)


def test_divergence_is_that_of_the_covariances():
    for base, loc, covariance in gaussians().values():
        for prior, prior_loc, prior_covariance in gaussians().values():
            precision, shift = np.linalg.inv(prior_covariance), loc - prior_loc
            log_det = np.log(np.linalg.det(prior_covariance) / np.linalg.det(covariance))
            expected = (np.trace(precision @ covariance) + shift @ precision @ shift - 3 + log_det) / 2
            np.testing.assert_allclose(kl_divergence(base, prior), expected, rtol=1e-4, atol=1e-5)


def test_the_entropy_of_other_libraries_is_theirs():
    base = dist.Normal(jnp.asarray(LOC), 2.0).to_event(1)
    np.testing.assert_allclose(entropy(base), scipy.stats.norm(0, 2).entropy() * 3, rtol=1e-5)


def test_a_transformed_distribution_of_numpyro_is_refused():
    base = dist.TransformedDistribution(dist.Normal(jnp.asarray(LOC), 1.0).to_event(1), dist.transforms.ExpTransform())
    with pytest.raises(InputError, match=r"a TransformedDistribution is not known .* function entropy\(base\)"):
        entropy(base)


def test_gradients_are_exact():
    gradient = jax.grad(lambda scale: entropy(Normal(jnp.zeros(3), scale)))(jnp.array([0.5, 1.0, 4.0]))
    np.testing.assert_allclose(gradient, [2.0, 1.0, 0.25], rtol=1e-5)


def test_other_distributions_are_refused():
    other = StudentT(jnp.full(3, 5.0))
    with pytest.raises(InputError, match="StudentT is not known"):
        entropy(other)
    with pytest.raises(InputError, match="not of a StudentT"):
        kl_divergence(StandardNormal((3,)), other)
