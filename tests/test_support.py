"""Where a density is NaN, zero or infinite: counted as it is, refused where nothing can be estimated."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from lehr import InputError
from lehr.path import Problem
from lehr.support import Guarded, look_at
from tests import targets


class Faulty(eqx.Module):
    """A standard normal but for constants: a NaN, a zero or an infinite density beyond thresholds of x_0."""

    nan_above: jax.Array
    zero_below: jax.Array
    infinite_above: jax.Array

    def __call__(self, x):
        value = -jnp.sum(x**2) / 2
        value = jnp.where(x[0] < self.zero_below, -jnp.inf, value)
        value = jnp.where(x[0] > self.infinite_above, jnp.inf, value)
        return jnp.where(x[0] > self.nan_above, jnp.nan, value)


def faulty(nan_above=math.inf, zero_below=-math.inf, infinite_above=math.inf):
    target = Faulty(*(jnp.array(float(value)) for value in (nan_above, zero_below, infinite_above)))
    return Problem(targets.Gaussian(jnp.zeros(2), jnp.eye(2)), target)


def assert_share(count, num_draws, share):
    error = math.sqrt(num_draws * share * (1 - share))
    assert abs(count - num_draws * share) < 5 * error


def test_a_density_without_faults_costs_few_draws(key):
    support = look_at(key, faulty())
    assert support == (4096, 0, 0)
    assert support.log_share == 0


def test_faults_are_counted_on_many_draws(key):
    support = look_at(key, faulty(nan_above=2.0, zero_below=-0.5))
    assert support.num_draws == 65_536
    assert_share(support.num_invalid, support.num_draws, norm.sf(2.0))
    assert_share(support.num_outside, support.num_draws, norm.cdf(-0.5))
    np.testing.assert_allclose(support.log_share, np.log(norm.cdf(2.0) - norm.cdf(-0.5)), atol=0.02)


def test_nan_and_zero_are_told_apart(key):
    assert look_at(key, faulty(nan_above=1.0)).num_outside == 0
    assert look_at(key, faulty(zero_below=-1.0)).num_invalid == 0


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (faulty(infinite_above=3.0), r"\+inf at \d+ of 4096 draws"),
        (faulty(infinite_above=-math.inf), r"\+inf at 4096 of 4096"),
        (faulty(nan_above=-math.inf), "density is NaN at all of 4096"),
        (faulty(zero_below=math.inf), "zero or NaN at all of 4096"),
        (faulty(zero_below=0.0, nan_above=0.0), "zero or NaN at all of 4096"),
    ],
    ids=["infinite in the tail", "infinite", "NaN", "zero", "zero or NaN"],
)
def test_nothing_can_be_estimated(problem, message):
    with pytest.raises(InputError, match=message):
        look_at(jax.random.key(0), problem)


def test_the_same_key_sees_the_same(key):
    problem = faulty(nan_above=1.5)
    assert look_at(key, problem) == look_at(key, problem)
    assert look_at(key, problem) != look_at(jax.random.fold_in(key, 1), problem)


class TestGuarded:
    def test_nan_becomes_density_zero(self):
        guarded = Guarded(faulty(nan_above=1.0).log_target)
        assert guarded(jnp.array([2.0, 0.0])) == -jnp.inf

    def test_the_rest_is_left_alone(self):
        plain = faulty(nan_above=1.0, zero_below=-1.0, infinite_above=0.5).log_target
        for x in (jnp.array([0.3, -0.4]), jnp.array([-2.0, 0.0]), jnp.array([0.7, 0.0])):
            assert Guarded(plain)(x) == plain(x)
        x = jnp.array([0.3, -0.4])
        np.testing.assert_array_equal(jax.grad(Guarded(plain))(x), -x)
