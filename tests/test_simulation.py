"""The check on simulated data: the bounds hold where log Z is known, and a wrong posterior draw shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr import InputError
from lehr.path import Problem
from lehr.simulation import simulate_check
from tests import targets
from tests.statistics import THRESHOLD, z_score

# The given base, for which nothing is compiled anew for the next data set.
OPTIONS = {"fit_base": False, "max_gradients": 30_000, "num_particles": 16, "tolerance": 0.5, "progress": False}


def prior():
    return targets.Gaussian(jnp.array([0.5, -1.0]), jnp.array([[1.1, 0.0], [0.5, 0.8]]))


def simulator(*, shift=0.0, truths=None):
    """A linear model with a Gaussian prior, whose log Z is noted for every data set."""
    design, noise = jnp.array([[1.0, 0.4], [-0.3, 1.2], [0.6, 0.6]]), jnp.array(1.5)

    def simulate(key):
        key_x, key_y = jax.random.split(key)
        x = prior().sample(key_x)
        y = design @ x + noise * jax.random.normal(key_y, (3,))
        target = targets.ConjugateGaussian(prior(), design, noise, y)
        if truths is not None:
            truths.append(float(target.log_evidence))
        return Problem(prior(), target), x + shift

    return simulate


@pytest.fixture(scope="module")
def truths():
    return []


@pytest.fixture(scope="module")
def check(truths):
    return simulate_check(jax.random.key(0), simulator(truths=truths), **OPTIONS)


def test_the_bounds_hold_on_average(check, truths):
    assert len(truths) == len(check.lower) == 8
    # log Z differs by data set far more than the bounds do from it.
    assert np.std(truths) > 0.5
    assert z_score(check.lower - truths, 0) < THRESHOLD
    assert z_score(check.upper - truths, 0) > -THRESHOLD
    for bound in (check.lower, check.upper, check.approximate_upper):
        np.testing.assert_allclose(bound, truths, atol=0.5)


def test_the_gap_is_small_and_the_approximate_gap_agrees(check):
    gap, error = check.gap
    approximate, approximate_error = check.approximate_gap
    assert -THRESHOLD * error < gap < 0.3
    assert abs(gap - approximate) < THRESHOLD * np.hypot(error, approximate_error)
    np.testing.assert_allclose(gap, np.mean(check.upper - check.lower))


def test_a_wrong_posterior_draw_shows():
    check = simulate_check(jax.random.key(0), simulator(shift=4.0), **OPTIONS)
    gap, error = check.gap
    # Draws out of the posterior make 1/Z too large, so that the bounds change places.
    assert gap < -0.5
    assert gap < -3 * error
    # The runs' own draws are right.
    assert abs(check.approximate_gap[0]) < 0.3


def test_the_same_key_gives_the_same_numbers(check):
    fewer = simulate_check(jax.random.key(0), simulator(), num_simulations=2, **OPTIONS)
    np.testing.assert_array_equal(fewer.lower, check.lower[:2])
    np.testing.assert_array_equal(fewer.upper, check.upper[:2])


def test_it_can_be_read_and_stored(check):
    text, stored = str(check), check.to_dict()
    assert "8, of which" in text
    assert f"{check.num_gradients:,} gradients" in text
    assert stored["gap"] == list(check.gap)
    assert stored["lower"] == check.lower.tolist()
    # Two runs a data set, and none for nothing.
    assert 16 * 5000 < check.num_gradients <= 16 * 30_000


@pytest.mark.parametrize("num_simulations", [1, 0, -3])
def test_an_error_needs_two_simulations(num_simulations):
    with pytest.raises(InputError, match=f"at least 2, to tell an error, but it is {num_simulations}"):
        simulate_check(jax.random.key(0), simulator(), num_simulations=num_simulations)


def test_options_are_those_of_evidence():
    with pytest.raises(InputError, match="tolerance must be"):
        simulate_check(jax.random.key(0), simulator(), **OPTIONS | {"tolerance": -1.0})


@pytest.mark.slow
def test_a_numpyro_model():
    numpyro = pytest.importorskip("numpyro")
    from lehr.adapters.numpyro import simulator as from_model

    def model(y=None):
        loc = numpyro.sample("loc", numpyro.distributions.Normal(1.0, 1.0))
        scale = numpyro.sample("scale", numpyro.distributions.HalfNormal(1.0))
        numpyro.sample("y", numpyro.distributions.Normal(loc, 1 + scale), obs=y)

    simulate = from_model(model, jnp.zeros(3))
    check = simulate_check(jax.random.key(1), simulate, num_simulations=2, **OPTIONS)
    gap, error = check.gap
    assert np.all(np.isfinite([*check.lower, *check.upper]))
    # An error from two data sets says little.
    assert -THRESHOLD * error - 0.1 < gap < 0.3
    # Other data have another evidence.
    assert abs(check.lower[0] - check.lower[1]) > 0.05
