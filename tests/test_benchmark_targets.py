"""The closed-form targets of the benchmarks: their densities against SciPy's, their constants by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.targets import CALIBRATION, NAMES, closed_form, target
from scipy import stats

CLOSED_FORM = ("log-gamma", "logit-beta", "mixture", "student", "banana", "gmm-40")

# In two dimensions each, with the classes that the targets are made of.
LOC, WHITEN = np.array([0.4, -0.7]), np.array([[1.2, 0.0], [-0.6, 0.8]])
PLANE = {
    "log-gamma": closed_form.LogGamma(LOC, WHITEN, np.array([0.9, 3.0])),
    "logit-beta": closed_form.LogitBeta(LOC, WHITEN, np.array([0.9, 3.0]), np.array([2.0, 1.1])),
    "mixture": closed_form.Mixture(np.log([2.0, 0.5]), np.stack([LOC, -3 * LOC]), np.stack([WHITEN, 2 * WHITEN])),
    "student": closed_form.Student(LOC, WHITEN),
    "banana": closed_form.Banana(num_pairs=1),
}


@pytest.mark.parametrize("name", PLANE)
def test_the_constant_is_the_integral_over_the_plane(name, x64):
    # x = sinh t: the trapezoid rule then converges exponentially, even for polynomial tails.
    t, step = np.linspace(-7, 7, 701, retstep=True)
    u, v = np.meshgrid(t, t)
    positions = np.stack([np.sinh(u), np.sinh(v)], axis=-1).reshape(-1, 2)
    values = np.exp(np.asarray(jax.jit(jax.vmap(PLANE[name]))(positions)))
    integral = np.sum(values * (np.cosh(u) * np.cosh(v)).ravel()) * step**2
    np.testing.assert_allclose(np.log(integral), PLANE[name].log_evidence, atol=1e-6)


def log_gamma(p, x):
    return stats.loggamma.logpdf(p.whiten @ (x - p.loc), p.shape).sum() + np.linalg.slogdet(p.whiten)[1]


def logit_beta(p, x):
    y = p.whiten @ (x - p.loc)
    share = 1 / (1 + np.exp(-y))
    jacobian = np.sum(np.log(share) + np.log1p(-share))
    return stats.beta.logpdf(share, p.a, p.b).sum() + jacobian + np.linalg.slogdet(p.whiten)[1]


def mixture(p, x):
    precision = np.swapaxes(p.whiten, 1, 2) @ p.whiten
    parts = [stats.multivariate_normal(loc, np.linalg.inv(a)).pdf(x) for loc, a in zip(p.loc, precision, strict=True)]
    mass = np.full(40, 1 / 40) if len(parts) == 40 else np.array([0.7, 0.3])
    return np.log(mass @ parts)


def student(p, x):
    return stats.multivariate_t(p.loc, np.linalg.inv(p.whiten.T @ p.whiten), 5).logpdf(x)


def banana(p, x):
    return stats.norm.logpdf(x[:5], 1).sum() + stats.norm.logpdf(x[5:], x[:5] ** 2 / 2, 0.5).sum()


SCIPY = {
    "log-gamma": log_gamma,
    "logit-beta": logit_beta,
    "mixture": mixture,
    "student": student,
    "banana": banana,
    "gmm-40": mixture,
}


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_target_over_evidence_is_the_density_of_scipy(name, x64):
    # Made anew, in float64: the cache holds those of the default precision.
    problem, log_evidence, error, _ = target.__wrapped__(name)
    rng, dimension = np.random.default_rng(0), problem.position.shape[0]
    x = rng.normal(size=(5, dimension)) * (20 if name == "gmm-40" else 2)
    log_density = np.asarray(jax.jit(jax.vmap(problem.log_target))(x)) - log_evidence
    parameters = jax.tree.map(np.asarray, problem.log_target)
    np.testing.assert_allclose(log_density, [SCIPY[name](parameters, row) for row in x], rtol=1e-7)
    assert error == 0


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_finite_in_float32_and_not_symmetric_about_zero(name, key):
    problem = target(name).problem
    x = problem.base.sample(key, (50,))
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(problem.log_prob)))(jnp.concatenate([x, -x]))
    assert value.dtype == jnp.float32
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))
    assert np.min(np.abs(value[:50] - value[50:])) > 1e-4


def test_names():
    assert {*CALIBRATION, "sonar", "breast-cancer", "gmm-40"} < set(NAMES)
    assert target("banana") is target("banana")
