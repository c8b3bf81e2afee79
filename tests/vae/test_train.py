"""Training: the learning rates, what an epoch visits and changes, and that bounds rise."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr import Schedule, anneal
from lehr.annealer import Annealer
from lehr.errors import InputError
from lehr.objectives.elbo import log_weights
from lehr.vae import data, session, train
from lehr.vae.model import VAE
from tests.statistics import assert_mean
from tests.vae import parameters, tiny_data, tiny_setting

# Learning rates


@pytest.mark.parametrize("steps_per_epoch", [1, 468])
def test_learning_rates_are_those_of_the_iwae_study(steps_per_epoch):
    """1e-3 * 10^(-i/7) for 3^i epochs, to the step, in its 3280 epochs."""
    rate = train.learning_rates(3280, steps_per_epoch)
    first = 0
    for i in range(8):
        last = first + 3**i * steps_per_epoch - 1
        np.testing.assert_allclose([rate(first), rate(last)], 1e-3 * 10 ** (-i / 7), rtol=1e-5)
        first = last + 1
    assert first == 3280 * steps_per_epoch
    np.testing.assert_allclose(rate(first), 1e-4, rtol=1e-5)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(100, 11), (328, 7), (5, 1)])
def test_learning_rates_are_compressed_in_proportion(epochs, steps_per_epoch):
    num_steps = epochs * steps_per_epoch
    rates = np.asarray(jax.vmap(train.learning_rates(epochs, steps_per_epoch))(jnp.arange(num_steps)))
    assert np.all(np.diff(rates) <= 0)
    for i in range(8):
        length = np.sum(np.isclose(rates, 1e-3 * 10 ** (-i / 7), rtol=1e-4))
        assert abs(length - 3**i / 3280 * num_steps) <= 1


# What an epoch visits


class Spied(NamedTuple):
    """An epoch whose "bound" of an image is a code of its pixels: what it reports is what it visited."""

    images: np.ndarray
    epoch: object
    state: train.TrainState


def spied(monkeypatch, images, code, batch_size, **changes):
    code = jnp.asarray(code, jnp.float32)
    monkeypatch.setattr(
        train, "image_bound", lambda setting, trainable, image, key: (jnp.dot(code, image), changes.get("acceptance"))
    )
    setting = tiny_setting(batch_size=batch_size, objective=changes.get("objective", "elbo"))
    images = np.asarray(images, np.float32)
    return Spied(images, train.make_epoch(setting, len(images)), train.initial_state(setting, images))


def test_an_epoch_visits_every_image_once_with_fresh_pixels(monkeypatch):
    num_images, id_bits, grey_bits = 20, 5, 10
    ids = (np.arange(num_images)[:, None] >> np.arange(id_bits)) & 1
    images = np.concatenate([ids, np.full((num_images, grey_bits), 0.5)], axis=1)
    spy = spied(monkeypatch, images, 2.0 ** np.arange(id_bits + grey_bits), batch_size=1)

    def one_epoch(state):
        state, codes = spy.epoch(state, jnp.asarray(spy.images))
        codes = np.asarray(codes, int)
        return state, codes % 2**id_bits, (codes >> id_bits)

    state, order, pixels = one_epoch(spy.state)
    assert int(state.epoch) == 1
    assert sorted(order) == list(range(num_images))
    assert list(order) != sorted(order)
    _, next_order, next_pixels = one_epoch(state)
    assert sorted(next_order) == list(range(num_images))
    assert list(next_order) != list(order)

    def by_image(order, pixels):
        drawn = np.empty((num_images, grey_bits))
        drawn[order] = (pixels[:, None] >> np.arange(grey_bits)) & 1
        return drawn

    # Independent draws agree at half of the grey pixels; the same draw would agree at all.
    first, second = by_image(order, pixels), by_image(next_order, next_pixels)
    assert_mean((first == second).ravel(), 0.5)
    assert_mean(first.ravel(), 0.5)
    # The draws within an epoch differ as well, from image to image.
    assert len(set(pixels)) > num_images / 2
    # And the same state has the same epoch.
    _, again, pixels_again = one_epoch(spy.state)
    np.testing.assert_array_equal(again, order)
    np.testing.assert_array_equal(pixels_again, pixels)


def test_an_image_that_fills_no_batch_waits(monkeypatch):
    """Seven images in batches of three: two batches, no image twice, and another one waits in another epoch."""
    images = np.eye(7)
    spy = spied(monkeypatch, images, 8.0 ** np.arange(7), batch_size=3)
    state, waiting = spy.state, set()
    for _ in range(12):
        state, bounds = spy.epoch(state, jnp.asarray(spy.images))
        assert bounds.shape == (2,)
        total = round(float(np.sum(3 * np.asarray(bounds, np.float64))))
        visits = np.array([total // 8**j % 8 for j in range(7)])
        assert visits.max() == 1
        assert visits.sum() == 6
        waiting.add(int(np.argmin(visits)))
    assert len(waiting) > 1


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match="a batch of 8 is larger than the 7 training images: give a batch_size of at"):
        train.initial_state(tiny_setting(batch_size=8), np.zeros((7, 4), np.float32))


# What an epoch changes


@functools.cache
def after_one_epoch(objective, seed=0):
    setting, images = tiny_setting(objective=objective, seed=seed), tiny_data().train
    before = train.initial_state(setting, images)
    after, bounds = session.make_epoch(setting, len(images))(before, jnp.asarray(images))
    return before.trainable, after, np.asarray(bounds)


def changed(before, after):
    before, after = parameters(before), parameters(after)
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("objective", ["elbo", "iwae", "davi", "davi-adapt", "aiwae"])
def test_an_epoch_trains_every_parameter_of_the_model(objective):
    before, after, bounds = after_one_epoch(objective)
    assert bounds.shape == (4,)
    assert np.all(np.isfinite(bounds))
    assert changed(before.model, after.trainable.model) == set(parameters(before.model))


@pytest.mark.parametrize("objective", ["elbo", "iwae", "davi"])
def test_the_sampler_stays_as_it_is(objective):
    before, after, _ = after_one_epoch(objective)
    assert not changed(before.schedule, after.trainable.schedule)
    assert not changed(before.kernel, after.trainable.kernel)


def test_davi_adapt_trains_every_parameter_of_the_sampler():
    before, after, _ = after_one_epoch("davi-adapt")
    assert changed(before.schedule, after.trainable.schedule) == {".logits"}
    names = {".log_step_size", ".log_momentum_scale", ".logit_persistence"}
    assert changed(before.kernel, after.trainable.kernel) == names == set(parameters(before.kernel))
    # One step size and one persistence for each temperature, one scale for each dimension; each number is trained, but
    # for the last persistence, because no move comes after that refreshment.
    old, new = parameters(before.kernel), parameters(after.trainable.kernel)
    for name, shape, rows in [
        (".log_step_size", (3, 1), slice(None)),
        (".log_momentum_scale", (3,), slice(None)),
        (".logit_persistence", (3, 1), slice(-1)),
    ]:
        assert old[name].shape == shape
        assert np.all((old[name] != new[name])[rows])


def test_davi_adapt_without_persistence_trains():
    setting = tiny_setting(objective="davi-adapt", persistence=0.0)
    state = train.initial_state(setting, tiny_data().train)
    assert set(parameters(state.trainable.kernel)) == {".log_step_size", ".log_momentum_scale"}


def test_aiwae_adapts_its_step_sizes_only():
    before, after, _ = after_one_epoch("aiwae")
    assert not changed(before.schedule, after.trainable.schedule)
    assert changed(before.kernel, after.trainable.kernel) == {".kernel.log_step_size"}
    assert after.trainable.kernel.kernel.step_size.shape == (3, 1)


def test_aiwae_moves_each_step_size_by_its_own_acceptance(monkeypatch):
    acceptance = jnp.array([0.1, 0.6, 1.0])
    spy = spied(monkeypatch, np.eye(6), np.ones(6), batch_size=3, objective="aiwae", acceptance=acceptance)
    state, _ = spy.epoch(spy.state, jnp.asarray(spy.images))
    log_step_size = np.asarray(state.trainable.kernel.kernel.log_step_size)[:, 0]
    # Two batches, each with log e += 0.05 (acceptance - 0.6).
    np.testing.assert_allclose(log_step_size, np.log(0.1) + 2 * 0.05 * (np.asarray(acceptance) - 0.6), rtol=1e-5)


def test_aiwae_arrives_at_an_acceptance_of_0_6(key):
    setting, images = tiny_setting(objective="aiwae", batch_size=12, epochs=120), tiny_data().train
    state, epoch = train.initial_state(setting, images), train.make_epoch(setting, len(images))

    binarised = jnp.asarray(data.fixed_binarisation(images))

    @eqx.filter_jit
    def acceptance(trainable):
        def one_image(key, image):
            annealer = Annealer(trainable.model.posterior(image), trainable.schedule, trainable.kernel)
            return anneal(key, annealer, trainable.model.joint(image), 100).acceptance

        return jax.vmap(one_image)(jax.random.split(key, len(images)), binarised).mean(axis=0)

    assert np.all(acceptance(state.trainable) > 0.95)
    for _ in range(setting.epochs):
        state, _ = epoch(state, jnp.asarray(images))
    # The adaptation never ends, so that the step sizes swing a little around the target.
    np.testing.assert_allclose(acceptance(state.trainable), 0.6, atol=0.1)


# Seeds


def test_the_same_seed_gives_the_same_numbers_and_another_others():
    before, after, bounds = after_one_epoch("davi")
    setting, images = tiny_setting(), tiny_data().train
    again, bounds_again = session.make_epoch(setting, len(images))(
        train.initial_state(setting, images), jnp.asarray(images)
    )
    np.testing.assert_array_equal(bounds, bounds_again)
    assert not changed(after, again)
    before_other, _, other_bounds = after_one_epoch("davi", seed=1)
    assert np.all(bounds != other_bounds)
    weights = {name for name, value in parameters(before.model).items() if value.ndim == 2}
    assert weights <= changed(before.model, before_other.model)


# The bounds


def test_elbo_and_iwae_are_means_of_the_same_weights(key):
    state = train.initial_state(tiny_setting(), tiny_data().train)
    image = jnp.asarray(data.fixed_binarisation(tiny_data().train)[0])

    @eqx.filter_jit
    def bound(objective):
        return train.image_bound(tiny_setting(objective=objective, num_particles=7), state.trainable, image, key)[0]

    model = state.trainable.model
    log_w = np.asarray(log_weights(model.posterior(image), model.joint(image), key, 7), np.float64)
    np.testing.assert_allclose(bound("elbo"), log_w.mean(), rtol=1e-5)
    np.testing.assert_allclose(bound("iwae"), np.log(np.mean(np.exp(log_w))), rtol=1e-5)


def test_the_test_bound_is_the_mean_over_all_images_with_fixed_keys(monkeypatch):
    """130 images: one batch of 128 and two more; each counts once."""
    images = np.zeros((130, 4), np.float32)
    images[:, 0] = np.arange(130)

    def number_and_noise(setting, trainable, image, key):
        return 1000 * image[0] + jax.random.uniform(key, ()), None

    monkeypatch.setattr(train, "image_bound", number_and_noise)
    setting = tiny_setting()
    trainable = train.initial_state(setting, images).trainable
    value = train.make_test_bound(setting)(trainable, jnp.asarray(images))
    assert 1000 * 64.5 < value < 1000 * 64.5 + 1
    # The same draws each time, also in another process; others for another seed.
    assert value == train.make_test_bound(setting)(trainable, jnp.asarray(images))
    assert value != train.make_test_bound(tiny_setting(seed=1))(trainable, jnp.asarray(images))


def test_the_test_bound_sees_the_parameters():
    test_bound = session.make_test_bound(tiny_setting())
    before, after, _ = after_one_epoch("davi")
    images = jnp.asarray(data.fixed_subset(tiny_data().test, 1000))
    assert images.shape == (4, 16)
    once = test_bound(before, images)
    assert once == test_bound(before, images)
    assert once != test_bound(after.trainable, images)


def digits():
    images = data.load("digits")
    return images.train[:256], jnp.asarray(data.fixed_subset(images.test, 100))


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("elbo", "iwae", "davi-adapt", "aiwae")]


@pytest.mark.parametrize("objective", ["davi", *OTHERS])
def test_bounds_rise_on_digits(objective):
    """Over 25 epochs by more than 1.5 nats (2.3 and more at seed 0), on unseen images too."""
    images, test = digits()
    setting = tiny_setting(objective=objective, batch_size=8, epochs=25, latent_dim=8, hidden=128)
    state = train.initial_state(setting, images)
    epoch, test_bound = train.make_epoch(setting, len(images)), train.make_test_bound(setting)
    first_test, means = float(test_bound(state.trainable, test)), []
    for _ in range(setting.epochs):
        state, bounds = epoch(state, jnp.asarray(images))
        means.append(float(np.mean(bounds)))
    assert means[-1] > means[0] + 1.5
    assert float(test_bound(state.trainable, test)) > first_test + 1.5


def test_model_of_the_state_is_the_vae():
    setting = tiny_setting(latent_dim=5)
    trainable = train.initial_state(setting, tiny_data().train).trainable
    assert isinstance(trainable.model, VAE)
    assert trainable.model.latent_dim == 5
    np.testing.assert_allclose(trainable.schedule.betas, Schedule.linear(3).betas)
