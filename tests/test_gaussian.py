"""The full-rank Gaussian base against scipy's."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import lehr
from lehr import Gaussian, InputError, objectives
from tests import targets
from tests.statistics import THRESHOLD, assert_mean, z_score

LOC = np.array([1.0, -0.5, 0.3])
COVARIANCE = np.array([[1.0, 0.3, 0.0], [0.3, 0.7, -0.2], [0.0, -0.2, 2.0]])


def moments(dim):
    rng = np.random.default_rng(dim)
    root = rng.normal(size=(dim, dim))
    return rng.normal(size=dim), root @ root.T + 0.1 * np.eye(dim)


@pytest.mark.parametrize("dim", [1, 2, 3, 11, 40])
def test_density_and_entropy_are_scipys(x64, dim):
    loc, covariance = moments(dim)
    base, expected = Gaussian.from_covariance(loc, covariance), scipy.stats.multivariate_normal(loc, covariance)
    x = np.random.default_rng(0).normal(size=(5, dim))
    np.testing.assert_allclose(jax.vmap(base.log_prob)(jnp.asarray(x)), expected.logpdf(x).reshape(-1), rtol=1e-9)
    np.testing.assert_allclose(base.entropy(), expected.entropy(), rtol=1e-12)
    np.testing.assert_allclose(base.scale_tril @ base.scale_tril.T, covariance, rtol=1e-12, atol=1e-12)
    # The gradient in x is that of the quadratic form.
    gradient = jax.grad(base.log_prob)(jnp.asarray(x[0]))
    np.testing.assert_allclose(gradient, -np.linalg.solve(covariance, x[0] - loc), rtol=1e-7)


def test_float32_is_enough_and_stays_float32_under_x64(key):
    narrow = Gaussian.from_covariance(LOC, COVARIANCE)
    expected = scipy.stats.multivariate_normal(LOC, COVARIANCE).logpdf([0.3, -0.2, 1.0])
    np.testing.assert_allclose(narrow.log_prob(jnp.array([0.3, -0.2, 1.0])), expected, rtol=1e-5)
    with jax.enable_x64(True):
        x = narrow.sample(key, (2,))
        assert x.dtype == narrow.log_prob(x[0]).dtype == narrow.entropy().dtype == jnp.float32
        wide = Gaussian(jnp.zeros(2), jnp.eye(2))
        assert wide.sample(key).dtype == jnp.float64
    assert Gaussian(np.array([0, 1]), np.array([[1, 0], [2, 3]])).sample(key).dtype == jnp.float32


def test_draws_have_its_moments(key):
    x = np.asarray(Gaussian.from_covariance(LOC, COVARIANCE).sample(key, (100_000,)))
    assert x.shape == (100_000, 3)
    for i in range(3):
        assert_mean(x[:, i], LOC[i])
        for j in range(i + 1):
            assert_mean((x[:, i] - LOC[i]) * (x[:, j] - LOC[j]), COVARIANCE[i, j])


def test_draws_are_reparameterised(key):
    """d/dloc E|x|^2 = 2 loc, and in L: d/dL E|x|^2 = 2 L."""
    base = Gaussian(jnp.array([0.5, -1.0]), jnp.array([[1.2, 0.0], [0.4, 0.7]]))

    @jax.jit
    @jax.vmap
    def sampled(key):
        return jax.grad(lambda base: jnp.sum(base.sample(key) ** 2))(base)

    found = sampled(jax.random.split(key, 50_000))
    scale = np.asarray(base.scale_tril)
    for i in range(2):
        assert_mean(found.loc[:, i], 2 * float(base.loc[i]))
        assert_mean(found.log_diagonal[:, i], 2 * scale[i, i] ** 2)
    assert_mean(found.lower[:, 1, 0], 2 * scale[1, 0])
    # What is not read has no gradient.
    assert not np.any(np.triu(np.asarray(found.lower[0])))


def test_gradients_in_its_parameters_are_those_of_finite_differences(x64):
    base, x = Gaussian.from_covariance(LOC, COVARIANCE), jnp.array([0.3, -0.2, 1.0])
    flat, unravel = jax.flatten_util.ravel_pytree(base)
    gradient = jax.grad(lambda flat: unravel(flat).log_prob(x))(flat)
    h = 1e-6
    for i, e in enumerate(np.eye(flat.size)):
        slope = (unravel(flat + h * e).log_prob(x) - unravel(flat - h * e).log_prob(x)) / (2 * h)
        np.testing.assert_allclose(gradient[i], slope, atol=1e-7)


def test_it_is_a_base_for_everything(x64, key):
    target = targets.conjugate_2d()
    posterior = target.posterior
    base = Gaussian(posterior.loc, posterior.scale_tril)
    assert isinstance(base, lehr.path.Base)
    # At the exact posterior every weight is Z, and the path derivative vanishes.
    np.testing.assert_allclose(objectives.iwae(base, target, key, num_samples=3), target.log_evidence, rtol=1e-10)
    gradient = jax.grad(lambda base: objectives.elbo_stl(base, target, key, num_samples=3))(base)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-10
    annealer = lehr.Annealer(
        Gaussian(jnp.zeros(2), jnp.eye(2)), lehr.Schedule.linear(4), lehr.Metropolis(lehr.Hamiltonian(0.5))
    )
    weights = np.exp(np.asarray(lehr.anneal(key, annealer, target, 20_000).log_weights) - float(target.log_evidence))
    assert abs(z_score(weights, 1)) < THRESHOLD


def test_many_at_once_are_each_their_own(key):
    scales = jnp.array([[[1.0, 0.0], [0.5, 2.0]], [[0.3, 0.0], [-0.5, 1.0]]])
    locs, x = jnp.array([[0.0, 1.0], [2.0, -1.0]]), jnp.array([0.3, 0.4])
    bases = eqx.filter_vmap(Gaussian)(locs, scales)
    together = eqx.filter_vmap(lambda base: base.log_prob(x))(bases)
    np.testing.assert_allclose(together, [Gaussian(*parts).log_prob(x) for parts in zip(locs, scales)], rtol=1e-6)


@pytest.mark.parametrize(
    ("loc", "scale_tril", "text"),
    [
        (np.zeros((2, 1)), np.eye(2), r"loc of shape \(dim,\)"),
        (np.zeros(2), np.eye(3), r"have \(2,\) and \(3, 3\)"),
        (np.zeros(2), np.ones(2), r"have \(2,\) and \(2,\)"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "zero above its diagonal"),
        (np.zeros(2), np.diag([1.0, -1.0]), "diagonal of scale_tril must be positive"),
    ],
)
def test_wrong_parts_are_refused(loc, scale_tril, text):
    with pytest.raises(InputError, match=text):
        Gaussian(loc, scale_tril)


@pytest.mark.parametrize(
    ("covariance", "text"),
    [
        (np.ones(2), r"must have shape \(dim, dim\)"),
        (np.array([[1.0, 0.5], [0.4, 1.0]]), "symmetric and finite"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "symmetric and finite"),
        (np.ones((2, 2)), "positive definite"),
        (np.eye(3), r"have \(2,\) and \(3, 3\)"),
    ],
)
def test_wrong_covariances_are_refused(covariance, text):
    with pytest.raises(InputError, match=text):
        Gaussian.from_covariance(np.zeros(2), covariance)


def test_positions_of_another_shape_are_refused():
    base = Gaussian(np.zeros(2), np.eye(2))
    with pytest.raises(InputError, match=r"use jax\.vmap"):
        base.log_prob(jnp.zeros((5, 2)))
    with pytest.raises(InputError, match=r"must have shape \(2,\)"):
        base.log_prob(jnp.zeros(3))
