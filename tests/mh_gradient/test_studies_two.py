"""The studies of the Ising model and of couplings run at small settings; the exact energy is that of enumeration."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr.errors import InputError
from lehr.studies import mh_couplings, mh_dimension, mh_ising
from lehr.studies.ising_exact import exact_heat, exact_moments, maximum


def run(study, tmp_path, name, **options):
    assert study(SimpleNamespace(out=tmp_path, seed=0, json=False, **options)) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    return json.loads((tmp_path / f"{name}.json").read_text())


def enumerated(beta):
    """Mean, variance and third central moment of the energy of the 4 x 4 torus, over its 65,536 states."""
    spins = (1 - 2 * (np.arange(2**16)[:, None] >> np.arange(16) & 1)).reshape(-1, 4, 4)
    energies = -np.sum(spins * (np.roll(spins, 1, 1) + np.roll(spins, 1, 2)), axis=(1, 2))
    weights = np.exp(-beta * (energies + 32.0))
    weights /= weights.sum()
    mean = weights @ energies
    return mean, weights @ (energies - mean) ** 2, weights @ (energies - mean) ** 3


@pytest.mark.parametrize("beta", [0.1, 0.3, np.log(1 + 2**0.5) / 2, 0.6])
def test_kaufmans_formula_is_enumeration(beta):
    np.testing.assert_allclose(exact_moments(beta, 4, 4), enumerated(beta), rtol=1e-9)


def test_kaufmans_formula_at_known_places():
    _, variance, third = exact_moments(0.3, 4, 4)
    # C = beta^2 Var E, d Var E / d beta = -k_3
    assert (-variance, 2 * 0.3 * variance - 0.3**2 * third) == pytest.approx((-78.40, 75.69), abs=0.01)
    assert -exact_moments(0.44, 4, 4)[1] == pytest.approx(-64.85, abs=0.01)
    peak = maximum(12)
    assert peak["temperature"] == pytest.approx(2.335, abs=0.005)
    assert peak["specific_heat"] == pytest.approx(202.2, abs=0.1)
    # The torus may be turned; and dC/dT is the derivative of C.
    assert exact_moments(0.4, 6, 10) == pytest.approx(exact_moments(0.4, 10, 6), rel=1e-9)
    difference = (exact_heat(2.5 + 1e-4, 12)[0] - exact_heat(2.5 - 1e-4, 12)[0]) / 2e-4
    assert exact_heat(2.5, 12)[1] == pytest.approx(difference, rel=1e-5)


def test_the_specific_heat_of_groups_is_unbiased():
    x = np.random.default_rng(0).normal(2, 1, (4000, 2))
    rows = jnp.asarray(np.stack([x, x**2], axis=-1))
    # Of two numbers of variance 1; with the square of their mean in place of their product it would be 1/2.
    found = np.asarray(jax.vmap(lambda rows: mh_ising.heat(1.0, rows, 1))(rows))
    assert abs(found.mean() - 1) < 5 * found.std() / len(found) ** 0.5 < 0.3


@pytest.mark.slow
def test_ising(tmp_path, monkeypatch):
    small = {"TEMPERATURES": (2.5, 4.0), "SWEEPS": (50, 100), "COMPARED_AT": (4.0,), "SLOTS_AT": (2.8,)}
    for name, value in (small | {"RUN_SWEEPS": (20, 50), "ITERATIONS": 120}).items():
        monkeypatch.setattr(mh_ising, name, value)
    found = run(mh_ising.ising, tmp_path, "mh-ising", side=4, num_chains=64)
    for row in found["curve"]:
        for name in ("energy", "specific_heat", "slope", "slope_by_covariance"):
            assert abs(row[name]["z"]) < 5
    assert found["curve"][0]["specific_heat"]["error"] < 2  # of 13
    assert found["curve"][1]["slope"]["error"] < 1  # of -3.2
    variances = {row["coupling"]: row["variance"] for row in found["couplings"]}
    assert variances["heat bath"] < variances["single spins, monotone"] < variances["single spins, independent"]
    for row in found["alternatives"]:
        assert abs(row["slope"] - row["exact"]) < 5 * row["error"]
    one, _, sixteen = (row["variance"] for row in found["alternatives"])
    assert sixteen < one / 2
    for row in found["ascents"]:
        assert abs(row["temperature"] - found["maximum"]["temperature"]) < 0.4


@pytest.mark.parametrize(("side", "num_chains"), [(5, 16), (4, 20), (2, 16)])
def test_what_ising_cannot_do_is_refused(side, num_chains, tmp_path):
    with pytest.raises(InputError, match=r"side|num_chains"):
        mh_ising.ising(SimpleNamespace(out=tmp_path, side=side, num_chains=num_chains, seed=0, json=False))


def test_couplings(tmp_path, monkeypatch):
    monkeypatch.setattr(mh_couplings, "DIMENSIONS", (2,))
    found = run(mh_couplings.couplings, tmp_path, "mh-couplings", num_chains=64)
    rows = {(row["target"], row["coupling"]): row for row in found["rows"]}
    assert len(rows) == 3 * 5
    assert all(abs(row["z"]) < 5 for row in rows.values())
    for target in ("Gaussian", "correlated Gaussian", "Student's t, df 5"):
        assert rows[target, "reflection"]["variance"] < rows[target, "common random numbers"]["variance"] / 10
        assert rows[target, "reflection"]["unmet"] < 0.05 < 0.3 < rows[target, "common random numbers"]["unmet"]
    assert {row["coupling"] for row in found["best"]} <= set(mh_couplings.METHODS)


@pytest.mark.parametrize("dim", [1, 2, 20])
def test_targets_of_couplings_are_what_they_are_drawn_from(dim):
    for name, shape in mh_couplings.shapes(dim).items():
        draws = jnp.asarray(shape.draws(np.random.default_rng(0), 20_000), jnp.float32)
        scores = jax.vmap(jax.grad(lambda x, target=shape.target: target(0.0, x)))(draws)
        # Of draws of p, E[x (d log p)'] = -I.
        np.testing.assert_allclose(np.asarray(draws.T @ scores) / len(draws), -np.eye(dim), atol=0.12)
        assert np.mean(scores**2) == pytest.approx(shape.second, rel=0.1)
        values = np.linalg.svd(np.asarray(shape.target.whitening), compute_uv=False)
        condition = 10 if name == "correlated Gaussian" and dim > 1 else 1
        assert (values[0] / values[-1]) ** 2 == pytest.approx(condition, rel=1e-3)


def test_couplings_needs_chains_for_errors(tmp_path):
    with pytest.raises(InputError, match="num_chains"):
        mh_couplings.couplings(SimpleNamespace(out=tmp_path, num_chains=2, seed=0, json=False))


@pytest.mark.slow
def test_dimension(tmp_path, monkeypatch):
    monkeypatch.setattr(mh_dimension, "_ALTERNATIVES", (1, 8))
    found = run(mh_dimension.dimension, tmp_path, "mh-dimension", largest=1000, num_chains=64, num_repeats=24)
    (row,) = found["rows"]
    assert row["num_parameters"] == 32 * 10 + 32 + 32 * 32 + 32 + 32
    assert row["cosine"] > 0.8
    assert 0.02 < row["births"] < 0.3
    assert found["strengths"]["num_parameters"] == 1184
    # The specification has 4.0, 4.4, 4.6 and 9.4, on a network of its own.
    ratios = found["strengths"]["variance_ratio"]
    assert max(ratios["gradient"], ratios["distance"]) < 4
    assert ratios["uniform"] < 9.4
    one, eight = (row["variance_ratio"] for row in found["alternatives"])
    assert eight < one / 3


@pytest.mark.parametrize(("largest", "num_chains"), [(999, 64), (1000, 1)])
def test_what_dimension_cannot_do_is_refused(largest, num_chains, tmp_path):
    with pytest.raises(InputError, match=r"at least 2 chains and 1,000 parameters"):
        mh_dimension.dimension(
            SimpleNamespace(out=tmp_path, largest=largest, num_chains=num_chains, num_repeats=4, seed=0, json=False)
        )
