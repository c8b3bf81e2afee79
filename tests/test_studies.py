"""The studies run on a small trained model, and say what they should."""

import json

import matplotlib.image
import pytest

from lehr.studies.figure2 import _agreement, _budgets


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
