"""NumPyro models: their joint density, their prior as the base, and problems with simulated data."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.distributions import StandardNormal
from jax.scipy.special import logsumexp
from scipy import integrate, stats

import lehr
from lehr import InputError
from tests.statistics import assert_mean, assert_unbiased_weights

numpyro = pytest.importorskip("numpyro")
adapter = pytest.importorskip("lehr.adapters.numpyro")
scan = pytest.importorskip("numpyro.contrib.control_flow").scan
from_numpyro, simulator = adapter.from_numpyro, adapter.simulator
dist, plate, sample = numpyro.distributions, numpyro.plate, numpyro.sample

Y = np.array([0.4, 1.3, -0.2])


def conjugate(y=Y, scale=2.0, noise=1.0):
    """theta ~ N(0.5, scale^2), y_i ~ N(theta, noise^2)."""
    theta = sample("theta", dist.Normal(0.5, scale))
    numpyro.deterministic("twice", 2 * theta)
    with plate("data", len(y)):
        sample("y", dist.Normal(theta, noise), obs=y)


def conjugate_log_evidence(y=Y):
    n = len(y)
    return stats.multivariate_normal(np.full(n, 0.5), 4 * np.ones((n, n)) + np.eye(n)).logpdf(y)


def mixed(y=1.2):
    """Several supports, two of them dependent on other sites, and a factor."""
    sigma = sample("sigma", dist.HalfNormal(1.5))
    upper = sample("upper", dist.Uniform(0.0, sigma))
    ratio = sample("ratio", dist.Beta(2.0, 3.0))
    weights = sample("weights", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    with plate("pair", 2):
        rate = sample("rate", dist.LogNormal(upper, 0.5))
    numpyro.factor("penalty", -0.3 * ratio)
    sample("y", dist.Normal(upper + weights[0] * rate.sum(), sigma), obs=y)


def stick_breaking(z):
    """Stan's and NumPyro's map to the simplex, written out, with its Jacobian by differences of the first n entries."""

    def first(z):
        left, values = 1.0, []
        for k, z_k in enumerate(z):
            share = 1 / (1 + jnp.exp(-(z_k - jnp.log(len(z) - k))))
            values.append(left * share)
            left = left * (1 - share)
        return jnp.stack(values)

    values = np.asarray(first(z))
    return np.append(values, 1 - values.sum()), np.linalg.slogdet(jax.jacobian(first)(z))[1]


@eqx.filter_jit
def both(problem, x):
    return problem.log_base(x), problem.log_prob(x), problem.unravel(x)


class TestDensity:
    def test_every_support_and_its_jacobian(self, x64):
        problem = from_numpyro(mixed)
        # In the order of their names: rate (2), ratio, sigma, upper, weights (2).
        for x in ([0.1, -0.4, 0.3, 0.2, -0.5, 0.7, -0.1], [1.0, 0.5, -2.0, -0.7, 1.5, -1.0, 2.0]):
            x = jnp.array(x)
            rate, ratio, sigma = np.exp(x[:2]), 1 / (1 + np.exp(-x[2])), np.exp(x[3])
            share = 1 / (1 + np.exp(-x[4]))
            upper = sigma * share
            weights, log_det = stick_breaking(x[5:])
            prior = stats.halfnorm(scale=1.5).logpdf(sigma) + x[3]
            prior += np.log(share * (1 - share))
            prior += stats.beta(2, 3).logpdf(ratio) + np.log(ratio * (1 - ratio))
            prior += stats.dirichlet([1, 2, 3]).logpdf(weights) + log_det
            prior += stats.lognorm(0.5, scale=np.exp(upper)).logpdf(rate).sum() + np.sum(x[:2])
            likelihood = stats.norm(upper + weights[0] * rate.sum(), sigma).logpdf(1.2) - 0.3 * ratio
            log_base, log_prob, values = both(problem, x)
            np.testing.assert_allclose(log_base, prior, rtol=1e-9)
            np.testing.assert_allclose(log_prob, prior + likelihood, rtol=1e-9)
            np.testing.assert_allclose(values["weights"], weights, rtol=1e-9)
            np.testing.assert_allclose(values["upper"], upper, rtol=1e-9)

    def test_the_prior_of_one_site_is_normalised(self, x64):
        for prior in (
            dist.HalfCauchy(2.0),
            dist.Beta(0.7, 3.0),
            dist.Gamma(2.0, 3.0),
            dist.TruncatedNormal(0, 1, low=1),
        ):
            base = from_numpyro(lambda prior=prior: sample("s", prior)).base
            density = jax.jit(lambda x, base=base: jnp.exp(base.log_prob(x[None])))
            integral, _ = integrate.quad(lambda x, density=density: float(density(x)), -60, 60, points=[0], limit=200)
            assert integral == pytest.approx(1, abs=1e-6)

    def test_an_observation_outside_its_support_has_density_zero(self):
        def uniform(y):
            sample("y", dist.Uniform(0.0, sample("theta", dist.Uniform(0.0, 4.0))), obs=y)

        problem = from_numpyro(uniform, jnp.array([0.5, 2.5]))
        assert problem.log_prob(jnp.array([0.0])) == -jnp.inf
        assert problem.log_prob(jnp.array([1.0])) > -10

    def test_masked_and_scaled_observations(self):
        def model():
            theta = sample("theta", dist.Normal(0.0, 1.0))
            with numpyro.handlers.mask(mask=jnp.array([True, False])):
                sample("y", dist.Normal(theta, 1.0), obs=jnp.array([0.3, jnp.nan]))
            with numpyro.handlers.scale(scale=0.5):
                sample("w", dist.Normal(theta, 1.0), obs=1.0)

        expected = stats.norm.logpdf([0.7, 0.3 - 0.7]).sum() + 0.5 * stats.norm.logpdf(0.3)
        assert from_numpyro(model).log_prob(jnp.array([0.7])) == pytest.approx(expected, rel=1e-5)

    def test_latent_sites_inside_a_scan(self, x64):
        def walk(y):
            def step(x, y):
                x = sample("x", dist.LogNormal(jnp.log(x), 0.3))
                sample("y", dist.Normal(x, 0.5), obs=y)
                return x, None

            scan(step, 1.0, y)

        y, z = np.array([1.1, 0.8, 1.4]), np.array([0.1, -0.2, 0.4])
        problem = from_numpyro(walk, jnp.array(y))
        prior = stats.norm(np.append(0, z[:-1]), 0.3).logpdf(z).sum()
        np.testing.assert_allclose(problem.log_base(jnp.array(z)), prior, rtol=1e-9)
        expected = prior + stats.norm(np.exp(z), 0.5).logpdf(y).sum()
        np.testing.assert_allclose(problem.log_prob(jnp.array(z)), expected, rtol=1e-9)
        assert problem.base.sample(jax.random.key(0), (5,)).shape == (5, 3)

    def test_deterministic_sites_are_reported(self):
        values = from_numpyro(conjugate).unravel(jnp.array([1.5]))
        assert {name: float(value) for name, value in values.items()} == {"theta": 1.5, "twice": 3.0}


@eqx.filter_jit
def draws_and_log_base(key, base):
    draws = base.sample(key, (200,))
    return draws, jax.vmap(base.log_prob)(draws)


class TestPrior:
    def test_draws_are_from_the_prior(self, key):
        problem = from_numpyro(mixed)
        draws = jax.jit(lambda key: problem.base.sample(key, (20_000,)))(key)
        values = jax.jit(jax.vmap(problem.unravel))(draws)
        assert_mean(values["sigma"], 1.5 * np.sqrt(2 / np.pi))
        assert_mean(values["upper"] / values["sigma"], 0.5)
        assert_mean(values["ratio"], 2 / 5)
        assert_mean(values["weights"][:, 2], 1 / 2)
        # In 7 dimensions too: the mean of q/p under p is 1 for any density q, here narrower than the prior.
        q = StandardNormal((7,))
        scale = draws.std(axis=0) * 0.5
        log_q = jax.vmap(lambda x: q.log_prob((x - draws.mean(axis=0)) / scale) - jnp.sum(jnp.log(scale)))(draws)
        assert_unbiased_weights(log_q - jax.jit(jax.vmap(problem.log_base))(draws), 0.0)

    @pytest.mark.parametrize("base", ["prior", None])
    def test_annealing_finds_the_evidence(self, key, base):
        problem = from_numpyro(conjugate, base=base)
        annealer = lehr.Annealer(problem.base, lehr.Schedule.linear(6), lehr.Metropolis(lehr.Hamiltonian(0.4)))
        particles = lehr.anneal(key, annealer, problem.log_target, 5000)
        assert_unbiased_weights(particles.log_weights, conjugate_log_evidence())

    def test_draws_at_the_edge_of_the_support_are_finite(self, key):
        problem = from_numpyro(lambda: sample("s", dist.Beta(0.02, 0.02).expand([8]).to_event(1)))
        draws, log_base = draws_and_log_base(key, problem.base)
        assert jnp.all(jnp.isfinite(draws))
        assert jnp.max(jnp.abs(draws)) > 80
        assert jnp.all(jnp.isfinite(log_base))

    def test_rounding_does_not_take_a_draw_out_of_its_support(self, key):
        # NumPyro itself gives 1 % of these the density zero, because their sum differs from 1 by more than 1e-6.
        problem = from_numpyro(lambda: sample("s", dist.Dirichlet(jnp.ones(1000))))
        assert jnp.all(jnp.isfinite(draws_and_log_base(key, problem.base)[1]))

    def test_float32_stays_float32_under_x64(self, x64):
        problem = from_numpyro(mixed)
        shapes = jax.eval_shape(functools.partial(both, problem), jax.ShapeDtypeStruct((7,), jnp.float32))
        assert shapes[0].dtype == shapes[1].dtype == jnp.float32
        assert jax.eval_shape(lambda: problem.base.sample(jax.random.key(0), (2, 3))).shape == (2, 3, 7)

    def test_float32_without_x64(self):
        draws = from_numpyro(conjugate).base.sample(jax.random.key(0))
        assert draws.dtype == jnp.float32


def test_a_model_without_latent_sites(key):
    problem = from_numpyro(lambda: sample("y", dist.Normal(0.0, 1.0), obs=Y))
    assert problem.position.shape == (0,)
    annealer = lehr.Annealer(problem.base, lehr.Schedule.linear(2), lehr.Metropolis(lehr.RandomWalk(0.1)))
    evidence = lehr.anneal(key, annealer, problem.log_target, 2).log_evidence
    assert evidence == pytest.approx(stats.norm.logpdf(Y).sum(), rel=1e-5)


class TestSimulator:
    def test_the_latent_draw_is_a_posterior_sample(self, key):
        """Its residual against the exact posterior given the simulated data has mean 0 and variance 1."""
        simulate = simulator(conjugate, np.zeros(4))

        def residual(key):
            problem, position = simulate(key)
            y = problem.log_target.sites.data["y"]
            variance = 1 / (1 / 4 + 4)
            return (position[0] - variance * (0.5 / 4 + y.sum())) / jnp.sqrt(variance), y

        residuals, y = jax.jit(jax.vmap(residual))(jax.random.split(key, 20_000))
        assert_mean(residuals, 0)
        assert_mean(residuals**2, 1)
        # Independent of the data, which have the prior predictive distribution.
        assert_mean(residuals * y[:, 0], 0)
        assert_mean(y[:, 0], 0.5)
        assert_mean((y[:, 0] - 0.5) ** 2, 5)

    def test_the_density_is_that_of_the_simulated_data(self, key):
        problem, position = simulator(conjugate)(key)
        y = np.asarray(problem.log_target.sites.data["y"])
        expected = stats.norm(0.5, 2).logpdf(position[0]) + stats.norm(position[0], 1).logpdf(y).sum()
        assert problem.log_prob(position) == pytest.approx(expected, rel=1e-5)
        assert not np.allclose(y, Y)

    def test_annealing_back_from_it_bounds_the_evidence(self, key):
        # A weak likelihood, or the inverse weights would have no variance.
        simulate = simulator(conjugate, np.zeros(2), 1.0, 2.0)
        kernel, schedule = lehr.Metropolis(lehr.Hamiltonian(0.7)), lehr.Schedule.linear(3)

        def inverse_weight(key):
            key_data, key_chain = jax.random.split(key)
            problem, position = simulate(key_data)
            annealer = lehr.Annealer(problem.base, schedule, kernel)
            back = lehr.anneal_reverse(key_chain, annealer, problem.log_target, position[None])
            return back.log_weights[0], problem.log_target.sites.data["y"]

        log_weights, y = jax.jit(jax.vmap(inverse_weight))(jax.random.split(key, 4000))
        log_evidence = stats.multivariate_normal(np.full(2, 0.5), np.ones((2, 2)) + 4 * np.eye(2)).logpdf(
            np.asarray(y, float)
        )
        assert_unbiased_weights(np.asarray(log_weights) + log_evidence, 0.0)

    def test_other_data_need_no_new_compilation(self, key):
        traced = []

        @eqx.filter_jit
        def density(problem, x):
            traced.append(1)
            return problem.log_prob(x) + problem.log_base(x)

        simulate = simulator(conjugate)
        for index in range(3):
            density(*simulate(jax.random.fold_in(key, index)))
        assert len(traced) == 1

    def test_discrete_data(self, key):
        def counts(y):
            rate = sample("rate", dist.Gamma(2.0, 1.0))
            with plate("data", 3):
                sample("y", dist.Poisson(rate), obs=y)

        problem, position = eqx.filter_jit(simulator(counts, jnp.zeros(3, int)))(key)
        y, rate = np.asarray(problem.log_target.sites.data["y"]), np.exp(position[0])
        expected = stats.gamma(2).logpdf(rate) + np.log(rate) + stats.poisson(rate).logpmf(y).sum()
        assert both(problem, position)[1] == pytest.approx(expected, rel=1e-4)


def test_summing_out_by_a_factor_is_exact(x64):
    """What the message about discrete sites tells to do."""

    def model():
        theta = sample("theta", dist.Normal(0.0, 1.0))
        numpyro.factor("mixture", logsumexp(jnp.array([-theta, theta])) - jnp.log(2.0))

    assert from_numpyro(model).log_prob(jnp.array([0.3])) == pytest.approx(
        stats.norm.logpdf(0.3) + np.log(np.cosh(0.3)), rel=1e-9
    )


def subsampled():
    theta = sample("theta", dist.Normal(0.0, 1.0))
    with plate("minibatch", 10, subsample_size=3):
        sample("y", dist.Normal(theta, 1.0), obs=jnp.zeros(3))


def scaled():
    with numpyro.handlers.scale(scale=2.0):
        sample("theta", dist.Normal(0.0, 1.0))


def branching():
    if sample("theta", dist.Normal(0.0, 1.0)) > 0:
        sample("y", dist.Normal(0.0, 1.0), obs=0.0)


def observed_in_a_scan():
    theta = sample("theta", dist.Normal(0.0, 1.0))
    scan(lambda c, y: (c, sample("y", dist.Normal(theta, 1.0), obs=y)), 0.0, jnp.zeros(3))


def scaled_data():
    with numpyro.handlers.scale(scale=2.0):
        sample("y", dist.Normal(sample("theta", numpyro.distributions.Normal(0.0, 1.0).mask(True)), 1.0), obs=0.0)


def latent(prior):
    return functools.partial(sample, "theta", prior)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (latent(dist.Bernoulli(0.5)), "'theta' is discrete: observe it, or sum it out"),
        (latent(dist.ImproperUniform(dist.constraints.real, (), ())), "'theta' has an improper prior"),
        (
            latent(
                dist.TransformedDistribution(
                    dist.ImproperUniform(dist.constraints.real, (), ()), dist.transforms.ExpTransform()
                )
            ),
            "'theta' has an improper prior",
        ),
        (latent(dist.Delta(1.0)), "'theta' is a point mass"),
        (latent(dist.Normal(0.0, 1.0).mask(False)), "'theta' is masked"),
        (latent(dist.ProjectedNormal(jnp.ones(2))), "support of the latent site 'theta'"),
        (scaled, "'theta' is scaled"),
        (subsampled, "'minibatch' is subsampled"),
        (lambda: numpyro.param("theta", 0.3), "'theta' has no prior"),
        (lambda x: None, "cannot trace the model with the given arguments .*TypeError"),
        (branching, "control flow does not depend on latent values"),
    ],
)
def test_faults_of_a_model(model, message):
    with pytest.raises(InputError, match=message):
        from_numpyro(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: numpyro.factor("penalty", -1.0), "factor 'penalty'"),
        (observed_in_a_scan, "'y' is observed inside a scan"),
        (scaled_data, "'theta' is scaled|'y' is scaled"),
        (latent(dist.Bernoulli(0.5)), "'theta' is discrete"),
    ],
)
def test_faults_of_a_simulation(model, message):
    with pytest.raises(InputError, match=message):
        simulator(model)


def test_faults_of_a_base():
    with pytest.raises(InputError, match='"prior", None'):
        from_numpyro(conjugate, base="posterior")
    with pytest.raises(InputError, match="1 unconstrained numbers"):
        from_numpyro(conjugate, base=StandardNormal((2,)))
    assert isinstance(from_numpyro(conjugate).base, adapter.Prior)
