"""The studies of a Gaussian, a mixture and proposals run at small settings, and say what they should."""

import json
from types import SimpleNamespace

import pytest

from lehr.errors import InputError
from lehr.studies import mh_gaussian, mh_mixture, mh_proposal


def run(study, tmp_path, name, num_chains):
    assert study(SimpleNamespace(out=tmp_path, num_chains=num_chains, seed=0, json=False)) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    return json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("study", "num_chains"), [(mh_gaussian.gaussian, 20), (mh_mixture.mixture, 2), (mh_proposal.proposal, 20)]
)
def test_too_few_chains_are_refused(study, num_chains, tmp_path):
    with pytest.raises(InputError, match="num_chains"):
        study(SimpleNamespace(out=tmp_path, num_chains=num_chains, seed=0, json=False))


def test_the_exact_gradient_of_finite_chains():
    assert mh_gaussian.exact(1, 0) == pytest.approx(0.3867, abs=1e-4)
    assert mh_gaussian.exact(10, 0) == pytest.approx(0.8435, abs=1e-4)


def test_gaussian(tmp_path, monkeypatch):
    few = ("default", "coupling: common numbers", "default, 1 step")
    monkeypatch.setattr(mh_gaussian, "SCHEMES", {name: mh_gaussian.SCHEMES[name] for name in few})
    monkeypatch.setattr(mh_gaussian, "BASELINES", {"covariance": mh_gaussian.BASELINES["covariance"]})
    found = run(mh_gaussian.gaussian, tmp_path, "mh-gaussian", 320)
    rows = {row["scheme"]: row for row in found["rows"]}
    assert all(abs(rows[name]["z"]) < 5 for name in few)
    assert rows["default"]["variance"] == pytest.approx(0.117, rel=0.5)
    assert rows["default"]["variance"] < rows["coupling: common numbers"]["variance"] / 20
    common, reflection = found["excursions"]
    # The same chain; only a reflection lets alternatives meet it.
    assert common["chain"] == reflection["chain"]
    assert common["apart"][19] > 0.95 > 0.1 > reflection["apart"][10]
    assert reflection["alternative"][-1] == pytest.approx(reflection["chain"][-1], abs=1e-5)


@pytest.mark.slow
def test_mixture(tmp_path, monkeypatch):
    for name, value in (("NUM_STEPS", 1000), ("LENGTHS", (50, 800)), ("ESTIMATORS", ("alternatives", "score"))):
        monkeypatch.setattr(mh_mixture, name, value)
    found = run(mh_mixture.mixture, tmp_path, "mh-mixture", 16)
    assert found["close"]["exact_gradient"] == pytest.approx(0.01837, abs=1e-5)
    assert abs(found["close"]["gradient_z"]) < 5
    assert found["ascent"]["best_obs"] == pytest.approx(1.066, abs=2e-3)
    assert found["ascent"]["exact_entropy"] > 1.07
    costs = {(row["estimator"], row["num_steps"]): row["cost"] for row in found["lengths"]}
    assert costs["score", 800] > 3 * costs["score", 50]
    assert costs["alternatives", 800] < 2 * costs["alternatives", 50]


@pytest.mark.slow
def test_proposal(tmp_path, monkeypatch):
    few = ("pathwise", "weak")
    monkeypatch.setattr(mh_proposal, "ROUTES", {name: mh_proposal.ROUTES[name] for name in (*few, "MALA")})
    monkeypatch.setattr(mh_proposal, "GOALS", ("whitened",))
    monkeypatch.setattr(mh_proposal, "NUM_STEPS", 600)
    found = run(mh_proposal.proposal, tmp_path, "mh-proposal", 512)
    rows = {row["route"]: row for row in found["routes"]}
    assert rows["weak"]["exact"] == pytest.approx(-0.1338, abs=1e-4)
    for row in rows.values():
        assert abs(row["z"]) < 5
        assert row["autocorrelation"] < row["least"] + 0.005
    (trained,), (_, best) = found["plane"], found["plane_known"]
    assert trained["correlation"] == pytest.approx(0.9, abs=0.1)
    assert trained["whitened"] < best["whitened"] + 0.01
