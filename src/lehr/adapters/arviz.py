"""The posterior draws of an evidence estimate, for ArviZ."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lehr.errors import InputError
from lehr.report import Evidence
from lehr.smc import systematic


def to_inference_data(evidence: Evidence, *, seed: int = 0) -> Any:
    """The draws as an `arviz.InferenceData` whose chains are the populations and whose draws have equal weights.

    Every population is resampled (systematically) by its own weights, so that `arviz.summary` and the like may be used
    as they are. Populations count alike, whatever evidence each found: the mean over chains differs from that of the
    pooled weighted draws where they disagree, and R-hat shows it. Copies of one particle stand beside each other, so
    that the effective sample size of ArviZ, which looks for correlation along a chain, is not deceived by them.

        posterior      the leaves of `evidence.draws`: named as there if it is a dict (nested names joined by dots), "x"
                       if it is an array
        sample_stats   `particle`, the index of the particle that a draw copies, and `log_weight`, what its log weight
                       was before resampling: the weighted draws can be had back
        attrs          log_evidence, standard_error, bracket_low, bracket_high (nats), converged (0 or 1), base

    Arguments:
        evidence: the result of an estimation.
        seed: of the resampling.

    Raises `lehr.errors.InputError` if ArviZ is not installed, or a population has no weight.

    Source: Kumar, Carroll, Hartikainen, Martin 2019 (ArviZ).
    """
    try:
        arviz: Any = importlib.import_module("arviz")
    except ImportError as error:
        raise InputError("to_arviz needs ArviZ: pip install 'lehr[arviz]'") from error
    chosen = _resampled(evidence, seed)

    def take(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return np.take_along_axis(leaf, chosen.reshape(chosen.shape + (1,) * (leaf.ndim - 2)), axis=1)

    groups = {
        "posterior": {name: take(leaf) for name, leaf in _named(evidence.draws).items()},
        "sample_stats": {"particle": chosen, "log_weight": take(evidence.log_weights)},
    }
    # The coming ArviZ 1 returns an xarray.DataTree, and takes the groups as one argument.
    data = arviz.from_dict(**groups) if hasattr(arviz, "InferenceData") else arviz.from_dict(groups)
    low, high = evidence.bracket
    attrs = {
        "inference_library": "lehr",
        "log_evidence": float(evidence.log_evidence),
        "standard_error": float(evidence.standard_error),
        "bracket_low": low,
        "bracket_high": high,
        # NetCDF has no booleans.
        "converged": int(evidence.converged),
        "base": evidence.base,
    }
    data.attrs.update(attrs)
    data["posterior"].attrs.update(attrs)
    return data


def _resampled(evidence: Evidence, seed: int) -> np.ndarray:
    """`(R, N)` indices of particles, each population by its own weights."""
    weights = jax.nn.softmax(evidence.log_weights, axis=1)
    bad = np.flatnonzero(~np.isfinite(np.asarray(weights)).all(axis=1))
    if len(bad):
        raise InputError(
            f"population {bad[0]} has no finite weight to resample by: take the draws of the others from "
            "evidence.positions and evidence.log_weights"
        )
    keys = jax.random.split(jax.random.key(seed), weights.shape[0])
    return np.asarray(jax.vmap(systematic)(keys, weights), dtype=np.int64)


def _named(draws: Any) -> dict[str, Any]:
    """The leaves of a pytree by their names; those of a list or a tuple are x.0, x.1, ..."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(draws)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {
        "x" if not name else f"x.{name}" if name[0].isdigit() else name: jnp.asarray(leaf)
        for name, (_, leaf) in zip(names, leaves)
    }
