"""Fitted bases: on a Gaussian target everything is exact; several modes, plateaus and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.bijections import Affine, Chain, TriangularAffine

from lehr import InputError, bases
from lehr.bases import find_modes, laplace, moment_matched
from lehr.transport import PulledBack, gaussian_map
from tests import targets

STARTS = jnp.array([[2.0, 1.0], [-3.0, 0.5], [0.0, 0.0]])


def covariance(bijection):
    scale = jax.jacobian(bijection.transform)(jnp.zeros(bijection.shape))
    return np.asarray(scale @ scale.T)


@pytest.mark.parametrize("full_rank", [True, False])
def test_laplace_of_a_gaussian_is_exact(monkeypatch, full_rank):
    target = targets.conjugate_2d()
    if not full_rank:
        monkeypatch.setattr(bases, "LARGEST_FULL_RANK", 1)
    modes, num_gradients = find_modes(target, STARTS)
    assert len(modes) == 1
    assert 5 < num_gradients < 200
    bijection = laplace(modes)
    exact = np.asarray(target.posterior.scale_tril @ target.posterior.scale_tril.T)
    np.testing.assert_allclose(bijection.transform(jnp.zeros(2)), target.posterior.loc, atol=1e-3)
    if full_rank:
        np.testing.assert_allclose(covariance(bijection), exact, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(modes[0].log_evidence, target.log_evidence, atol=1e-3)
    else:
        np.testing.assert_allclose(covariance(bijection), np.diag(1 / np.diag(np.linalg.inv(exact))), rtol=1e-3)


def test_modes_are_found_once_each_and_covered():
    def two(x):
        return jnp.logaddexp(-jnp.sum((x - 3) ** 2) / 2, -jnp.sum((x + 3) ** 2) / 2 - 1)

    modes, _ = find_modes(two, jnp.array([[2.0, 1.0], [-3.0, 0.5], [2.5, 2.0], [-1.0, -1.0]]))
    np.testing.assert_allclose([mode.loc for mode in modes], [[3, 3], [-3, -3]], atol=1e-3)
    np.testing.assert_allclose(modes[0].log_evidence - modes[1].log_evidence, 1, atol=1e-3)
    both = laplace(modes)
    np.testing.assert_allclose(both.transform(jnp.zeros(2)), 0, atol=1e-3)
    np.testing.assert_allclose(covariance(both), [[10, 9], [9, 10]], atol=0.01)
    np.testing.assert_allclose(covariance(laplace(modes, within=0.5)), np.eye(2), atol=0.01)


def test_a_direction_without_curvature_gets_unit_variance():
    modes, _ = find_modes(lambda x: -2 * x[0] ** 2, STARTS[:1])
    np.testing.assert_allclose(covariance(laplace(modes)), np.diag([0.25, 1]), rtol=1e-4)


def test_moments_of_many_draws_and_of_few(key):
    exact = targets.conjugate_2d().posterior
    draws = exact.sample(key, (20_000,))
    many = moment_matched(draws)
    np.testing.assert_allclose(covariance(many), np.cov(np.asarray(draws).T), atol=0.003)
    wide = jax.random.normal(key, (30, 50)) * jnp.linspace(0.1, 10, 50)
    few = covariance(moment_matched(wide))
    assert np.all(np.linalg.eigvalsh(few) > 0)
    np.testing.assert_allclose(np.diag(few), np.var(wide, axis=0), rtol=0.3)


def test_starts_outside_the_support_are_left_out():
    def positive(x):
        return jnp.sum(jnp.where(x > 0, jnp.log(x) - x, -jnp.inf))

    modes, _ = find_modes(positive, jnp.array([[2.0, 1.0], [-3.0, 0.5]]))
    np.testing.assert_allclose(modes[0].loc, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_modes(lambda x: jnp.sum(x) * jnp.nan, STARTS), "any of the 3 starts"),
        (lambda: find_modes(lambda x: -jnp.sum(jnp.abs(x) ** 1.5), jnp.zeros((1, 2))), "second derivative"),
        (lambda: moment_matched(jnp.array([[1.0, 2.0], [1.0, 3.0]])), "do not vary"),
        (lambda: moment_matched(jnp.array([[1.0, 2.0], [jnp.nan, 3.0]])), "not finite"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


class TestPulledBack:
    def test_the_evidence_is_kept(self):
        target = targets.mixture_1d()
        grid = jnp.linspace(-20, 20, 20_001)[:, None]
        bijection = gaussian_map(jnp.array([0.7]), jnp.array([1.8]))
        log_density = jax.vmap(PulledBack(target, bijection))(grid)
        log_z = jax.nn.logsumexp(log_density) + np.log(40 / 20_000)
        np.testing.assert_allclose(log_z, target.log_evidence, atol=1e-3)

    def test_a_gaussian_becomes_standard(self):
        target = targets.base_2d()
        pulled = PulledBack(target.log_prob, gaussian_map(target.loc, target.scale_tril))
        z = jnp.array([[0.3, -1.0], [2.0, 0.1]])
        expected = -np.sum(np.asarray(z) ** 2, axis=1) / 2 - np.log(2 * np.pi)
        np.testing.assert_allclose(jax.vmap(pulled)(z), expected, rtol=1e-5)
        np.testing.assert_allclose(pulled.push(z)[0], target.loc + target.scale_tril @ z[0], rtol=1e-5)

    def test_any_bijection_and_no_wider_type(self, x64):
        chain = Chain([Affine(jnp.ones(2), 2 * jnp.ones(2)), TriangularAffine(jnp.zeros(2), jnp.eye(2))])
        value = PulledBack(lambda x: -jnp.sum(x**2), chain)(jnp.zeros(2, jnp.float32))
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, -2 + 2 * np.log(2), rtol=1e-6)
