"""A target whose log likelihood is a sum over data, of which each step of annealing sees a mini-batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray
from scipy.stats import poisson

from lehr.errors import InputError, check_whole
from lehr.numerics import is_concrete, stop_gradient
from lehr.path import LogDensity
from lehr.taylor import Taylor

PerDatum = Callable[[Array, Any], Array]


class Subsampled(eqx.Module):
    """log f(x) = log_prior(x) + sum_i log p(y_i | x), n terms, of which a step of uncorrected annealing sees B:

        log f(x) is replaced by  log_prior(x) + (n / B) sum_{i in batch} log p(y_i | x),

    with a new batch for every step and particle, the same in a step and in its reverse; the end of a chain sees all
    data, once. So weights are unbiased for any B, E[w] = Z. But their bound is low, for one leapfrog a step by about

        sum_k h_k^2 beta_k^2 tr C_k / 2,        C_k the covariance of the gradient's noise in step k:

    h_k^2 K, which mixing needs, does not vanish as the number of steps K grows, and so does not the gap (theorem 2 of
    the paper). `lehr.anneal` warns with that number (`lehr.noise_gap`); docs/gradient-noise.md has the remedies.

    Use it wherever a log density is taken. `lehr.anneal`, and of the objectives `davi`, `davi_stl` and
    `davi_control_variate`, use mini-batches with `lehr.Hamiltonian`, alone or in `lehr.LearnedReverse`. With
    `lehr.Metropolis`, and in `lehr.evidence`, `lehr.tune` and everywhere else, it is the sum over all data: a
    correction that sees a part of the data would not be exact.

    Arguments:
        log_prior: maps a position `(dim,)` to a scalar, in nats; normalised, if log Z is to be an evidence.
        log_likelihood_per_datum: maps a position and one datum to a scalar.
        data: an array, or a pytree of arrays, with a leading axis of n data.
        batch_size: B, from 1 to n; or several, for as many equal parts of the path: noise counts times beta^2, so that
            larger batches belong to its end; parts are of equal numbers of steps, of which there must be as many.
        replace: whether batches are drawn with replacement. Without, B^2 comparisons are made to draw a batch, but a
            batch of all n data is all of them.
        check: whether `lehr.anneal` predicts the gap, with 16 more chains of four gradients a step, to warn of it.
        taylor: expansions to reduce the noise with; `around` makes them.

    Compiled functions are kept by what the two log densities are: give functions, or methods of modules, that are made
    once, and not lambdas that are made anew for each call.

    **Gradient**: exact for the given batches, and unbiased, over them, for the gradient of E[log w]. Data and
    expansions are not differentiated.

    Raises `lehr.errors.InputError` for no data, leading axes that differ, values that are not finite, or a batch size
    out of range; in use, for a log likelihood of a datum that is no scalar.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, section 4.3 (stochastic DAIS).
    """

    log_prior: LogDensity
    log_likelihood_per_datum: PerDatum
    data: Any
    batch_sizes: tuple[int, ...] = eqx.field(static=True)
    replace: bool = eqx.field(static=True)
    check: bool = eqx.field(static=True)
    taylor: Taylor | None

    def __init__(
        self,
        log_prior: LogDensity,
        log_likelihood_per_datum: PerDatum,
        data: Any,
        batch_size: int | Sequence[int],
        *,
        replace: bool = True,
        check: bool = True,
        taylor: Taylor | None = None,
    ):
        self.log_prior, self.log_likelihood_per_datum = log_prior, log_likelihood_per_datum
        self.data = jax.tree.map(_array, data)
        self.replace, self.check, self.taylor = replace, check, taylor
        lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(self.data)}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"data must be arrays with one leading axis of at least one datum, but their lengths are {lengths}"
            )
        for leaf in jax.tree.leaves(self.data):
            if is_concrete(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(leaf))):
                raise InputError("data must be finite: remove what has missing or infinite values")
        self.batch_sizes = _batch_sizes(batch_size, self.num_data, smallest=1 if taylor is None else 0)

    @property
    def num_data(self) -> int:
        """n."""
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def is_noisy(self) -> bool:
        """Whether a step sees less than all data, and needs them."""
        return any(0 < size < self.num_data or (size == self.num_data and self.replace) for size in self.batch_sizes)

    def with_batches(self, batch_size: int | Sequence[int]) -> "Subsampled":
        """The same with other batch sizes; 0, no data at all, is the surrogate of `around` alone.

        Raises `lehr.errors.InputError` for a size out of range, and for 0 without `around`.
        """
        return self._but(batch_size, self.taylor)

    def around(self, reference: ArrayLike, *, order: int = 2) -> "Subsampled":
        """The same with the batch's noise reduced by Taylor expansions around a point, best near the posterior's mode:

            sum_i log p(y_i | x)  is replaced by  sum_i t_i(x) + (n / B) sum_{i in batch} [log p(y_i | x) - t_i(x)],

        unbiased as before; what is left is of order |x - reference|^(order + 1) a datum. With batches of no data
        (`with_batches(0)`) the steps see the surrogate sum_i t_i alone, and have no noise; the end of a
        chain sees all data, so that weights stay unbiased.

        Arguments:
            reference: `(dim,)`.
            order: 1 or 2. It takes one pass over the data, for 2 with their Hessian.

        Raises `lehr.errors.InputError` for another order, or an expansion that is not finite.

        Source: Baker, Fearnhead, Fox, Nemeth 2019 (gradients); Jankowiak, Phan 2021 (surrogates).
        """
        order = check_whole("the order of the expansions", order, 1, 2)
        reference = jnp.asarray(reference)
        reference = reference if jnp.issubdtype(reference.dtype, jnp.inexact) else reference.astype(float)
        if reference.ndim != 1:
            raise InputError(f"a reference must have the shape (dim,) of a position, but it has {reference.shape}")
        value, slope = jax.value_and_grad(self.log_likelihood)(reference)
        curvature = jax.hessian(self.log_likelihood)(reference) if order == 2 else None
        taylor = Taylor(reference, value, slope, curvature)
        leaves = jax.tree.leaves(taylor)
        if all(map(is_concrete, leaves)) and not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
            raise InputError("the log likelihood has no finite derivatives at the reference: give another point")
        return self._but(self.batch_sizes, taylor)

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """log f(x), with all data."""
        return self.log_prior(x) + self.log_likelihood(x)

    def log_likelihood(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """sum_i log p(y_i | x), all data."""
        return jnp.sum(jax.vmap(functools.partial(self._of_one, x))(stop_gradient(self.data)))

    def residual(self, x: Float[Array, " dim"], datum: Any) -> Float[Array, ""]:
        """What a batch is needed for: log p(y_i | x), less its expansion if there is one."""
        value = self._of_one(x, datum)
        if self.taylor is None:
            return value
        return value - self.taylor.of_one(lambda x: self._of_one(x, datum), x)

    def surrogate(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """log_prior(x) + sum_i t_i(x): no data are touched.

        Raises `lehr.errors.InputError` without `around`.
        """
        return self.log_prior(x) + self._expansions().total(x)

    def likelihood_ratio(
        self, key: PRNGKeyArray, x: Float[Array, " dim"], *, batch_size: int, rate: float = 2.0
    ) -> Float[Array, ""]:
        """An unbiased estimate of f(x) / exp(surrogate(x)) from some batches of data: a weight's exact correction.

            prod_{j <= J} (1 + D_j / rate),    J ~ Poisson(rate),    D_j = (n / B) sum_{i in batch j} r_i(x),

        r_i = log p(y_i | .) - t_i; its mean is that of the terms E[D]^j / j!, exp(sum_i r_i(x)). So chains that are
        annealed to the surrogate, which touch no data, have weights whose mean is Z after multiplication with this. It
        may be negative, and is of use where D_j spreads by less than the rate: near the reference. (Compiled code has a
        fixed size: as many batches are computed, if not used, as J exceeds with probability 1e-12: 18 at a rate of 2.)

        Arguments:
            key: a PRNG key.
            x: `(dim,)`.
            batch_size: B, of each batch.
            rate: the expected number of batches, positive.

        Returns the ratio, not its logarithm.

        **Gradient**: of the estimate, for the given batches.

        Raises `lehr.errors.InputError` without `around`, or for a batch size or rate out of range.

        Source: Beskos, Papaspiliopoulos, Roberts, Fearnhead 2006 (the Poisson estimator); Quiroz, Tran, Villani, Kohn,
        Dang 2021 (for subsampled likelihoods).
        """
        self._expansions()
        check_whole("batch_size", batch_size, 1, self.num_data)
        if not (is_concrete(rate) and 0 < rate < 1000):
            raise InputError(f"the rate of batches must be a number between 0 and 1000, but it is {rate}")
        key_count, key_data = jax.random.split(key)
        most = int(poisson.isf(1e-12, rate))
        count = jax.random.poisson(key_count, rate)

        def factor(key):
            residuals = jax.vmap(lambda datum: self.residual(x, datum))(
                self.some(key, batch_size, replace=self.replace)
            )
            return 1 + jnp.sum(residuals) * (self.num_data / batch_size) / rate

        factors = jax.lax.map(factor, jax.random.split(key_data, most))
        return jnp.prod(jnp.where(jnp.arange(most) < count, factors, 1)).astype(x.dtype)

    def _expansions(self) -> Taylor:
        if self.taylor is None:
            raise InputError("there is no surrogate without expansions: make them with Subsampled.around")
        return self.taylor

    def on(self, key: PRNGKeyArray, part: Int[Array, ""]) -> "OnBatch":
        """log f as seen by a step in a part of the path, with the batch that is drawn with `key`."""
        return OnBatch(self, key, part)

    def some(self, key: PRNGKeyArray, size: int, *, replace: bool) -> Any:
        """Data drawn at random."""
        if size == self.num_data and not replace:
            return stop_gradient(self.data)
        chosen = jax.random.randint(key, (size,), 0, self.num_data) if replace else _distinct(key, self.num_data, size)
        return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf[chosen]), self.data)

    def _but(self, batch_size: int | Sequence[int], taylor: Taylor | None) -> "Subsampled":
        parts = self.log_prior, self.log_likelihood_per_datum, self.data, batch_size
        return Subsampled(*parts, replace=self.replace, check=self.check, taylor=taylor)

    def _of_one(self, x: Float[Array, " dim"], datum: Any) -> Float[Array, ""]:
        value = self.log_likelihood_per_datum(x, datum)
        if jnp.shape(value) != ():
            raise InputError(
                f"the log likelihood of one datum must be a scalar, but it has shape {jnp.shape(value)}: sum it"
            )
        return value


class OnBatch(eqx.Module):
    """log f with a mini-batch in place of the data, the same at every call."""

    target: Subsampled
    key: PRNGKeyArray
    part: Int[Array, ""]

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        target = self.target

        def with_batch(size, x):
            if size == 0:
                return jnp.zeros((), x.dtype)
            residuals = jax.vmap(lambda datum: target.residual(x, datum))(
                target.some(self.key, size, replace=target.replace)
            )
            return (jnp.sum(residuals) * (target.num_data / size)).astype(x.dtype)

        branches = [functools.partial(with_batch, size) for size in target.batch_sizes]
        noisy = branches[0](x) if len(branches) == 1 else jax.lax.switch(self.part, branches, x)
        known = target.log_prior(x) if target.taylor is None else target.log_prior(x) + target.taylor.total(x)
        return known + noisy


def _array(leaf: Any) -> Array:
    """Raises `InputError` for what is no array of numbers, and whole numbers that do not fit JAX's default type."""
    if isinstance(leaf, jax.Array):
        return leaf
    values = np.asarray(leaf)
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise InputError(f"data must be arrays of numbers, but there is one of type {values.dtype}")
    array = jnp.asarray(values)
    if np.issubdtype(values.dtype, np.integer) and not np.array_equal(np.asarray(array), values):
        raise InputError("data have whole numbers beyond 32 bits: make them floats, or switch jax_enable_x64 on")
    return array


def _distinct(key: PRNGKeyArray, n: int, size: int) -> Int[Array, " size"]:
    """Uniform on sets of `size` of n numbers (their order is not). Source: Floyd, in Bentley 1987."""
    last = jnp.arange(n - size, n)
    drawn = jax.random.randint(key, (size,), 0, last + 1)

    def step(i, chosen):
        return chosen.at[i].set(jnp.where(jnp.any(chosen == drawn[i]), last[i], drawn[i]))

    return jax.lax.fori_loop(0, size, step, jnp.full(size, -1, drawn.dtype))


def _batch_sizes(batch_size: int | Sequence[int], num_data: int, *, smallest: int) -> tuple[int, ...]:
    sizes = tuple(batch_size) if isinstance(batch_size, Sequence) and not isinstance(batch_size, str) else (batch_size,)
    if not sizes:
        raise InputError("batch_size must be a whole number, or one for each part of the path, but it is empty")
    return tuple(check_whole("batch_size", size, smallest, num_data) for size in sizes)
