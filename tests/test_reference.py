"""The reference targets: their densities against SciPy's, and their evidence where it has a closed form."""

import functools
import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from sklearn.datasets import load_breast_cancer

from lehr import InputError
from lehr.reference import NAMES, reference

WITH_FILES = ("sonar", "ionosphere", "seeds", "brownian", "lorenz", "pines")
FOLDER = Path(os.environ.get("LEHR_DATA", "missing")) / "bayes"
needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason="LEHR_DATA has no folder bayes")


def table(name):
    return np.genfromtxt(FOLDER / f"{name}.csv", delimiter=",", skip_header=1)


def logistic(x, features, y):
    spread = features.std(axis=0)
    spread[spread == 0] = 1
    logits = x[0] + ((features - features.mean(axis=0)) / spread) @ x[1:]
    return stats.norm.logpdf(x).sum() + stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-logits))).sum()


def sonar(x):
    data = table("sonar")
    return logistic(x, data[:, :-1], data[:, -1].astype(int))


def ionosphere(x):
    data = table("ionosphere")
    return logistic(x, data[:, :-1], data[:, -1].astype(int))


def breast_cancer(x):
    return logistic(x, *load_breast_cancer(return_X_y=True))


def seeds(x):
    count, total, kind, extract = table("seeds").T
    tau, a, b = np.exp(x[0]), x[1:5], x[5:]
    p = 1 / (1 + np.exp(-(a[0] + a[1] * kind + a[2] * extract + a[3] * kind * extract + b)))
    log_prior = stats.gamma.logpdf(tau, 0.01, scale=100) + x[0]
    log_prior += stats.norm.logpdf(a, scale=10).sum() + stats.norm.logpdf(b, scale=tau**-0.5).sum()
    return log_prior + stats.binom.logpmf(count, total, p).sum()


def brownian(x):
    y = table("brownian")[:, 1]
    (s, r), path = np.exp(x[:2]), x[2:]
    # A log-normal scale, and the Jacobian of its logarithm.
    log_p = stats.lognorm.logpdf([s, r], 2).sum() + x[:2].sum()
    log_p += stats.norm.logpdf(path, np.concatenate([[0], path[:-1]]), s).sum()
    seen = ~np.isnan(y)
    assert seen.sum() == 20
    return log_p + stats.norm.logpdf(y[seen], path[seen], r).sum()


def lorenz(x):
    y, path = table("lorenz")[:, 1], x.reshape(-1, 3)
    log_p = stats.norm.logpdf(path[0]).sum()
    for (a, b, c), new in itertools.pairwise(path):
        field = np.array([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c])
        log_p += stats.norm.logpdf(new, np.array([a, b, c]) + 0.02 * field, 0.1 * 0.02**0.5).sum()
    seen = ~np.isnan(y)
    assert seen.sum() == 20
    return log_p + stats.norm.logpdf(y[seen], path[seen, 0]).sum()


@functools.cache
def pines_prior_and_counts():
    points = table("pines")
    assert len(points) == 126
    counts = np.histogram2d(*points.T, bins=40, range=[[0, 1], [0, 1]])[0].ravel()
    i, j = np.divmod(np.arange(1600), 40)
    distance = np.hypot(i[:, None] - i, j[:, None] - j)
    covariance = 1.91 * np.exp(-distance * 33 / 40)
    return stats.multivariate_normal(np.full(1600, np.log(126) - 1.91 / 2), covariance), counts


def pines(x):
    prior, counts = pines_prior_and_counts()
    return prior.logpdf(x) + np.sum(counts * x - np.exp(x) / 1600)


def funnel(x):
    return stats.norm.logpdf(x[0], scale=3) + stats.norm.logpdf(x[1:], scale=np.exp(x[0] / 2)).sum()


@pytest.mark.parametrize(
    "truth",
    [pytest.param(f, marks=needs_files) for f in (sonar, ionosphere, seeds, brownian, lorenz, pines)]
    + [breast_cancer, funnel],
)
def test_the_density_is_that_of_scipy(truth):
    with jax.enable_x64(True):
        target = reference(truth.__name__.replace("_", "-"))
        rng = np.random.default_rng(0)
        for _ in range(3):
            x = np.asarray(target.problem.base.sample(jax.random.key(rng.integers(99)))) * 0.5
            np.testing.assert_allclose(target.problem.log_target(jnp.asarray(x)), truth(x), rtol=1e-7)


@pytest.mark.parametrize("name", ["gaussian", "diabetes"])
def test_a_conjugate_evidence_is_the_ratio_of_prior_and_posterior(name):
    with jax.enable_x64(True):
        target = reference(name)
        log_target, dimension = target.problem.log_target, target.problem.position.shape[0]
        # A quadratic: one Newton step finds the posterior, and log target - log posterior is log Z at any x.
        zero = jnp.zeros(dimension)
        precision = -np.asarray(jax.hessian(log_target)(zero))
        mean = np.linalg.solve(precision, np.asarray(jax.grad(log_target)(zero)))
        posterior = stats.multivariate_normal(mean, np.linalg.inv(precision))
        for x in (np.zeros(dimension), mean + 0.1):
            log_z = float(log_target(jnp.asarray(x))) - posterior.logpdf(x)
            np.testing.assert_allclose(log_z, target.log_evidence, rtol=1e-9)


def test_the_gaussian_is_correlated():
    log_target = reference("gaussian").problem.log_target
    covariance = np.linalg.inv(-np.asarray(jax.hessian(log_target)(jnp.zeros(20)), np.float64))
    scale = np.sqrt(np.diag(covariance))
    assert np.abs(covariance / np.outer(scale, scale) - np.eye(20)).max() > 0.4


def test_the_evidence_of_the_wells():
    target = reference("many-well")

    def density(a):
        x = np.zeros(32)
        x[0] = a
        return np.exp(float(target.problem.log_target(jnp.asarray(x, jnp.float32))))

    well = integrate.quad(density, -4, 4, epsrel=1e-5)[0]
    np.testing.assert_allclose(16 * (np.log(well) + 0.5 * np.log(2 * np.pi)), target.log_evidence, rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_files if n in WITH_FILES else ()) for n in NAMES])
def test_density_and_gradient_are_finite_in_float32(name, key):
    problem = reference(name).problem
    x = problem.base.sample(key, (5,))
    value, gradient = jax.vmap(jax.value_and_grad(problem.log_prob))(x)
    assert value.dtype == jnp.float32
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))


class TestWrongInput:
    def test_unknown_name(self):
        with pytest.raises(InputError, match="did you mean sonar"):
            reference("sonarr")

    def test_no_folder(self, monkeypatch):
        monkeypatch.delenv("LEHR_DATA", raising=False)
        with pytest.raises(InputError, match="set LEHR_DATA"):
            reference("sonar")

    def test_no_file(self, tmp_path):
        with pytest.raises(InputError, match=r"there is no .*sonar\.csv"):
            reference("sonar", data_dir=tmp_path)

    @pytest.mark.parametrize("text", ["", "x,y\n", "x,y\n1,two\n", "x,y\n1,2\n3\n"])
    def test_malformed_file(self, tmp_path, text):
        (tmp_path / "sonar.csv").write_text(text)
        with pytest.raises(InputError, match="table of numbers under one header line"):
            reference("sonar", data_dir=tmp_path)
