"""Models against each other: probabilities by hand, errors in quadrature, and what the errors leave open."""

import json
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from lehr.comparison import compare
from lehr.errors import InputError
from tests.test_report import make_evidence


def evidence(log_z, error=0.01, *, num_populations=16, converged=True):
    """A result with exactly this log evidence and upper end, and a standard error of `error`, below 0.25."""
    signs = jnp.where(jnp.arange(num_populations) % 2 == 0, 1.0, -1.0)
    spread = error * math.sqrt(max(num_populations - 1, 1))
    result = make_evidence(num_populations, 2, 1, converged=converged)
    z = jnp.log1p(spread * signs) if num_populations > 1 else jnp.zeros(1)
    return eqx.tree_at(lambda e: (e.forward, e.backward), result, (log_z + z, log_z - z))


def test_by_hand():
    result = compare({"a": evidence(-12.0, 0.03), "b": evidence(-10.0, 0.04), "c": evidence(-14.5, 0.05)})
    assert [model.name for model in result.models] == ["b", "a", "c"]
    assert result.best.name == "b"
    assert [model.log_evidence for model in result.models] == pytest.approx([-10, -12, -14.5], abs=1e-5)
    assert [model.log_bayes_factor for model in result.models] == pytest.approx([0, -2, -4.5], abs=1e-5)
    # 3-4-5: errors in quadrature.
    errors = [model.log_bayes_factor_error for model in result.models]
    assert errors == pytest.approx([0, 0.05, math.sqrt(0.05**2 + 0.04**2)], rel=1e-3)
    z = np.exp([0, -2, -4.5])
    assert [model.probability for model in result.models] == pytest.approx(list(z / z.sum()), abs=1e-5)
    assert [model.prior for model in result.models] == [1 / 3] * 3
    assert [model.strength for model in result.models] == ["", "positive", "strong"]
    assert result.ranked
    assert result.warnings == ()


def test_prior_probabilities():
    prior = {"a": 0.7, "b": 0.2, "c": 0.1}
    result = compare({"a": evidence(-12.0), "b": evidence(-10.0), "c": evidence(-14.5)}, prior=prior)
    # The order and the Bayes factors are those of the data alone.
    assert [model.name for model in result.models] == ["b", "a", "c"]
    joint = np.array([0.2, 0.7, 0.1]) * np.exp([0, -2, -4.5])
    assert [model.probability for model in result.models] == pytest.approx(list(joint / joint.sum()), abs=1e-5)
    certain = compare({"a": evidence(-12.0), "b": evidence(-10.0)}, prior={"a": 1.0, "b": 0.0})
    assert {model.name: model.probability for model in certain.models} == {"a": 1.0, "b": 0.0}
    assert certain.best.probability_interval == (0.0, 0.0)


def test_the_interval_of_a_probability():
    """For two models the probability is a monotone function of a normal difference, whose quantiles are known."""
    error = 0.2
    result = compare({"a": evidence(-10.0, error), "b": evidence(-11.0, error)})
    difference = 1.0 + np.array([-1.96, 1.96]) * error * math.sqrt(2)
    assert result.best.probability_interval == pytest.approx(tuple(1 / (1 + np.exp(-difference))), abs=0.01)
    low, high = result.models[1].probability_interval
    assert (1 - high, 1 - low) == pytest.approx(result.best.probability_interval, abs=1e-9)
    assert result == compare({"a": evidence(-10.0, error), "b": evidence(-11.0, error)})
    # Where the errors are small, the delta method: p (1 - p) se.
    small = compare({"a": evidence(-10.0, 0.01), "b": evidence(-11.0, 0.01)})
    p, (low, high) = small.best.probability, small.best.probability_interval
    assert (high - low) / (2 * 1.96) == pytest.approx(p * (1 - p) * 0.01 * math.sqrt(2), rel=0.03)


def test_no_ranking_within_the_errors():
    # t = 2.131: brackets +- 0.02; at 0.03 nats they overlap, though the difference is more than two errors (0.028).
    close = {"a": evidence(-10.0, 0.01), "b": evidence(-10.03, 0.01)}
    assert compare(close).warnings == ("The errors do not tell 'b' from 'a': run them longer to rank them.",)
    far = {"a": evidence(-10.0, 0.01), "b": evidence(-10.05, 0.01)}
    assert compare(far).warnings == ()
    # An upper end far below the lower one does not make a bracket smaller than the error of the estimate.
    noisy = {"a": evidence(-10.0, 0.15), "b": evidence(-10.3, 0.15)}
    noisy["b"] = eqx.tree_at(lambda e: e.backward, noisy["b"], noisy["b"].backward - 2)
    assert compare(noisy).models[1].not_separated_from == ("a",)
    three = compare({"a": evidence(-10.0), "b": evidence(-10.0), "c": evidence(-10.0)})
    assert three.models[2].not_separated_from == ("a", "b")
    assert three.warnings[1] == "The errors do not tell 'c' from 'a' and 'b': run them longer to rank them."


def test_not_converged():
    result = compare({"a": evidence(-10.0), "b": evidence(-20.0, converged=False)})
    assert result.warnings == ("'b' did not converge: its log evidence may be off by more than its error.",)
    assert not result.ranked
    assert "CAUTION" in str(result)


def test_an_unknown_error_tells_nothing():
    result = compare({"a": evidence(-10.0), "b": evidence(-20.0, num_populations=1)})
    assert [model.probability_interval for model in result.models] == [(0.0, 1.0)] * 2
    assert result.models[1].not_separated_from == ("a",)
    assert result.models[1].strength == ""


@pytest.mark.parametrize(
    ("difference", "strength"),
    [
        (0.9, "not worth more than a bare mention"),
        (1.1, "positive"),
        (2.9, "positive"),
        (3.1, "strong"),
        (4.9, "strong"),
        (5.1, "very strong"),
    ],
)
def test_words_of_kass_and_raftery(difference, strength):
    assert compare({"a": evidence(-10.0), "b": evidence(-10.0 - difference)}).models[1].strength == strength


def test_table():
    text = str(
        compare({"linear": evidence(-10.0, 0.012), "quadratic": evidence(-12.0, 0.012), "c" * 40: evidence(-20.0, 0.2)})
    )
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "model"
    assert [line.split()[0] for line in lines[1:4]] == ["linear", "quadratic", "c" * 23 + "…"]
    assert "-10.000 ± 0.012" in lines[1]
    assert "best" in lines[1]
    assert "-2.000 ± 0.017" in lines[2]
    assert "0.881 [0.877, 0.884]" in lines[1]
    assert len({len(line) for line in lines[:4]}) == 1
    assert max(map(len, lines)) <= 100
    assert "linear over quadratic: positive" in text
    assert lines[-1] == "ranking   The errors tell every model from every other."
    undecided = str(compare({"linear": evidence(-10.0), "quadratic": evidence(-10.001)}))
    assert "linear over quadratic" not in undecided
    assert "CAUTION  The errors do not tell 'quadratic' from 'linear'" in undecided


def test_json_round_trip():
    result = compare({"a": evidence(-10.0), "b": evidence(-20.0, num_populations=1)})
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read == result.to_dict()
    assert [model["name"] for model in read["models"]] == ["a", "b"]
    assert read["models"][1]["log_bayes_factor"] == pytest.approx(-10, abs=1e-5)
    assert float(read["models"][1]["log_bayes_factor_error"]) == math.inf
    assert read["warnings"] == list(result.warnings)
    assert read["ranked"] is False


@pytest.mark.parametrize(
    ("prior", "sentence"),
    [
        ({"a": 0.5, "b": 0.4}, r"^prior probabilities must sum to 1, but these sum to 0\.9$"),
        ({"a": 1.5, "b": -0.5}, r"^a prior probability is at least 0, but that of 'b' is -0\.5$"),
        ({"a": math.nan, "b": 0.5}, r"^a prior probability is at least 0, but that of 'a' is nan$"),
        ({"a": 0.5, "c": 0.5}, r"^prior probabilities are given for a, c, but the models are a, b: give one for each$"),
        ({"a": 1.0}, r"^prior probabilities are given for a, but the models are a, b: give one for each$"),
    ],
)
def test_faults_of_the_prior(prior, sentence):
    with pytest.raises(InputError, match=sentence):
        compare({"a": evidence(-10.0), "b": evidence(-11.0)}, prior=prior)


def test_faults_of_the_models():
    with pytest.raises(InputError, match=r"^a comparison needs at least two models, but there is 1: give each by its"):
        compare({"a": evidence(-10.0)})
    with pytest.raises(
        InputError, match=r"^the log evidence of 'b' is -inf, which cannot be compared: leave the model"
    ):
        compare({"a": evidence(-10.0), "b": evidence(-math.inf)})


def test_plot(tmp_path):
    models = {
        "a": evidence(-12.0, 0.03),
        "b": evidence(-10.0),
        "c": evidence(-11.0, num_populations=1, converged=False),
    }
    result = compare(models)
    left, right = result.plot(tmp_path / "comparison.png").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["b", "c\n(not converged)", "a"]
    brackets = [line.get_xdata() for line in left.lines[::2]]
    np.testing.assert_allclose(brackets[0], result.models[0].bracket)
    # A bracket without ends is drawn as a point.
    np.testing.assert_allclose(brackets[1], [-11, -11], atol=1e-5)
    assert [bar.get_width() for bar in right.patches] == [model.probability for model in result.models]
    assert imread(tmp_path / "comparison.png")[:, :, :3].std() > 0.05
