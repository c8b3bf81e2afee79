"""Step sizes and scales that are functions of beta are those rows, and have the gradient of those rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import objectives
from lehr.kernels import linear_drift
from tests import targets

START, END = np.array([0.2, 0.4], np.float32), np.array([0.5, 0.1], np.float32)
KERNELS = {
    "hamiltonian": lambda e: lehr.Hamiltonian(e, 0.9),
    "momentum scale": lambda e: lehr.Hamiltonian(0.3, 0.9, e),
    "langevin": lambda e: lehr.Langevin(e),
    "learned reverse": lambda e: lehr.LearnedReverse(lehr.Langevin(e), linear_drift(2, momentum=False)),
    "random walk": lambda e: lehr.RandomWalk(e),
}
SCHEDULE = lehr.Schedule(jnp.array([0.3, -0.2, 0.5, 0.1]))


def rows_of(start, end, betas):
    return np.exp(np.outer(1 - betas, np.log(start)) + np.outer(betas, np.log(end)))


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_its_rows_and_so_is_its_gradient(key, name):
    betas = np.asarray(SCHEDULE.betas, np.float64)[1:]

    def bound(step_size):
        annealer = lehr.Annealer(targets.base_2d(), SCHEDULE, KERNELS[name](step_size))
        return objectives.davi(annealer, targets.mixture_2d(), key, num_particles=3)

    def of_ends(log_ends):
        return bound(lehr.AffineInBeta(jnp.exp(log_ends[0]), jnp.exp(log_ends[1])))

    log_rows = jnp.log(jnp.asarray(rows_of(START, END, betas), jnp.float32))
    value, gradient = jax.jit(jax.value_and_grad(of_ends))(jnp.log(jnp.stack([START, END])))
    value_of_rows, by_row = jax.jit(jax.value_and_grad(lambda log_rows: bound(jnp.exp(log_rows))))(log_rows)
    np.testing.assert_allclose(value, value_of_rows, rtol=1e-5)
    assert np.abs(by_row).min() > 1e-4
    np.testing.assert_allclose(gradient, np.stack([1 - betas, betas]) @ np.asarray(by_row), rtol=2e-3, atol=2e-4)


def test_every_way_to_run_a_chain_takes_it(key):
    kernel = lehr.Hamiltonian(lehr.AffineInBeta(0.3, 0.2), 0.9)
    annealer = lehr.Annealer(targets.base_2d(), SCHEDULE, kernel)
    stepwise = lehr.Annealer(targets.base_2d(), SCHEDULE, kernel.along(SCHEDULE.betas[1:]))
    target = targets.mixture_2d()
    for memory in ("store", "checkpoint", "reversible"):
        pair = [lehr.anneal(key, a, target, 4, memory=memory).log_weights for a in (annealer, stepwise)]
        np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-5)
    draws = target.sample(key, (4,))
    np.testing.assert_allclose(
        *(lehr.anneal_reverse(key, a, target, draws).log_weights for a in (annealer, stepwise)), rtol=1e-5, atol=1e-5
    )
    exact = lehr.Annealer(targets.base_2d(), SCHEDULE, lehr.Metropolis(lehr.RandomWalk(lehr.AffineInBeta(0.9, 0.5))))
    assert np.all(lehr.anneal(key, exact, target, 4).acceptance > 0)
    tuned = lehr.tune(key, annealer, target, num_particles=8).annealer
    assert tuned.kernel.step_size.shape == (4, 1)


def test_steps_that_hardly_move_want_to_be_larger_at_both_ends(key):
    kernel = lehr.Langevin(lehr.AffineInBeta(0.05, 0.05))
    start = lehr.Annealer(targets.base_2d(), lehr.Schedule.linear(4), kernel)
    target = targets.mixture_2d()
    gradient = jax.jit(jax.grad(lambda a: objectives.davi(a, target, key, num_particles=200)))(start)
    step_size = gradient.kernel.log_step_size
    assert step_size.log_at_base > 0
    assert step_size.log_at_target > 0


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.1, -1.0), (np.inf, 1.0), (np.ones((3, 2)), 1.0)])
def test_ends_that_are_none_are_refused(ends):
    with pytest.raises(lehr.InputError, match=r"positive|number or"):
        lehr.AffineInBeta(*ends)


def test_values_without_a_schedule_are_refused():
    with pytest.raises(lehr.InputError, match="along"):
        _ = lehr.Hamiltonian(lehr.AffineInBeta(0.1, 0.2)).step_size


def test_a_wrong_dimension_is_refused(key):
    kernel = lehr.Langevin(lehr.AffineInBeta(np.ones(3), 1.0))
    annealer = lehr.Annealer(targets.base_2d(), SCHEDULE, kernel)
    with pytest.raises(lehr.InputError, match="2 dimensions"):
        lehr.anneal(key, annealer, targets.mixture_2d(), 4)
