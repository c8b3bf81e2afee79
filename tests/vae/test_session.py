"""Training runs that are stopped, killed, damaged, or become non-finite: they lose nothing, and go on to the digit."""

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lehr.errors import InputError
from lehr.vae import session, train
from lehr.vae.run_folder import RunFolder
from tests.vae import parameters, tiny_data, tiny_setting


class Killed(BaseException):
    """Stands for `kill -9`: nothing of the run's own catches it."""


def run(folder, *, resume=False, until=None, data=None, **changes):
    """A tiny run; killed in the middle of epoch `until`: after its metrics, before its checkpoint."""
    said = []

    def on_epoch(row, images_per_second):
        if row["epoch"] == until:
            raise Killed
        assert images_per_second > 0

    try:
        state = session.run(
            tiny_setting(**changes), data or tiny_data(), folder, resume=resume, on_epoch=on_epoch, say=said.append
        )
    finally:
        folder.close()
    return state, said


def new(path):
    return RunFolder.create(path, {})


def lines(folder):
    return (folder.path / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def only_at_the_ends():
    """Checkpoints at the start and the end only: those between come by the clock, and on a busy machine earlier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "CHECKPOINT_SECONDS", math.inf)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = new(tmp_path_factory.mktemp("whole") / "run")
    state, said = run(folder)
    assert said == []
    return folder, state


@pytest.fixture
def each_epoch(monkeypatch):
    """A checkpoint after each epoch."""
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", -1.0)


def assert_same(folder, state, whole):
    assert lines(folder) == lines(whole[0])
    found, expected = parameters(state.trainable), parameters(whole[1].trainable)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


# An uninterrupted run


def test_one_line_of_metrics_an_epoch(whole):
    rows = whole[0].metrics()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() == {"epoch", "train_bound", "test_bound", "learning_rate"}
        assert -20 < row["train_bound"] < -4
        assert -20 < row["test_bound"] < -4
    rate = train.learning_rates(4, 36 // 8)
    assert [row["learning_rate"] for row in rows] == [float(rate(step)) for step in (3, 7, 11, 15)]


def test_the_last_state_is_saved(whole):
    folder, state = whole
    restored = RunFolder.open(folder.path).restore(train.initial_state(tiny_setting(), tiny_data().train), pytest.fail)
    assert int(restored.epoch) == 4
    np.testing.assert_array_equal(restored.trainable.schedule.logits, state.trainable.schedule.logits)
    for name, leaf in parameters(state).items():
        np.testing.assert_array_equal(parameters(restored)[name], leaf)


def test_another_seed_has_other_metrics(whole, tmp_path):
    folder = new(tmp_path / "run")
    run(folder, seed=1)
    pairs = zip(folder.metrics(), whole[0].metrics())
    assert all(a["train_bound"] != b["train_bound"] and a["test_bound"] != b["test_bound"] for a, b in pairs)


# Interruptions


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_killed_run_goes_on_to_the_digit(whole, tmp_path, each_epoch, epoch):
    folder = new(tmp_path / "run")
    with pytest.raises(Killed):
        run(folder, until=epoch)
    assert len(folder.metrics()) == epoch
    state, said = run(RunFolder.open(folder.path), resume=True)
    assert said == []
    assert_same(folder, state, whole)


@pytest.mark.parametrize("objective", ["davi-adapt", "aiwae"])
def test_a_sampler_that_trains_goes_on_to_the_digit(tmp_path, each_epoch, objective):
    whole, folder = new(tmp_path / "whole"), new(tmp_path / "run")
    expected, _ = run(whole, objective=objective)
    with pytest.raises(Killed):
        run(folder, until=3, objective=objective)
    state, _ = run(RunFolder.open(folder.path), resume=True, objective=objective)
    assert_same(folder, state, (whole, expected))
    # It has trained, so that a sampler that begins again would show.
    start = parameters(train.initial_state(tiny_setting(objective=objective), tiny_data().train).trainable.kernel)
    assert any(np.any(value != start[name]) for name, value in parameters(state.trainable.kernel).items())


def test_a_run_killed_between_two_checkpoints_goes_back_to_the_first(whole, tmp_path):
    """Three epochs of metrics, but the only checkpoint is the start: the lines are computed again."""
    folder = new(tmp_path / "run")
    with pytest.raises(Killed):
        run(folder, until=3)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["0"]
    state, _ = run(RunFolder.open(folder.path), resume=True)
    assert_same(folder, state, whole)


def test_a_run_killed_before_its_first_checkpoint_begins_again(whole, tmp_path, monkeypatch):
    folder = new(tmp_path / "run")
    state, said = run(RunFolder.open(folder.path), resume=True)
    assert said == []
    assert_same(folder, state, whole)


def test_a_run_killed_in_the_middle_of_a_line_goes_on_to_the_digit(whole, tmp_path, each_epoch):
    folder = new(tmp_path / "run")
    with pytest.raises(Killed):
        run(folder, until=3)
    path = folder.path / "metrics.jsonl"
    path.write_bytes(lines(folder)[:-30])
    state, said = run(RunFolder.open(folder.path), resume=True)
    assert said == []
    assert_same(folder, state, whole)


def test_a_run_may_be_killed_again_and_again(whole, tmp_path, each_epoch):
    folder = new(tmp_path / "run")
    for epoch in (1, 2, 2, 4):
        with pytest.raises(Killed):
            run(RunFolder.open(folder.path), resume=True, until=epoch)
    state, _ = run(RunFolder.open(folder.path), resume=True)
    assert_same(folder, state, whole)


def test_a_finished_run_stays_as_it_is(whole, tmp_path):
    folder = RunFolder.open(Path(shutil.copytree(whole[0].path, tmp_path / "run")))
    state, said = run(folder, resume=True, until=4)
    assert said == []
    assert_same(folder, state, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_epoch_saves_and_stops(whole, tmp_path, number):
    folder = new(tmp_path / "run")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def on_epoch(row, images_per_second):
        if row["epoch"] == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(session.Interrupted, match="stopped after epoch 2 of 4, and saved"):
        session.run(tiny_setting(), tiny_data(), folder, on_epoch=on_epoch)
    folder.close()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(folder.metrics()) == 2
    assert (folder.path / "checkpoints" / "2").is_dir()
    state, _ = run(RunFolder.open(folder.path), resume=True)
    assert_same(folder, state, whole)


@pytest.fixture
def interruptible():
    """Python's own handler: a process that a shell starts in the background ignores SIGINT otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_stops_at_once(tmp_path, interruptible):
    def on_epoch(row, images_per_second):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal had no effect")

    folder = new(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        session.run(tiny_setting(), tiny_data(), folder, on_epoch=on_epoch)
    folder.close()


def test_after_a_signal_in_the_last_epoch_only_the_report_is_left(whole, tmp_path):
    def on_epoch(row, images_per_second):
        if row["epoch"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    folder = new(tmp_path / "run")
    with pytest.raises(session.Interrupted, match="stopped after epoch 4 of 4, and saved"):
        session.run(tiny_setting(), tiny_data(), folder, on_epoch=on_epoch)
    state = session.run(tiny_setting(), tiny_data(), folder, resume=True)
    folder.close()
    assert_same(folder, state, whole)


# Damage


def test_a_damaged_checkpoint_costs_its_epochs_only(whole, tmp_path, each_epoch):
    folder = new(tmp_path / "run")
    run(folder)
    (folder.path / "checkpoints" / "4" / "SHA256SUMS").write_text("")
    again = RunFolder.open(folder.path)
    state, said = run(again, resume=True)
    assert len(said) == 1
    assert said[0].startswith("the checkpoint of epoch 4 is damaged")
    assert_same(folder, state, whole)
    assert (folder.path / "checkpoints" / "4").is_dir()


def test_lost_lines_of_metrics_are_named_and_the_rest_is_kept(whole, tmp_path):
    folder = RunFolder.open(Path(shutil.copytree(whole[0].path, tmp_path / "run")))
    rows = lines(folder).splitlines(keepends=True)
    (folder.path / "metrics.jsonl").write_bytes(rows[0] + b"\xff\n" + b"".join(rows[2:]))
    _, said = run(folder, resume=True)
    assert said == ["metrics.jsonl was damaged: it stays without 1 of the first 4 epochs"]
    assert lines(folder) == rows[0] + b"".join(rows[2:])


# Not finite


def rising_bias(monkeypatch, limit, *, gradient_only=False):
    """A bound that is one bias of the decoder, which Adam raises by the learning rate each step, up to a limit."""

    def image_bound(setting, trainable, image, key):
        bias = trainable.model.decoder.layers[-1].bias[0]
        # The square root at zero is finite, its gradient is not.
        steep = 1e-6 * jnp.sqrt(jnp.maximum(limit - bias, 0))
        return bias + (steep if gradient_only else jnp.where(bias > limit, jnp.nan, 0.0)), None

    monkeypatch.setattr(train, "image_bound", image_bound)
    # Not the shared functions: they were compiled for the real bound.
    monkeypatch.setattr(session, "make_epoch", train.make_epoch)
    monkeypatch.setattr(session, "make_test_bound", train.make_test_bound)


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_loss_that_is_not_finite_stops_at_once(tmp_path, monkeypatch, gradient_only):
    """The limit is passed at a step that follows from the learning rates: it is named, and the epoch before is kept."""
    setting = tiny_setting(epochs=30)
    bias = float(train.initial_state(setting, tiny_data().train).trainable.model.decoder.layers[-1].bias[0])
    rate = train.learning_rates(30, 4)
    heights = bias + np.cumsum([float(rate(step)) for step in range(120)])
    # Between two steps, in the middle of an epoch: the 51st step, the third of epoch 13, is the first to see it.
    limit = (heights[48] + heights[49]) / 2
    rising_bias(monkeypatch, limit, gradient_only=gradient_only)
    folder = new(tmp_path / "run")
    with pytest.raises(InputError) as error:
        run(folder, epochs=30)
    message = str(error.value)
    assert message.startswith("the loss or its gradient is not finite at step 51 (epoch 13): ")
    assert f"the state before that epoch is kept in {folder.path}" in message
    assert "smaller step_size or another seed" in message
    assert "\n" not in message
    assert len(folder.metrics()) == 12
    kept = RunFolder.open(folder.path).restore(train.initial_state(setting, tiny_data().train), pytest.fail)
    assert int(kept.epoch) == 12
    assert all(np.all(np.isfinite(leaf)) for leaf in parameters(kept).values())
    np.testing.assert_allclose(kept.trainable.model.decoder.layers[-1].bias[0], heights[47], rtol=1e-4)


def test_an_enormous_step_size_stops_at_the_first_step(tmp_path):
    folder = new(tmp_path / "run")
    with pytest.raises(InputError, match=r"not finite at step 1 \(epoch 1\)"):
        run(folder, step_size=1e30)
    assert folder.metrics() == []
    kept = RunFolder.open(folder.path).restore(train.initial_state(tiny_setting(), tiny_data().train), pytest.fail)
    assert int(kept.epoch) == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in parameters(kept.trainable.model).values())


def test_a_test_bound_that_is_not_finite_is_null(tmp_path, monkeypatch):
    values = itertools.chain([-5.0, math.nan, -math.inf], itertools.repeat(-4.0))
    monkeypatch.setattr(session, "make_test_bound", lambda setting: lambda trainable, images: next(values))
    folder = new(tmp_path / "run")
    run(folder)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines(folder).splitlines()]
    assert [row["test_bound"] for row in rows] == [-5.0, None, None, -4.0]


# Summaries


@pytest.mark.parametrize("objective", ["davi", "davi-adapt", "aiwae"])
@pytest.mark.parametrize("persistence", [0.0, 0.9])
def test_the_samplers_summary_is_plain_numbers(objective, persistence):
    state = train.initial_state(tiny_setting(objective=objective, persistence=persistence), tiny_data().train)
    summary = json.loads(json.dumps(session.kernel_summary(state)))
    np.testing.assert_allclose(summary["betas"], [0, 1 / 3, 2 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(summary["step_size"], np.full((), 0.1) if objective == "davi" else np.full((3, 1), 0.1))
    expected = 0 if objective == "aiwae" else persistence
    np.testing.assert_allclose(summary["persistence"], expected, atol=1e-6)
    np.testing.assert_allclose(summary["momentum_scale"], 1)


def test_the_rate_is_the_median_without_the_first_epoch_which_compiles():
    assert session.images_per_second([1.0, 100.0, 300.0, 200.0]) == 200
    assert session.images_per_second([1.0]) == 1
    assert math.isnan(session.images_per_second([]))
