"""The tuned path: equal steps of the barrier, step sizes towards the wanted acceptance, gradients counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr.pilot import Pilot
from lehr.smc import PathStatistics
from lehr.tuned_path import TARGET_ACCEPTANCE, TunedPath
from tests import targets


def pilot_of(barrier, betas, log_step_size, log_scale):
    """A pilot run that saw what is given, with rows to spare at the end as real ones have."""
    size, dimension = log_scale.shape

    def padded(values, filling):
        rest = np.full((3, *np.shape(values)[1:]), filling)
        return jnp.asarray(np.concatenate([values, rest]), jnp.float32)

    positions = jnp.zeros((4, dimension))
    return Pilot(
        padded(betas, 1.0),
        padded(barrier, barrier[-1]),
        padded(log_step_size, 7.0),
        padded(log_scale, 7.0),
        jnp.array(size, jnp.int32),
        jnp.array(100, jnp.int32),
        jnp.array(True),
        positions,
        positions[None],
        jnp.zeros(()),
    )


def typical(total=3.0):
    """Most of the barrier at high temperature; coordinates that narrow at different rates."""
    betas = np.array([0.01, 0.05, 0.2, 0.5, 1.0])
    barrier = total * np.array([0.3, 0.5, 0.7, 0.9, 1.0])
    log_scale = np.log(np.linspace([2.0, 3.0], [0.5, 2.0], 5))
    return pilot_of(barrier, betas, np.log(np.linspace(0.9, 0.6, 5)), log_scale)


def seen(path, *, discrepancy, acceptance, scale):
    """What two populations saw, whose means are the given values."""
    k, dimension = path.num_steps, path.log_scale.shape[1]

    def full(values, *shape):
        return jnp.asarray(np.broadcast_to(values, shape), jnp.float32)

    mean = PathStatistics(
        full(0, k),
        full(discrepancy, k),
        full(10, k),
        full(acceptance, k),
        full(scale, k, dimension),
        full(0, k + 1),
        full(0, k + 1),
    )
    return jax.tree.map(lambda leaf: jnp.stack([0.9 * leaf, 1.1 * leaf]), mean)


def assert_increasing(betas):
    assert betas[0] == 0
    assert betas[-1] == 1
    assert np.all(np.diff(betas) > 0)


class TestFromAPilot:
    def test_temperatures_increase_in_equal_steps_of_the_barrier(self):
        run = typical()
        path = TunedPath.from_pilot(run)
        assert_increasing(path.betas)
        barrier = np.interp(path.betas, [0, *run.betas[:5]], [0, *run.barrier[:5]])
        # Not quite equal, because a straight floor keeps the spacing bounded where there is no barrier.
        np.testing.assert_allclose(np.diff(barrier), barrier[-1] / path.num_steps, rtol=0.2)

    def test_steps_grow_with_the_square_of_the_barrier(self):
        lengths = [TunedPath.from_pilot(typical(total)).num_steps for total in (0.2, 3.0, 6.0)]
        assert lengths[0] == 16
        # Their number may be rounded up.
        assert 72 <= lengths[1] <= 90
        assert 288 <= lengths[2] <= 352

    def test_steps_are_bounded(self):
        assert TunedPath.from_pilot(typical(1000.0)).num_steps == 512
        assert TunedPath.from_pilot(typical(), max_steps=16).num_steps == 16

    def test_a_trajectory_is_a_quarter_of_a_period(self):
        run = typical()
        path = TunedPath.from_pilot(run)
        step = np.exp(np.median(np.asarray(run.log_step_size[:5])))
        assert abs(path.num_leapfrog * step - np.pi / 2) <= step / 2 + 1e-6
        tiny = TunedPath.from_pilot(pilot_of(np.ones(1), np.ones(1), np.full(1, -9.0), np.zeros((1, 2))))
        huge = TunedPath.from_pilot(pilot_of(np.ones(1), np.ones(1), np.full(1, 9.0), np.zeros((1, 2))))
        assert (tiny.num_leapfrog, huge.num_leapfrog) == (10, 1)

    def test_it_ends_with_the_scales_and_step_size_of_the_target(self):
        path = TunedPath.from_pilot(typical())
        np.testing.assert_allclose(np.exp(path.log_scale[-1]), [0.5, 2.0], rtol=1e-5)
        np.testing.assert_allclose(np.exp(path.log_step_size[-1]), 0.6, rtol=1e-5)
        assert np.all(np.diff(path.log_scale, axis=0) <= 0)

    def test_a_barrier_of_zero(self):
        path = TunedPath.from_pilot(pilot_of(np.zeros(1), np.ones(1), np.zeros(1), np.zeros((1, 2))))
        assert_increasing(path.betas)
        assert path.num_steps == 16


class TestAfterARun:
    @pytest.fixture
    def path(self):
        return TunedPath(np.linspace(0, 1, 21), np.full(20, np.log(0.7)), np.zeros((20, 2)), 3)

    def test_temperatures_move_to_where_the_barrier_is(self, path):
        discrepancy = np.linspace(0.2, 0.05, path.num_steps) ** 2
        after = path.after(seen(path, discrepancy=discrepancy, acceptance=0.8, scale=1.0))
        assert_increasing(after.betas)
        assert after.num_steps == path.num_steps
        barrier = np.concatenate([[0], np.cumsum(np.sqrt(discrepancy))])
        steps = np.diff(np.interp(after.betas, path.betas, barrier))
        np.testing.assert_allclose(steps, barrier[-1] / path.num_steps, rtol=0.15)
        assert after.betas[1] < path.betas[1]

    def test_step_sizes_move_towards_the_acceptance(self, path):
        acceptance = np.linspace(0.95, 0.5, path.num_steps)
        # Where the steps are already equal, temperatures stay where they are.
        after = path.after(seen(path, discrepancy=0.01, acceptance=acceptance, scale=1.0))
        np.testing.assert_allclose(after.betas, path.betas, atol=1e-6)
        change = after.log_step_size - path.log_step_size
        np.testing.assert_allclose(change, acceptance - TARGET_ACCEPTANCE, atol=1e-5)

    def test_it_settles_at_the_acceptance(self, path):
        for _ in range(30):
            # As of HMC: an error of second order in the step.
            acceptance = np.exp(-np.exp(2 * path.log_step_size))
            path = path.after(seen(path, discrepancy=0.01, acceptance=acceptance, scale=1.0))
        np.testing.assert_allclose(np.exp(-np.exp(2 * path.log_step_size)), TARGET_ACCEPTANCE, atol=0.01)

    def test_scales_are_those_seen(self, path):
        scale = np.linspace([1.0, 4.0], [0.2, 8.0], path.num_steps)
        after = path.after(seen(path, discrepancy=0.01, acceptance=0.8, scale=scale))
        np.testing.assert_allclose(np.exp(after.log_scale[-1]), [0.2, 8.0], rtol=1e-5)
        assert np.all(np.diff(after.log_scale, axis=0) * [1, -1] <= 0)

    def test_no_discrepancy_and_no_spread_are_no_trouble(self, path):
        after = path.after(seen(path, discrepancy=0.0, acceptance=0.8, scale=0.0))
        assert_increasing(after.betas)
        assert np.all(np.isfinite(after.log_scale))

    def test_the_leapfrogs_stay(self, path):
        after = path.after(seen(path, discrepancy=0.01, acceptance=1.0, scale=1.0))
        assert after.num_leapfrog == path.num_leapfrog
        assert after.num_gradients == path.num_gradients == path.num_steps * path.num_leapfrog + 1


def test_the_annealer_follows_the_path():
    path = TunedPath.from_pilot(typical())
    annealer = path.annealer(targets.base_2d(), jnp.float32)
    np.testing.assert_allclose(annealer.schedule.betas, path.betas, atol=1e-6)
    move = annealer.kernel.kernel
    np.testing.assert_allclose(np.exp(move.log_step_size)[:, 0], np.exp(path.log_step_size), rtol=1e-5)
    np.testing.assert_allclose(np.exp(move.log_momentum_scale), np.exp(-path.log_scale), rtol=1e-5)
    assert move.num_leapfrog == path.num_leapfrog
    assert annealer.kernel.exact
