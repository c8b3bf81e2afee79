"""The pilot: it reaches the target by steps of equal discrepancy, and learns its scales and step sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr.path import Problem
from lehr.pilot import pilot
from tests import targets

SCALES = np.array([0.05, 1.0, 4.0])


@pytest.fixture(scope="module")
def run():
    base = targets.Gaussian(jnp.zeros(3), 3 * jnp.eye(3))
    target = targets.Gaussian(jnp.array([0.5, -1.0, 2.0]), jnp.diag(jnp.asarray(SCALES)))
    problem = Problem(base, lambda x: target.log_prob(x) + 7)
    return pilot(jax.random.key(1), problem, num_particles=1000)


def test_it_ends_at_the_target(run):
    steps = int(run.num_steps)
    betas = np.asarray(run.betas)
    assert run.finished
    assert betas[steps - 1] == 1
    assert np.all(np.diff(betas[:steps]) > 0)
    np.testing.assert_allclose(np.std(run.positions, axis=0), SCALES, rtol=0.15)
    assert np.all(np.abs(np.asarray(run.positions).mean(axis=0) - np.array([0.5, -1.0, 2.0])) < 0.3 * SCALES)
    np.testing.assert_allclose(run.log_evidence, 7, atol=0.3)


def test_steps_are_of_equal_discrepancy(run):
    steps = np.diff(np.asarray(run.barrier[: int(run.num_steps)]), prepend=0)
    # An effective share of 0.7 is a discrepancy of -log 0.7; the last step is what was left.
    np.testing.assert_allclose(steps[:-1], np.sqrt(-np.log(0.7)), rtol=0.01)
    assert steps[-1] <= np.sqrt(-np.log(0.7)) * 1.01


def test_scales_and_step_sizes_fit_the_target(run):
    last = int(run.num_steps) - 1
    np.testing.assert_allclose(np.exp(run.log_scale[last]), SCALES, rtol=0.15)
    # In standard deviations: a leapfrog is stable below 2.
    assert 0.3 < float(jnp.exp(run.log_step_size[last])) < 2


def test_gradients_are_counted(run):
    assert int(run.num_gradients) == 1000 * (1 + (int(run.num_steps) * 2 + 8) * 4)


def test_a_path_too_steep_is_said_to_be_unfinished(key):
    base = targets.Gaussian(jnp.zeros(1), jnp.eye(1))
    far = targets.Gaussian(jnp.full(1, 1000.0), jnp.eye(1))
    short = pilot(key, Problem(base, far.log_prob), num_particles=16, max_steps=5)
    assert not short.finished
    assert int(short.num_steps) == 5


def test_nan_is_density_zero(key):
    base = targets.Gaussian(jnp.zeros(1), jnp.eye(1))
    run = pilot(key, Problem(base, lambda x: -jnp.sum(x**2) / 2 + 0 * jnp.log(x[0])), num_particles=1000)
    assert np.all(np.asarray(run.positions) > 0)
    np.testing.assert_allclose(run.log_evidence, 0.5 * np.log(np.pi / 2), atol=0.15)


def test_draws_at_the_end_are_the_targets(run):
    assert run.draws.shape == (8, *run.positions.shape)
    np.testing.assert_array_equal(run.draws[-1], run.positions)
