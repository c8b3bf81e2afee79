"""The estimators to compare with: what each estimates, and that all have the value of the chain."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import mh_gradient as mh
from tests.mh_gradient.truths import derivative, on_a_line, on_states
from tests.statistics import assert_mean, z_score

KEYS = jax.random.split(jax.random.key(2), 200)
SHORT = {"num_steps": 10, "num_chains": 100}


def log_normal(theta, x):
    return -jnp.sum((x - theta) ** 2) / 2


def second(theta, x):
    return theta * x[0] ** 2


def made(which, **options):
    return which(log_normal, second, mh.RandomWalk(2.38), jnp.zeros(1), **options)


def exact(num_steps):
    def mean(theta):
        return theta * on_a_line(lambda x: -((x - theta) ** 2) / 2, lambda x: x**2, 2.38, num_steps, 0, 0.0)

    return derivative(mean, 0.5)


def gradients(expectation):
    return np.asarray(jax.lax.map(lambda key: jax.grad(expectation)(0.5, key), KEYS))


def test_the_value_is_that_of_the_coupled_estimator():
    coupled = lehr.mh_expectation(
        log_normal, second, mh.RandomWalk(2.38), mh.MaximalReflection(), jnp.zeros(1), **SHORT
    )
    for which in (mh.covariance_expectation, mh.score_expectation, mh.difference_expectation):
        assert made(which, **SHORT)(0.5, KEYS[0]) == pytest.approx(float(coupled(0.5, KEYS[0])), rel=1e-6)


@pytest.mark.parametrize("baseline", [True, False])
def test_the_score_is_unbiased_for_a_finite_chain(baseline):
    found = gradients(made(mh.score_expectation, baseline=baseline, **SHORT))
    assert found.std() < (0.4 if baseline else 0.8)
    assert_mean(found, exact(10))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_the_score_of_single_spins(dtype):
    """Three on a ring, turned one at a time: exact by powers of the kernel."""
    states = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    neighbours = (np.abs(states[:, None] - states).sum(axis=2) == 2) / 3

    def mean(theta):
        logs = theta * (np.sum(states * np.roll(states, 1, axis=1), axis=1) + 0.3 * states.sum(axis=1))
        return on_states(logs, neighbours, states[:, 0] * states[:, 1] + states[:, 2], 10, 0, len(states) - 1)

    expectation = mh.score_expectation(
        lambda theta, x: theta * jnp.sum(x * jnp.roll(x, 1) + 0.3 * x),
        lambda x: x[0] * x[1] + 1.0 * x[2],
        mh.SpinFlip(),
        jnp.ones(3, dtype),
        **SHORT,
    )
    found = gradients(expectation)
    assert found.std() < 0.5
    assert_mean(found, derivative(mean, 0.5))


def test_a_baseline_takes_variance_away():
    plain, better = (
        gradients(made(mh.score_expectation, baseline=baseline, num_steps=40, num_chains=50)).var()
        for baseline in (False, True)
    )
    assert better < 0.5 * plain


def test_differences_are_those_of_the_finite_chain():
    found = gradients(made(mh.difference_expectation, step=0.05, **SHORT))
    # The bias is of order 0.05^2.
    assert abs(found.mean() - exact(10)) < 5 * found.std() / len(found) ** 0.5 + 0.01
    assert found.std() < 0.3


def test_the_covariance_is_that_of_the_stationary_law_and_not_of_a_short_chain():
    # d/dtheta of theta (theta^2 + 1)
    truth = 3 * 0.5**2 + 1
    long = gradients(made(mh.covariance_expectation, num_steps=120, burn_in=20, num_chains=50))
    assert_mean(long, truth)
    start = jnp.full(1, 3.0)
    short = [
        gradients(which(log_normal, lambda x: x[0], mh.RandomWalk(2.38), start, num_steps=2, num_chains=100))
        for which in (mh.covariance_expectation, mh.score_expectation)
    ]
    truth = derivative(
        lambda theta: on_a_line(lambda x: -((x - theta) ** 2) / 2, lambda x: x, 2.38, 2, 0, 3.0, half_width=12.0), 0.5
    )
    assert abs(z_score(short[0], truth)) > 5
    assert_mean(short[1], truth)


def test_the_covariance_varies_more_for_a_scale():
    """d E[x^2] / d log s, whose score x^2 - 1 has heavy tails; the specification has a ratio of variances of 2.8."""

    def log_density(log_scale, x):
        return -jnp.sum(x**2) * jnp.exp(-2 * log_scale) / 2 - log_scale

    def square(x):
        return x[0] ** 2

    walk, settings = mh.RandomWalk(2.38), {"num_steps": 200, "burn_in": 50}
    by_gradient, by_distance = (
        lehr.mh_expectation(
            log_density, square, walk, mh.MaximalReflection(), jnp.zeros(1), strength=strength, **settings
        )
        for strength in ("gradient", "distance")
    )
    covariance = mh.covariance_expectation(log_density, square, walk, jnp.zeros(1), **settings)
    keys = jax.random.split(jax.random.key(0), 4000)
    gradient, distance, other = (
        np.asarray(jax.jit(jax.vmap(jax.grad(of), (None, 0)))(0.0, keys))
        for of in (by_gradient, by_distance, covariance)
    )
    assert abs(z_score(gradient, 2.0)) < 4
    assert abs(z_score(distance, 2.0)) < 4
    ratios = [other.var() / gradient.var(), other.var() / distance.var()]
    assert ratios == pytest.approx([4.5, 1.7], rel=0.25)
    assert ratios[0] > 2.8


def test_the_heat_bath_has_a_covariance_too():
    def log_density(field, x):
        return field * jnp.sum(x) + 0.3 * x[0] * x[1]

    expectation = mh.covariance_expectation(
        log_density,
        lambda x: x[0] * x[1],
        mh.HeatBath(np.arange(2)),
        jnp.ones(2),
        num_steps=300,
        burn_in=20,
        num_chains=8,
    )
    states = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])

    def mean(field):
        weights = np.exp(field * states.sum(axis=1) + 0.3 * states.prod(axis=1))
        return weights @ states.prod(axis=1) / weights.sum()

    found = np.asarray(jax.lax.map(lambda key: jax.grad(expectation)(0.4, key), KEYS))
    # Its bias is of order 1 / 2,400, below the error.
    assert abs(z_score(found, derivative(mean, 0.4))) < 5
    assert found.std() < 0.2


def test_what_they_cannot_do_they_say():
    ratio = mh.DensityRatio(lambda theta, x_new, x: 1.0)
    with pytest.raises(lehr.InputError, match=r"use lehr\.mh_expectation"):
        mh.covariance_expectation(ratio, second, mh.RandomWalk(1.0), jnp.zeros(1), num_steps=3)
    with pytest.raises(lehr.InputError, match="at least 2"):
        made(mh.score_expectation, num_steps=3)
    with pytest.raises(lehr.InputError, match="without parameters and drift"):
        mh.score_expectation(log_normal, second, mh.MALA(1.0), jnp.zeros(1), num_steps=3, num_chains=2)
    with pytest.raises(lehr.InputError, match="step must be positive"):
        made(mh.difference_expectation, num_steps=3, step=0.0)
    with pytest.raises(lehr.InputError, match="burn_in must be below"):
        made(mh.covariance_expectation, num_steps=3, burn_in=3)
    for which in (mh.covariance_expectation, mh.score_expectation, mh.difference_expectation):
        with pytest.raises(lehr.InputError, match="cannot be differentiated again"):
            jax.grad(jax.grad(made(which, **SHORT)))(0.5, KEYS[0])
