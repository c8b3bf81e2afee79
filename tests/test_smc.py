"""Annealed sequential Monte Carlo: unbiased evidence, its error from one run, and what it sees along the path."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import Annealer, Hamiltonian, InputError, Metropolis, RandomWalk, Schedule
from lehr.smc import _Generation, smc, systematic, thermodynamic_integral, waste_free_smc
from tests import targets
from tests.statistics import THRESHOLD, assert_mean, assert_unbiased_weights, weight_z_score

NUM_POPULATIONS = 4000
KERNEL = Metropolis(Hamiltonian(0.7, num_leapfrog=2))


def far_annealer(num_steps=4, kernel=KERNEL):
    """A base two standard deviations off, so that few particles carry the weight and resampling matters."""
    base = targets.Gaussian(jnp.array([1.5, 0.8]), jnp.array([[1.1, 0.0], [0.2, 1.0]]))
    return Annealer(base, Schedule.linear(num_steps), kernel)


def populations(key, one):
    """The log evidence of many independent populations."""
    return np.asarray(jax.jit(jax.vmap(lambda key: one(key).log_evidence))(jax.random.split(key, NUM_POPULATIONS)))


CASES = {
    "resampling at every step": lambda key, target: smc(key, far_annealer(), target, 8, resample_below=1.0),
    "resampling when needed": lambda key, target: smc(key, far_annealer(), target, 8),
    "never resampling": lambda key, target: smc(key, far_annealer(), target, 8, resample_below=0.0),
    "persistent momentum": lambda key, target: smc(
        key, far_annealer(kernel=Metropolis(Hamiltonian(0.7, 0.8))), target, 8, resample_below=1.0
    ),
    "waste-free": lambda key, target: waste_free_smc(key, far_annealer(), target, 3, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_evidence_is_unbiased(key, name):
    target = targets.conjugate_2d()
    log_z = populations(key, lambda key: CASES[name](key, target))
    assert_unbiased_weights(log_z, float(target.log_evidence))


class TestPower:
    """Mistakes that must fail the test above."""

    def z_score(self, key, threshold):
        target = targets.conjugate_2d()
        # A threshold of its own, because what was compiled for the others must not be used.
        log_z = populations(key, lambda key: smc(key, far_annealer(), target, 8, resample_below=threshold))
        return weight_z_score(log_z, float(target.log_evidence))

    def test_weights_kept_after_resampling(self, key, monkeypatch):
        right = _Generation.resampled

        def wrong(self, chosen, happens):
            return eqx.tree_at(lambda g: g.log_weights, right(self, chosen, happens), self.log_weights[chosen] * 0.2)

        monkeypatch.setattr(_Generation, "resampled", wrong)
        assert abs(self.z_score(key, 0.99)) > THRESHOLD

    def test_particles_not_resampled_with_their_weights(self, key, monkeypatch):
        right = _Generation.resampled

        def wrong(self, chosen, happens):
            return right(self, jnp.arange(chosen.shape[0]), happens)

        monkeypatch.setattr(_Generation, "resampled", wrong)
        assert abs(self.z_score(key, 0.98)) > THRESHOLD


def test_without_resampling_it_is_annealed_importance_sampling(key):
    target = targets.conjugate_2d()
    population = smc(key, far_annealer(), target, 4096, resample_below=0.0)
    particles = lehr.anneal(jax.random.fold_in(key, 1), far_annealer(), target, 4096)
    assert population.num_resampled == 0
    for moment in (1, 2):
        a, b = np.asarray(population.log_weights) ** moment, np.asarray(particles.log_weights) ** moment
        z = (a.mean() - b.mean()) / np.hypot(a.std() / 64, b.std() / 64)
        assert abs(z) < THRESHOLD


def test_positions_follow_the_target(key):
    target = targets.conjugate_2d()
    population = smc(key, far_annealer(num_steps=8), target, 20_000)
    chosen = systematic(jax.random.fold_in(key, 1), jax.nn.softmax(population.log_weights))
    # Thinned, because resampled particles of one family are dependent for a move or two.
    draws = np.asarray(population.positions[chosen])[::20]
    for index in range(2):
        assert_mean(draws[:, index], float(target.posterior.loc[index]))


class TestPath:
    """Between Gaussians every density of the path is Gaussian, so that all that a run sees has a closed form."""

    num_particles = 20_000

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls):
        base = targets.Gaussian(jnp.array([1.0]), jnp.array([[1.3]]))
        target = targets.Gaussian(jnp.array([-0.5]), jnp.array([[0.6]]))
        annealer = Annealer(base, Schedule.from_betas([0.0, 0.1, 0.3, 0.6, 1.0]), KERNEL)
        return smc(jax.random.key(3), annealer, target.log_prob, cls.num_particles), annealer.schedule.betas

    @staticmethod
    def exact(betas):
        """Mean and variance of x, and of the log ratio a x^2 + b x + c, under each density of the path."""
        precision = (1 - betas) / 1.3**2 + betas / 0.6**2
        m = ((1 - betas) * 1.0 / 1.3**2 + betas * -0.5 / 0.6**2) / precision
        v = 1 / precision
        a, b = -0.5 / 0.6**2 + 0.5 / 1.3**2, -0.5 / 0.6**2 - 1.0 / 1.3**2
        c = -0.5 * (0.5 / 0.6) ** 2 - np.log(0.6) + 0.5 * (1 / 1.3) ** 2 + np.log(1.3)
        mean = a * (m**2 + v) + b * m + c
        return m, v, mean, (2 * a * m + b) ** 2 * v + 2 * a**2 * v**2

    def test_moments_along_the_path(self, run):
        population, betas = run
        _, variance, mean, var = self.exact(np.asarray(betas, np.float64))
        path = population.path
        # Resampled particles are dependent: as if they were a quarter of their number.
        tolerance = THRESHOLD * np.sqrt(4 * var / self.num_particles)
        assert np.all(np.abs(np.asarray(path.mean_log_ratio) - mean) < tolerance)
        np.testing.assert_allclose(path.var_log_ratio, var, rtol=0.15)
        np.testing.assert_allclose(np.asarray(path.scale)[:, 0] ** 2, variance[1:], rtol=0.1)

    def test_increments_and_discrepancies(self, run):
        population, betas = run
        betas = np.asarray(betas, np.float64)
        grid = np.linspace(-12, 12, 20_001)
        base = -0.5 * ((grid - 1) / 1.3) ** 2 - np.log(1.3)
        ratio = -0.5 * ((grid + 0.5) / 0.6) ** 2 - np.log(0.6) - base

        def log_z(beta):
            return np.log(np.sum(np.exp(base + beta * ratio)))

        increment = [log_z(new) - log_z(old) for old, new in itertools.pairwise(betas)]
        discrepancy = [log_z(2 * new - old) + log_z(old) - 2 * log_z(new) for old, new in itertools.pairwise(betas)]
        np.testing.assert_allclose(population.path.log_increment, increment, atol=0.05)
        np.testing.assert_allclose(population.path.discrepancy, discrepancy, rtol=0.15)
        np.testing.assert_allclose(population.path.log_increment.sum(), population.log_evidence, atol=0.05)

    def test_thermodynamic_integral(self, run):
        population, betas = run
        assert abs(float(thermodynamic_integral(betas, population.path))) < 0.05


@pytest.mark.parametrize("num_draws", [5, 64])
def test_systematic_resampling(key, num_draws):
    weights = jax.nn.softmax(2 * jax.random.normal(key, (10,)))
    drawn = jax.vmap(lambda key: systematic(key, weights, num_draws))(jax.random.split(key, 2000))
    counts = np.stack([np.bincount(row, minlength=10) for row in np.asarray(drawn)])
    expected = num_draws * np.asarray(weights, np.float64)
    assert np.all((counts >= np.floor(expected - 1e-4)) & (counts <= np.ceil(expected + 1e-4)))
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=5 * 0.5 / np.sqrt(2000))


def test_outside_the_support_a_particle_has_no_weight(key):
    def half(x):
        return jnp.where(x[0] > 0, -jnp.sum(x**2) / 2, -jnp.inf)

    base = targets.Gaussian(jnp.array([0.0]), jnp.array([[1.5]]))
    annealer = Annealer(base, Schedule.linear(4), Metropolis(RandomWalk(0.8)))
    population = smc(key, annealer, half, 4000)
    assert np.all(np.asarray(population.positions) > 0)
    assert abs(float(population.log_evidence) - 0.5 * np.log(np.pi / 2)) < 0.1
    assert np.all(np.isfinite(population.path.mean_log_ratio[1:]))


def test_float32_stays_float32(key, x64):
    base = targets.Gaussian(jnp.zeros(2, jnp.float32), jnp.eye(2, dtype=jnp.float32))
    annealer = Annealer(base, Schedule.linear(3), KERNEL)
    population = smc(key, annealer, lambda x: -jnp.sum((x - 1) ** 2), 8)
    floats = [leaf.dtype for leaf in jax.tree.leaves(population) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key, f: smc(key, far_annealer(), f, 1), "at least 2 particles"),
        (lambda key, f: smc(key, far_annealer(), f, 8, resample_below=1.5), "in \\[0, 1\\]"),
        (lambda key, f: smc(key, far_annealer(kernel=Hamiltonian(0.1)), f, 8), "lehr.Metropolis"),
        (lambda key, f: waste_free_smc(key, far_annealer(), f, 2, 1), "at least 2 states"),
        (lambda key, f: smc(key, far_annealer(), lambda x: x, 8), "must be one float"),
    ],
)
def test_wrong_input(key, call, message):
    with pytest.raises(InputError, match=message):
        call(key, targets.conjugate_2d())
