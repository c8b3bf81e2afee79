"""Weighted particles, and what they say of the evidence."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_mean_exp(log_weights: Float[Array, " n"]) -> Float[Array, ""]:
    """log (1/n) sum_i exp(log_weights_i), without overflow."""
    return jax.nn.logsumexp(log_weights) - math.log(log_weights.shape[0])


class WeightedParticles(eqx.Module):
    """N independent particles with log weights, E[w] = Z (from `anneal_reverse`: E[w] = 1/Z).

    `acceptance` holds the mean Metropolis acceptance probability by step `(K,)`, None for uncorrected kernels.
    """

    positions: Float[Array, "num_particles dim"]
    log_weights: Float[Array, " num_particles"]
    acceptance: Float[Array, " num_steps"] | None = None

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """log (1/N) sum_i w_i, in nats: w is unbiased for Z, so this is a lower bound of log Z in expectation.

        **Gradient**: exact for this quantity (that of the importance weighted bound).
        """
        return log_mean_exp(self.log_weights)

    @property
    def elbo(self) -> Float[Array, ""]:
        """(1/N) sum_i log w_i <= log Z in expectation, in nats."""
        return jnp.mean(self.log_weights)

    @property
    def weights(self) -> Float[Array, " num_particles"]:
        """The self-normalised weights, which sum to 1."""
        return jax.nn.softmax(self.log_weights)

    @property
    def effective_sample_size(self) -> Float[Array, ""]:
        """(sum w)^2 / sum w^2, between 1 and N. Source: Kong 1992."""
        return 1 / jnp.sum(self.weights**2)

    @property
    def standard_error(self) -> Float[Array, ""]:
        """The standard error of `log_evidence`, in nats, by the delta method on the weights:

            se^2 = var(w) / (N mean(w)^2) = (N / ESS - 1) / (N - 1).

        Infinite for one particle, which cannot tell. Too small when few particles carry the weight: distrust it when
        the effective sample size is below about ten.
        """
        if self._n == 1:
            return jnp.full((), jnp.inf, self.log_weights.dtype)
        # Rounding may leave N / ESS a little under 1 for equal weights.
        excess = jnp.maximum(self._n * jnp.sum(self.weights**2) - 1, 0)
        return jnp.sqrt(excess / (self._n - 1))

    @property
    def _n(self) -> int:
        return self.log_weights.shape[-1]
