"""The studies run on a small trained model, and say what they should."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from lehr import Gaussian, objectives
from lehr.studies import sticking
from lehr.studies.figure2 import _agreement, _budgets
from tests import targets


def test_budgets_end_at_the_largest_and_every_method_can_spend_them():
    assert _budgets(300) == [10, 30, 100, 300]
    assert _budgets(10_000) == [10, 30, 100, 320, 1000, 3160, 10_000]
    assert all(budget % 10 == 0 for budget in _budgets(4567))


def test_agreement_compares_the_last_budget_only():
    rows = [
        {"method": method, "gradients": budget, "nll": nll, "error": 0.3}
        for budget, nlls in ((10, (9, 8, 7)), (100, (2.0, 1.5, 1.0)))
        for method, nll in zip(("ais", "hais", "dais"), nlls)
    ]
    by_pair = {row["pair"]: row for row in _agreement(rows, 100)}
    assert by_pair["ais - dais"]["difference"] == pytest.approx(1.0)
    assert by_pair["ais - hais"]["error"] == pytest.approx(0.3 * 2**0.5)


@pytest.mark.slow
def test_figure2_on_a_small_run(tmp_path, capsys):
    from lehr.cli import main

    run = tmp_path / "run"
    small = ["--epochs", "3", "--hidden", "8", "--latent-dim", "2", "--objective", "iwae"]
    with pytest.raises(SystemExit) as trained:
        main(["train", *small, "--out", str(run)])
    assert trained.value.code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as studied:
        main(
            ["study", "figure2", str(run), "--num-images", "4", "--num-chains", "4", "--max-gradients", "30", "--json"]
        )
    assert studied.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["gradients"] for row in result["rows"]] == [g for g in (10, 30) for _ in range(4)]
    # All four estimate the same likelihood; a model this small is easy, so they meet at the largest budget.
    last = [row for row in result["rows"] if row["gradients"] == 30]
    assert max(row["nll"] for row in last) - min(row["nll"] for row in last) < 5 * max(row["error"] for row in last)
    assert all(0 < row["error"] < 1 for row in last)
    assert matplotlib.image.imread(run / "figure2.png").shape[0] > 300


def test_figure2_needs_more_than_one_chain(tmp_path, capsys):
    from lehr.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["study", "figure2", str(tmp_path), "--num-chains", "1"])
    assert stopped.value.code == 2
    assert "2 chains" in capsys.readouterr().err


def test_the_linear_target_of_sticking_has_the_posterior_it_says(x64):
    logistic, linear = sticking._targets()
    posterior = linear.posterior()
    np.testing.assert_allclose(jax.grad(linear)(posterior.loc), 0, atol=1e-8)
    precision = -jax.hessian(linear)(posterior.loc)
    scale = posterior.scale_tril
    np.testing.assert_allclose(precision @ scale @ scale.T, np.eye(11), atol=1e-8)
    # The other is not Gaussian: its curvature changes.
    assert not np.allclose(*(jax.hessian(logistic)(x) for x in (jnp.zeros(11), jnp.ones(11))), rtol=0.5)


def test_moments_of_the_gradient_are_right(key):
    # The gradient is a + z with z ~ N(0, 4 I) in three dimensions.
    def objective(a, target, key):
        return target + jnp.sum(a**2) / 2 + 2 * jnp.sum(a * jax.random.normal(key, a.shape))

    keys = jax.random.split(key, 4000)
    bound = sticking.Bound(objective, jnp.zeros(()), ())
    found = sticking.gradient_moments(bound, jnp.array([3.0, 0.0, 4.0]), keys)
    assert abs(found["variance"] - 12) < 5 * found["variance_error"]
    np.testing.assert_allclose(found["signal_to_noise"], 5 / 12**0.5, rtol=0.1)
    assert np.isnan(sticking.gradient_moments(bound, jnp.zeros(3), keys)["signal_to_noise"])


def test_the_variance_of_a_mean_of_bounds_is_given_for_one_bound(key):
    """A rule whose replicates are independent has the moments of one bound, however many it averages."""

    def averaged(base, target, key, *, num_replicates):
        keys = jax.random.split(key, num_replicates)
        return jnp.mean(jax.vmap(lambda key: objectives.elbo(base, target, key))(keys))

    start = targets.base_2d()
    rules = {"plain": sticking.Rule(objectives.elbo), "averaged": sticking.Rule(averaged, 8)}
    run = sticking.Run("conjugate", start, targets.conjugate_2d(), {"ELBO": (rules, ())})
    plain, mean = sticking.measure(key, run, 100, 2000)[:2]
    error = (plain["variance_error"] ** 2 + mean["variance_error"] ** 2) ** 0.5
    assert abs(plain["variance"] - mean["variance"]) < 5 * error
    assert error < 0.1 * plain["variance"]
    np.testing.assert_allclose(plain["signal_to_noise"], mean["signal_to_noise"], rtol=0.2)


def test_sticking_on_a_target_in_the_family(tmp_path, capsys, monkeypatch):
    from lehr.cli import main

    linear = sticking._targets()[1]
    posterior = linear.posterior()
    start = Gaussian.from_covariance(posterior.loc + 0.05, 1.3 * posterior.scale_tril @ posterior.scale_tril.T)
    rules = {
        "plain": sticking.Rule(objectives.elbo),
        "control variate": sticking.Rule(objectives.elbo_control_variate),
        "STL": sticking.Rule(objectives.elbo_stl),
    }
    run = sticking.Run("in the family", start, linear, {"ELBO": (rules, (("num_samples", 4),))}, posterior)
    monkeypatch.setattr(sticking, "runs", lambda key: [run])
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as studied:
        main(["study", "sticking", "--num-iterations", "100", "--num-keys", "40", "--out", str(out), "--json"])
    assert studied.value.code == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert json.loads((out / "sticking.json").read_text()) == result
    assert "exact posterior: plain" in captured.err
    assert [row["iteration"] for row in result["rows"][::3]] == [0, 1, 3, 10, 30, 100, 100]
    by_rule = {rule: [row["variance"] for row in result["rows"] if row["rule"] == rule] for rule in rules}
    # At the posterior the score is all the noise there is, and only the other two leave it out.
    for rule in ("STL", "control variate"):
        assert by_rule[rule][-1] < 1e-7 * by_rule["plain"][-1]
    assert by_rule["plain"][-1] > 0.1 * by_rule["plain"][0]
    assert matplotlib.image.imread(out / "sticking.png").shape[0] > 300


@pytest.mark.slow
def test_every_run_of_sticking(tmp_path, capsys):
    from lehr.cli import main

    out = tmp_path / "out"
    with pytest.raises(SystemExit) as studied:
        main(["study", "sticking", "--num-iterations", "100", "--num-keys", "20", "--out", str(out), "--json"])
    assert studied.value.code == 0
    result = json.loads(capsys.readouterr().out)
    elbo, several = ["plain", "control variate", "STL"], ["plain", "control variate", "STL (biased)", "DReG"]
    expected = {
        "ELBO, full-rank Gaussian": elbo,
        "IWAE S = 5": several,
        "IWAE S = 50": several,
        "ELBO, coupling flow": elbo,
        "DAVI K = 5, S = 5": several,
    }
    for setting, rules in expected.items():
        for target in ("logistic regression", "target in the family"):
            rows = [row for row in result["rows"] if (row["setting"], row["target"]) == (setting, target)]
            inside = target == "target in the family"
            assert [row["rule"] for row in rows] == rules * (7 if inside else 6)
            assert [row["iteration"] for row in rows[:: len(rules)]] == [0, 1, 3, 10, 30, 100] + [100] * inside
            assert [row["exact"] for row in rows[:: len(rules)]] == [False] * 6 + [True] * inside
            assert all(np.isfinite([row["bound"], row["variance"], row["variance_error"]]).all() for row in rows)
            last = {row["rule"]: row for row in rows[-len(rules) :]}
            # The same draws, and so the same bound; the means of several bounds have draws of their own.
            bounds = [last[rule]["bound"] for rule in rules if setting.startswith("ELBO") or rule != "control variate"]
            np.testing.assert_allclose(bounds, bounds[0], rtol=1e-4)
            if inside and not setting.startswith("DAVI"):
                # At the exact posterior the score is all the noise, and every rule but the plain one takes it out.
                assert all(last[rule]["variance"] < 1e-7 * last["plain"]["variance"] for rule in rules[1:])
    assert len(result["rows"]) == 13 * sum(len(rules) for rules in expected.values())
    assert matplotlib.image.imread(out / "sticking.png").shape[0] > 300


def test_sticking_needs_more_than_a_few_keys(tmp_path, capsys):
    from lehr.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["study", "sticking", "--num-keys", "2", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "10 keys" in capsys.readouterr().err


def test_figure1_says_the_rates(tmp_path, capsys):
    from lehr.cli import main

    with pytest.raises(SystemExit) as done:
        main(["study", "figure1", "--max-steps", "1000", "--num-chains", "20", "--out", str(tmp_path), "--json"])
    assert done.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert matplotlib.image.imread(tmp_path / "figure1.png").shape[2] == 4
    assert result == json.loads((tmp_path / "figure1.json").read_text())
    curves = {(row["setting"], row["c"]): row for row in result["curves"]}
    assert len(curves) == 15
    # The simulation does not know the closed form.
    z = [dot["z"] for row in result["curves"] for dot in row["simulated"]]
    assert len(z) == 30
    assert max(map(abs, z)) < 6
    for c in (0.25, 0.5):
        falling, noisy = curves["persistence 0.9", c], curves["batches of 100", c]
        assert falling["exact"][-1]["gap"] < 0.2 * falling["exact"][0]["gap"]
        assert noisy["exact"][-1]["gap"] > 0.5 * noisy["exact"][0]["gap"]
    assert result["perfect"]["slope"] == pytest.approx(-1, abs=0.2)
    assert result["least"][-1]["gap"] > 0.9 * result["least"][0]["gap"]
    assert result["predicted"]["predicted"] == pytest.approx(result["predicted"]["exact"], rel=0.1)


@pytest.mark.slow
def test_gradient_noise_ranks_the_remedies(tmp_path, monkeypatch):
    from lehr.cli import main
    from lehr.studies import gradient_noise

    monkeypatch.setattr(gradient_noise, "_PASSES", (4,))
    monkeypatch.setattr(gradient_noise, "_FACTORS", np.array([0.05, 0.3]))
    with pytest.raises(SystemExit) as done:
        main(["study", "gradient-noise", "--num-data", "1000", "--num-chains", "20", "--out", str(tmp_path)])
    assert done.value.code == 0
    result = json.loads((tmp_path / "gradient-noise.json").read_text())
    assert matplotlib.image.imread(tmp_path / "gradient-noise.png").shape[2] == 4
    gaps = {(row["setting"], row["method"]): row for row in result["rows"]}
    assert len(gaps) == 12
    for setting in ("linear", "logistic"):
        assert gaps[setting, "control variate, order 1"]["gap"] < 0.5 * gaps[setting, "batches of 100"]["gap"]
    assert gaps["linear", "surrogate"]["gap"] < 0.3 * gaps["linear", "batches of 100"]["gap"]
    for row in result["rows"]:
        if row["exact"] is not None:
            assert abs(row["gap"] - row["exact"]) < 6 * row["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["figure1", "--max-steps", "10"],
        ["figure1", "--num-chains", "1"],
        ["gradient-noise", "--num-data", "10"],
        ["gradient-noise", "--num-chains", "1"],
    ],
)
def test_studies_of_regression_want_enough(arguments, capsys):
    from lehr.cli import main

    with pytest.raises(SystemExit) as done:
        main(["study", *arguments])
    assert done.value.code == 2
    assert "give larger numbers" in capsys.readouterr().err
