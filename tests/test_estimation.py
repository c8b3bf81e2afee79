"""The front door: right where the truth is known, honest where it cannot be right, and clear about wrong input.

Nearly all use one kind of target, whose faults are data, and one number of particles: so little is compiled.
"""

import functools
import math
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import InputError, estimation
from lehr.estimation import evidence
from lehr.path import Problem
from lehr.support import Support, look_at
from tests import targets
from tests.statistics import THRESHOLD


class Faulty(eqx.Module):
    """Sheared log-gamma variates, `lift` nats up, but NaN or zero where x_0 is below a threshold."""

    inner: targets.ShearedLogGamma
    nan_below: jax.Array
    zero_below: jax.Array
    lift: jax.Array

    def __call__(self, x):
        value = jnp.where(x[0] < self.zero_below, -jnp.inf, self.inner(x) + self.lift)
        return jnp.where(x[0] < self.nan_below, jnp.nan, value)

    @property
    def log_evidence(self):
        """Of what is not NaN: x_0 alone is cut off."""
        shape, rate = (float(values[0]) for values in (self.inner.shape, self.inner.rate))
        cut = max(float(self.nan_below), float(self.zero_below))
        log_total = float(self.inner.log_evidence + self.lift)
        if cut == -math.inf:
            return log_total
        # x_0 is the logarithm of a Gamma variate.
        return log_total + math.log(float(jax.scipy.special.gammaincc(shape, rate * math.exp(cut))))

    def sample(self, key, num_draws):
        """Exact draws, those beyond the thresholds left out."""
        gamma = jax.random.gamma(key, self.inner.shape, (2 * num_draws, 2)) / self.inner.rate
        y = jnp.log(gamma)
        x = jnp.stack([y[:, 0], y[:, 1] - self.inner.shear * y[:, 0]], axis=1)
        return x[x[:, 0] > max(float(self.nan_below), float(self.zero_below))][:num_draws]


def base():
    return targets.Gaussian(jnp.array([0.3, -0.2]), jnp.array([[1.5, 0.0], [-0.3, 1.2]]))


def faulty(*, nan_below=-math.inf, zero_below=-math.inf, lift=0.0, base=base):
    faults = (jnp.array(float(value)) for value in (nan_below, zero_below, lift))
    return Problem(base(), Faulty(targets.log_gamma_2d(), *faults))


def estimate(problem, **options):
    options = {"max_gradients": 30_000, "num_particles": 32, "fit_base": False, "progress": False} | options
    return evidence(options.pop("key", jax.random.key(1)), problem, **options)


def assert_right(result, truth, *, upper=True):
    """Both ends within five standard errors of the truth, and the truth within a bracket as much wider."""
    ends = (result.lower, result.upper) if upper else (result.lower,)
    for end in ends:
        assert 0 < end.error < 1
        assert abs(end.value - truth) < THRESHOLD * end.error, f"{end} for {truth}"


@pytest.fixture(scope="module")
def plain():
    return faulty()


@pytest.fixture(scope="module")
def result(plain):
    return estimate(plain)


class TestTheAnswer:
    def test_it_is_right(self, plain, result):
        truth = plain.log_target.log_evidence
        assert_right(result, truth)
        low, high = result.bracket
        assert low < truth < high
        assert abs(float(result.thermodynamic_mean) - truth) < THRESHOLD * result.thermodynamic_error

    def test_with_a_fitted_base(self, plain):
        result = estimate(plain, fit_base=True, tolerance=0.2)
        assert_right(result, plain.log_target.log_evidence)
        assert result.converged
        assert result.num_gradients <= 30_000
        # Draws are in the coordinates of the problem, whatever the base.
        weights = np.asarray(jax.nn.softmax(result.log_weights.reshape(-1)))
        exact = np.asarray(plain.log_target.sample(jax.random.key(2), 4000)).mean(axis=0)
        np.testing.assert_allclose(weights @ np.asarray(result.positions).reshape(-1, 2), exact, atol=0.25)

    def test_of_a_correlated_gaussian_it_is_exact(self, monkeypatch):
        target = targets.Gaussian(
            jnp.array([2.0, -1.0, 0.5]), jnp.array([[0.5, 0.0, 0.0], [1.0, 0.2, 0.0], [-0.3, 0.6, 2.0]])
        )
        wide = targets.Gaussian(jnp.zeros(3), 3 * jnp.eye(3))
        # Exact draws are in the coordinates of the problem, and are brought to those of the base: the weights, being
        # equal, would not show a mistake.
        backward, annealed = estimation.Engine.backward, []

        def seen(engine, key, positions, log_weights):
            annealed.append(engine.candidate.push(positions.reshape(-1, 3)))
            return backward(engine, key, positions, log_weights)

        monkeypatch.setattr(estimation.Engine, "backward", seen)
        draws = target.sample(jax.random.key(5), (50,))
        result = estimate(Problem(wide, lambda x: target.log_prob(x) - 40), fit_base=True, posterior_draws=draws)
        assert result.base != "given"
        assert result.converged
        np.testing.assert_allclose(result.log_evidence, -40, atol=0.02)
        np.testing.assert_allclose(result.upper.value, -40, atol=0.02)
        distances = np.linalg.norm(np.asarray(annealed[0])[:, None] - np.asarray(draws), axis=2)
        assert np.max(np.min(distances, axis=1)) < 1e-3

    def test_the_same_key_gives_the_same_numbers(self, plain, result):
        again, other = estimate(plain), estimate(plain, key=jax.random.key(2))
        np.testing.assert_array_equal(again.forward, result.forward)
        np.testing.assert_array_equal(again.backward, result.backward)
        np.testing.assert_array_equal(again.positions, result.positions)
        assert not np.any(np.isin(other.forward, result.forward))

    def test_populations_are_independent(self, result):
        # The same numbers twice would halve the error without any right to it.
        assert len(np.unique(result.forward)) == len(result.forward)
        assert len(np.unique(result.backward)) == len(result.backward)

    def test_exact_posterior_draws_make_the_upper_end_exact(self, plain, result):
        truth = plain.log_target.log_evidence
        exact = estimate(plain, posterior_draws=plain.log_target.sample(jax.random.key(4), 500))
        assert exact.exact_upper
        assert not result.exact_upper
        assert_right(exact, truth)
        # The populations themselves are the same, for the draws go only into the way back.
        np.testing.assert_array_equal(exact.forward, result.forward)
        assert not np.any(np.isin(exact.backward, result.backward))

    def test_draws_have_the_names_of_the_problem(self, plain):
        named = Problem(plain.base, plain.log_target, lambda x: {"a": x[0], "b": jnp.exp(x[1])})
        result = estimate(named)
        np.testing.assert_allclose(result.draws["a"], result.positions[..., 0])
        np.testing.assert_allclose(result.draws["b"], jnp.exp(result.positions[..., 1]), rtol=1e-5)

    def test_in_double_precision(self, x64):
        problem = faulty()
        result = estimate(problem, tolerance=0.5)
        floats = [leaf for leaf in jax.tree.leaves(result) if eqx.is_inexact_array(leaf)]
        assert len(floats) > 8
        assert {leaf.dtype for leaf in floats} == {jnp.dtype("float64")}
        assert_right(result, problem.log_target.log_evidence)

    def test_without_latent_variables(self):
        class Nothing(eqx.Module):
            def sample(self, key, shape=()):
                return jnp.zeros((*shape, 0))

            def log_prob(self, x):
                return jnp.zeros(())

        exact = estimate(Problem(Nothing(), lambda x: jnp.sum(x) - 3.5))
        assert (float(exact.log_evidence), float(exact.standard_error), exact.bracket) == (-3.5, 0.0, (-3.5, -3.5))
        assert exact.converged
        assert exact.num_gradients == 0
        assert "-3.5" in str(exact)
        with pytest.raises(InputError, match="its log density is nan"):
            estimate(Problem(Nothing(), lambda x: jnp.sum(x) + jnp.nan))


class TestTheWork:
    def test_gradients_are_what_the_target_is_asked_for(self, monkeypatch):
        # Values without gradients, which are looked at before: few, because every call is counted on the host.
        monkeypatch.setattr(estimation, "look_at", functools.partial(look_at, num_draws=256))
        # A list, because callbacks come from several threads, and two additions to one number can count as one.
        asked = []

        def count(x):
            asked.append(np.size(x) // 2)

        def target(x):
            jax.debug.callback(count, x)
            return -jnp.sum((x - 0.5) ** 2) / 2

        result = estimate(Problem(base(), target), max_gradients=5400, num_particles=16)
        jax.effects_barrier()
        assert result.forward.shape[0] >= 4
        assert sum(asked) == result.num_gradients + 256

    def test_it_doubles_from_round_to_round(self, result):
        rounds = result.rounds
        assert [r.num_populations for r in rounds[:2]] == [8, 16]
        assert np.all(np.diff([r.num_gradients for r in rounds]) > 0)
        assert rounds[-1].num_populations == result.forward.shape[0]
        assert rounds[-1].log_evidence == float(result.log_evidence)
        assert rounds[-1].num_gradients == result.num_gradients <= 30_000

    def test_it_spends_what_it_may_and_no_more(self, plain):
        spent = [estimate(plain, max_gradients=limit).num_gradients for limit in (25_000, 30_000)]
        assert 20_000 < spent[0] <= 25_000 < spent[1] <= 30_000

    def test_it_stops_at_the_tolerance(self, result, plain):
        loose = estimate(plain, tolerance=1.0, max_gradients=200_000)
        assert loose.converged
        assert not loose.warnings
        assert loose.reach <= 1.0
        assert loose.forward.shape[0] == 32
        assert loose.num_gradients < 100_000
        assert not result.converged
        assert "beyond the tolerance of 0.05" in result.warnings[0]

    @pytest.mark.parametrize("batch_size", [16, pytest.param(64, marks=pytest.mark.slow)])
    def test_little_memory(self, plain, batch_size):
        result = estimate(plain, batch_size=batch_size, tolerance=0.4, max_gradients=200_000)
        assert result.log_weights.shape[1] == min(32, batch_size)
        assert_right(result, plain.log_target.log_evidence)

    def test_a_budget_too_small_for_a_round(self, plain):
        result = estimate(plain, max_gradients=3000)
        assert not result.converged
        assert result.bracket == (-math.inf, math.inf)
        assert math.isinf(result.standard_error)
        assert "3,000 did not suffice" in result.warnings[0]
        assert "NOT CONVERGED" in str(result)
        # No measure of its error, but of the right size.
        assert abs(float(result.log_evidence) - plain.log_target.log_evidence) < 1

    def test_the_advice_on_a_small_budget_suffices(self, plain):
        for limit in (3000, 9_000):
            result = estimate(plain, max_gradients=limit)
            assert not result.converged
            enough = int(result.warnings[0].rstrip(".").split(" ")[-1].replace(",", ""))
            assert enough > limit
            result = estimate(plain, max_gradients=enough, tolerance=10.0)
            assert result.forward.shape[0] >= 16
            assert result.converged

    def test_few_populations_are_not_believed(self, plain):
        result = estimate(plain, max_gradients=9_000, tolerance=10.0)
        assert 4 <= result.forward.shape[0] < 16
        assert not result.converged
        assert "too few to tell the error" in result.warnings[0]


class TestInterruption:
    def interrupt_at(self, monkeypatch, block):
        add = estimation._Ledger.add

        def interrupted(ledger, key):
            if len(ledger.blocks) == block:
                raise KeyboardInterrupt
            return add(ledger, key)

        monkeypatch.setattr(estimation._Ledger, "add", interrupted)

    def test_what_there_is_is_reported(self, monkeypatch, plain, result):
        self.interrupt_at(monkeypatch, 3)
        partial = estimate(plain, tolerance=100.0)
        assert "It was interrupted." in partial.warnings
        assert not partial.converged
        np.testing.assert_array_equal(partial.forward, result.forward[:12])
        assert partial.rounds[-1].num_populations == 12

    def test_before_the_first_block_there_is_nothing(self, monkeypatch, plain):
        self.interrupt_at(monkeypatch, 0)
        with pytest.raises(KeyboardInterrupt):
            estimate(plain)


class TestFaultyDensities:
    def test_nan_in_a_region_is_reported(self):
        problem = faulty(nan_below=-1.0)
        result = estimate(problem, tolerance=0.5)
        assert result.num_invalid > 100
        assert not result.converged
        assert any("NaN at" in warning for warning in result.warnings)
        # The answer is that of density zero there.
        assert_right(result, problem.log_target.log_evidence)

    def test_nan_at_few_draws_of_the_base_is_reported(self):
        # About one draw of the base in two thousand.
        result = estimate(faulty(nan_below=-4.7), tolerance=0.5)
        assert 0 < result.num_invalid < 200
        assert not result.converged
        assert len(result.warnings) == 1
        assert "NaN at" in result.warnings[0]

    def test_nan_is_reported_though_the_fitted_base_has_no_draw_there(self):
        def wide():
            return targets.Gaussian(jnp.zeros(2), 3 * jnp.eye(2))

        result = estimate(faulty(nan_below=-8.0, base=wide), fit_base=True, tolerance=0.5)
        assert result.base != "given"
        assert result.num_invalid > 0
        assert not result.converged

    @pytest.mark.parametrize(
        ("faults", "message"),
        [
            ({"nan_below": math.inf}, "density is NaN at all of"),
            ({"zero_below": math.inf}, "zero or NaN at all of"),
            ({"lift": -math.inf}, "zero or NaN at all of"),
            ({"lift": math.inf}, r"\+inf at"),
        ],
        ids=["NaN", "zero", "minus infinity", "infinity"],
    )
    def test_nothing_to_estimate(self, faults, message):
        with pytest.raises(InputError, match=message):
            estimate(faulty(**faults))

    def test_half_a_support(self):
        problem = faulty(zero_below=-1.0)
        draws = problem.log_target.sample(jax.random.key(6), 500)
        for options in ({}, {"posterior_draws": draws}):
            result = estimate(problem, tolerance=0.5, **options)
            assert_right(result, problem.log_target.log_evidence)
            assert result.converged
            assert result.num_invalid == 0

    def test_the_share_of_the_base_in_the_support_is_needed(self, monkeypatch):
        # The power of the test before: without the share the upper end is wrong.
        monkeypatch.setattr(Support, "log_share", 0.0)
        problem = faulty(zero_below=-1.0)
        exact = problem.log_target.sample(jax.random.key(6), 500)
        result = estimate(problem, posterior_draws=exact, max_gradients=100_000)
        with pytest.raises(AssertionError):
            assert_right(result, problem.log_target.log_evidence)


class TestBasesThatDoNotCover:
    def test_a_narrow_base_is_right_or_reported(self):
        def narrow():
            return targets.Gaussian(jnp.array([0.3, -0.2]), 0.1 * jnp.eye(2))

        problem = faulty(base=narrow)
        result = estimate(problem)
        assert not result.converged
        assert_right(result, problem.log_target.log_evidence)

    def test_a_base_without_a_part_of_the_support(self, plain):
        class Box(eqx.Module):
            def sample(self, key, shape=()):
                return jax.random.uniform(key, (*shape, 2))

            def log_prob(self, x):
                return jnp.where(jnp.all((x >= 0) & (x <= 1)), 0.0, -jnp.inf)

        result = estimate(Problem(Box(), plain.log_target))
        # Forwards only the box is seen; on the way back it shows.
        assert float(result.log_evidence) < plain.log_target.log_evidence - 1
        assert not result.converged
        assert result.upper.value - result.lower.value > 0.5

    def test_a_disjoint_support_is_refused(self, plain):
        class Elsewhere(eqx.Module):
            def sample(self, key, shape=()):
                return jax.random.uniform(key, (*shape, 2)) - 5

            def log_prob(self, x):
                return jnp.where(jnp.all((x >= -5) & (x <= -4)), 0.0, -jnp.inf)

        problem = Problem(Elsewhere(), faulty(zero_below=-3.0).log_target)
        with pytest.raises(InputError, match="give a base that covers"):
            estimate(problem)

    def test_an_improper_target_does_not_converge(self, plain):
        # Of shape and rate zero it is flat, and already compiled.
        flat = eqx.tree_at(lambda f: (f.inner.shape, f.inner.rate), plain.log_target, (jnp.zeros(2), jnp.zeros(2)))
        result = estimate(Problem(plain.base, flat), tolerance=0.5)
        assert not result.converged
        assert result.num_invalid == 0

    def test_a_pilot_that_found_more_is_a_doubt(self, monkeypatch, plain):
        find_base = estimation.find_base

        def found_more(*args, **options):
            fitted = find_base(*args, **options)
            run = eqx.tree_at(lambda run: run.log_evidence, fitted.best.run, fitted.best.run.log_evidence + 5)
            return fitted._replace(tried=[*fitted.tried, fitted.best._replace(name="another", run=run)])

        monkeypatch.setattr(estimation, "find_base", found_more)
        result = estimate(plain, tolerance=1.0)
        assert not result.converged
        assert "another base (another) found" in result.warnings[0]

    def test_wrong_posterior_draws_are_noticed(self, plain):
        draws = plain.log_target.sample(jax.random.key(4), 500) + 1.5
        result = estimate(plain, posterior_draws=draws, tolerance=1.0)
        assert not result.converged
        assert any("upper end lies below" in warning for warning in result.warnings)

    @pytest.mark.slow
    def test_two_modes_are_right_or_reported(self):
        def two(x):
            return jnp.logaddexp(-jnp.sum((x - 6) ** 2) / 2, -jnp.sum(x**2) / 2) - math.log(2 * math.pi)

        middle = targets.Gaussian(jnp.full(2, 3.0), 4 * jnp.eye(2))
        for seed in range(5):
            key = jax.random.key(seed)
            result = estimate(Problem(middle, two), key=key, fit_base=True, max_gradients=100_000, tolerance=0.2)
            if result.converged:
                assert_right(result, math.log(2))


class TestWrongInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tolerance": 0.0}, "tolerance must be a positive"),
            ({"tolerance": -1.0}, "tolerance must be a positive"),
            ({"tolerance": math.nan}, "tolerance must be a positive"),
            ({"max_gradients": 0}, "max_gradients must be positive"),
            ({"num_particles": 1}, "at least 2 particles"),
            ({"batch_size": 1}, "at least 2 particles"),
            ({"posterior_draws": jnp.zeros((5, 3))}, r"shape \(num_draws, 2\), but it is \(5, 3\)"),
        ],
    )
    def test_options_out_of_range(self, plain, options, message):
        with pytest.raises(InputError, match=message):
            estimate(plain, **options)

    @pytest.mark.parametrize("draws", [jnp.zeros((0, 2)), jnp.full((5, 2), jnp.nan)], ids=["none", "NaN"])
    def test_posterior_draws_that_are_none(self, plain, draws):
        with pytest.raises(InputError, match="posterior_draws"):
            estimate(plain, posterior_draws=draws)

    def test_a_target_that_is_not_one_number(self):
        with pytest.raises(InputError, match="must be one float"):
            estimate(Problem(base(), lambda x: x))

    def test_something_that_is_no_problem(self, plain):
        # Without the runtime checks of the tests, as users run it.
        with pytest.raises(InputError, match=r"needs a lehr\.Problem, not a ShearedLogGamma"):
            estimation._check.__wrapped__(plain.log_target.inner, 0.1, 100, 32, None, None)


TWO_DEVICES = """
import jax, jax.numpy as jnp, lehr
from flowjax.distributions import Normal
assert len(jax.devices()) == 2
problem = lehr.Problem(Normal(jnp.zeros(2), 2.0), lambda x: -jnp.sum((x - 1) ** 2) / 2)
options = dict(max_gradients=40_000, num_particles=16, fit_base=False, tolerance=0.3, progress=False)
for draws in (None, 1 + jax.random.normal(jax.random.key(3), (100, 2))):
    result = lehr.evidence(jax.random.key(0), problem, posterior_draws=draws, **options)
    print(len(result.forward), float(result.log_evidence), float(result.standard_error), result.upper.value)
"""


@pytest.mark.slow
def test_on_two_devices():
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", TWO_DEVICES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.strip().split("\n"):
        num_populations, value, error, upper = (float(word) for word in line.split(" "))
        # Blocks of four populations a device.
        assert num_populations % 8 == 0
        assert abs(value - math.log(2 * math.pi)) < THRESHOLD * error
        assert abs(upper - math.log(2 * math.pi)) < 0.5


def test_evidence_is_the_front_door():
    assert lehr.evidence is evidence
