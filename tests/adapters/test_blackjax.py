"""BlackJAX algorithms as kernels: they leave every density of the path invariant, and the evidence unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import Annealer, InputError, Schedule
from lehr.adapters.blackjax import BlackJAX, pathfinder
from lehr.smc import smc
from tests import targets
from tests.statistics import THRESHOLD, assert_mean, assert_unbiased_weights, weight_z_score

blackjax = pytest.importorskip("blackjax")

ALGORITHMS = {
    "mala": lambda f: blackjax.mala(f, 0.3),
    "nuts": lambda f: blackjax.nuts(f, step_size=0.6, inverse_mass_matrix=jnp.ones(2), max_num_doublings=3),
    "random walk": lambda f: blackjax.additive_step_random_walk(f, blackjax.mcmc.random_walk.normal(0.8 * jnp.ones(2))),
    # It keeps a momentum beside the position.
    "ghmc": lambda f: blackjax.ghmc(f, step_size=0.6, momentum_inverse_scale=jnp.ones(2), alpha=0.5, delta=0.3),
    # It reports no share of acceptance.
    "slice": lambda f: blackjax.slice_sampling(f, width=1.0),
}
BASE = targets.Gaussian(jnp.array([1.0, 0.4]), jnp.array([[1.2, 0.0], [0.2, 1.1]]))


@pytest.mark.parametrize("name", ["mala", "nuts", "random walk"])
def test_each_density_of_the_path_stays_invariant(key, name):
    """Between Gaussians every tempered density is Gaussian: exact draws stay exact draws, and are not left in place."""
    target, beta = targets.Gaussian(jnp.array([-0.5, 0.5]), jnp.array([[0.6, 0.0], [-0.3, 0.8]])), 0.35
    density = lehr.Problem(BASE, target.log_prob).at(jnp.array(beta))
    precisions = [np.linalg.inv(np.asarray(g.scale_tril @ g.scale_tril.T, float)) for g in (BASE, target)]
    covariance = np.linalg.inv((1 - beta) * precisions[0] + beta * precisions[1])
    mean = covariance @ ((1 - beta) * precisions[0] @ BASE.loc + beta * precisions[1] @ target.loc)
    tempered = targets.Gaussian(jnp.array(mean, jnp.float32), jnp.array(np.linalg.cholesky(covariance), jnp.float32))
    kernel = BlackJAX(ALGORITHMS[name])

    @jax.jit
    @jax.vmap
    def step(key):
        key_start, key_init, key_noise = jax.random.split(key, 3)
        start = tempered.sample(key_start)
        noise = kernel.noise(key_noise, 1, jax.eval_shape(lambda: start))[0]
        moved = kernel.move(density, kernel.init(key_init, density, start), noise)
        return start, moved.state.point, moved.acceptance

    start, point, acceptance = step(jax.random.split(key, 10_000))
    z = np.linalg.solve(np.asarray(tempered.scale_tril, float), (np.asarray(point.position) - mean).T)
    for index in range(2):
        assert_mean(z[index], 0)
        assert_mean(z[index] ** 2, 1)
    assert_mean(z[0] * z[1], 0)
    assert float(jnp.mean(jnp.any(start != point.position, axis=1))) > 0.3
    assert 0.3 < float(acceptance.mean()) <= 1
    np.testing.assert_allclose(point.log_base, jax.vmap(BASE.log_prob)(point.position), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(point.log_target, jax.vmap(target.log_prob)(point.position), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ghmc", "slice"])
def test_annealing_is_unbiased(key, name):
    target = targets.conjugate_2d()
    particles = lehr.anneal(key, Annealer(BASE, Schedule.linear(3), BlackJAX(ALGORITHMS[name])), target, 5000)
    assert_unbiased_weights(particles.log_weights, float(target.log_evidence))
    assert particles.log_weights.dtype == jnp.float32


def test_the_density_of_another_temperature_would_be_found_out(key):
    """The planted bug: an algorithm that always samples the target is not invariant on the way to it."""
    target = targets.conjugate_2d()
    kernel = BlackJAX(lambda f: blackjax.mala(target, 0.3))
    particles = lehr.anneal(key, Annealer(BASE, Schedule.linear(3), kernel), target, 5000)
    assert abs(weight_z_score(particles.log_weights, float(target.log_evidence))) > THRESHOLD


def test_sequential_monte_carlo_is_unbiased(key):
    target = targets.conjugate_2d()
    annealer = Annealer(BASE, Schedule.linear(3), BlackJAX(ALGORITHMS["mala"]))
    run = jax.jit(jax.vmap(lambda key: smc(key, annealer, target, 8, resample_below=1.0).log_evidence))
    assert_unbiased_weights(run(jax.random.split(key, 2000)), float(target.log_evidence))


def test_the_gradient_raises(key):
    target = targets.conjugate_2d()

    def loss(schedule):
        return lehr.anneal(key, Annealer(BASE, schedule, BlackJAX(ALGORITHMS["mala"])), target, 4).elbo

    with pytest.raises(TypeError, match="stop_gradient"):
        jax.grad(loss)(Schedule.linear(2))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (blackjax.mala(lambda x: -jnp.sum(x**2), 0.1), "must map a log density"),
        (lambda f: f, "with init and step"),
        (lambda f: blackjax.mclmc(f, L=1.0, step_size=0.1), "MCLMCInfo is uncorrected"),
    ],
)
def test_faults(key, algorithm, message):
    with pytest.raises(InputError, match=message):
        lehr.anneal(key, Annealer(BASE, Schedule.linear(1), BlackJAX(algorithm)), targets.conjugate_2d(), 2)


class TestPathfinder:
    def test_of_a_gaussian_it_is_that_gaussian(self, key):
        target = targets.conjugate_2d()
        found = pathfinder(key, lehr.Problem(targets.Gaussian(jnp.array([3.0, -3.0]), jnp.eye(2)), target))
        x = target.sample(jax.random.key(1), (100,))
        # Quasi-Newton steps in two dimensions see the Hessian only nearly.
        log_ratio = jax.vmap(target)(x) - jax.vmap(found.base.log_prob)(x)
        np.testing.assert_allclose(jnp.mean(log_ratio), target.log_evidence, atol=0.1)

    def test_evidence_starts_from_it(self, key):
        target = targets.log_gamma_2d()
        problem = pathfinder(key, lehr.Problem(BASE, target))
        result = lehr.evidence(key, problem, fit_base=False, max_gradients=60_000, progress=False)
        assert result.base == "given"
        assert abs(result.log_evidence - target.log_evidence) < 5 * result.standard_error + 1e-3

    def test_a_density_that_is_not_finite(self, key):
        with pytest.raises(InputError, match="no Gaussian with a finite bound"):
            pathfinder(key, lehr.Problem(BASE, lambda x: jnp.nan * jnp.sum(x)))
