"""PyMC models: their joint density through PyMC's JAX backend."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.distributions import StandardNormal
from scipy import integrate, stats

import lehr
from lehr import InputError
from tests.statistics import assert_unbiased_weights

pm = pytest.importorskip("pymc")
# PyMC warns of a BLAS that is slow, and its backend of casts to float64.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BEFORE = jax.config.values["jax_enable_x64"], os.environ.get("XLA_FLAGS")
from_pymc = pytest.importorskip("lehr.adapters.pymc").from_pymc
AFTER = jax.config.values["jax_enable_x64"], os.environ.get("XLA_FLAGS")

Y = np.array([0.4, 1.3, -0.2])


@pytest.fixture(scope="module")
def mixed():
    """Several supports, one dependent on another variable, a deterministic and a potential."""
    with pm.Model() as model:
        sigma = pm.HalfNormal("sigma", 1.5)
        upper = pm.Uniform("upper", 0.0, sigma)
        weights = pm.Dirichlet("weights", np.array([1.0, 2.0, 3.0]))
        rate = pm.LogNormal("rate", 0.2, 0.5, shape=2)
        mean = pm.Deterministic("mean", upper + weights[0] * rate.sum())
        pm.Potential("penalty", -0.3 * rate[0])
        pm.Normal("y", mean, sigma, observed=1.2)
    return model


@pytest.fixture(scope="module")
def conjugate():
    with pm.Model() as model:
        pm.Normal("y", pm.Normal("theta", 0.5, 2.0), 1.0, observed=Y)
    return model


def softmax_simplex(z):
    """The map to the simplex with a last logit of minus the sum, and its Jacobian by its first entries."""

    def first(z):
        return jax.nn.softmax(jnp.append(z, -jnp.sum(z)))[:-1]

    values = np.asarray(first(z))
    return np.append(values, 1 - values.sum()), np.linalg.slogdet(jax.jacobian(first)(z))[1]


def test_the_import_leaves_the_process_as_it_was():
    assert BEFORE == AFTER


def test_every_support_and_its_jacobian(mixed, x64):
    problem = from_pymc(mixed)
    assert [variable.name for variable in mixed.free_RVs] == ["sigma", "upper", "weights", "rate"]
    log_prob, unravel = jax.jit(problem.log_prob), jax.jit(problem.unravel)
    for x in ([0.2, -0.5, 0.7, -0.1, 0.1, -0.4], [-0.7, 1.5, -1.0, 2.0, 1.0, 0.5]):
        x = jnp.array(x)
        sigma, share, rate = np.exp(x[0]), 1 / (1 + np.exp(-x[1])), np.exp(x[4:])
        weights, log_det = softmax_simplex(x[2:4])
        upper = sigma * share
        mean = upper + weights[0] * rate.sum()
        expected = stats.halfnorm(scale=1.5).logpdf(sigma) + x[0] + np.log(share * (1 - share))
        expected += stats.dirichlet([1, 2, 3]).logpdf(weights) + log_det
        expected += stats.lognorm(0.5, scale=np.exp(0.2)).logpdf(rate).sum() + np.sum(x[4:])
        expected += stats.norm(mean, sigma).logpdf(1.2) - 0.3 * rate[0]
        # PyMC itself keeps some constants in float32.
        np.testing.assert_allclose(log_prob(x), expected, rtol=1e-7)
        values = unravel(x)
        assert set(values) == {"sigma", "upper", "weights", "rate", "mean"}
        np.testing.assert_allclose(values["weights"], weights, rtol=1e-9)
        np.testing.assert_allclose(values["upper"], upper, rtol=1e-9)
        np.testing.assert_allclose(values["mean"], mean, rtol=1e-9)


def test_the_density_is_normalised(x64):
    with pm.Model() as model:
        pm.Gamma("s", 2.0, 3.0)
    density = jax.jit(lambda x: jnp.exp(from_pymc(model).log_prob(x[None])))
    integral, _ = integrate.quad(lambda x: float(density(x)), -30, 10)
    assert integral == pytest.approx(1, abs=1e-6)


def test_annealing_finds_the_evidence(key, conjugate):
    problem = from_pymc(conjugate)
    annealer = lehr.Annealer(problem.base, lehr.Schedule.linear(6), lehr.Metropolis(lehr.Hamiltonian(0.4)))
    particles = lehr.anneal(key, annealer, problem.log_target, 5000)
    assert particles.log_weights.dtype == jnp.float32
    covariance = 4 * np.ones((3, 3)) + np.eye(3)
    assert_unbiased_weights(particles.log_weights, stats.multivariate_normal(np.full(3, 0.5), covariance).logpdf(Y))


def test_float32_stays_float32(mixed):
    problem = from_pymc(mixed)
    assert problem.position.dtype == jnp.float32
    value, gradient = jax.jit(jax.value_and_grad(problem.log_prob))(jnp.zeros(6))
    assert value.dtype == gradient.dtype == jnp.float32
    with jax.enable_x64(True):
        wide, narrow = (jax.ShapeDtypeStruct((6,), dtype) for dtype in (jnp.float64, jnp.float32))
        assert jax.eval_shape(problem.log_prob, narrow).dtype == jnp.float32
        assert jax.eval_shape(problem.log_prob, wide).dtype == jnp.float64
        np.testing.assert_allclose(jax.jit(problem.log_prob)(jnp.zeros(6)), value, rtol=1e-5)


def test_shapes_that_depend_on_data():
    with pm.Model(coords={"row": range(3)}) as model:
        x = pm.Data("x", np.ones(3), dims="row")
        pm.Normal("a", x, 1.0, dims="row")
    assert from_pymc(model).position.shape == (3,)


def test_a_model_without_free_variables():
    with pm.Model() as model:
        pm.Normal("y", 0.0, 1.0, observed=Y)
    problem = from_pymc(model)
    assert problem.position.shape == (0,)
    assert problem.log_prob(jnp.zeros(0)) == pytest.approx(stats.norm.logpdf(Y).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pm.Poisson("n", 3.0), "'n' is discrete: observe it, or sum it out"),
        (lambda: pm.Flat("f"), "'f' has a flat prior"),
        (lambda: pm.HalfFlat("h"), "'h' has a flat prior"),
        (
            lambda: pm.Normal("y", 0.0, 1.0, observed=pm.Minibatch(np.zeros(9), batch_size=3), total_size=9),
            "'y' is a minibatch",
        ),
    ],
)
def test_faults_of_a_model(build, message):
    with pm.Model() as model:
        build()
    with pytest.raises(InputError, match=message):
        from_pymc(model)


def test_other_faults(conjugate):
    with pytest.raises(InputError, match="not a function"):
        from_pymc(lambda: None)
    with pytest.raises(InputError, match="1 unconstrained numbers"):
        from_pymc(conjugate, base=StandardNormal((2,)))
