"""Weighted particles, and what they say of the evidence."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def log_mean_exp(log_weights: Float[Array, " n"]) -> Float[Array, ""]:
    """log (1/n) sum_i exp(log_weights_i), without overflow."""
    return jax.nn.logsumexp(log_weights) - math.log(log_weights.shape[0])


def pareto_k(log_weights: Float[Array, " n"] | Float[np.ndarray, " n"]) -> float:
    """The shape k of a generalised Pareto distribution fitted to the largest weights: how heavy their tail is.

        P(w - u > t | w > u) = (1 + k t / sigma)^(-1/k),     u the ceil(min(n/5, 3 sqrt n))-th largest weight but one.

    The weights have 1/k finite moments. Up to k = 0.5 their variance is finite and errors can be believed; above 0.7 no
    reachable number of draws makes the mean reliable.

    Arguments:
        log_weights: `(n,)`, in nats, outside `jax.jit`; a constant added to all of them changes nothing.

    Returns k, computed in float64; or

        inf    too few weights to tell: n < 21, or fewer than 5 above u (a handful carries everything);
        -inf   no tail: more weights share the largest value than the tail would hold, as when all are equal;
        nan    a log weight is NaN, or all weights are zero.

    **Gradient**: none.

    Source: Zhang, Stephens 2009 (the fit); Vehtari, Simpson, Gelman, Yao, Gabry 2024 (the tail, the prior on k).
    """
    x = np.asarray(log_weights, np.float64)
    if np.any(np.isnan(x)) or not np.any(x > -np.inf):
        return math.nan
    num_tail = math.ceil(min(len(x) / 5, 3 * math.sqrt(len(x))))
    if num_tail < 5 or np.any(x == np.inf):
        return math.inf
    x = np.sort(x - np.max(x))
    # Weights below the smallest float are zero.
    cut = max(float(x[-num_tail - 1]), math.log(np.finfo(np.float64).tiny))
    if cut == 0:
        return -math.inf
    # (w - u) / u, because k knows no scale.
    tail = np.expm1(x[x > cut] - cut)
    return _generalised_pareto_shape(tail) if len(tail) >= 5 else math.inf


def _generalised_pareto_shape(x: np.ndarray) -> float:
    """k from positive, sorted values: the mean of b = -k / sigma over its profile likelihood on a grid gives k.

    The prior weighs like ten values with k = 0.5.
    """
    n = len(x)
    num_grid = 30 + math.isqrt(n)
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - np.sqrt(num_grid / (np.arange(num_grid) + 0.5))) / (3 * quartile)
    k = np.mean(np.log1p(-b[:, None] * x), axis=1)
    # 1 / sigma, which tends to one over the mean of x as b and k vanish together.
    inverse_scale = np.divide(-b, k, out=np.full_like(b, 1 / np.mean(x)), where=b != 0)
    log_likelihood = n * (np.log(inverse_scale) - k - 1)
    weights = np.exp(log_likelihood - np.max(log_likelihood))
    mean_b = np.sum(weights * b) / np.sum(weights)
    return float((n * np.mean(np.log1p(-mean_b * x)) + 5) / (n + 10))


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
    def pareto_k(self) -> float:
        """How heavy the tail of the weights is (`lehr.weighted.pareto_k`): below 0.5 good, above 0.7 not to be used."""
        return pareto_k(self.log_weights)

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
