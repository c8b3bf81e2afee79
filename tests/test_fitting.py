"""The search for a base: it shortens the path, never at the price of a part of the target, and says what it tried."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.targets import target
from flowjax.bijections import AbstractBijection, Affine, TriangularAffine

from lehr import InputError, fitting
from lehr.fitting import Candidate, find_base
from lehr.path import Problem
from lehr.pilot import Pilot
from tests import targets


class Banana(eqx.Module):
    """(a, b) with a ~ N(0.5, 1), b | a ~ N(bend a^2, width^2), unnormalised."""

    bend: jax.Array
    width: jax.Array

    def __call__(self, x):
        return -((x[0] - 0.5) ** 2 + ((x[1] - self.bend * x[0] ** 2) / self.width) ** 2) / 2

    @property
    def log_evidence(self):
        return float(jnp.log(2 * jnp.pi * self.width))


def wide_base():
    return targets.Gaussian(jnp.array([0.3, -0.2]), 3 * jnp.eye(2))


def funnel_draws(key, num_draws):
    z = jax.random.normal(key, (num_draws, 2))
    draws = jnp.stack([z[:, 0], z[:, 1] * jnp.exp(z[:, 0])], axis=1)
    return draws / jnp.std(draws, axis=0)


@pytest.fixture(scope="module")
def gaussian():
    """A target that is a Gaussian, far from the base and narrow: problem, what was found, and what was said."""
    target = targets.Gaussian(jnp.array([4.0, -3.0]), jnp.array([[0.5, 0.0], [0.9, 0.2]]))
    problem, said = Problem(wide_base(), lambda x: target.log_prob(x) + 2), []
    return problem, find_base(jax.random.key(1), problem, max_gradients=50_000, say=said.append), said


class TestAGaussianTarget:
    def test_the_path_from_the_fitted_base_is_short(self, gaussian):
        _, fitted, _ = gaussian
        assert fitted.tried[0].name == "given"
        assert fitted.tried[0].barrier > 2
        assert fitted.best.barrier < 0.05
        np.testing.assert_allclose(fitted.best.log_evidence, 2, atol=0.02)

    def test_the_bijection_maps_the_standard_normal_to_the_target(self, gaussian):
        _, fitted, _ = gaussian
        scale = np.asarray(jax.jacobian(fitted.best.bijection.transform)(jnp.zeros(2)))
        np.testing.assert_allclose(fitted.best.push(jnp.zeros((1, 2))), [[4, -3]], atol=0.01)
        np.testing.assert_allclose(scale @ scale.T, [[0.25, 0.45], [0.45, 0.85]], rtol=0.01)

    def test_the_problem_in_its_coordinates_is_the_same(self, gaussian):
        problem, fitted, _ = gaussian
        z = jnp.array([0.7, -1.1])
        x = fitted.best.push(z[None])[0]
        _, log_det = np.linalg.slogdet(np.asarray(jax.jacobian(fitted.best.bijection.transform)(z)))
        np.testing.assert_allclose(fitted.best.problem.log_prob(z), problem.log_prob(x) + log_det, rtol=1e-4)
        np.testing.assert_allclose(
            fitted.best.problem.log_base(z), -jnp.sum(z**2) / 2 - math.log(2 * math.pi), rtol=1e-5
        )

    def test_gradients_are_those_of_all_runs_and_searches(self, gaussian):
        _, fitted, _ = gaussian
        runs = sum(int(candidate.run.num_gradients) for candidate in fitted.tried)
        # Four searches for modes take at least a few each, and the Hessian takes two.
        assert runs + 8 < fitted.num_gradients < runs + 400
        assert fitted.num_modes == 1

    def test_it_says_what_it_tries(self, gaussian):
        _, fitted, said = gaussian
        assert len(said) >= len(fitted.tried) >= 2
        assert said[0].startswith("given: log Z about")


def test_the_base_is_taken_wider_unless_it_is_the_target(gaussian):
    _, exact, _ = gaussian
    assert not any("widened" in tried.name for tried in exact.tried)
    skewed = find_base(jax.random.key(1), Problem(wide_base(), targets.log_gamma_2d()), max_gradients=50_000)
    *_, narrow, wide = skewed.tried
    assert wide.name == f"{narrow.name}, widened"
    assert skewed.best is wide
    assert isinstance(wide.bijection, TriangularAffine)
    np.testing.assert_allclose(wide.bijection.loc, narrow.bijection.loc, rtol=1e-5)
    # By 1 + 0.6 / sqrt(2) in either dimension.
    np.testing.assert_allclose(wide.bijection.triangular, 1.42426 * narrow.bijection.triangular, rtol=1e-4)


def test_only_the_given_base_if_told_so(gaussian):
    problem, _, _ = gaussian
    fitted = find_base(jax.random.key(1), problem, fit_base=False, max_gradients=50_000)
    assert [candidate.name for candidate in fitted.tried] == ["given"]
    assert fitted.best.bijection is None
    assert fitted.num_modes == 0
    assert fitted.num_gradients == int(fitted.best.run.num_gradients)
    np.testing.assert_array_equal(fitted.best.push(jnp.ones((3, 2))), 1)


def test_nothing_more_is_begun_when_gradients_are_spent(monkeypatch, gaussian):
    monkeypatch.setattr(fitting, "_LARGEST_FOR_FLOW", 1)
    problem, _, _ = gaussian
    fitted = find_base(jax.random.key(1), problem, max_gradients=1)
    assert [candidate.name for candidate in fitted.tried] == ["given"]


@pytest.mark.slow
def test_a_flow_for_a_banana(monkeypatch, key):
    # So that small runs go all the way: the Gaussian's path is not long in two dimensions.
    monkeypatch.setattr(fitting, "_SHORT_ENOUGH", 0.3)
    monkeypatch.setattr(fitting, "_MOST_FLOWS", 1)
    target = Banana(jnp.array(0.8), jnp.array(0.2))
    fitted = find_base(key, Problem(wide_base(), target), max_gradients=50_000)
    barriers = {candidate.name.split(" ")[0]: candidate.barrier for candidate in fitted.tried}
    assert barriers["coupling"] < 0.7 * barriers["given"]
    assert "flow" in fitted.best.name
    assert abs(fitted.best.log_evidence - target.log_evidence) < fitted.best.noise
    # Draws follow the bend: b - 0.8 a^2 is of the width of the banana.
    a, b = fitted.best.push(fitted.best.draws).T
    assert np.std(b - 0.8 * a**2) < 0.3


@pytest.mark.slow
def test_a_flow_reaches_all_of_a_banana():
    """Exact draws, pulled back, are where the base is: none is far out.

    Fitted to the last run's draws alone, and chosen by siblings of what it was fitted to, the flow of this key put 1 %
    of the exact draws beyond ten standard deviations, the farthest at a thousand.
    """
    fitted = find_base(jax.random.split(jax.random.key(106), 5)[1], target("banana").problem, max_gradients=400_000)
    assert "flow" in fitted.best.name
    assert fitted.best.bijection is not None
    a, noise = np.random.default_rng(0).normal(size=(2, 20_000, 5))
    exact = jnp.asarray(np.concatenate([1 + a, (1 + a) ** 2 / 2 + noise / 2], axis=1), jnp.float32)
    distance = np.linalg.norm(jax.vmap(fitted.best.bijection.inverse)(exact), axis=1)
    # The norm of 20,000 draws of N(0, I) in ten dimensions is at most about 6.3.
    assert distance.max() < 10


def test_two_modes_are_both_covered(monkeypatch):
    # Without flows, which take long to fit.
    monkeypatch.setattr(fitting, "_LARGEST_FOR_FLOW", 1)

    def two(x):
        return jnp.logaddexp(-jnp.sum((x - 4) ** 2) / 2, -jnp.sum((x + 4) ** 2) / 2) - math.log(2 * math.pi)

    base = targets.Gaussian(jnp.zeros(2), 4 * jnp.eye(2))
    fitted = find_base(jax.random.key(5), Problem(base, two), max_gradients=20_000)
    first = np.asarray(fitted.best.push(fitted.best.draws))[:, 0]
    assert fitted.num_modes == 2
    assert 0.15 < np.mean(first > 0) < 0.85
    assert abs(fitted.best.log_evidence - math.log(2)) < fitted.best.noise


@pytest.mark.parametrize("fit_base", [True, False])
def test_no_base_reaches_a_density_of_zero(fit_base):
    with pytest.raises(InputError, match="no run from the base reached the target"):
        find_base(
            jax.random.key(0),
            Problem(wide_base(), lambda x: -jnp.inf + 0 * x[0]),
            fit_base=fit_base,
            max_gradients=9000,
        )


class TestWhichBaseIsBetter:
    """The rule: never less of the target; if as much, the shorter path."""

    def candidate(self, log_evidence, barrier, *, finished=True):
        zero, positions = jnp.zeros(1), jnp.zeros((64, 2))
        run = Pilot(
            jnp.ones(1),
            zero + barrier,
            zero,
            jnp.zeros((1, 2)),
            jnp.array(1, jnp.int32),
            jnp.array(64, jnp.int32),
            jnp.array(finished),
            positions,
            positions[None],
            jnp.array(float(log_evidence)),
        )
        return Candidate("a base", Problem(wide_base(), targets.base_2d().log_prob), None, run)

    def test_as_much_on_a_shorter_path(self):
        assert self.candidate(0.0, 1.0).beats(self.candidate(0.05, 2.0))
        assert not self.candidate(0.05, 2.0).beats(self.candidate(0.0, 1.0))

    def test_a_base_that_misses_a_mode_does_not_beat_one_that_covers_both(self):
        both, one = self.candidate(math.log(2), 1.2), self.candidate(0.0, 0.0)
        assert not one.beats(both)
        assert both.beats(one)

    def test_noise_grows_with_the_barrier(self):
        assert self.candidate(0.0, 8.0).noise > self.candidate(0.0, 1.0).noise
        # The same 1.2 nats are within the noise of a long path, and beyond that of a short one.
        assert self.candidate(0.0, 1.0).beats(self.candidate(1.2, 8.0))
        assert not self.candidate(0.0, 1.0).beats(self.candidate(1.2, 1.5))

    @pytest.mark.parametrize("log_evidence", [math.nan, -math.inf])
    def test_a_run_that_failed_beats_nothing(self, log_evidence):
        assert not self.candidate(log_evidence, 0.0).beats(self.candidate(0.0, 9.0))
        assert not self.candidate(3.0, 0.0, finished=False).beats(self.candidate(0.0, 9.0))

    def test_draws_of_one_particle_follow_each_other(self):
        candidate = self.candidate(0.0, 1.0)
        draws = jnp.arange(24.0).reshape(3, 4, 2)
        run = eqx.tree_at(lambda run: run.draws, candidate.run, draws)
        rows = candidate._replace(run=run).draws
        np.testing.assert_array_equal(rows[:3], draws[:, 0])
        np.testing.assert_array_equal(rows[-3:], draws[:, 3])


class TestWhetherAFlowGains:
    def test_a_funnel(self, key):
        assert fitting._gains(key, funnel_draws(key, 1024).reshape(128, 8, 2))

    def test_a_gaussian(self, key):
        assert not fitting._gains(key, jax.random.normal(key, (128, 8, 2)))


def test_two_affine_maps_are_one(key):
    outer = TriangularAffine(jnp.array([1.0, -2.0]), jnp.array([[0.5, 0.0], [0.3, 2.0]]))
    inner = TriangularAffine(jnp.array([0.2, 0.7]), jnp.array([[1.5, 0.0], [-0.4, 0.6]]))
    z = jax.random.normal(key, (2,))
    composed = fitting._composed(inner, outer)
    assert isinstance(composed, TriangularAffine)
    np.testing.assert_allclose(composed.transform(z), outer.transform(inner.transform(z)), rtol=1e-5)
    other: AbstractBijection = Affine(jnp.ones(2), 2 * jnp.ones(2))
    np.testing.assert_allclose(fitting._composed(inner, other).transform(z), 1 + 2 * inner.transform(z), rtol=1e-5)
    assert fitting._composed(inner, None) is inner
