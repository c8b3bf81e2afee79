"""Test likelihood of a trained model: by annealing, by many importance samples, and bracketed on simulated data."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.kernels import AbstractKernel
from lehr.objectives.elbo import log_weights
from lehr.vae.data import binarise
from lehr.vae.model import VAE
from lehr.vae.sampler import Sampler, anneal_images, anneal_images_reverse
from lehr.weighted import WeightedParticles

#: hears how many images are done
Progress = Callable[[int], None]


class Evidence(eqx.Module):
    """log p(x) of each image, in nats, with the standard error over its chains (or its samples).

    That error is too small where the effective sample size is: see `lehr.WeightedParticles.standard_error`. The
    acceptance is that of the chains, None where nothing is rejected.
    """

    log_evidence: Float[Array | np.ndarray, "*images"]
    standard_error: Float[Array | np.ndarray, "*images"]
    effective_sample_size: Float[Array | np.ndarray, "*images"] | None = None
    acceptance: Float[Array | np.ndarray, "*images"] | None = None

    def negative_log_likelihood(self) -> tuple[float, float, float]:
        """Mean over images of -log p(x), its standard error over images, and that over chains."""
        mean, over_images = mean_and_error(self.log_evidence)
        return -mean, over_images, float(np.sqrt(np.sum(np.square(self.standard_error))) / len(self.standard_error))


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean, and its standard error (infinite for a single value, which cannot tell)."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.inf
    return float(np.mean(values)), float(error)


def annealed_evidence(
    key: PRNGKeyArray,
    model: VAE,
    images: Float[Array, "images pixels"],
    sampler: Sampler,
    kernel: AbstractKernel,
    *,
    batch_size: int = 20,
    on_batch: Progress = lambda done: None,
) -> Evidence:
    """log p(x) of each image by annealing: a lower bound in expectation, consistent as temperatures or chains grow.

    Arguments:
        images: binarised.
        sampler: method and size.
        kernel: with tuned step sizes, see `lehr.vae.sampler.tune`.
        batch_size: images at a time (memory).
        on_batch: hears how many images are done.

    Source: Wu, Burda, Salakhutdinov, Grosse 2017, section 3.
    """

    def one_batch(key, images):
        return _evidence(anneal_images(key, model, images, sampler, kernel))

    return _in_batches(one_batch, key, (images,), batch_size, on_batch)


def sandwich(
    key: PRNGKeyArray,
    model: VAE,
    sampler: Sampler,
    kernel: AbstractKernel,
    *,
    num_images: int,
    batch_size: int = 20,
    on_batch: Progress = lambda done: None,
) -> tuple[Evidence, Evidence]:
    """Lower and upper stochastic bounds of log p(x) for images simulated from the model.

    z ~ p(z), x ~ p(x | z): then z is an exact draw of p(z | x), from which the reverse chain gives an upper bound in
    expectation. The gap between the two bounds what the annealing has missed (on such images).

    Source: Grosse, Ghahramani, Adams 2015; Wu et al. 2017, section 3.2.
    """
    key_latent, key_pixels, key_forward, key_reverse = jax.random.split(key, 4)
    latents = model.prior().sample(key_latent, (num_images,))
    images = binarise(key_pixels, jax.vmap(model.mean_pixels)(latents))

    def lower(key, images, latents):
        del latents
        return _evidence(anneal_images(key, model, images, sampler, kernel))

    def upper(key, images, latents):
        # The reverse chain estimates 1/Z.
        inverse = _evidence(anneal_images_reverse(key, model, images, latents, sampler, kernel))
        return eqx.tree_at(lambda e: e.log_evidence, inverse, -inverse.log_evidence)

    pair = (images, latents)
    return (
        _in_batches(lower, key_forward, pair, batch_size, lambda done: on_batch(done // 2)),
        _in_batches(upper, key_reverse, pair, batch_size, lambda done: on_batch((num_images + done) // 2)),
    )


def importance_bounds(
    key: PRNGKeyArray,
    model: VAE,
    images: Float[Array, "images pixels"],
    *,
    num_samples: int = 5000,
    batch_size: int = 10,
    on_batch: Progress = lambda done: None,
) -> tuple[Evidence, Evidence]:
    """The bound L_S of S importance samples from the encoder (L_5000 of the papers), and the ELBO of the same samples.

    The standard errors are those over samples.

    Source: Burda, Grosse, Salakhutdinov 2016, equation (8).
    """

    def one_batch(key, images):
        return _importance_bounds(key, model, images, num_samples)

    return _in_batches(one_batch, key, (images,), batch_size, on_batch)


@eqx.filter_jit
def _importance_bounds(key: PRNGKeyArray, model: VAE, images: Array, num_samples: int) -> tuple[Evidence, Evidence]:
    num_chunks = -(-num_samples // 100)  # of 100 samples: memory

    def one_image(key, image):
        def chunk(key):
            return log_weights(model.posterior(image), model.joint(image), key, 100)

        log_w = jax.lax.map(chunk, jax.random.split(key, num_chunks)).ravel()[:num_samples]
        particles = WeightedParticles(jnp.zeros((num_samples, 0)), log_w)
        elbo_error = jnp.std(log_w, ddof=1) / num_samples**0.5 if num_samples > 1 else jnp.full((), jnp.inf)
        bound = Evidence(particles.log_evidence, particles.standard_error, particles.effective_sample_size)
        return bound, Evidence(particles.elbo, elbo_error)

    return jax.vmap(one_image)(jax.random.split(key, len(images)), images)


def active_units(model: VAE, images: Float[Array, "images pixels"], *, threshold: float = 0.01) -> int:
    """The number of latent dimensions whose posterior mean varies over the data: Var_x(E_q[z_j]) > threshold.

    Source: Burda, Grosse, Salakhutdinov 2016, section 5.2.
    """
    means = jax.lax.map(lambda image: model.posterior(image).loc, images, batch_size=min(500, len(images)))
    return int(jnp.sum(jnp.var(means, axis=0) > threshold))


def _evidence(particles: WeightedParticles) -> Evidence:
    def one_image(p):
        acceptance = None if p.acceptance is None else p.acceptance.mean()
        return Evidence(p.log_evidence, p.standard_error, p.effective_sample_size, acceptance)

    return jax.vmap(one_image)(particles)


def _in_batches(
    one_batch: Callable[..., Any], key: PRNGKeyArray, arrays: Sequence[Array], batch_size: int, on_batch: Progress
) -> Any:
    """`one_batch(key, *arrays)` over equal batches, joined in order, in float64 (sums over images are taken in it).

    The last batch is filled up with the first images, so that one function is compiled.
    """
    num_images = len(arrays[0])
    batch_size = min(batch_size, num_images)
    starts = range(0, num_images, batch_size)
    results = []
    for start, batch_key in zip(starts, jax.random.split(key, len(starts))):
        rows = np.arange(start, start + batch_size) % num_images
        results.append(jax.tree.map(np.asarray, one_batch(batch_key, *(array[rows] for array in arrays))))
        on_batch(min(start + batch_size, num_images))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_images].astype(np.float64), *results)
