"""The latent-variable model of the IWAE study: two hidden tanh layers each way, Bernoulli pixels, Gaussian latents."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.numerics import bernoulli_log_prob, normal


class DiagonalGaussian(eqx.Module):
    """N(loc, diag(scale^2)), with the logarithm of the scale as the network gives it."""

    loc: Float[Array, " dim"]
    log_scale: Float[Array, " dim"]

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape dim"]:
        """Reparameterised draws. **Gradient**: exact for a fixed key."""
        noise = normal(key, (*shape, *self.loc.shape), self.loc.dtype)
        return self.loc + jnp.exp(self.log_scale) * noise

    def log_prob(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """The normalised log density, in nats."""
        standardised = (x - self.loc) * jnp.exp(-self.log_scale)
        return -jnp.sum(standardised**2 / 2 + self.log_scale) - x.shape[0] * math.log(2 * math.pi) / 2


class JointDensity(eqx.Module):
    """log p(x, z) as a function of z for one image x: the log target of every objective here.

    log p(x, z) = log N(z; 0, I) + sum_j log Bernoulli(x_j | sigmoid(decoder(z)_j)).

    A pytree, so that objectives can hold its parameters fixed.
    """

    decoder: eqx.nn.MLP
    image: Float[Array, " pixels"]

    def __call__(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        log_prior = -jnp.sum(z**2) / 2 - z.shape[0] * math.log(2 * math.pi) / 2
        return log_prior + jnp.sum(bernoulli_log_prob(self.decoder(z), self.image))


class VAE(eqx.Module):
    """p(z) = N(0, I), p(x | z) Bernoulli, q(z | x) diagonal Gaussian, both networks 200-200 tanh unless said.

    Source: Burda, Grosse, Salakhutdinov 2016, section 5 and their published code (which starts the output bias at the
    logit of the mean image and subtracts the mean image from the input, as here).
    """

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(
        self, key: PRNGKeyArray, mean_image: Float[np.ndarray, " pixels"], *, latent_dim: int = 50, hidden: int = 200
    ):
        key_encoder, key_decoder = jax.random.split(key)
        pixels = len(mean_image)
        mean = jnp.asarray(mean_image, jnp.float32)
        encoder = _glorot(key_encoder, pixels, 2 * latent_dim, hidden)
        decoder = _glorot(key_decoder, latent_dim, pixels, hidden)
        mean_inside = jnp.clip(mean, 0.001, 0.999)
        self.encoder = eqx.tree_at(lambda mlp: mlp.layers[0].bias, encoder, -encoder.layers[0].weight @ mean)
        self.decoder = eqx.tree_at(
            lambda mlp: mlp.layers[-1].bias, decoder, jnp.log(mean_inside) - jnp.log1p(-mean_inside)
        )

    @property
    def latent_dim(self) -> int:
        """The dimension of z."""
        return self.decoder.layers[0].weight.shape[1]

    def posterior(self, image: Float[Array, " pixels"]) -> DiagonalGaussian:
        """q(z | x), the encoder's approximation."""
        loc, log_scale = jnp.split(self.encoder(image), 2)
        return DiagonalGaussian(loc, log_scale)

    def joint(self, image: Float[Array, " pixels"]) -> JointDensity:
        """z -> log p(x, z)."""
        return JointDensity(self.decoder, image)

    def prior(self) -> DiagonalGaussian:
        """p(z) = N(0, I)."""
        zero = jnp.zeros(self.latent_dim)
        return DiagonalGaussian(zero, zero)

    def mean_pixels(self, z: Float[Array, " latent"]) -> Float[Array, " pixels"]:
        """E[x | z]."""
        return jax.nn.sigmoid(self.decoder(z))


def _glorot(key: PRNGKeyArray, inputs: int, outputs: int, hidden: int) -> eqx.nn.MLP:
    """An MLP with Glorot's uniform weights and zero biases (Glorot, Bengio 2010)."""
    key_shape, key_weights = jax.random.split(key)
    mlp = eqx.nn.MLP(inputs, outputs, hidden, depth=2, activation=jnp.tanh, key=key_shape)
    weights = [layer.weight for layer in mlp.layers]
    initialise = jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0)
    drawn = [initialise(k, w.shape) for k, w in zip(jax.random.split(key_weights, len(weights)), weights)]
    mlp = eqx.tree_at(lambda m: [layer.weight for layer in m.layers], mlp, drawn)
    return eqx.tree_at(lambda m: [layer.bias for layer in m.layers], mlp, replace_fn=jnp.zeros_like)
