"""The latent-variable model: densities against closed forms and numpy, and the start that the IWAE study uses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lehr.vae.model import VAE, DiagonalGaussian
from tests.statistics import assert_mean
from tests.vae import network

PIXELS, LATENT = 16, 3
MEAN = np.linspace(0, 1, PIXELS).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return VAE(jax.random.key(3), MEAN, latent_dim=LATENT, hidden=8)


def shapes_of(**sizes):
    """The model without its numbers: nothing is compiled."""
    return eqx.filter_eval_shape(lambda key: VAE(key, MEAN, **sizes), jax.random.key(0))


# The Gaussian


@pytest.mark.parametrize("dim", [1, 4])
def test_gaussian_log_prob_is_that_of_scipy(dim):
    rng = np.random.default_rng(dim)
    loc, log_scale, x = rng.normal(size=(3, dim)).astype(np.float32)
    gaussian = DiagonalGaussian(jnp.asarray(loc), jnp.asarray(log_scale))
    expected = scipy.stats.norm.logpdf(x, loc, np.exp(log_scale)).sum()
    np.testing.assert_allclose(gaussian.log_prob(jnp.asarray(x)), expected, rtol=1e-5)


def test_gaussian_samples_have_its_moments(key):
    gaussian = DiagonalGaussian(jnp.array([1.0, -2.0]), jnp.log(jnp.array([0.5, 3.0])))
    draws = np.asarray(gaussian.sample(key, (20_000,)))
    assert draws.shape == (20_000, 2)
    for j, (loc, scale) in enumerate([(1, 0.5), (-2, 3)]):
        assert_mean(draws[:, j], loc)
        assert_mean((draws[:, j] - loc) ** 2, scale**2)
    assert_mean((draws[:, 0] - 1) * (draws[:, 1] + 2), 0)


def test_gaussian_sample_is_one_position_without_shape_and_reparameterised(key):
    loc, log_scale = jnp.array([1.0, -2.0]), jnp.log(jnp.array([0.5, 3.0]))
    x = DiagonalGaussian(loc, log_scale).sample(key)
    assert x.shape == (2,)
    jacobian = jax.jacobian(lambda g: g.sample(key))(DiagonalGaussian(loc, log_scale))
    np.testing.assert_allclose(jacobian.loc, np.eye(2), rtol=1e-6)
    np.testing.assert_allclose(jacobian.log_scale, np.diag(x - loc), rtol=1e-5)


# The densities


def test_joint_density_is_that_of_numpy(model):
    rng = np.random.default_rng(0)
    for _ in range(3):
        image, z = rng.integers(0, 2, PIXELS).astype(np.float32), 2 * rng.normal(size=LATENT).astype(np.float32)
        p = 1 / (1 + np.exp(-network(model.decoder, z)))
        expected = scipy.stats.norm.logpdf(z).sum() + scipy.stats.bernoulli.logpmf(image, p).sum()
        np.testing.assert_allclose(model.joint(jnp.asarray(image))(jnp.asarray(z)), expected, rtol=1e-5)
        np.testing.assert_allclose(model.mean_pixels(jnp.asarray(z)), p, rtol=1e-4)


def test_joint_density_is_a_pytree_with_the_decoder_and_the_image(model):
    leaves = jax.tree.leaves(eqx.filter(model.joint(jnp.asarray(MEAN)), eqx.is_array))
    assert len(leaves) == len(jax.tree.leaves(eqx.filter(model.decoder, eqx.is_array))) + 1


def test_posterior_is_the_encoders_output_and_the_prior_is_standard(model):
    image = np.random.default_rng(1).integers(0, 2, PIXELS).astype(np.float32)
    posterior = model.posterior(jnp.asarray(image))
    expected = network(model.encoder, image)
    np.testing.assert_allclose(posterior.loc, expected[:LATENT], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(posterior.log_scale, expected[LATENT:], rtol=1e-4, atol=1e-5)
    z = jnp.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(model.prior().log_prob(z), scipy.stats.norm.logpdf(z).sum(), rtol=1e-6)


# The start


def test_the_decoder_starts_at_the_mean_image(model):
    inside = np.clip(MEAN, 0.001, 0.999)
    np.testing.assert_allclose(model.decoder.layers[-1].bias, np.log(inside / (1 - inside)), rtol=1e-4)
    np.testing.assert_allclose(model.mean_pixels(jnp.zeros(LATENT)), inside, rtol=1e-4)


def test_the_encoder_starts_centred_on_the_mean_image(model):
    """The input of the first layer is the image minus the mean image, so that the mean image is coded as N(0, I)."""
    posterior = model.posterior(jnp.asarray(MEAN))
    np.testing.assert_allclose(posterior.loc, 0, atol=1e-5)
    np.testing.assert_allclose(posterior.log_scale, 0, atol=1e-5)
    image, first = np.ones(PIXELS), model.encoder.layers[0]
    expected = np.asarray(first.weight, np.float64) @ (image - MEAN)
    np.testing.assert_allclose(first(jnp.ones(PIXELS)), expected, rtol=1e-4, atol=1e-5)


def test_weights_start_as_glorots_and_by_the_key(model):
    for mlp in (model.encoder, model.decoder):
        for layer in mlp.layers:
            outputs, inputs = layer.weight.shape
            limit = np.sqrt(6 / (inputs + outputs))
            assert 0.8 * limit < np.abs(layer.weight).max() <= limit
    other = VAE(jax.random.key(4), MEAN, latent_dim=LATENT, hidden=8)
    assert not np.allclose(other.decoder.layers[0].weight, model.decoder.layers[0].weight)
    assert not np.allclose(model.encoder.layers[1].weight, model.decoder.layers[1].weight)


@pytest.mark.parametrize(("latent_dim", "hidden"), [(1, 4), (7, 5)])
def test_sizes_are_settable(latent_dim, hidden):
    model = shapes_of(latent_dim=latent_dim, hidden=hidden)
    assert model.latent_dim == latent_dim
    shapes = [layer.weight.shape for layer in model.encoder.layers]
    assert shapes == [(hidden, PIXELS), (hidden, hidden), (2 * latent_dim, hidden)]
    shapes = [layer.weight.shape for layer in model.decoder.layers]
    assert shapes == [(hidden, latent_dim), (hidden, hidden), (PIXELS, hidden)]
    image, z = jnp.asarray(MEAN), jnp.zeros(latent_dim)
    call = eqx.filter_eval_shape
    assert call(lambda model: model.posterior(image).loc, model).shape == (latent_dim,)
    assert call(lambda model: model.mean_pixels(z), model).shape == (PIXELS,)
    assert call(lambda model: model.joint(image)(z), model).shape == ()


def test_the_default_is_the_iwae_studys_network():
    model = shapes_of()
    assert model.latent_dim == 50
    assert [layer.weight.shape[0] for layer in model.decoder.layers] == [200, 200, PIXELS]
