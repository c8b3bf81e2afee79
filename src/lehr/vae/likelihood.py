"""Test likelihood of a trained model: by annealing, by many importance samples, and bracketed on simulated data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealing import Annealer, anneal, anneal_reverse
from lehr.kernels import AbstractKernel, Hamiltonian, Metropolis
from lehr.objectives.elbo import log_weights
from lehr.path import Schedule
from lehr.tuning import adapt_step_size
from lehr.vae.data import binarise
from lehr.vae.model import VAE
from lehr.weighted import WeightedParticles

ANNEALED = ("ais", "hais", "dais")
METHODS = ("iwae", *ANNEALED)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How each image's evidence is annealed, from q(z | x) or from the prior to p(x, z).

    `ais` is HMC with fresh momentum, `hais` keeps `persistence` of it, `dais` is uncorrected and keeps it too.
    """

    method: str = "ais"
    num_temperatures: int = 1000
    num_chains: int = 16
    num_leapfrog: int = 10
    persistence: float = 0.9
    base: str = "posterior"

    def kernel(self, step_size: Float[Array, "num_steps 1"]) -> AbstractKernel:
        """The kernel with one step size per temperature."""
        persistence = 0.0 if self.method == "ais" else self.persistence
        move = Hamiltonian(step_size, persistence, num_leapfrog=self.num_leapfrog)
        return move if self.method == "dais" else Metropolis(move)

    def annealer(self, model: VAE, image: Float[Array, " pixels"], kernel: AbstractKernel, num_steps: int) -> Annealer:
        """The annealer of one image. Close spacing at both ends, where the path bends (Grosse et al. 2015)."""
        base = model.posterior(image) if self.base == "posterior" else model.prior()
        return Annealer(base, Schedule.sigmoidal(num_steps), kernel)

    @property
    def gradients_per_image(self) -> int:
        """Gradients of log p(x, z) spent on one image."""
        start = 0 if self.method == "dais" else 1
        return self.num_chains * (self.num_temperatures * self.num_leapfrog + start)


class Evidence(eqx.Module):
    """log p(x) of each image, in nats, with the standard error over its chains."""

    log_evidence: Float[np.ndarray, " images"]
    standard_error: Float[np.ndarray, " images"]

    def negative_log_likelihood(self) -> tuple[float, float, float]:
        """Mean over images of -log p(x), its standard error over images, and that over chains."""
        return -_mean(self.log_evidence), _error(self.log_evidence), _chain_error(self.standard_error)


@eqx.filter_jit
def _forward(
    key: PRNGKeyArray, model: VAE, images: Array, sampler: Sampler, kernel: AbstractKernel
) -> WeightedParticles:
    num_steps = _num_steps(kernel)

    def one_image(key, image):
        annealer = sampler.annealer(model, image, kernel, num_steps)
        return anneal(key, annealer, model.joint(image), sampler.num_chains)

    return jax.vmap(one_image)(jax.random.split(key, len(images)), images)


@eqx.filter_jit
def _backward(
    key: PRNGKeyArray, model: VAE, images: Array, latents: Array, sampler: Sampler, kernel: AbstractKernel
) -> WeightedParticles:
    num_steps = _num_steps(kernel)

    def one_image(key, image, latent):
        annealer = sampler.annealer(model, image, kernel, num_steps)
        samples = jnp.broadcast_to(latent, (sampler.num_chains, *latent.shape))
        return anneal_reverse(key, annealer, model.joint(image), samples)

    return jax.vmap(one_image)(jax.random.split(key, len(images)), images, latents)


def annealed_evidence(
    key: PRNGKeyArray,
    model: VAE,
    images: Float[Array, "images pixels"],
    sampler: Sampler,
    kernel: AbstractKernel,
    *,
    batch_size: int = 20,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Evidence:
    """log p(x) of each image by annealing: a lower bound in expectation, consistent as temperatures or chains grow.

    Arguments:
        images: binarised.
        sampler: method and size.
        kernel: with tuned step sizes, see `tune`.
        batch_size: images at a time (memory).
        on_batch: hears how many images are done.

    Source: Wu, Burda, Salakhutdinov, Grosse 2017, section 3.
    """
    results = [
        _summary(
            jax.vmap(lambda w: (w.log_evidence, w.standard_error))(_forward(batch_key, model, batch, sampler, kernel))
        )
        for batch_key, (batch,) in _batches(key, (images,), batch_size, on_batch)
    ]
    return _joined(results, len(images))


def sandwich(
    key: PRNGKeyArray,
    model: VAE,
    sampler: Sampler,
    kernel: AbstractKernel,
    *,
    num_images: int,
    batch_size: int = 20,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[Evidence, Evidence]:
    """Lower and upper stochastic bounds of log p(x) for images simulated from the model.

    z ~ p(z), x ~ p(x | z): then z is an exact draw of p(z | x), from which the reverse chain gives an upper bound in
    expectation. The gap between the two bounds what the annealing has missed (on such images).

    Source: Grosse, Ghahramani, Adams 2015; Wu et al. 2017, section 3.2.
    """
    key_latent, key_pixels, key_forward, key_backward = jax.random.split(key, 4)
    latents = model.prior().sample(key_latent, (num_images,))
    images = binarise(key_pixels, jax.vmap(model.mean_pixels)(latents))
    lower = annealed_evidence(
        key_forward, model, images, sampler, kernel, batch_size=batch_size, on_batch=lambda done: on_batch(done // 2)
    )
    results = [
        _summary(
            jax.vmap(lambda w: (-w.log_evidence, w.standard_error))(
                _backward(batch_key, model, batch, latent, sampler, kernel)
            )
        )
        for batch_key, (batch, latent) in _batches(
            key_backward, (images, latents), batch_size, lambda done: on_batch((num_images + done) // 2)
        )
    ]
    return lower, _joined(results, num_images)


def importance_bounds(
    key: PRNGKeyArray,
    model: VAE,
    images: Float[Array, "images pixels"],
    *,
    num_samples: int = 5000,
    batch_size: int = 10,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[Evidence, Evidence]:
    """The bound L_S of S importance samples from the encoder (L_5000 of the papers), and the ELBO of the same samples.

    The standard errors are those over samples. `num_samples` is rounded up to whole hundreds.

    Source: Burda, Grosse, Salakhutdinov 2016, equation (8).
    """
    chunks = -(-num_samples // 100)

    @eqx.filter_jit
    def bounds(key, model, images):
        def one_image(key, image):
            draw = lambda key: log_weights(model.posterior(image), model.joint(image), key, 100)  # noqa: E731
            log_w = jax.lax.map(draw, jax.random.split(key, chunks)).ravel()
            particles = WeightedParticles(jnp.zeros((len(log_w), 0)), log_w)
            return particles.log_evidence, particles.standard_error, jnp.mean(log_w), jnp.std(log_w) / len(log_w) ** 0.5

        return jax.vmap(one_image)(jax.random.split(key, len(images)), images)

    results = [
        tuple(np.asarray(part) for part in bounds(batch_key, model, batch))
        for batch_key, (batch,) in _batches(key, (images,), batch_size, on_batch)
    ]
    return _joined([r[:2] for r in results], len(images)), _joined([r[2:] for r in results], len(images))


def active_units(model: VAE, images: Float[Array, "images pixels"], *, threshold: float = 0.01) -> int:
    """The number of latent dimensions whose posterior mean varies over the data: Var_x(E_q[z_j]) > threshold.

    Source: Burda, Grosse, Salakhutdinov 2016, section 5.2.
    """
    means = jax.lax.map(lambda image: model.posterior(image).loc, images, batch_size=min(500, len(images)))
    return int(jnp.sum(jnp.var(means, axis=0) > threshold))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Step sizes by inverse temperature, found on a coarse schedule; `acceptance` is None for uncorrected kernels."""

    betas: np.ndarray
    step_size: np.ndarray
    acceptance: np.ndarray | None

    def kernel(self, sampler: Sampler) -> AbstractKernel:
        """The kernel for the sampler's own number of temperatures.

        The log step size is interpolated in beta. For an uncorrected kernel it also scales with K^(-1/4), which gives
        the best rate of the bound (Zhang et al. 2021, theorem 1).
        """
        betas = np.asarray(Schedule.sigmoidal(sampler.num_temperatures).betas[1:])
        step_size = np.exp(np.interp(betas, self.betas, np.log(self.step_size)))
        if self.acceptance is None:
            step_size *= (sampler.num_temperatures / len(self.betas)) ** -0.25
        return sampler.kernel(jnp.asarray(step_size, jnp.float32)[:, None])

    def report(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        report: dict[str, Any] = {"beta": self.betas.tolist(), "step_size": self.step_size.tolist()}
        if self.acceptance is not None:
            report |= {"acceptance": self.acceptance.tolist(), "mean_acceptance": _mean(self.acceptance)}
        return report


def tune(
    key: PRNGKeyArray,
    model: VAE,
    images: Float[Array, "images pixels"],
    sampler: Sampler,
    *,
    target: float = 0.65,
    num_rounds: int = 20,
    num_steps: int = 50,
) -> Tuning:
    """Step sizes tuned on images that are not evaluated, with 4 chains each on `num_steps` temperatures.

    Corrected kernels: the step size of each temperature goes towards the acceptance `target`, over `num_rounds` runs.
    Uncorrected ones: the one step size, of a ladder, that maximises the mean log weight.
    """
    coarse = dataclasses.replace(sampler, num_chains=4, num_temperatures=num_steps)
    betas = np.asarray(Schedule.sigmoidal(num_steps).betas[1:])

    def kernel_with(step_size: float) -> AbstractKernel:
        return coarse.kernel(jnp.full((num_steps, 1), step_size))

    if sampler.method == "dais":
        ladder = 0.02 * 1.25 ** np.arange(15)
        # Each run meets the same noise. A step beyond stability gives NaN or -inf, and loses.
        scores = [float(jnp.mean(_forward(key, model, images, coarse, kernel_with(e)).log_weights)) for e in ladder]
        best = ladder[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]
        return Tuning(betas, np.full(num_steps, best), None)
    kernel = kernel_with(0.1)
    acceptance = np.zeros(num_steps)
    assert isinstance(kernel, Metropolis)
    for number, round_key in enumerate(jax.random.split(key, num_rounds)):
        weighted = _forward(round_key, model, images, coarse, kernel)
        acceptance = np.asarray(weighted.acceptance, np.float64).mean(axis=0)
        kernel = adapt_step_size(kernel, jnp.asarray(acceptance), target=target, rate=2.0 / (1 + number / 3))
    assert isinstance(kernel.kernel, Hamiltonian)
    return Tuning(betas, np.asarray(kernel.kernel.step_size, np.float64)[:, 0], acceptance)


def _num_steps(kernel: AbstractKernel) -> int:
    move = kernel.kernel if isinstance(kernel, Metropolis) else kernel
    assert isinstance(move, Hamiltonian)
    return move.log_step_size.shape[0]


def _batches(key, arrays, batch_size, on_batch):
    """Equal batches, the last one filled up with its first images, so that one function is compiled."""
    num_images = len(arrays[0])
    batch_size = min(batch_size, num_images)
    starts = range(0, num_images, batch_size)
    for start, batch_key in zip(starts, jax.random.split(key, len(starts))):
        rows = np.arange(start, start + batch_size) % num_images
        yield batch_key, tuple(array[rows] for array in arrays)
        on_batch(min(start + batch_size, num_images))


def _summary(pair: tuple[Array, Array]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(pair[0]), np.asarray(pair[1])


def _joined(results: list[Any], num_images: int) -> Evidence:
    log_evidence, error = (np.concatenate([r[i] for r in results])[:num_images].astype(np.float64) for i in (0, 1))
    return Evidence(log_evidence, error)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")


def _chain_error(errors: np.ndarray) -> float:
    return float(np.sqrt(np.sum(errors**2)) / len(errors))
