"""A NumPyro model as a problem: its log joint over unconstrained positions, and its prior as the base."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.adapters.functions import base_of_dimension
from lehr.adapters.numpyro_sites import Sites
from lehr.errors import InputError
from lehr.path import Problem


class Joint(eqx.Module):
    """The log joint density of latent sites (unconstrained) and observed ones, with every constant and factor."""

    sites: Sites

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        return self.sites.log_joint(x)


class Constrain(eqx.Module):
    """Maps a position to the values of the latent and the deterministic sites, by name."""

    sites: Sites

    def __call__(self, x: Float[Array, " dim"]) -> dict[str, Array]:
        return self.sites.values(x)


class Prior(eqx.Module):
    """The prior of the latent sites as a base, over unconstrained positions.

        log base(x) = sum over latent sites of [ log p(s) + log |ds/dx| ],    s the constrained value at x.

    A draw that rounds to the edge of its support has no finite position, and is moved inside. Where a prior has much
    of its mass there, such as Beta(0.01, 0.01), take another base, or float64.

    **Gradient**: of `log_prob` exact; of `sample` that of NumPyro's samplers, which is reparameterised for most.
    """

    sites: Sites

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape `(*shape, dim)`."""
        if shape == ():
            return self.sites.draw(key)
        draws = jax.vmap(self.sites.draw)(jax.random.split(key, math.prod(shape)))
        return draws.reshape(*shape, self.sites.layout.dimension)

    def log_prob(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """The normalised log density at one position."""
        return self.sites.log_prior(x)


def from_numpyro(model: Callable[..., Any], *args: Any, base: Any = "prior", **kwargs: Any) -> Problem:
    """The problem whose evidence is that of a NumPyro model, p(observed sites).

        log target(x) = sum over sites of log p + factors + log |ds/dx|,    Z = p(data) (times the factors).

    Latent sites are unconstrained by NumPyro's own transforms, also where a support depends on other sites. The density
    is zero where an observed number lies outside a bounded support; beyond that NumPyro's validation is not used.

    Arguments:
        model: a NumPyro model, whose observed sites have their values from `obs=` or `numpyro.handlers.condition`.
        *args: its arguments, fixed from now on, as are `**kwargs`. (An argument of the model's that is called `base`
            must be bound before, with `functools.partial`.)
        base: "prior" for the prior of the latent sites (`Prior`), None for a standard normal over unconstrained
            positions, or any base over them.
        **kwargs: its arguments by name.

    Returns the problem; positions hold the latent sites in the order of their names, in JAX's default float type, and
    `unravel` gives the constrained values of latent and deterministic sites by name. A model without latent sites has
    positions of shape (0,), and its likelihood as evidence.

    **Gradient**: exact, in the position.

    Raises `lehr.errors.InputError`, with the name of the site, for latent sites that are discrete, improper, a point
    mass, masked or scaled, for `numpyro.param`, subsampled plates, and models that fail.

    Source: Phan, Pradhan, Jankowiak 2019, "Composable effects for flexible and accelerated probabilistic programming".
    """
    if isinstance(base, str) and base != "prior":
        raise InputError(f'base must be "prior", None or an object with sample and log_prob, but it is "{base}"')
    sites = Sites.of(partial(model, *args, **kwargs))
    base = Prior(sites) if isinstance(base, str) else base_of_dimension(base, sites.layout.dimension)
    return Problem(base, Joint(sites), Constrain(sites))


def simulator(
    model: Callable[..., Any], *args: Any, **kwargs: Any
) -> Callable[[PRNGKeyArray], tuple[Problem, Float[Array, " dim"]]]:
    """Makes problems whose posterior has a known exact sample, on data simulated from the model itself.

        s ~ p(s),   y ~ p(y | s):   s is then a draw from p(s | y).

    From that draw `lehr.anneal_reverse` bounds log Z from above, as `lehr.anneal` does from below.

    Arguments:
        model: as for `from_numpyro`.
        *args: its arguments, as are `**kwargs`. The sites that they observe are simulated; the values given for these
            sites count for nothing, unless the model uses them elsewhere as well.
        **kwargs: its arguments by name.

    Returns `simulate(key)`, which gives the problem with the prior as its base, and the latent draw as a position
    `(dim,)`. The simulated data are leaves of the problem: what is compiled for one serves for all. Where an observed
    site is masked, no other site may depend on the masked values, or the draw is not exact.

    **Gradient**: none is meant.

    Raises `lehr.errors.InputError` as `from_numpyro`, and for what nothing can be drawn from: factors, scaled sites,
    and sites observed inside NumPyro's `scan`.

    Source: Grosse, Ancha, Roy 2016, "Measuring the reliability of MCMC inference with bidirectional Monte Carlo".
    """
    sites = Sites.of(partial(model, *args, **kwargs))
    sites.check_simulation()

    def simulate(key: PRNGKeyArray) -> tuple[Problem, Float[Array, " dim"]]:
        simulated, position = sites.simulate(key)
        return Problem(Prior(simulated), Joint(simulated), Constrain(simulated)), position

    return simulate
