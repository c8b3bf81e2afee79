"""What the tests of training and evaluation share: tiny images, a tiny setting, and functions compiled once."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import numpy as np
import scipy.special
import scipy.stats

from lehr.vae import session
from lehr.vae.data import ImageData
from lehr.vae.model import VAE
from lehr.vae.setting import Setting

# One compilation for each setting, however many runs the tests make of it.
session.make_epoch = functools.cache(session.make_epoch)
session.make_test_bound = functools.cache(session.make_test_bound)

TINY: dict[str, Any] = {
    "hidden": 8,
    "latent_dim": 3,
    "num_steps": 3,
    "num_particles": 2,
    "num_leapfrog": 2,
    "batch_size": 8,
    "epochs": 4,
}


def tiny_setting(**changes) -> Setting:
    return Setting(**{**TINY, **changes})


def tiny_images(num_images: int = 40) -> np.ndarray:
    """Grey 4x4 images with structure to learn: two bars whose brightness varies."""
    rng = np.random.default_rng(0)
    images = 0.1 + 0.05 * rng.random((num_images, 4, 4))
    images[:, 1] += 0.8 * rng.random((num_images, 1))
    images[:, :, 2] += 0.05 * rng.random((num_images, 1))
    return images.astype(np.float32)


def tiny_data() -> ImageData:
    images = tiny_images().reshape(40, 16)
    return ImageData("tiny", images[4:], images[:4], (4, 4))


def parameters(tree: Any) -> dict[str, np.ndarray]:
    """Every float leaf by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def network(mlp: Any, x: np.ndarray) -> np.ndarray:
    """The network again, in numpy and float64, row by row."""
    *hidden, last = [(np.asarray(layer.weight, np.float64), np.asarray(layer.bias, np.float64)) for layer in mlp.layers]
    x = np.asarray(x, np.float64)
    for weight, bias in hidden:
        x = np.tanh(x @ weight.T + bias)
    return x @ last[0].T + last[1]


@dataclasses.dataclass(frozen=True)
class Toy:
    """A model of six pixels with two latents: all 64 images, and by numerical quadrature what is to be estimated.

    Attributes:
        log_evidence: log p(x) of each image.
        elbo: E_q[log p(x, z) - log q(z | x)] of each image.
        spread: the standard deviation of log p(x, z) - log q(z | x) under q.
        inefficiency: E_q[w^2] / p(x)^2 of the weight w = p(x, z) / q(z | x).
    """

    model: VAE
    images: np.ndarray
    log_evidence: np.ndarray
    elbo: np.ndarray
    spread: np.ndarray
    inefficiency: np.ndarray

    def index(self, images: np.ndarray) -> np.ndarray:
        """Which of the 64 each image is."""
        return (np.asarray(images, int) * 2 ** np.arange(6)).sum(axis=1)


@functools.cache
def toy() -> Toy:
    images = ((np.arange(64)[:, None] >> np.arange(6)) & 1).astype(np.float32)
    model = VAE(jax.random.key(5), np.full(6, 0.4, np.float32), latent_dim=2, hidden=5)
    # Far from Gaussian posteriors, and an encoder that is no more than roughly right.
    model = eqx.tree_at(lambda m: m.decoder, model, replace_fn=lambda d: jax.tree.map(_stretched, d))
    last = model.encoder.layers[-1]
    # Wide enough for weights of finite variance.
    wide = eqx.tree_at(lambda layer: (layer.weight, layer.bias), last, (0.3 * last.weight, last.bias.at[2:].add(0.4)))
    model = eqx.tree_at(lambda m: m.encoder.layers[-1], model, wide)
    axis = np.arange(-12, 12, 0.12)
    z = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    logits = network(model.decoder, z)
    log_joint = images @ logits.T - np.logaddexp(0, logits).sum(axis=1) + scipy.stats.norm.logpdf(z).sum(axis=1)
    log_evidence = scipy.special.logsumexp(log_joint, axis=1) + 2 * np.log(0.12)
    np.testing.assert_allclose(np.exp(log_evidence).sum(), 1, rtol=1e-8)
    loc, log_scale = np.split(network(model.encoder, images)[:, None], 2, axis=-1)
    log_q = scipy.stats.norm.logpdf(z, loc, np.exp(log_scale)).sum(axis=-1)
    q, log_weight = np.exp(log_q) * 0.12**2, log_joint - log_q
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-6)
    elbo = (q * log_weight).sum(axis=1)
    spread = np.sqrt((q * (log_weight - elbo[:, None]) ** 2).sum(axis=1))
    inefficiency = (q * np.exp(2 * (log_weight - log_evidence[:, None]))).sum(axis=1)
    return Toy(model, images, log_evidence, elbo, spread, inefficiency)


def _stretched(leaf: Any) -> Any:
    return 2 * leaf if eqx.is_inexact_array(leaf) and leaf.ndim == 2 else leaf
