"""Greedy tuning: from steps that diverge, or do nothing, it finds those of a good bound; and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import Annealer, Hamiltonian, InputError, Langevin, Metropolis, Schedule, anneal, tune
from lehr.kernels import LearnedReverse, linear_drift
from tests import targets
from tests.statistics import assert_unbiased_weights

NUM_STEPS = 8


def far_base():
    """Narrower than the target, and beside it."""
    return targets.Gaussian(jnp.array([2.0, -1.5]), 0.6 * jnp.eye(2))


def bound(annealer, target):
    return float(jnp.mean(anneal(jax.random.key(3), annealer, target, 4_000).log_weights))


KERNELS = {
    "hamiltonian": lambda step_size: Hamiltonian(step_size, 0.5),
    "two leapfrogs": lambda step_size: Hamiltonian(step_size, num_leapfrog=2),
    "langevin": Langevin,
    "learned": lambda step_size: LearnedReverse(Langevin(step_size), linear_drift(2, momentum=False)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_from_wherever_it_begins_the_bound_is_near_that_of_the_best_single_size(name, key):
    target, base = targets.log_gamma_2d(), far_base()

    def with_size(step_size):
        return Annealer(base, Schedule.linear(NUM_STEPS), KERNELS[name](step_size))

    plain = {step_size: bound(with_size(step_size), target) for step_size in (0.02, 0.2, 0.4, 0.8, 4.0)}
    best = np.nanmax(list(plain.values()))
    # There is something to find: the smallest step does little, and the largest diverges.
    assert plain[0.02] < best - 0.3
    assert not plain[4.0] > best - 1
    for start in (0.02, 4.0):
        tuned, _ = tune(key, with_size(start), target)
        assert bound(tuned, target) > best - 0.15
        assert np.all(np.diff(tuned.schedule.betas) > 0)


def test_what_it_finds_is_an_annealer_like_any_other(key):
    setting = targets.coarse_setting()
    start = Annealer(setting.base, Schedule.linear(3), Hamiltonian(0.1, 0.5))
    tuned, _ = tune(key, start, setting.target)
    assert_unbiased_weights(anneal(key, tuned, setting.target, 50_000).log_weights, setting.target.log_evidence)
    assert jax.tree.structure(tuned) == jax.tree.structure(start)
    assert tuned.kernel.log_step_size.shape == (3, 1)  # pyright: ignore[reportAttributeAccessIssue]


def test_proportions_over_dimensions_stay(key):
    sizes = np.array([0.1, 0.4])
    tuned, _ = tune(key, Annealer(targets.base_2d(), Schedule.linear(4), Hamiltonian(sizes)), targets.log_gamma_2d())
    found = np.exp(tuned.kernel.log_step_size)  # pyright: ignore[reportAttributeAccessIssue]
    assert found.shape == (4, 2)
    np.testing.assert_allclose(found[:, 1] / found[:, 0], 4, rtol=1e-4)


def test_what_differs_by_step_moves_with_the_temperatures(key):
    logits = np.linspace(-1, 2, 8)[:, None]
    kernel = Hamiltonian(0.1, 1 / (1 + np.exp(-logits)), np.ones((8, 2)))
    start = Annealer(targets.base_2d(), Schedule.linear(8), kernel)
    tuned, _ = tune(key, start, targets.log_gamma_2d())
    found: Any = tuned.kernel
    old, new = (np.asarray(a.schedule.betas[1:], np.float64) for a in (start, tuned))
    assert np.abs(new - old).max() > 0.05
    # Each step has about the persistence that belonged to its temperature, and not to its number.
    at_its_place = np.interp(new, old, logits[:, 0])
    assert np.abs(found.logit_persistence[:, 0] - at_its_place).max() < 0.5 * np.abs(logits[:, 0] - at_its_place).max()
    np.testing.assert_allclose(found.momentum_scale, 1, rtol=1e-6)


class TestWhatItRefuses:
    start = Annealer(targets.base_2d(), Schedule.linear(2), Hamiltonian(0.1))

    def test_an_exact_kernel(self, key):
        exact = Annealer(self.start.base, self.start.schedule, Metropolis(Hamiltonian(0.1)))
        with pytest.raises(InputError, match="uncorrected"):
            lehr.tune(key, exact, targets.log_gamma_2d())

    def test_few_particles(self, key):
        with pytest.raises(InputError, match="at least 8"):
            tune(key, self.start, targets.log_gamma_2d(), num_particles=4)

    def test_a_density_that_is_not_finite(self, key):
        with pytest.raises(InputError, match="check the density"):
            tune(key, self.start, lambda x: jnp.nan * jnp.sum(x))
