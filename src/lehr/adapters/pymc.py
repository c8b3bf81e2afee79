"""A PyMC model as a problem, through PyMC's own compilation of its log density to JAX."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lehr.adapters.functions import Layout, base_of_dimension
from lehr.errors import InputError
from lehr.path import Problem

# Importing PyMC's JAX backend sets float64 for the whole process, and a hundred host devices: neither is its to choose.
_x64, _flags = jax.config.values["jax_enable_x64"], os.environ.get("XLA_FLAGS")
try:
    import pymc
    from pymc.sampling.jax import get_jaxified_graph
    from pymc.util import get_default_varnames
    from pymc.variational.minibatch_rv import MinibatchRandomVariable
except ImportError as error:
    raise InputError("from_pymc needs PyMC: pip install 'lehr[pymc]'") from error
finally:
    jax.config.update("jax_enable_x64", _x64)
    if _flags is None:
        os.environ.pop("XLA_FLAGS", None)
    else:
        os.environ["XLA_FLAGS"] = _flags

_FLAT: Any = (pymc.Flat.rv_type, pymc.HalfFlat.rv_type)


class Graph(eqx.Module):
    """A PyTensor graph as a JAX function of one unconstrained position.

    Arguments:
        function: the graph, from the value variables to a list of arrays.
        layout: where the value variables lie in a position, in their order in the model.
    """

    function: Callable[..., Any] = eqx.field(static=True)
    layout: Layout

    def outputs(self, x: Float[Array, " dim"]) -> Any:
        """The outputs of the graph, as JAX computes them in the dtype of `x`."""
        with warnings.catch_warnings():
            # Casts that PyTensor has put into the graph are cut to float32 where JAX has no float64, as is meant.
            warnings.filterwarnings("ignore", "Explicitly requested dtype")
            return self.function(*self.layout.split(x))


class Joint(eqx.Module):
    """The log joint density of the unconstrained free variables and the observed ones, with every constant."""

    graph: Graph

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        return jnp.asarray(self.graph.outputs(x)[0], x.dtype)


class Constrain(eqx.Module):
    """Maps a position to the values of free variables and deterministics, by name."""

    names: tuple[str, ...] = eqx.field(static=True)
    graph: Graph

    def __call__(self, x: Float[Array, " dim"]) -> dict[str, Array]:
        return dict(zip(self.names, map(jnp.asarray, self.graph.outputs(x))))


def from_pymc(model: Any, *, base: Any = None) -> Problem:
    """The problem whose evidence is that of a PyMC model, p(observed variables).

        log target(x) = model.logp at the value variables x, with potentials and log Jacobians.

    Everything is computed in the dtype of the position, which is JAX's default: float32, unless `jax_enable_x64` is
    set. (PyMC's own default is float64.) Data are those at the time of the call: a later `pymc.set_data` is not seen.

    Arguments:
        model: a `pymc.Model`.
        base: a base over unconstrained positions `(dim,)`; a standard normal by default. (PyMC's prior cannot be
            sampled inside JAX.)

    Returns the problem; positions hold the value variables in the order of `model.value_vars`, and `unravel` gives the
    constrained free variables and the deterministics by name.

    **Gradient**: exact, in the position.

    Raises `lehr.errors.InputError`, with the name of the variable, for free variables that are discrete or have a flat
    prior, for minibatches, and for operations that PyMC cannot translate to JAX.

    Source: Abril-Pla et al. 2023, "PyMC: a modern and comprehensive probabilistic programming framework in Python".
    """
    if not isinstance(model, pymc.Model):
        raise InputError(f"from_pymc takes a pymc.Model, not a {type(model).__name__}")
    _check(model)
    layout = Layout.of(_example(model))
    try:
        joint = Joint(Graph(_jax(model, [model.logp()]), layout))
        named = get_default_varnames(model.unobserved_value_vars, include_transformed=False)
        constrain = Constrain(tuple(variable.name for variable in named), Graph(_jax(model, named), layout))
        jax.eval_shape(joint, jnp.zeros(layout.dimension))
    except Exception as error:
        message = (str(error).strip().splitlines() or ["no message"])[0]
        raise InputError(
            f"PyMC cannot translate the model to JAX ({type(error).__name__}: {message}): write it with others"
        ) from error
    return Problem(base_of_dimension(base, layout.dimension), joint, constrain)


def _jax(model: "pymc.Model", outputs: list[Any]) -> Callable[..., Any]:
    return get_jaxified_graph(inputs=model.value_vars, outputs=outputs)


def _example(model: "pymc.Model") -> list[Any]:
    """Something with the shape of each value variable."""
    shapes = [variable.type.shape for variable in model.value_vars]
    if all(size is not None for shape in shapes for size in shape):
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    # The shapes depend on data: PyMC has to compute them.
    point = model.initial_point()
    return [point[variable.name] for variable in model.value_vars]


def _check(model: "pymc.Model") -> None:
    discrete = {model.values_to_rvs[value].name for value in model.discrete_value_vars}
    for variable in model.free_RVs:
        if variable.name in discrete:
            raise InputError(
                f"the free variable '{variable.name}' is discrete: observe it, or sum it out, as pymc.Mixture does for "
                "the components of a mixture"
            )
        if isinstance(variable.owner.op, _FLAT):
            raise InputError(
                f"the free variable '{variable.name}' has a flat prior, and leaves no evidence: give it a proper one"
            )
    for variable in model.observed_RVs:
        if isinstance(variable.owner.op, MinibatchRandomVariable):
            raise InputError(
                f"the observed variable '{variable.name}' is a minibatch, and the evidence needs all data: observe it "
                "without pymc.Minibatch and total_size"
            )
