"""The arithmetic that float32 depends on, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr.numerics import bernoulli_log_prob, compensated_add, inverse_of_lower, normal, softplus, uniform_pairs

LOGITS = np.array([-1e30, -1e4, -200.0, -80.0, -20.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0, 80.0, 200.0, 1e4, 1e30])


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2, 1, 10)])
def test_normal_draws_the_numbers_of_jax(shape):
    key = jax.random.key(3)
    np.testing.assert_array_equal(normal(key, shape, jnp.float32), jax.random.normal(key, shape, jnp.float32))


def test_uniform_pairs_are_uniform_and_independent():
    """Of a thousand keys: moments, and what each number has to do with the other of its pair, and with the next."""
    n = 1000
    pairs = np.asarray(jax.vmap(lambda key: uniform_pairs(key, n, jnp.float32))(jax.random.split(jax.random.key(5), n)))
    assert pairs.shape == (n, 2, n)
    # Else they took the time of two draws.
    assert np.any(pairs[0] != np.asarray(jax.random.uniform(jax.random.split(jax.random.key(5), n)[0], (2, n))))
    assert pairs.min() >= 0
    assert pairs.max() < 1
    centred = (pairs.astype(np.float64) - 0.5) * 12**0.5
    first, second = centred[:, 0], centred[:, 1]
    products = {
        "mean": centred,
        "square": (centred**2 - 1) / 0.8**0.5,
        "in a pair": first * second,
        "next": first[:, 1:] * first[:, :-1],
        "next of the other": first[:, 1:] * second[:, :-1],
        "next key": first[1:] * first[:-1],
        "squares in a pair": (first**2 - 1) * (second**2 - 1) / 0.8,
    }
    for name, product in products.items():
        assert abs(product.mean()) * product.size**0.5 < 5, name
    counts = np.bincount((pairs.ravel() * 256).astype(int), minlength=256)
    expected = pairs.size / 256
    assert abs(np.sum((counts - expected) ** 2) / expected - 255) < 5 * (2 * 255) ** 0.5


def test_uniform_pairs_of_other_generators_and_precisions(x64):
    for key, dtype in ((jax.random.key(0, impl="rbg"), jnp.float32), (jax.random.key(0), jnp.float64)):
        first, second = np.asarray(uniform_pairs(key, 1000, dtype))
        assert first.dtype == dtype
        assert abs(first.mean() - 0.5) < 5 / 12_000**0.5
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 1000**0.5


def test_softplus_and_two_derivatives():
    x = jnp.asarray(LOGITS, jnp.float32)
    truth = np.asarray(x, np.float64)
    derivative = jax.grad(softplus)
    # Relative: below -20 a value that is merely close to zero would have lost all its digits.
    np.testing.assert_allclose(softplus(x), np.logaddexp(0, truth), rtol=2e-6, atol=1e-37)
    np.testing.assert_allclose(jax.vmap(derivative)(x), sigmoid(truth), rtol=2e-5, atol=1e-37)
    # s(x) s(-x) is tiny, not 0 * inf, at both ends.
    second = jax.vmap(jax.grad(derivative))(x)
    np.testing.assert_allclose(second, sigmoid(truth) * sigmoid(-truth), rtol=2e-5, atol=1e-7)


def test_softplus_keeps_float32_under_x64(x64):
    assert softplus(jnp.ones(2, jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("bit", [0.0, 1.0])
def test_bernoulli_log_prob_and_gradient(bit):
    x = jnp.asarray(LOGITS, jnp.float32)
    truth = np.asarray(x, np.float64)
    bits = jnp.full_like(x, bit)
    value = bernoulli_log_prob(x, bits)
    # log(1 - p) = log sigmoid(-x): the textbook bit log p + (1 - bit) log(1 - p) is -inf or NaN from 20 upwards.
    np.testing.assert_allclose(value, -np.logaddexp(0, -truth if bit else truth), rtol=2e-6, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(bernoulli_log_prob(x, bits)))(x)
    np.testing.assert_allclose(gradient, bit - sigmoid(truth), rtol=2e-5, atol=1e-6)


def test_bernoulli_probabilities_sum_to_one():
    x = jnp.linspace(-5, 5, 11)
    total = jnp.exp(bernoulli_log_prob(x, jnp.ones(11))) + jnp.exp(bernoulli_log_prob(x, jnp.zeros(11)))
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def compensated_sum(terms, start=0.0):
    def step(carry, term):
        return compensated_add(*carry, term), None

    zero = jnp.zeros((), terms.dtype)
    (total, lost), _ = jax.lax.scan(step, (zero + start, zero), terms)
    return total, lost


def test_compensated_sum_is_exact_to_one_rounding():
    rng = np.random.default_rng(0)
    terms = (100 + rng.normal(size=1000)).astype(np.float32)
    exact = np.sum(terms, dtype=np.float64)
    total, lost = compensated_sum(jnp.asarray(terms))
    plain = jax.lax.scan(lambda total, term: (total + term, None), jnp.float32(0), jnp.asarray(terms))[0]
    assert abs(float(total + lost) - exact) <= np.spacing(np.float32(exact)) / 2
    assert abs(float(plain) - exact) > 5 * np.spacing(np.float32(exact))


def test_compensated_sum_recovers_what_a_huge_term_hides():
    # The branch of Neumaier that Kahan's sum lacks: the term is larger than the total.
    total, lost = compensated_sum(jnp.array([1.0, 1e9, 1.0, -1e9], jnp.float32))
    assert total + lost == 2


@pytest.mark.parametrize("position", [0, 1, 3])
def test_compensated_sum_of_minus_infinity(position):
    # A particle outside the support has weight zero, not NaN.
    terms = jnp.array([1.0, -2.0, 3.0, 0.5]).at[position].set(-jnp.inf)
    total, lost = compensated_sum(terms)
    assert total + lost == -jnp.inf


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 20])
def test_inverse_of_a_triangular_matrix_and_its_gradient(dim, x64):
    rng = np.random.default_rng(dim)
    scale = np.linalg.cholesky(np.cov(rng.normal(size=(dim, 2 * dim))).reshape(dim, dim))
    inverse = inverse_of_lower(jnp.asarray(scale + np.triu(rng.normal(size=(dim, dim)), 1)))
    np.testing.assert_allclose(inverse, np.linalg.inv(scale), atol=1e-10)
    weight = rng.normal(size=(dim, dim))
    gradient = jax.grad(lambda scale: jnp.sum(weight * inverse_of_lower(scale)))(jnp.asarray(scale))
    # d(L^-1) = -L^-1 dL L^-1.
    exact = np.tril(-np.linalg.inv(scale).T @ weight @ np.linalg.inv(scale).T)
    np.testing.assert_allclose(gradient, exact, atol=1e-8 * np.abs(exact).max())
