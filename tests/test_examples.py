"""The worked example of docs/evidence.md, against quadrature."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logsumexp

import lehr

FOLDER = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(scope="module")
def seeds():
    pytest.importorskip("numpyro")
    spec = importlib.util.spec_from_file_location("seeds", FOLDER / "seeds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data():
    return json.loads((FOLDER / "seeds.json").read_text())


def by_quadrature(data):
    """log Z of `roots`: the trapezoid rule over both coefficients."""
    intercept, step_0 = np.linspace(-1.8, 0.6, 241, retstep=True)
    extract, step_1 = np.linspace(-0.4, 2.6, 301, retstep=True)
    log_odds = intercept[:, None, None] + extract[None, :, None] * np.array(data["extract"])
    log_likelihood = stats.binom.logpmf(data["germinated"], data["total"], expit(log_odds)).sum(axis=-1)
    sd = data["prior_sd"]
    log_prior = stats.norm.logpdf(intercept, 0, sd)[:, None] + stats.norm.logpdf(extract, 0, sd)
    return logsumexp(log_likelihood + log_prior) + np.log(step_0 * step_1)


def test_the_smallest_model_agrees_with_quadrature(seeds, data):
    problem = lehr.from_numpyro(seeds.roots, **{name: jnp.asarray(value) for name, value in data.items()})
    found = lehr.evidence(jax.random.key(0), problem, max_gradients=60_000, progress=False)
    truth = by_quadrature(data)
    assert found.converged
    assert found.standard_error < 0.005
    # Beyond the errors, float32 leaves 1e-5 of -65.
    assert found.bracket[0] - 1e-3 < truth < found.bracket[1] + 1e-3


def test_both_data_files_hold_the_same_plates(data):
    wide = json.loads((FOLDER / "seeds-wide.json").read_text())
    assert wide | {"prior_sd": data["prior_sd"]} == data
    assert {len(column) for name, column in data.items() if name != "prior_sd"} == {21}
    assert all(0 <= few <= many for few, many in zip(data["germinated"], data["total"]))
