"""A NumPyro model as a function of one unconstrained position, and what such a model must not contain."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lehr.adapters.functions import Layout
from lehr.errors import InputError
from lehr.numerics import is_concrete

try:
    import numpyro
    from numpyro import distributions as dist
    from numpyro.distributions import biject_to, constraints
    from numpyro.distributions.distribution import validation_enabled
    from numpyro.handlers import condition, seed, substitute, trace, uncondition
    from numpyro.infer.util import compute_log_probs
    from numpyro.primitives import Messenger
except ImportError as error:
    raise InputError("from_numpyro needs NumPyro: pip install 'lehr[numpyro]'") from error


class Sites(eqx.Module):
    """A model with its arguments, seen as a function of one unconstrained position. Make one with `of`.

    The arguments are fixed with the model, so that it may look at their values. `data` replaces the observed values;
    being leaves, other data of the same shapes need no new compilation.

    Arguments:
        model: the model with its arguments, called without any.
        layout: where the latent sites lie in a position, by name.
        data: values of observed sites, by name.
    """

    model: Callable[[], Any] = eqx.field(static=True)
    layout: Layout
    data: dict[str, Any]

    @classmethod
    def of(cls, model: Callable[[], Any]) -> "Sites":
        """The sites of a model, traced once and checked. Raises `InputError`, with the name of the site at fault."""

        def latent(drawn: dict[str, Any]) -> dict[str, Array]:
            latent = {
                name: site for name, site in drawn.items() if site["type"] == "sample" and not site["is_observed"]
            }
            return {name: _unconstrained(name, site) for name, site in latent.items()}

        sites = cls(model, Layout.of(_checked(lambda: latent(_checked_trace(model)))), {})
        _checked(lambda: sites.log_joint(jnp.zeros(sites.layout.dimension)))
        return sites

    @property
    def names(self) -> list[str]:
        """The latent sites, in the order of the position."""
        return list(jax.tree.unflatten(self.layout.treedef, self.layout.shapes))

    def log_joint(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """All sites, factors, and log Jacobians; -inf where an observed value is outside a bounded support."""
        log_probs, sites = self._at(x)
        total = sum(log_probs.values(), start=jnp.zeros((), x.dtype))
        inside = [_inside(site) for site in sites.values() if site["type"] == "sample" and site["is_observed"]]
        return jnp.where(jnp.all(jnp.array(inside, bool)), total, -jnp.inf)

    def log_prior(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """Latent sites only, with their log Jacobians."""
        log_probs, _ = self._at(x)
        terms = [log_probs[name] + log_probs[_log_det_name(name)] for name in self.names]
        return sum(terms, start=jnp.zeros((), x.dtype))

    def values(self, x: Float[Array, " dim"]) -> dict[str, Array]:
        """The values of latent and deterministic sites, by name."""
        _, sites = self._at(x)
        names = [name for name, site in sites.items() if name in self.names or site["type"] == "deterministic"]
        return {name: sites[name]["value"] for name in names}

    def draw(self, key: PRNGKeyArray) -> Float[Array, " dim"]:
        """A draw of the latent sites from the prior, unconstrained."""
        return self._position(trace(seed(condition(self.model, data=self.data), key)).get_trace())

    def simulate(self, key: PRNGKeyArray) -> tuple["Sites", Float[Array, " dim"]]:
        """The sites with data drawn from the prior predictive, and the latent draw that goes with them."""
        drawn = trace(seed(uncondition(self.model), key)).get_trace()
        data = {name: site["value"] for name, site in drawn.items() if _was_observed(site)}
        return Sites(self.model, self.layout, data), self._position(drawn)

    def check_simulation(self) -> None:
        """Raises `InputError` for observed sites from which nothing can be drawn."""

        def check() -> None:
            for name, site in _checked_trace(uncondition(self.model)).items():
                if _was_observed(site):
                    _check_observed(name, site)

        _checked(check)

    def _at(self, x: Float[Array, " dim"]) -> tuple[dict[str, Array], dict[str, Any]]:
        """The log probability of each site, and log Jacobian of each latent one, by name; and the trace."""
        values = self.layout.unravel(x)
        model = substitute(condition(self.model, data=self.data), substitute_fn=partial(_constrained, values))
        # NumPyro's checks of supports have tolerances, by which float32 rounding makes the density of one in a hundred
        # draws of a Wishart or a large Dirichlet zero.
        with validation_enabled(False):
            return compute_log_probs(model, (), {}, {})

    def _position(self, drawn: dict[str, Any]) -> Float[Array, " dim"]:
        x, _ = ravel_pytree({name: _unconstrained(name, drawn[name]) for name in self.names})
        x = x.astype(jnp.result_type(float))
        # A draw may round to the edge of its support, where the position is infinite: one uniform float32 number in
        # eight million is 0, and would turn the whole estimate into NaN.
        return jnp.where(jnp.isinf(x), -jnp.sign(x) * math.log(jnp.finfo(x.dtype).tiny), x)


def _constrained(values: dict[str, Array], site: dict[str, Any]) -> Array | None:
    """What takes the place of a latent value: the transformed one, with its log Jacobian as a factor beside it."""
    if site["type"] != "sample" or site["name"] not in values:
        return None
    fn, x = site["fn"], values[site["name"]]
    transform = biject_to(fn.support)
    step = site["infer"].get("_scan_current_index")
    # Inside a scan the value has a leading axis of time.
    if step is not None and x.ndim > len(fn.shape()) + transform.domain.event_dim - transform.codomain.event_dim:
        x = x[step]
    value = transform(x)
    log_det = transform.log_abs_det_jacobian(x, value)
    # With the batch shape of its site, or a plate would repeat it.
    batch_ndim = jnp.ndim(value) - len(fn.event_shape)
    numpyro.factor(_log_det_name(site["name"]), jnp.sum(log_det, axis=tuple(range(batch_ndim, jnp.ndim(log_det)))))
    return value


def _log_det_name(name: str) -> str:
    return f"_{name}_log_det"


def _unconstrained(name: str, site: dict[str, Any]) -> Array:
    try:
        return biject_to(site["fn"].support).inv(site["value"])
    except NotImplementedError as error:
        raise InputError(
            f"NumPyro has no transform for the support of the latent site '{name}': reparameterise the site with "
            "numpyro.handlers.reparam"
        ) from error


def _inside(site: dict[str, Any]) -> Bool[Array, ""] | bool:
    """Whether observed values are in a bounded support: of itself the density of Uniform(0, theta) does not look."""
    parts = list(_parts(site["fn"]))
    if any(isinstance(part, dist.MaskedDistribution | dist.Unit) for part in parts):
        return True
    support = site["fn"].support
    inner = support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    bounded = hasattr(inner, "lower_bound") or hasattr(inner, "upper_bound")
    # Densities on the circle are periodic; counts may be fractional on purpose.
    if not bounded or inner is constraints.circular or inner.is_discrete:
        return True
    return jnp.all(support(site["value"]))


def _checked(function: Callable[[], Any]) -> Any:
    """The shapes of what a function of the model gives; a fault of the model's as `InputError`."""
    try:
        return jax.eval_shape(function)
    except InputError:
        raise
    except Exception as error:
        message = (str(error).strip().splitlines() or ["no message"])[0]
        raise InputError(
            f"JAX cannot trace the model with the given arguments ({type(error).__name__}: {message}): see that it "
            "runs under numpyro.handlers.seed, and that its control flow does not depend on latent values"
        ) from error


def _checked_trace(model: Callable[[], Any]) -> dict[str, Any]:
    return trace(_Check(seed(model, 0))).get_trace()


class _Check(Messenger):
    """Raises `InputError` for a site that has no normalised density, before anything is drawn from it."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["args"][1] not in (None, msg["args"][0]):
            raise InputError(f"the plate '{msg['name']}' is subsampled, and the evidence needs all data: give it all")
        if msg["type"] in ("param", "mutable"):
            raise InputError(
                f"the parameter '{msg['name']}' has no prior: give it one with numpyro.handlers.lift, or make it an "
                "argument of the model"
            )
        if msg["type"] == "sample" and not msg["is_observed"] and not _was_observed(msg):
            _check_latent(msg["name"], msg["fn"], msg["scale"])


def _check_latent(name: str, fn: Any, scale: Any) -> None:
    parts = list(_parts(fn))
    if any(isinstance(part, dist.ImproperUniform) for part in parts):
        raise InputError(
            f"the latent site '{name}' has an improper prior, so that there is no evidence: give it a proper one"
        )
    if any(isinstance(part, dist.Delta) for part in parts):
        raise InputError(f"the latent site '{name}' is a point mass, without a density: use numpyro.deterministic")
    if fn.support.is_discrete:
        raise InputError(
            f"the latent site '{name}' is discrete: observe it, or sum it out, as numpyro.distributions."
            "MixtureSameFamily does for the components of a mixture"
        )
    if any(isinstance(part, dist.MaskedDistribution) and part._mask is not True for part in parts):
        raise InputError(f"the latent site '{name}' is masked, and has no proper prior: mask observed sites only")
    if not _is_one(scale):
        raise InputError(f"the latent site '{name}' is scaled, and its prior not normalised: scale observed sites only")


def _check_observed(name: str, site: dict[str, Any]) -> None:
    """Raises `InputError` if nothing can be drawn from an observed site."""
    if any(isinstance(part, dist.Unit) for part in _parts(site["fn"])):
        raise InputError(f"the factor '{name}' is no distribution to draw from: write it as an observed site")
    if not _is_one(site["scale"]):
        raise InputError(f"the observed site '{name}' is scaled, and cannot be drawn: take the scale away")
    if site.get("_control_flow_done"):
        raise InputError(f"the site '{name}' is observed inside a scan, and cannot be drawn: move it out of it")


def _parts(fn: Any) -> Any:
    """A distribution and those that it is made of."""
    yield fn
    parts = [getattr(fn, name, None) for name in ("base_dist", "component_distribution")]
    for part in (*parts, *(getattr(fn, "component_distributions", None) or ())):
        if isinstance(part, dist.Distribution):
            yield from _parts(part)


def _was_observed(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and bool(site["infer"].get("was_observed"))


def _is_one(scale: Any) -> bool:
    return scale is None or (is_concrete(scale) and bool(np.all(np.asarray(scale) == 1)))
