"""Weighted particles: values by hand, and a standard error that tells the truth."""

import jax
import jax.numpy as jnp
import numpy as np

from lehr import WeightedParticles
from lehr.weighted import log_mean_exp
from tests.statistics import assert_mean


def particles(weights):
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))
    return WeightedParticles(jnp.zeros((len(weights), 1)), log_weights)


def test_values_by_hand():
    # w = 1, 2, 3, 2: mean 2, sum of squares 18, sample variance 2/3.
    result = particles([1, 2, 3, 2])
    np.testing.assert_allclose(result.log_evidence, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(result.elbo, np.log(12) / 4, rtol=1e-6)
    np.testing.assert_allclose(result.weights, np.array([1, 2, 3, 2]) / 8, rtol=1e-6)
    np.testing.assert_allclose(result.effective_sample_size, 64 / 18, rtol=1e-6)
    np.testing.assert_allclose(result.standard_error, np.sqrt((2 / 3) / (4 * 2**2)), rtol=1e-5)


def test_a_shift_of_the_log_weights_shifts_the_evidence_only():
    plain, shifted = particles([1, 2, 3, 2]), particles([1, 2, 3, 2])
    shifted = WeightedParticles(shifted.positions, shifted.log_weights - 2.0**17)
    # exp of -131072 is zero in any float.
    np.testing.assert_allclose(shifted.log_evidence, plain.log_evidence - 2.0**17, atol=0.01)
    np.testing.assert_allclose(shifted.effective_sample_size, plain.effective_sample_size, rtol=0.05)


def test_weights_of_zero():
    result = particles([0, 4, 0, 0])
    np.testing.assert_allclose(result.log_evidence, 0, atol=1e-6)
    assert result.elbo == -jnp.inf
    np.testing.assert_allclose(result.effective_sample_size, 1, rtol=1e-6)
    np.testing.assert_allclose(result.standard_error, 1, rtol=1e-6)


def test_equal_weights_have_no_error_and_one_particle_does_not_know():
    for n in (2, 7, 1000):
        assert particles([3.0] * n).standard_error < 1e-3 / np.sqrt(n)
        np.testing.assert_allclose(particles([3.0] * n).effective_sample_size, n, rtol=1e-5)
    assert particles([3.0]).standard_error == jnp.inf
    np.testing.assert_allclose(particles([3.0]).log_evidence, np.log(3), rtol=1e-6)


def test_gradient_of_log_mean_exp_is_the_normalised_weight():
    log_weights = jnp.array([0.0, 1.0, -2.0, 500.0])
    np.testing.assert_allclose(jax.grad(log_mean_exp)(log_weights), jax.nn.softmax(log_weights), rtol=1e-6)


def test_the_standard_error_is_the_spread_between_runs(key):
    # Log weights from importance sampling of N(0.3, 0.9^2) with N(0, 1): skewed, but with a finite fourth moment.
    def run(key):
        x = jax.random.normal(key, (200,))
        log_weights = x**2 / 2 - (x - 0.3) ** 2 / (2 * 0.81) - np.log(0.9)
        result = WeightedParticles(x[:, None], log_weights)
        return result.log_evidence, result.standard_error

    log_evidence, standard_error = (np.asarray(a) for a in jax.jit(jax.vmap(run))(jax.random.split(key, 5000)))
    # Var of the runs against the mean of the se^2: E[(x - mean)^2 - se^2] = 0 up to O(1/N) of itself.
    assert standard_error.min() > 0
    difference = (log_evidence - log_evidence.mean()) ** 2 / np.mean(standard_error**2)
    assert_mean(difference, 1)
    # The same test sees an error that is 15 % off.
    assert abs(np.mean(difference) - 1) < 0.15
