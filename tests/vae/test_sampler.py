"""Annealing of images: step sizes that tuning finds, and how they carry over to other numbers of temperatures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr import Metropolis, Schedule
from lehr.vae.sampler import Sampler, Tuning, anneal_images, tune
from tests.vae import toy


@functools.cache
def images(part):
    return jnp.asarray({"train": toy().images[:16], "test": toy().images[16:]}[part])


@pytest.mark.parametrize(("method", "target"), [("ais", 0.65), ("hais", 0.8)])
def test_tuning_reaches_the_target_acceptance_on_other_images(key, method, target):
    sampler = Sampler(method, num_temperatures=20, num_chains=50, num_leapfrog=2)
    key_tune, key_test = jax.random.split(key)
    tuning = tune(key_tune, toy().model, images("train"), sampler, target=target, num_steps=10)
    assert abs(np.mean(tuning.acceptance) - target) < 0.07
    acceptance = np.asarray(
        anneal_images(key_test, toy().model, images("test"), sampler, tuning.kernel(sampler)).acceptance
    )
    assert acceptance.shape == (48, 20)
    assert abs(acceptance.mean() - target) < 0.07
    # Not in the mean alone: at each temperature.
    assert np.all(np.abs(acceptance.mean(axis=0) - target) < 0.25)


def test_tuning_of_dais_takes_the_best_step_of_its_ladder(key):
    sampler = Sampler("dais", num_temperatures=40, num_chains=100, num_leapfrog=1)
    tuning = tune(key, toy().model, images("train"), sampler, num_steps=40)
    assert tuning.acceptance is None
    best = tuning.step_size[0]
    assert np.all(tuning.step_size == best)
    assert np.any(np.isclose(best, 0.01 * 1.3 ** np.arange(18)))

    def bound(step_size):
        kernel = sampler.kernel(jnp.full((40, 1), step_size))
        return float(
            np.mean(anneal_images(jax.random.key(7), toy().model, images("test"), sampler, kernel).log_weights)
        )

    bounds = {factor: bound(best * factor) for factor in (0.2, 1.0, 2.5)}
    assert max(bounds, key=bounds.get) == 1.0, bounds


def tuning(acceptance):
    betas = np.asarray(Schedule.sigmoidal(4).betas[1:])
    return Tuning(betas, np.array([0.1, 0.2, 0.4, 0.8]), acceptance)


def test_step_sizes_carry_over_to_the_same_temperatures_unchanged():
    kernel = tuning(np.full(4, 0.65)).kernel(Sampler("ais", num_temperatures=4))
    assert isinstance(kernel, Metropolis)
    np.testing.assert_allclose(kernel.kernel.step_size[:, 0], [0.1, 0.2, 0.4, 0.8], rtol=1e-5)


def test_step_sizes_are_interpolated_in_beta():
    kernel = tuning(np.full(4, 0.65)).kernel(Sampler("hais", num_temperatures=8))
    step_size = np.asarray(kernel.kernel.step_size)[:, 0]
    # Every second temperature is one of the four; those between have step sizes between; below the first, the first.
    np.testing.assert_allclose(step_size[1::2], [0.1, 0.2, 0.4, 0.8], rtol=1e-4)
    np.testing.assert_allclose(step_size[0], 0.1, rtol=1e-5)
    assert np.all(np.diff(step_size[1:]) > 0)


def test_the_step_size_of_dais_shrinks_with_the_fourth_root_of_the_temperatures():
    kernel = tuning(None).kernel(Sampler("dais", num_temperatures=64))
    np.testing.assert_allclose(kernel.step_size[-1, 0], 0.8 * 16**-0.25, rtol=1e-5)
    np.testing.assert_allclose(kernel.step_size[0, 0], 0.1 * 16**-0.25, rtol=1e-5)


def test_reports_are_plain_numbers():
    assert tuning(None).report().keys() == {"beta", "step_size"}
    report = tuning(np.array([0.5, 0.6, 0.7, 0.8])).report()
    assert report["acceptance"] == [0.5, 0.6, 0.7, 0.8]
    assert report["mean_acceptance"] == pytest.approx(0.65)


def test_work_is_counted():
    sampler = Sampler("ais", num_temperatures=1000, num_chains=16, num_leapfrog=10)
    assert sampler.gradients_per_image == 16 * 10_001
    assert dataclasses.replace(sampler, method="dais").gradients_per_image == 160_000


def test_methods_differ_in_momentum_and_correction():
    step_size = jnp.ones((5, 1))
    ais, hais, dais = (Sampler(name, persistence=0.7).kernel(step_size) for name in ("ais", "hais", "dais"))
    assert isinstance(ais, Metropolis)
    assert isinstance(hais, Metropolis)
    assert not dais.exact
    assert ais.kernel.logit_persistence is None
    np.testing.assert_allclose([hais.kernel.persistence, dais.persistence], 0.7, rtol=1e-5)
