"""Likelihood estimates of a model with two latents, against numerical quadrature; and that their errors are true."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr.vae import likelihood
from lehr.vae.likelihood import Evidence
from lehr.vae.sampler import Sampler
from tests.statistics import THRESHOLD, assert_mean, assert_unbiased_weights, z_score
from tests.vae import toy


def sampler(method, base="posterior"):
    return Sampler(method, num_temperatures=8, num_chains=1000, num_leapfrog=2, persistence=0.7, base=base)


def kernel(sampler):
    # A large step of an uncorrected kernel has weights without a variance.
    return sampler.kernel(jnp.full((sampler.num_temperatures, 1), 0.25 if sampler.method == "dais" else 0.7))


def estimate(key, images, sampler):
    return likelihood.annealed_evidence(
        key, toy().model, jnp.asarray(images), sampler, kernel(sampler), batch_size=len(images)
    )


def assert_agrees(evidence, log_evidence):
    """On the scale of the weights, where the estimate is unbiased; and all images together to a few thousandths."""
    ratio = np.exp(evidence.log_evidence - log_evidence)
    error = ratio * evidence.standard_error
    assert np.all(np.abs(ratio - 1) < THRESHOLD * error)
    together = np.sqrt(np.sum(error**2)) / len(error)
    assert together < 0.01, "this setting cannot see a bias of 5 %"
    assert abs(np.mean(ratio) - 1) < THRESHOLD * together


# The truth


def test_the_toy_is_worth_estimating_and_can_be():
    """Bounds are not tight, images differ, and importance weights have a moderate variance."""
    assert np.min(toy().log_evidence - toy().elbo) > 0.3
    assert np.ptp(toy().log_evidence) > 2
    assert toy().inefficiency.max() < 10


# Annealing


@pytest.mark.parametrize(
    ("method", "base"),
    [("ais", "posterior"), ("hais", "posterior"), ("dais", "posterior"), ("ais", "prior"), ("dais", "prior")],
)
def test_annealed_evidence_is_that_of_quadrature(key, method, base):
    evidence = estimate(key, toy().images, sampler(method, base))
    assert evidence.log_evidence.dtype == np.float64
    assert_agrees(evidence, toy().log_evidence)


def test_the_error_over_chains_is_the_spread_between_runs(key):
    """64 copies of one image, each with random numbers of its own, five times."""
    copies = np.repeat(toy().images[:1], 64, axis=0)
    runs = [estimate(k, copies, sampler("hais")) for k in jax.random.split(key, 5)]
    log_evidence, error = (
        np.concatenate([getattr(r, name) for r in runs]) for name in ("log_evidence", "standard_error")
    )
    assert len(set(log_evidence)) > 300
    ratio = (log_evidence - log_evidence.mean()) ** 2 / np.mean(error**2)
    assert_mean(ratio, 1)
    assert 0.6 < ratio.mean() < 1.6


def test_another_key_gives_other_numbers_and_the_same_the_same(key):
    first, again = (estimate(key, toy().images, sampler("ais")) for _ in range(2))
    np.testing.assert_array_equal(first.log_evidence, again.log_evidence)
    other = estimate(jax.random.fold_in(key, 1), toy().images, sampler("ais"))
    assert np.all(first.log_evidence != other.log_evidence)


@pytest.mark.parametrize("method", ["hais", "dais"])
def test_the_sandwich_brackets_quadrature(key, method, monkeypatch):
    """Simulated images, one chain each: E[lower] < log p(x) < E[upper], and both weights are unbiased."""
    simulated = []

    def binarise(key, images):
        simulated.append(np.asarray(original(key, images)))
        return jnp.asarray(simulated[-1])

    original = likelihood.binarise
    monkeypatch.setattr(likelihood, "binarise", binarise)
    coarse = Sampler(method, num_temperatures=12, num_chains=1, num_leapfrog=2, persistence=0.7)
    progress = []
    lower, upper = likelihood.sandwich(
        key, toy().model, coarse, kernel(coarse), num_images=2500, batch_size=1000, on_batch=progress.append
    )
    truth = toy().log_evidence[toy().index(simulated[0])]
    # They are images of the model: each as often as it is probable.
    assert_mean(truth, np.sum(np.exp(toy().log_evidence) * toy().log_evidence))
    assert_unbiased_weights(lower.log_evidence, truth)
    assert_unbiased_weights(-upper.log_evidence, -truth)
    assert z_score(lower.log_evidence - truth, 0) < -THRESHOLD
    assert z_score(upper.log_evidence - truth, 0) > THRESHOLD
    assert progress == [500, 1000, 1250, 1750, 2250, 2500]


# Importance samples


def importance(key, images, num_samples):
    images = jnp.asarray(images)
    return likelihood.importance_bounds(key, toy().model, images, num_samples=num_samples, batch_size=len(images))


def test_importance_bounds_are_those_of_quadrature(key):
    bound, elbo = importance(key, toy().images, 4050)
    assert_agrees(bound, toy().log_evidence)
    z = (elbo.log_evidence - toy().elbo) / elbo.standard_error
    assert np.all(np.abs(z) < THRESHOLD)
    assert abs(np.sum(z)) < THRESHOLD * 8
    np.testing.assert_allclose(elbo.standard_error, toy().spread / np.sqrt(4050), rtol=0.3)
    assert np.all(elbo.log_evidence < bound.log_evidence)


def test_one_importance_sample_is_one_sample(key):
    """Not rounded up to a hundred: the bound is the ELBO, with the spread of single samples, and knows no error."""
    bound, elbo = importance(key, np.repeat(toy().images, 20, axis=0), 1)
    np.testing.assert_array_equal(bound.log_evidence, elbo.log_evidence)
    assert np.all(np.isinf(bound.standard_error))
    assert np.all(np.isinf(elbo.standard_error))
    standardised = (elbo.log_evidence - np.repeat(toy().elbo, 20)) / np.repeat(toy().spread, 20)
    assert_mean(standardised, 0)
    assert_mean(standardised**2, 1)


# Batches


def test_each_image_has_its_own_estimate_in_order_also_with_a_remainder(key):
    order = np.argsort(toy().log_evidence)
    chosen = order[[0, 63, 20, 5, 40, 10, 60]]
    done = []
    bound, elbo = likelihood.importance_bounds(
        key, toy().model, jnp.asarray(toy().images[chosen]), num_samples=4000, batch_size=3, on_batch=done.append
    )
    assert done == [3, 6, 7]
    for evidence, truth in ((bound, toy().log_evidence[chosen]), (elbo, toy().elbo[chosen])):
        assert evidence.log_evidence.shape == evidence.standard_error.shape == (7,)
        assert np.all(np.abs(evidence.log_evidence - truth) < 0.2)
    # Images that are repeated to fill the last batch, or a batch that shares keys with another, would show here.
    assert len(set(bound.standard_error)) == 7


def test_a_batch_larger_than_the_images_is_one_batch(key):
    done = []
    bound, _ = likelihood.importance_bounds(
        key, toy().model, jnp.asarray(toy().images[:3]), num_samples=4000, batch_size=50, on_batch=done.append
    )
    assert done == [3]
    assert bound.log_evidence.shape == (3,)


# Summaries


def test_means_and_errors_by_hand():
    evidence = Evidence(np.array([-1.0, -3.0, -8.0]), np.array([0.3, 0.0, 0.4]))
    nll, over_images, over_chains = evidence.negative_log_likelihood()
    assert nll == pytest.approx(4)
    # Deviations 3, 1, -4: sample variance 13, of the mean 13/3.
    assert over_images == pytest.approx(np.sqrt(13 / 3))
    assert over_chains == pytest.approx(0.5 / 3)


def test_one_image_knows_no_error_over_images():
    nll, over_images, over_chains = Evidence(np.array([-2.0]), np.array([0.1])).negative_log_likelihood()
    assert (nll, over_images, over_chains) == (2.0, np.inf, pytest.approx(0.1))


@pytest.mark.parametrize(("threshold", "expected"), [(0.01, 2), (0.02, 1), (1e-6, 3)])
def test_active_units_of_an_encoder_made_by_hand(threshold, expected):
    """Means 5, 0.19 x, 0.21 x and 3 y of independent fair bits: variances 0, 0.0090, 0.0110 and 2.25."""
    means = np.array([[0, 0], [0.19, 0], [0.21, 0], [0, 3]])
    encoder = eqx.nn.Linear(2, 8, key=jax.random.key(0))
    weight = np.concatenate([means, np.full((4, 2), 100)]).astype(np.float32)
    bias = np.array([5, 0, 0, 0, 0, 0, 0, 0], np.float32)
    encoder = eqx.tree_at(lambda e: (e.weight, e.bias), encoder, (jnp.asarray(weight), jnp.asarray(bias)))
    model = eqx.tree_at(lambda m: m.encoder, toy().model, encoder)
    # More images than one batch of 500, all four kinds equally often.
    images = np.tile(np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32), (200, 1))
    assert likelihood.active_units(model, jnp.asarray(images), threshold=threshold) == expected
