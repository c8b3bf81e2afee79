"""Training reaches known optima, resumes to the last digit, and says what went wrong."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flowjax.distributions import Normal
from paramax import NonTrainable

import lehr
from lehr import InputError, objectives, optimisation
from lehr.training_loop import MOST_SKIPPED
from tests import targets

ADAM = optax.adam(optax.linear_schedule(0.05, 0.001, 1000))


def same(a, b):
    return all(
        np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def lower(base):
    """With what is above the diagonal at zero: `sample` would use it, and `log_prob` not, which training exploits."""
    return eqx.tree_at(lambda base: base.scale_tril, base, jnp.tril(base.scale_tril))


def elbo(base, key):
    return objectives.elbo(lower(base), targets.conjugate_2d(), key, num_samples=4)


def elbo_stl(base, key):
    base = lower(base)
    return objectives.elbo_stl(base, targets.conjugate_2d(), key, num_samples=4)


def bowl(x, key):
    """-|x - 2|^2 / 2 with a little noise in the value, not in the gradient."""
    return -jnp.sum((x - 2) ** 2) / 2 + 0.01 * jax.random.normal(key, dtype=x.dtype)


def rough(x, key):
    """The bowl with noise in its gradient."""
    return bowl(x, key) + 0.3 * jnp.sum(x * jax.random.normal(key, x.shape))


SGD = optax.sgd(0.1)


def fit(*args, **options):
    return lehr.fit(*args, **({"progress": False} | options))


class TestKnownOptima:
    def test_a_gaussian_base_becomes_the_posterior(self, key):
        target = targets.conjugate_2d()
        trained = fit(key, elbo_stl, targets.base_2d(), ADAM, 1500)
        np.testing.assert_allclose(trained.params.loc, target.posterior.loc, atol=0.01)
        np.testing.assert_allclose(jnp.tril(trained.params.scale_tril), target.posterior.scale_tril, atol=0.01)
        assert abs(trained.bound.value - float(target.log_evidence)) < 5 * trained.bound.error + 1e-3
        assert trained.warnings == ()
        assert trained.values.shape == (1500,)
        assert trained.num_skipped == 0
        assert float(trained.at_start.mean()) < trained.bound.value - 0.1

    def test_davi_comes_near_the_log_evidence(self, key):
        target = targets.conjugate_2d()
        annealer = lehr.Annealer(targets.base_2d(), lehr.Schedule.linear(4), lehr.Hamiltonian(jnp.asarray(0.2)))
        trained = fit(
            key,
            lambda a, key: objectives.davi(
                eqx.tree_at(lambda a: a.base, a, lower(a.base)), target, key, num_particles=4
            ),
            annealer,
            optax.adam(0.03),
            400,
            num_evaluations=200,
        )
        truth = float(target.log_evidence)
        start = float(trained.at_start.mean())
        assert start < truth - 0.05
        # A lower bound, that has most of the way behind it.
        assert trained.bound.value < truth + 5 * trained.bound.error
        assert truth - trained.bound.value < 0.2 * (truth - start) + 5 * trained.bound.error
        assert not np.array_equal(trained.params.kernel.log_step_size, annealer.kernel.log_step_size)

    def test_an_objective_may_return_more(self, key):
        with_aux = lambda x, key: (bowl(x, key), {"more": x})  # noqa: E731
        plain = fit(key, bowl, jnp.zeros(2), SGD, 30)
        assert same(plain.last_params, fit(key, with_aux, jnp.zeros(2), SGD, 30, has_aux=True).last_params)

    def test_only_float_arrays_are_trained(self, key):
        params = {"x": np.zeros(2, np.float32), "frozen": NonTrainable(jnp.ones(2)), "n": jnp.arange(3), "name": tuple}
        trained = fit(key, lambda p, key: bowl(p["x"] + 0 * p["frozen"].tree, key), params, optax.adamw(0.1), 30)
        assert float(trained.params["x"].min()) > 0.5
        assert same(trained.params["frozen"], params["frozen"])
        assert same(trained.params["n"], params["n"])
        assert trained.params["name"] is tuple

    def test_the_optimiser_hears_of_the_loss(self, key):
        optimiser = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, rtol=1.0))
        trained = fit(key, bowl, jnp.zeros(2), optimiser, 100)
        assert float(trained.params.max()) < 1.9  # the steps have become smaller and smaller


class TestBestAndLast:
    def test_values_on_fresh_keys_decide(self, key):
        trained = fit(key, bowl, jnp.zeros(2), SGD, 300)
        assert not trained.took_best
        assert same(trained.params, trained.last_params)
        assert trained.best_iteration > 30
        assert abs(trained.bound.value) < 5 * trained.bound.error
        assert abs(trained.trend.value) < 5 * trained.trend.error

    def test_what_was_lost_at_the_end_is_not_returned(self, key):
        # Rises at first, and is thrown far off by the last fifth of the steps.
        rates = optax.piecewise_constant_schedule(0.1, {160: 31.0})
        trained = fit(key, rough, jnp.zeros(2), optax.sgd(rates), 180)
        assert trained.took_best
        assert same(trained.params, trained.best_params)
        assert 17 <= trained.best_iteration <= 161
        np.testing.assert_allclose(trained.params, 2, atol=0.5)
        assert np.abs(trained.last_params - 2).max() > 10
        assert trained.last_bound.value < trained.bound.value
        assert f"the best, after {trained.best_iteration}" in str(trained)

    def test_a_run_that_made_things_worse_from_the_first_step_returns_its_start(self, key):
        start = jnp.full(2, 1.0)
        with pytest.warns(RuntimeWarning, match="far below its best"):
            trained = fit(key, bowl, start, optax.sgd(2.5), 40)
        assert trained.diverged
        assert trained.best_iteration == 0
        assert same(trained.params, start)
        assert "at the start" in trained.warnings[0]
        assert "smaller learning rate" in trained.warnings[0]


class TestDivergence:
    def test_it_is_said_and_the_run_may_stop(self, key):
        rates = optax.piecewise_constant_schedule(0.1, {200: 21.0})
        with pytest.warns(RuntimeWarning, match="far below its best"):
            goes_on = fit(key, rough, jnp.zeros(2), optax.sgd(rates), 300, window=20)
        diverging = goes_on, fit(key, rough, jnp.zeros(2), optax.sgd(rates), 300, window=20, stop_when_diverged=True)
        for trained in diverging:
            assert trained.diverged
            assert trained.took_best
            assert trained.warnings[0].startswith("It diverged")
            assert str(trained).count("It diverged") == 1
        assert [trained.num_iterations == 300 for trained in diverging] == [True, False]
        assert 220 < diverging[1].num_iterations < 240
        assert "stopped after" in diverging[1].warnings[1]
        assert len(diverging[1].values) == diverging[1].num_iterations

    def test_it_is_said_at_once(self, key):
        rates = optax.piecewise_constant_schedule(0.1, {200: 21.0})
        with pytest.warns(RuntimeWarning, match="far below its best") as said:
            fit(key, rough, jnp.zeros(2), optax.sgd(rates), 3000, window=20)
        assert len(said) == 1
        # Within a block of the loop of it, and long before the end.
        at = int(re.search(r"at iteration ([\d,]+):", str(said[0].message))[1].replace(",", ""))
        assert 220 <= at < 1500

    def test_one_far_value_is_not_divergence(self, key):
        def heavy(x, key):
            return bowl(x, key) - jnp.where(jax.random.uniform(key) < 0.02, 1e6, 0.0)

        trained = fit(key, heavy, jnp.zeros(2), SGD, 400, window=20, stop_when_diverged=True)
        assert float(trained.values.min()) < -1e5
        assert trained.num_iterations == 400
        assert not trained.diverged

    def test_noise_alone_is_not_divergence(self, key):
        noisy = lambda x, key: bowl(x, key) + 100 * jax.random.normal(key)  # noqa: E731
        assert not fit(key, noisy, jnp.zeros(2), SGD, 500, stop_when_diverged=True).warnings


class TestWhatIsNotFinite:
    @pytest.mark.parametrize("where", ["value", "gradient"])
    def test_such_iterations_change_nothing_and_are_counted(self, key, where):
        def planted(x, key):
            bad = jax.random.uniform(key) < 0.2
            # sqrt has an infinite derivative at 0, and 0 times that is NaN.
            fault = jnp.where(bad, jnp.nan, 0.0) if where == "value" else jnp.sqrt(jnp.where(bad, 0 * x[0], 1.0)) - 1.0
            return bowl(x, key) + jnp.where(bad & (where == "gradient"), fault + 1, fault)

        adam = optax.adam(0.1)
        trained = fit(key, planted, jnp.zeros(2), adam, 300)
        assert 30 < trained.num_skipped < 90
        assert np.all(np.isfinite(trained.params))
        np.testing.assert_allclose(trained.params, 2, atol=0.1)
        assert np.isnan(np.asarray(trained.values)).sum() == (trained.num_skipped if where == "value" else 0)
        assert f"{trained.num_skipped} of 300 iterations were skipped" in trained.warnings[0]
        # The same steps as without the keys that were skipped: the state has not counted them.
        sound = np.isfinite(np.asarray(trained.values))
        if where == "value":
            short = fit(key, bowl, jnp.zeros(2), adam, int(sound.sum()))
            np.testing.assert_allclose(trained.last_params, short.last_params, rtol=1e-5)

    def test_many_in_a_row_stop_the_run(self, key):
        fragile = lambda x, key: bowl(x, key) + jnp.where(x[0] > 1, jnp.nan, 0.0)  # noqa: E731
        trained = fit(key, fragile, jnp.zeros(2), SGD, 1000)
        assert trained.num_skipped == MOST_SKIPPED
        assert trained.num_iterations < 60
        assert any("stopped after" in warning for warning in trained.warnings)
        # The last step led to where nothing is finite; the best iterate is before it.
        assert trained.took_best or float(trained.params[0]) < 1

    def test_a_step_that_overflows_is_not_taken(self, key):
        steep = lambda x, key: 1e38 * jnp.sum(x)  # noqa: E731
        trained = fit(key, steep, jnp.zeros(2), optax.sgd(1e3), 50)
        assert trained.num_skipped == MOST_SKIPPED
        assert same(trained.last_params, jnp.zeros(2))

    def test_nowhere_finite_at_the_start_is_refused(self, key):
        with pytest.raises(InputError, match="not finite at the start: it is nan"):
            fit(key, lambda x, key: bowl(x, key) + jnp.nan, jnp.zeros(2), SGD, 10)


class TestCheckpoints:
    @pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
    def test_a_resumed_run_is_the_uninterrupted_one(self, make_key, tmp_path):
        key, run = make_key(3), lambda n, **options: fit(make_key(3), elbo, targets.base_2d(), ADAM, n, **options)
        del key
        whole = run(300, window=20)
        first = run(130, window=20, checkpoint=tmp_path / "run")
        assert (tmp_path / "run" / "fit.npz").exists()
        resumed = run(300, window=20, checkpoint=tmp_path / "run")
        for name in ("params", "last_params", "best_params", "values", "at_start", "at_last", "at_best"):
            assert same(getattr(whole, name), getattr(resumed, name)), name
        assert whole.best_iteration == resumed.best_iteration
        assert same(whole.values[:130], first.values)
        assert resumed.seconds > first.seconds

    def test_an_interrupted_run_returns_what_there_is_and_goes_on(self, key, tmp_path, monkeypatch):
        whole = fit(key, bowl, jnp.zeros(2), SGD, 200)
        shown = []

        def interrupt(state, window):
            shown.append(state)
            if int(state.iteration) > 50:
                raise KeyboardInterrupt
            return ""

        with monkeypatch.context() as patched:
            patched.setattr(optimisation, "_line", interrupt)
            stopped = fit(key, bowl, jnp.zeros(2), SGD, 200, checkpoint=tmp_path)
        assert 50 < stopped.num_iterations < 200
        assert stopped.warnings == (f"It was interrupted after {stopped.num_iterations} of 200 iterations.",)
        assert same(stopped.values, whole.values[: stopped.num_iterations])
        resumed = fit(key, bowl, jnp.zeros(2), SGD, 200, checkpoint=tmp_path)
        assert same((resumed.params, resumed.values), (whole.params, whole.values))
        assert resumed.warnings == ()

    def test_interrupted_before_anything_was_done(self, key, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(optimisation, "block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(key, bowl, jnp.zeros(2), SGD, 20)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    def test_types_and_keys_in_the_state_survive(self, key, tmp_path, dtype):
        optimiser = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(5)), optax.adam(0.1))
        objective = lambda x, key: bowl(x.astype(jnp.float32), key)  # noqa: E731
        run = lambda n, **options: fit(key, objective, jnp.zeros(2, dtype), optimiser, n, window=5, **options)  # noqa: E731
        whole = run(60)
        run(25, checkpoint=tmp_path)
        resumed = run(60, checkpoint=tmp_path)
        assert resumed.params.dtype == dtype
        assert same((whole.params, whole.values), (resumed.params, resumed.values))

    def test_checkpoints_of_other_runs_are_refused(self, key, tmp_path):
        run = lambda **changes: fit(  # noqa: E731
            *(
                {"key": key, "objective": bowl, "params": jnp.zeros(2), "optimiser": SGD, "num_iterations": 30}
                | changes
            ).values(),
            checkpoint=tmp_path,
        )
        run()
        for changes, name in (
            ({"key": jax.random.key(99)}, "key"),
            ({"params": jnp.ones(2)}, "numbers in params"),
            ({"params": jnp.zeros(3)}, "shapes"),
            ({"optimiser": ADAM}, "shapes"),
            ({"num_iterations": 100}, "window"),
            ({"objective": lambda x, key: bowl(x, key) - 1}, "values of the objective"),
        ):
            with pytest.raises(InputError, match=f"is of another run.*{name}"):
                run(**changes)
        with pytest.raises(InputError, match="holds 30 iterations, more than num_iterations = 29"):
            fit(key, bowl, jnp.zeros(2), SGD, 29, window=3, checkpoint=tmp_path)

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "text"])
    def test_a_damaged_file_is_one_clear_sentence(self, key, tmp_path, damage):
        file = tmp_path / "fit.npz"
        fit(key, bowl, jnp.zeros(2), SGD, 30, checkpoint=tmp_path)
        content = bytearray(file.read_bytes())
        if damage == "foreign":
            np.savez(file, x=np.zeros(3))
        else:
            content[len(content) // 3] ^= 0xFF
            file.write_bytes(
                {"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}.get(damage, b"hello")
            )
        with pytest.raises(InputError, match=r"fit\.npz is damaged \(.*\): delete it to begin anew$"):
            fit(key, bowl, jnp.zeros(2), SGD, 30, checkpoint=tmp_path)

    def test_pickles_are_not_opened(self, key, tmp_path):
        np.savez(tmp_path / "fit.npz", identity=np.array([{"a": 1}], dtype=object))
        with pytest.raises(InputError, match="is damaged"):
            fit(key, bowl, jnp.zeros(2), SGD, 30, checkpoint=tmp_path)

    def test_a_place_that_cannot_be_written_is_said_before_the_run(self, key, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot write the checkpoint"):
            fit(key, bowl, jnp.zeros(2), SGD, 30, checkpoint=tmp_path / "file")

    def test_a_disk_that_fills_up_does_not_lose_the_run(self, key, tmp_path, monkeypatch):
        calls = []

        def save(self, *args):
            calls.append(args)
            if len(calls) > 1:
                raise InputError("cannot write")

        monkeypatch.setattr(optimisation.Checkpoint, "save", save)
        trained = fit(key, bowl, jnp.zeros(2), SGD, 30, checkpoint=tmp_path)
        assert trained.num_iterations == 30
        assert trained.warnings == ("The checkpoint is not that of the end: cannot write.",)


class TestCompilation:
    def test_new_values_and_numbers_of_iterations_compile_nothing(self, key):
        traced = []

        def counted(x, key):
            traced.append(0)
            return bowl(x, key)

        fit(key, counted, jnp.zeros(2), SGD, 30)
        before = len(traced)
        fit(jax.random.key(8), counted, jnp.full(2, 0.5), SGD, 700, window=9, stop_when_diverged=True)
        assert len(traced) == before + 1  # only the check of its shape

    def test_data_in_a_pytree_are_arguments(self, key):
        traced = []

        class Fit(eqx.Module):
            data: jax.Array

            def __call__(self, x, key):
                traced.append(0)
                return bowl(x - self.data, key)

        first = fit(key, Fit(jnp.zeros(2)), jnp.zeros(2), SGD, 200)
        before = len(traced)
        second = fit(key, Fit(jnp.ones(2)), jnp.zeros(2), SGD, 200)
        assert len(traced) == before + 1
        np.testing.assert_allclose(second.params - first.params, 1, atol=1e-3)

    def test_float32_stays_float32_and_float64_float64(self, x64, key):
        for dtype in (jnp.float32, jnp.float64):
            trained = fit(key, bowl, jnp.zeros(2, dtype), optax.adam(optax.cosine_decay_schedule(0.1, 50)), 50)
            assert {leaf.dtype for leaf in (trained.params, trained.best_params, trained.values)} == {jnp.dtype(dtype)}

    def test_a_run_of_one_iteration(self, key):
        trained = fit(key, bowl, jnp.zeros(2), SGD, 1)
        assert trained.values.shape == (1,)
        assert math.isnan(trained.trend.value)
        assert "unknown" in str(trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"num_evaluations": 1}, "num_evaluations must be at least 2"),
        ({"params": {"n": jnp.arange(2), "x": 0.5}}, "no float arrays"),
        ({"objective": lambda x, key: x}, "must be one float.*take its mean"),
        ({"objective": lambda x, key: jnp.sum(x).astype(int)}, "must be one float"),
        ({"objective": lambda x, key: None}, "must be one float"),
        ({"objective": lambda x, key: (jnp.sum(x), x)}, "give has_aux=True"),
        ({"has_aux": True}, "must return \\(scalar, anything\\)"),
    ],
)
def test_what_is_refused(key, changes, message):
    given = {"objective": bowl, "params": jnp.zeros(2), "optimiser": SGD, "num_iterations": 10} | changes
    with pytest.raises(InputError, match=message):
        lehr.fit(key, **given, progress=False)


def test_what_is_no_optimiser_is_refused():
    with pytest.raises(InputError, match=r"must be one of optax.*not a float"):
        optimisation._check(0.1, 10, None, 32)


def test_it_reads_as_a_table(key, capsys):
    trained = lehr.fit(
        key, lambda base, key: objectives.elbo(base, Normal(jnp.ones(2)).log_prob, key), Normal(jnp.zeros(2)), SGD, 50
    )
    text = str(trained)
    for name in ("objective", "params", "at the start", "trend", "iterations", "time", "warnings"):
        assert f"\n{name} " in f"\n{text}"
    assert "objective" in capsys.readouterr().err  # the progress bar
