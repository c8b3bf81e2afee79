"""Weighted particles: values by hand, and a standard error that tells the truth."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr import WeightedParticles
from lehr.weighted import log_mean_exp, pareto_k
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


def generalised_pareto(rng, shape, n):
    """log w of draws with density proportional to (1 + k w)^(-1/k - 1)."""
    return np.log(np.expm1(-shape * np.log(rng.random(n))) / shape)


class TestParetoK:
    @pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 1.0])
    def test_known_shapes(self, shape):
        rng = np.random.default_rng(0)
        estimates = [pareto_k(generalised_pareto(rng, shape, 4000)) for _ in range(200)]
        tail = int(np.ceil(3 * np.sqrt(4000)))
        # The prior weighs ten values at 0.5; the fit itself is biased by less than 1 / sqrt(tail) / 3.
        assert np.mean(estimates) == pytest.approx((tail * shape + 5) / (tail + 10), abs=0.025)
        # The asymptotic standard deviation of the maximum likelihood estimate, for k > -1/2.
        assert np.std(estimates) == pytest.approx((1 + shape) / np.sqrt(tail), rel=0.25)

    @pytest.mark.parametrize("n", [21, 100, 5000])
    @pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
    def test_agrees_with_arviz(self, n, spread):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            arviz = pytest.importorskip("arviz")
        log_weights = spread * np.random.default_rng(n).standard_normal(n) - 1000
        assert pareto_k(log_weights) == pytest.approx(float(arviz.psislw(log_weights.copy())[1]), abs=1e-6)

    def test_a_shift_and_the_order_do_not_matter(self):
        rng = np.random.default_rng(1)
        log_weights = rng.standard_normal(400).astype(np.float32)
        expected = pareto_k(log_weights)
        assert pareto_k(rng.permutation(log_weights)) == expected
        assert pareto_k(log_weights.astype(np.float64) - 1e4) == pytest.approx(expected, abs=1e-6)

    def test_of_particles(self):
        log_weights = jnp.asarray(np.random.default_rng(2).standard_normal(300), jnp.float32)
        assert WeightedParticles(jnp.zeros((300, 1)), log_weights).pareto_k == pareto_k(log_weights)

    def test_no_tail(self):
        assert pareto_k(np.full(100, -7.0)) == -math.inf
        # A population resampled at the end has equal weights: no tail, although another has less weight.
        assert pareto_k(np.repeat([-7.0, -7.1], 1000)) == -math.inf
        # Sixteen such populations: a tail of 64 equal values, as bounded as can be.
        assert -math.inf < pareto_k(np.repeat(np.linspace(0, 1, 16), 64)) < -1
        # The grid of b holds an exact zero here.
        assert math.isfinite(pareto_k(np.concatenate([np.zeros(100), np.full(100, -0.5), np.full(1400, -1.0)])))

    def test_too_few_to_tell(self):
        assert pareto_k(np.linspace(0, 1, 20)) == math.inf
        assert math.isfinite(pareto_k(np.linspace(0, 1, 21)))
        assert pareto_k(np.array([0.0] + 99 * [-math.inf])) == math.inf
        assert pareto_k(np.array([0.0, 0.1, 0.2, 0.3] + 99 * [-1.0])) == math.inf
        assert pareto_k(np.array([math.inf] + 99 * [0.0])) == math.inf

    def test_weights_of_zero_count_as_weights(self):
        log_weights = np.random.default_rng(3).standard_normal(300)
        zeros = np.concatenate([log_weights, np.full(300, -math.inf)])
        assert pareto_k(zeros) == pareto_k(np.concatenate([log_weights, np.full(300, -50.0)]))

    def test_not_known(self):
        assert math.isnan(pareto_k(np.array([math.nan] + 99 * [0.0])))
        assert math.isnan(pareto_k(np.full(99, -math.inf)))
