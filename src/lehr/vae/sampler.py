"""How each image's evidence is annealed: the method, its size, and its tuned step sizes."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer
from lehr.annealing import anneal, anneal_reverse
from lehr.errors import InputError
from lehr.kernels import AbstractKernel, Hamiltonian, Metropolis
from lehr.path import Schedule
from lehr.tuning import adapt_step_size
from lehr.vae.model import VAE
from lehr.weighted import WeightedParticles

METHODS = ("ais", "hais", "dais")
BASES = ("posterior", "prior")


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

    def annealer(self, model: VAE, image: Float[Array, " pixels"], kernel: AbstractKernel) -> Annealer:
        """The annealer of one image."""
        base = model.posterior(image) if self.base == "posterior" else model.prior()
        return Annealer(base, self.schedule, kernel)

    @property
    def schedule(self) -> Schedule:
        """Close spacing at both ends, where the path bends (Grosse, Ghahramani, Adams 2015)."""
        return Schedule.sigmoidal(self.num_temperatures)

    @property
    def gradients_per_image(self) -> int:
        """Gradients of log p(x, z) spent on one image."""
        start = 0 if self.method == "dais" else 1
        return self.num_chains * (self.num_temperatures * self.num_leapfrog + start)


@eqx.filter_jit
def anneal_images(
    key: PRNGKeyArray, model: VAE, images: Array, sampler: Sampler, kernel: AbstractKernel
) -> WeightedParticles:
    """`lehr.anneal` for each image: weighted particles with a leading axis of images."""

    def one_image(key, image):
        annealer = sampler.annealer(model, image, kernel)
        return anneal(key, annealer, model.joint(image), sampler.num_chains)

    return jax.vmap(one_image)(jax.random.split(key, len(images)), images)


@eqx.filter_jit
def anneal_images_reverse(
    key: PRNGKeyArray, model: VAE, images: Array, latents: Array, sampler: Sampler, kernel: AbstractKernel
) -> WeightedParticles:
    """`lehr.anneal_reverse` for each image, all chains from its one exact posterior draw `(images, latent)`."""

    def one_image(key, image, latent):
        annealer = sampler.annealer(model, image, kernel)
        samples = jnp.broadcast_to(latent, (sampler.num_chains, *latent.shape))
        return anneal_reverse(key, annealer, model.joint(image), samples)

    return jax.vmap(one_image)(jax.random.split(key, len(images)), images, latents)


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
        betas = np.asarray(sampler.schedule.betas[1:])
        step_size = np.exp(np.interp(betas, self.betas, np.log(self.step_size)))
        if self.acceptance is None:
            step_size *= (sampler.num_temperatures / len(self.betas)) ** -0.25
        return sampler.kernel(jnp.asarray(step_size, jnp.float32)[:, None])

    def report(self) -> dict[str, Any]:
        """Plain numbers for a report; the acceptance is that of the last tuning run."""
        report: dict[str, Any] = {"beta": self.betas.tolist(), "step_size": self.step_size.tolist()}
        if self.acceptance is not None:
            report |= {"acceptance": self.acceptance.tolist(), "mean_acceptance": float(self.acceptance.mean())}
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
    betas = np.asarray(coarse.schedule.betas[1:])

    def kernel_with(step_size: float) -> AbstractKernel:
        return coarse.kernel(jnp.full((num_steps, 1), step_size))

    if sampler.method == "dais":
        ladder = 0.01 * 1.3 ** np.arange(18)
        # Each run meets the same noise. A step beyond stability gives what is not finite, and loses.
        runs = [anneal_images(key, model, images, coarse, kernel_with(e)).log_weights for e in ladder]
        scores = np.array([np.mean(np.asarray(log_weights, np.float64)) for log_weights in runs])
        if not np.isfinite(scores).any():
            raise InputError(f"no step size from {ladder[0]} to {ladder[-1]:.2f} gives a finite bound: use ais or hais")
        best = ladder[int(np.argmax(np.where(np.isfinite(scores), scores, -np.inf)))]
        return Tuning(betas, np.full(num_steps, best), None)
    kernel = kernel_with(0.1)
    acceptance = np.zeros(num_steps)
    assert isinstance(kernel, Metropolis)
    for number, round_key in enumerate(jax.random.split(key, num_rounds)):
        weighted = anneal_images(round_key, model, images, coarse, kernel)
        acceptance = np.asarray(weighted.acceptance, np.float64).mean(axis=0)
        kernel = adapt_step_size(kernel, jnp.asarray(acceptance), target=target, rate=2.0 / (1 + number / 3))
    return Tuning(betas, np.exp(np.asarray(kernel.kernel.log_step_size, np.float64))[:, 0], acceptance)
