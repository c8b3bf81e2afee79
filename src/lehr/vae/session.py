"""One training run from the first epoch, or from its newest checkpoint, to the report."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lehr.errors import InputError
from lehr.vae.data import ImageData, fixed_subset
from lehr.vae.run_folder import RunFolder
from lehr.vae.setting import Setting
from lehr.vae.train import TrainState, initial_state, learning_rates, make_epoch, make_test_bound

#: at least this long between checkpoints, which follow an epoch; the last epoch is always saved
CHECKPOINT_SECONDS = 20.0
#: test images on which the bound is followed during training
NUM_TEST_IMAGES = 1000


class Interrupted(Exception):
    """The run was stopped by a signal, and saved."""


def run(
    setting: Setting,
    data: ImageData,
    folder: RunFolder,
    *,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any], float], None] = lambda row, images_per_second: None,
    say: Callable[[str], None] = print,
) -> TrainState:
    """Trains to the end of the setting's epochs, with one line of metrics an epoch, and checkpoints.

    All random numbers derive from the seed and the epoch, so that a run resumed from a checkpoint writes the same
    metrics as one that was never interrupted, to the last digit (on the same kind of machine).

    Arguments:
        setting: what decides the numbers.
        data: the images.
        folder: where the run is kept.
        resume: go on from the newest sound checkpoint in the folder.
        on_epoch: hears of each epoch: its metrics, and images per second.
        say: hears of damaged checkpoints and the like, one sentence each.

    Raises:
        `lehr.errors.InputError` if the loss becomes non-finite (names the step, keeps the last good checkpoint), or for
            faults of setting, data and folder.
        `Interrupted` after SIGINT or SIGTERM, when the state is saved.
    """
    state = initial_state(setting, data.train)
    if resume and not folder.is_fresh():
        state = folder.restore(state, say)
        missing = int(state.epoch) - len(folder.rewind_metrics(int(state.epoch)))
        if missing:
            say(f"metrics.jsonl was damaged: it stays without {missing} of the first {int(state.epoch)} epochs")
    else:
        folder.save(0, state)
    epoch, test_bound = make_epoch(setting, len(data.train)), make_test_bound(setting)
    train = jnp.asarray(data.train)
    test = jnp.asarray(fixed_subset(data.test, NUM_TEST_IMAGES))
    steps_per_epoch = len(data.train) // setting.batch_size
    learning_rate = learning_rates(setting.epochs, steps_per_epoch)
    saved_at = time.monotonic()
    with _deferred_signals(say) as stopped:
        while (done := int(state.epoch)) < setting.epochs:
            started = time.monotonic()
            new_state, bounds = epoch(state, train)
            bounds = np.asarray(bounds)
            if not np.all(np.isfinite(bounds)):
                folder.save(done, state)
                step = done * steps_per_epoch + int(np.argmin(np.isfinite(bounds))) + 1
                raise InputError(
                    f"the loss or its gradient is not finite at step {step} (epoch {done + 1}): the state before that "
                    f"epoch is kept in {folder.path}; train anew with a smaller step_size or another seed"
                )
            images_per_second = steps_per_epoch * setting.batch_size / (time.monotonic() - started)
            state, done = new_state, done + 1
            row = {
                "epoch": done,
                "train_bound": float(bounds.astype(np.float64).mean()),
                "test_bound": float(test_bound(state.trainable, test)),
                "learning_rate": float(jnp.asarray(learning_rate(done * steps_per_epoch - 1))),
            }
            folder.append_metrics(row)
            on_epoch(row, images_per_second)
            if done == setting.epochs or stopped() or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                folder.save(done, state)
                saved_at = time.monotonic()
            if stopped():
                raise Interrupted(f"stopped after epoch {done} of {setting.epochs}, and saved")
    return state


def kernel_summary(state: TrainState) -> dict[str, Any]:
    """The schedule, step sizes, persistence and momentum scale as they are now, as plain numbers."""
    trainable = state.trainable
    move = getattr(trainable.kernel, "kernel", trainable.kernel)
    return jax.tree.map(
        lambda leaf: np.round(np.asarray(leaf, np.float64), 6).tolist(),
        {
            "betas": trainable.schedule.betas,
            "step_size": move.step_size,
            "persistence": move.persistence,
            "momentum_scale": move.momentum_scale,
        },
    )


def images_per_second(rates: list[float]) -> float:
    """The typical rate: the median over epochs, without the first, which compiles."""
    return float(np.median(rates[1:] or rates)) if rates else math.nan


@contextmanager
def _deferred_signals(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM lets the epoch finish; the second stops at once."""
    received = []

    def handle(number, frame):
        received.append(number)
        for each, old in previous.items():
            signal.signal(each, old)
        say("stopping after this epoch, then saving; once more stops at once")

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
