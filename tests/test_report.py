"""What an estimation reports: numbers against numpy, a table, JSON, ArviZ, a picture."""

import json
import math
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from lehr.adapters.arviz import _named
from lehr.errors import InputError
from lehr.report import Bound, Evidence, Round, in_words
from lehr.smc import PathStatistics
from lehr.weighted import pareto_k

LOG_Z = -1234.5


def make_evidence(num_populations=16, num_particles=128, num_steps=24, *, seed=0, log_z=LOG_Z, spread=0.05, **changes):
    """A result with realistic values: populations whose log estimates spread as lognormal ones do."""
    rng = np.random.default_rng(seed)
    forward = rng.normal(log_z - spread**2 / 2, spread, num_populations)
    log_weights = rng.normal(0, 0.7, (num_populations, num_particles))
    log_weights += (forward - np.log(np.mean(np.exp(log_weights), axis=1)))[:, None]
    # A posterior that the weights move: the first coordinate is larger where the weight is.
    positions = rng.normal(size=(num_populations, num_particles, 3))
    positions[:, :, 0] += log_weights - log_z
    betas = np.concatenate([[0.0], np.geomspace(1e-4, 1, num_steps)]) if num_steps > 1 else np.array([0.0, 1.0])
    path = PathStatistics(
        *(
            jnp.asarray(value, jnp.float32)
            for value in (
                np.full(num_steps, forward.mean() / num_steps),
                (0.25 * rng.uniform(0.9, 1.1, num_steps)) ** 2,
                np.full(num_steps, 0.8 * num_particles),
                np.linspace(0.9, 0.7, num_steps),
                np.ones((num_steps, 3)),
                np.zeros(num_steps + 1),
                np.ones(num_steps + 1),
            )
        )
    )
    rounds = tuple(
        Round(n, 100_000 * n, log_z, error, Bound(log_z - 0.01, error), Bound(log_z + 0.01, error))
        for n in range(2, num_populations + 1, 2)
        for error in [spread / math.sqrt(n)]
    )
    arrays = {
        "forward": forward,
        "backward": rng.normal(log_z + spread**2 / 2, spread, num_populations),
        "positions": positions,
        "log_weights": log_weights,
        "draws": {"mu": positions[..., 0], "theta": {"a": positions[..., 1:], "b": positions[..., 2]}},
        "betas": betas,
        "thermodynamic": forward + 0.01,
    }
    words = {
        "base": "Gaussian with the curvature at the mode",
        "rounds": rounds,
        "num_gradients": 412_345,
        "seconds": 12.34,
        "num_invalid": 0,
        "exact_upper": False,
        "converged": True,
        "tolerance": 0.1,
        "warnings": (),
    }
    arrays |= {name: value for name, value in changes.items() if name in arrays}
    words |= {name: value for name, value in changes.items() if name in words}
    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), arrays)
    return Evidence(**arrays, path=path, **words)


@pytest.fixture(scope="module")
def evidence():
    return make_evidence()


class TestNumbers:
    def test_estimate_and_error_against_numpy(self, evidence):
        z = np.exp(np.asarray(evidence.forward, np.float64) - LOG_Z)
        assert float(evidence.log_evidence) == pytest.approx(LOG_Z + np.log(z.mean()), abs=3e-4)
        assert float(evidence.standard_error) == pytest.approx(z.std(ddof=1) / z.mean() / 4, rel=1e-2)
        inverse = np.exp(LOG_Z - np.asarray(evidence.backward, np.float64))
        assert evidence.upper.value == pytest.approx(LOG_Z - np.log(inverse.mean()), abs=3e-4)
        assert evidence.upper.error == pytest.approx(inverse.std(ddof=1) / inverse.mean() / 4, rel=1e-2)

    def test_bracket(self, evidence):
        # The 97.5 % quantile of Student's distribution with 15 degrees of freedom, from a printed table.
        low, high = evidence.bracket
        assert low == pytest.approx(evidence.lower.value - 2.131 * evidence.lower.error, abs=1e-4)
        assert high == pytest.approx(evidence.upper.value + 2.131 * evidence.upper.error, abs=1e-4)

    def test_bracket_covers(self):
        """In nine of ten brackets and more the truth lies; were the quantile that of 80 %, in fewer."""
        inside = 0
        for seed in range(100):
            low, high = make_evidence(4, 2, 1, seed=seed, spread=0.2).bracket
            inside += low < LOG_Z < high
        # At 95 %, fewer than 86 of 100 happens once in 5,000.
        assert inside >= 86

    def test_one_population_knows_no_error(self):
        one = make_evidence(1)
        assert one.bracket == (-math.inf, math.inf)
        assert float(one.standard_error) == one.thermodynamic_error == math.inf

    def test_a_population_without_weight_leaves_the_bracket_open(self):
        low, high = make_evidence(2, forward=np.full(2, -math.inf), backward=np.full(2, -math.inf)).bracket
        assert (low, high) == (-math.inf, math.inf)

    def test_pooled_weights(self, evidence):
        w = np.exp(np.asarray(evidence.log_weights, np.float64).reshape(-1) - LOG_Z)
        assert float(evidence.effective_sample_size) == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-4)
        assert evidence.pareto_k == pytest.approx(pareto_k(np.log(w)), abs=1e-6)
        # A population with e^20 times the evidence of the others holds all the weight: its size is that of its draws.
        shift = jnp.zeros((16, 1)).at[3].set(20.0)
        one = eqx.tree_at(lambda e: e.log_weights, evidence, evidence.log_weights + shift)
        w = np.exp(np.asarray(evidence.log_weights[3], np.float64) - LOG_Z)
        assert float(one.effective_sample_size) == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-3)

    def test_cross_checks(self, evidence):
        assert float(evidence.stepping_stone) == pytest.approx(float(np.mean(evidence.forward)), abs=1e-2)
        values = np.asarray(evidence.thermodynamic, np.float64)
        assert float(evidence.thermodynamic_mean) == pytest.approx(values.mean(), abs=3e-4)
        assert evidence.thermodynamic_error == pytest.approx(values.std(ddof=1) / 4, rel=1e-2)

    def test_barrier(self, evidence):
        steps = np.sqrt(np.asarray(evidence.path.discrepancy))
        np.testing.assert_allclose(evidence.barrier, np.concatenate([[0], np.cumsum(steps)]), rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1234.5678, 0.0123, "-1234.568 ± 0.012"),
        (-1234.5678, 0.123, "-1234.57 ± 0.12"),
        (-1234.5678, 1.23, "-1234.6 ± 1.2"),
        (-1234.5678, 123.0, "-1235 ± 123"),
        (-1234.5678, math.inf, "-1234.568 ± unknown"),
        (-1.0, 0.0, "-1.000 ± 0.000"),
        (-1.0, 1e-9, "-1.00000 ± 0.00000"),
    ],
)
def test_in_words(value, error, text):
    assert in_words(value, error) == text


class TestTable:
    def test_what_it_says(self, evidence):
        text = str(evidence)
        lines = text.splitlines()
        rows = dict(line.split("  ", 1) for line in lines if not line.startswith(" "))
        rows = {name: value.strip() for name, value in rows.items()}
        low, high = evidence.bracket
        assert rows["log evidence"] == f"{float(evidence.log_evidence):.3f} ± {float(evidence.standard_error):.3f} nats"
        assert rows["bracket"] == f"[{low:.3f}, {high:.3f}] nats at 95 %, {high - low:.3f} nats wide"
        assert "its upper end is approximate" in text
        assert rows["converged"] == "yes"
        assert rows["base"] == "Gaussian with the curvature at the mode"
        assert rows["schedule"] == f"K = 24, barrier {float(evidence.barrier[-1]):.2f}"
        assert rows["populations"] == "16 x 128 particles"
        assert rows["draws"] == (
            f"effective sample size {float(evidence.effective_sample_size):,.0f}, Pareto k {evidence.pareto_k:.2f}"
        )
        assert rows["acceptance"] == "0.70 to 0.90"
        assert rows["work"] == "412,345 gradients, 12.3 s"
        assert rows["cross-checks"].startswith(f"thermodynamic {float(evidence.thermodynamic_mean):.3f} ± ")
        assert f"stepping stone {float(evidence.stepping_stone):.3f}" in lines[-1]

    def test_not_converged_with_every_reason(self):
        reasons = ("The acceptance falls to 0.03: " + "use a smaller step size " * 8 + "there.", "Second reason.")
        text = str(make_evidence(4, spread=0.8, converged=False, warnings=reasons, exact_upper=True, num_invalid=1500))
        assert "NOT CONVERGED  The acceptance falls" in text
        flat = " ".join(text.split())
        assert all(" ".join(reason.split()) in flat for reason in reasons)
        assert "exact: from posterior draws" in text
        assert "density NaN at 1,500 draws" in text
        assert max(map(len, text.splitlines())) <= 100
        # Every text begins in one column.
        assert len({len(line) - len(line.lstrip()) for line in text.splitlines() if line.startswith(" ")}) == 1

    def test_converged_with_a_warning(self):
        assert "converged     yes\n              A warning.\n" in str(make_evidence(warnings=("A warning.",)))

    def test_unknown_errors_and_tails(self):
        text = str(make_evidence(1, 4, 1, converged=False))
        assert "± unknown nats" in text
        assert "Pareto k unknown (too few draws)" in text
        assert "[-inf, inf]" in text
        text = str(make_evidence(log_weights=np.zeros((16, 128))))
        assert "Pareto k -inf (the largest weights are equal)" in text


def test_json_round_trip(evidence):
    for result in (evidence, make_evidence(1, 4, 1)):
        read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert read == result.to_dict()
        assert float(read["log_evidence"]) == float(result.log_evidence)
        assert float(read["standard_error"]) == float(result.standard_error)
        assert [float(end) for end in read["bracket"]] == list(result.bracket)
        assert float(read["lower"]["error"]) == result.lower.error
        assert float(read["pareto_k"]) == result.pareto_k
        np.testing.assert_allclose(read["forward"], result.forward)
        assert [
            Round(**row)._replace(lower=Bound(**row["lower"]), upper=Bound(**row["upper"])) for row in read["rounds"]
        ] == list(result.rounds)
        assert (read["num_populations"], read["num_particles"], read["dim"]) == result.positions.shape
        assert "draws" not in read
        assert "positions" not in read
    assert make_evidence(1).to_dict()["standard_error"] == "inf"
    assert make_evidence(2, forward=np.full(2, math.nan)).to_dict()["log_evidence"] == "nan"


@pytest.fixture
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return pytest.importorskip("arviz")


class TestArviz:
    def test_draws_are_the_weighted_ones(self, arviz):
        evidence = make_evidence(num_particles=512)
        data = evidence.to_arviz()
        assert set(data.posterior.data_vars) == {"mu", "theta.a", "theta.b"}
        assert data.posterior["mu"].shape == (16, 512)
        assert data.posterior["theta.a"].shape == (16, 512, 2)
        w = np.exp(np.asarray(evidence.log_weights, np.float64) - LOG_Z)
        w /= w.sum(axis=1, keepdims=True)
        values = np.asarray(evidence.positions)[..., 0]
        weighted, plain = np.sum(w * values, axis=1), values.mean(axis=1)
        means = np.asarray(data.posterior["mu"]).mean(axis=1)
        # Resampling adds less than sd / sqrt(N) to a population's mean: 0.05. Unweighted means would be far off.
        assert weighted.mean() - plain.mean() > 0.4
        np.testing.assert_allclose(means, weighted, atol=5 * 0.05)
        np.testing.assert_allclose(means.mean(), weighted.mean(), atol=5 * 0.05 / 4)
        # The populations nearly agree, so that the pooled weighted mean is this one too.
        pooled = np.asarray(jax.nn.softmax(evidence.log_weights.reshape(-1)), np.float64)
        pooled = np.sum(pooled * values.reshape(-1))
        np.testing.assert_allclose(means.mean(), pooled, atol=5 * 0.05 / 4)

    def test_leaves_stay_together_and_weights_can_be_had_back(self, arviz, evidence):
        data = evidence.to_arviz()
        particle = np.asarray(data.sample_stats["particle"])
        rows = np.arange(16)[:, None]
        np.testing.assert_array_equal(data.sample_stats["log_weight"], np.asarray(evidence.log_weights)[rows, particle])
        positions = np.asarray(evidence.positions)[rows, particle]
        np.testing.assert_array_equal(data.posterior["mu"], positions[..., 0])
        np.testing.assert_array_equal(data.posterior["theta.a"], positions[..., 1:])
        # Each particle floor(N w) or ceil(N w) times, copies side by side.
        w = np.asarray(jax.nn.softmax(evidence.log_weights, axis=1), np.float64)
        copies = np.stack([np.bincount(row, minlength=128) for row in particle])
        assert np.all(np.abs(copies - 128 * w) < 1 + 1e-3)
        assert np.all(np.diff(particle, axis=1) >= 0)

    def test_attributes_and_file(self, arviz, evidence, tmp_path):
        evidence.to_arviz().to_netcdf(str(tmp_path / "draws.nc"))
        attrs = arviz.from_netcdf(str(tmp_path / "draws.nc")).posterior.attrs
        assert attrs["log_evidence"] == float(evidence.log_evidence)
        assert attrs["standard_error"] == float(evidence.standard_error)
        assert (attrs["bracket_low"], attrs["bracket_high"]) == evidence.bracket
        assert attrs["converged"] == 1
        assert attrs["inference_library"] == "lehr"

    @pytest.mark.parametrize(
        ("draws", "names"),
        [
            (0.0, ["x"]),
            ((0.0, 1.0), ["x.0", "x.1"]),
            ([{"a": 0.0}, 1.0], ["x.0.a", "x.1"]),
            ({"loc": 0.0, "scale": 1.0}, ["loc", "scale"]),
            ({"loc": {"a": 0.0, "b": [1.0, 2.0]}}, ["loc.a", "loc.b.0", "loc.b.1"]),
            (Bound(0.0, 1.0), ["value", "error"]),
        ],
    )
    def test_names(self, draws, names):
        named = _named(draws)
        assert list(named) == names
        assert [float(value) for value in named.values()] == list(range(len(names)))

    def test_faults(self, arviz, evidence, monkeypatch):
        dead = eqx.tree_at(lambda e: e.log_weights, evidence, evidence.log_weights.at[3].set(-jnp.inf))
        with pytest.raises(InputError, match="population 3 has no finite weight to resample by: take the draws of the"):
            dead.to_arviz()
        monkeypatch.setitem(sys.modules, "arviz", None)
        with pytest.raises(InputError, match=r"^to_arviz needs ArviZ: pip install 'lehr\[arviz\]'$"):
            evidence.to_arviz()


class TestPlot:
    def test_panels(self, evidence, tmp_path):
        figure = evidence.plot(tmp_path / "evidence.png")
        barrier, acceptance, populations, rounds = figure.axes
        labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
        assert labels == [
            ("inverse temperature", "barrier from the base"),
            ("inverse temperature", "mean acceptance probability"),
            (f"log Z by each population, nats from {float(evidence.log_evidence):.2f}", "populations"),
            ("gradients of the target, so far", "log Z, nats"),
        ]
        np.testing.assert_allclose(barrier.lines[0].get_xydata(), np.stack([evidence.betas, evidence.barrier], axis=1))
        np.testing.assert_allclose(
            acceptance.lines[0].get_xydata(), np.stack([evidence.betas[1:], evidence.acceptance], axis=1)
        )
        # Every population once forward and once backward.
        assert sum(patch.get_height() for patch in populations.patches) == 2 * 16
        assert populations.lines[1].get_xdata()[0] == pytest.approx(evidence.upper.value - float(evidence.log_evidence))
        assert list(rounds.lines[0].get_xdata()) == [row.num_gradients for row in evidence.rounds]
        assert list(rounds.lines[1].get_ydata()) == [row.upper.value for row in evidence.rounds]
        band = rounds.patches[0].get_extents().transformed(rounds.transData.inverted())
        np.testing.assert_allclose((band.y0, band.y1), evidence.bracket, rtol=1e-9)
        picture = imread(tmp_path / "evidence.png")[:, :, :3]
        assert 500 < min(picture.shape[:2]) < max(picture.shape[:2]) < 2000
        assert picture.std() > 0.05
        assert "NOT CONVERGED" not in figure.get_suptitle()

    @pytest.mark.parametrize(
        "result",
        [
            lambda: make_evidence(1, 4, 1, converged=False),
            lambda: make_evidence(2, forward=np.array([-math.inf, math.nan]), backward=np.array([math.inf, math.nan])),
            lambda: make_evidence(3, forward=np.full(3, -10.0), backward=np.full(3, -10.0), rounds=()),
        ],
    )
    def test_whatever_the_numbers(self, result, tmp_path):
        evidence = result()
        figure = evidence.plot(str(tmp_path / "evidence.png"))
        assert (tmp_path / "evidence.png").stat().st_size > 10_000
        assert ("NOT CONVERGED" in figure.get_suptitle()) == (not evidence.converged)
