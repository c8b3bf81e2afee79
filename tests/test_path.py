"""Schedules are ordered, problems are checked, and the path has its two ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import InputError, Problem, Schedule
from tests import targets

MAKERS = {"linear": Schedule.linear, "geometric": Schedule.geometric, "sigmoidal": Schedule.sigmoidal}


def assert_ordered(betas, *, strictly=True):
    betas = np.asarray(betas)
    assert betas[0] == 0
    assert betas[-1] == 1
    smallest = np.diff(betas).min()
    assert smallest > 0 if strictly else smallest >= 0


@pytest.mark.parametrize("num_steps", [1, 2, 10, 10_000])
@pytest.mark.parametrize("name", MAKERS)
def test_schedules_are_ordered_with_exact_ends(name, num_steps):
    schedule = MAKERS[name](num_steps)
    assert schedule.num_steps == num_steps
    assert schedule.betas.shape == (num_steps + 1,)
    assert_ordered(schedule.betas)


def test_schedules_by_their_formulas():
    np.testing.assert_allclose(Schedule.linear(4).betas, [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(Schedule.geometric(3, first=0.01).betas, [0, 0.01, 0.1, 1], rtol=1e-5)
    s = 1 / (1 + np.exp(-np.linspace(-2, 2, 6)))
    np.testing.assert_allclose(
        Schedule.sigmoidal(5, steepness=2.0).betas, (s - s[0]) / (s[-1] - s[0]), rtol=1e-5, atol=1e-7
    )


def test_from_betas_returns_them():
    betas = np.concatenate([[0], np.sort(np.random.default_rng(0).uniform(size=50)), [1]])
    np.testing.assert_allclose(Schedule.from_betas(betas).betas, betas, atol=1e-6)
    np.testing.assert_allclose(Schedule.from_betas(np.array([0, 1e-6, 1e-3, 1])).betas, [0, 1e-6, 1e-3, 1], rtol=1e-5)


def test_from_betas_takes_a_list():
    # As the message of its error suggests.
    np.testing.assert_allclose(Schedule.from_betas([0, 0.5, 1]).betas, [0, 0.5, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "betas",
    [
        [0, 0.5, 0.4, 1],
        [0, 0.5, 0.5, 1],
        [0.1, 0.5, 1],
        [0, 0.5, 0.9],
        [0, 0.5, 1.1],
        [0],
        [],
        [[0, 1]],
        [0, np.nan, 1],
        1.0,
    ],
    ids=str,
)
def test_from_betas_refuses_what_is_not_a_schedule(betas):
    with pytest.raises(InputError, match=r"increase strictly from 0 to 1, for example \[0, 0.5, 1\]"):
        Schedule.from_betas(np.array(betas, float))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_schedule_has_at_least_one_step(name, num_steps):
    with pytest.raises(InputError, match=f"at least 1 step, but num_steps is {num_steps}"):
        MAKERS[name](num_steps)


def test_options_of_schedules_are_checked():
    for first in (0.0, 1.0, -1.0, np.nan):
        with pytest.raises(InputError, match=r"inside \(0, 1\)"):
            Schedule.geometric(5, first=first)
    for steepness in (0.0, -1.0, np.nan):
        with pytest.raises(InputError, match="must be positive"):
            Schedule.sigmoidal(5, steepness=steepness)


def test_gradient_steps_keep_a_schedule_ordered(key):
    # Ascent of a function that pulls the temperatures far apart and into disorder.
    wanted = jax.random.normal(key, (11,)) * 3
    schedule = Schedule.linear(10)
    gradient = jax.jit(jax.grad(lambda schedule: jnp.sum(wanted * schedule.betas)))
    for _ in range(20):
        schedule = jax.tree.map(lambda a, g: a + g, schedule, gradient(schedule))
        assert_ordered(schedule.betas)
    assert np.abs(np.diff(schedule.betas) - 0.1).max() > 0.05


@pytest.mark.parametrize("num_steps", [100, 9_999, 10_000])
def test_any_logits_give_temperatures_that_never_decrease(num_steps):
    # Wide logits, and steps at the end that are smaller than a rounding error: ties are unavoidable in float32, a
    # temperature above 1 or a negative increment is not.
    wide = 5 * jax.random.normal(jax.random.key(0), (num_steps,))
    tiny_at_the_end = jnp.zeros(num_steps).at[-50:].set(-15.0)
    for logits in (wide, tiny_at_the_end):
        assert_ordered(Schedule(logits).betas, strictly=False)


def test_gradient_of_the_temperatures(x64):
    schedule = Schedule(jnp.array([0.3, -1.0, 0.7]))
    gradient = jax.jacfwd(lambda logits: Schedule(logits).betas)(schedule.logits)
    p = np.diff(schedule.betas)
    softmax = np.diag(p) - np.outer(p, p)
    np.testing.assert_allclose(gradient[1:], np.cumsum(softmax, axis=0), atol=1e-12)
    np.testing.assert_array_equal(gradient[0], 0)


def test_the_path_mixes_its_ends():
    base, target = targets.base_2d(), targets.log_gamma_2d()
    x = jnp.array([0.4, -1.1])
    for beta in (0.0, 0.3, 1.0):
        density = Problem(base, target).at(jnp.asarray(beta))

        def mixed(x, beta=beta):
            return (1 - beta) * base.log_prob(x) + beta * target(x)

        point = density.evaluate(x, gradient=True)
        np.testing.assert_allclose(density.log_prob_at(point), mixed(x), rtol=1e-5)
        np.testing.assert_allclose(density.gradient_at(point), jax.grad(mixed)(x), rtol=1e-5)
        np.testing.assert_allclose(density.gradient(x), jax.grad(mixed)(x), rtol=1e-5)
        np.testing.assert_allclose(point.log_ratio, target(x) - base.log_prob(x), rtol=1e-5)
        assert density.evaluate(x, gradient=False).grad_base is None


def test_a_base_of_density_zero_does_not_matter_at_the_target():
    problem = Problem(targets.base_2d(), targets.log_gamma_2d())
    point = problem.evaluate(jnp.zeros(2), gradient=False)
    outside = lehr.path.Point(point.position, jnp.asarray(-jnp.inf), point.log_target)
    assert problem.at(jnp.ones(())).log_prob_at(outside) == point.log_target


class BaseOfShape:
    """A base with a sample of a wrong kind, or a log density of a wrong shape."""

    def __init__(self, sample=None, log_prob=None):
        self.a_sample = jnp.zeros(2) if sample is None else sample
        self.a_log_prob = jnp.zeros(()) if log_prob is None else log_prob

    def sample(self, key, shape=()):
        return self.a_sample

    def log_prob(self, x):
        return self.a_log_prob


@pytest.mark.parametrize("sample", [jnp.zeros(()), jnp.zeros((2, 2)), jnp.zeros(2, int)], ids=lambda s: f"{s.shape}")
def test_a_position_is_a_vector_of_floats(sample):
    with pytest.raises(InputError, match=r"must be a 1-D float array.*ravel it"):
        Problem(BaseOfShape(sample), lambda x: jnp.sum(x))


@pytest.mark.parametrize("value", [jnp.zeros(2), jnp.zeros((1,)), jnp.zeros((), int)], ids=lambda v: f"{v.shape}")
def test_a_log_density_is_one_float(value):
    with pytest.raises(InputError, match=r"log_target\(x\) must be one float.*sum it over the dimensions"):
        Problem(BaseOfShape(), lambda x: value)
    with pytest.raises(InputError, match=r"base.log_prob\(x\) must be one float"):
        Problem(BaseOfShape(log_prob=value), lambda x: jnp.sum(x))


def test_targets_have_the_evidence_they_say():
    # The tests' own ground truth, by quadrature.
    mixture = targets.mixture_1d()
    np.testing.assert_allclose(targets.quadrature(mixture, -12, 14), mixture.log_evidence, atol=1e-5)
    log_gamma = targets.ShearedLogGamma(jnp.array([1.3]), jnp.array([0.7]))
    np.testing.assert_allclose(targets.quadrature(log_gamma, -40, 8), log_gamma.log_evidence, atol=1e-5)
    conjugate = targets.conjugate_2d()
    # Bayes' rule at any point: log p(y) = log p(x) p(y | x) - log p(x | y).
    by_bayes = jax.jit(lambda x: conjugate(x) - conjugate.posterior.log_prob(x))
    for x in (jnp.array([0.1, -2.0]), jnp.array([3.0, 1.0])):
        np.testing.assert_allclose(by_bayes(x), conjugate.log_evidence, atol=1e-4)
