"""The state of a training run in one file, complete or absent, that only the same run takes up again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.training_loop import State

_NAME = "fit.npz"


class Checkpoint:
    """The file `fit.npz` in a folder, made if it is missing: state, values so far, seconds, and whose they are.

    What identifies a run: its key, its window, the types and shapes of what it trains and of its optimiser's state, the
    numbers it started from, and the values of its objective there.
    """

    def __init__(self, folder: str | Path, key: PRNGKeyArray, window: int, state: State, at_start: np.ndarray):
        self.path, self.at_start, self.like = Path(folder) / _NAME, at_start, state
        self.identity = {
            "key": np.asarray(_data(key)).tolist(),
            "window": window,
            "shapes of params and optimiser": [
                [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)]
                for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            ],
            "numbers in params at the start": hashlib.sha256(
                b"".join(_bytes(leaf) for leaf in jax.tree.leaves(state.trained))
            ).hexdigest(),
        }

    def restore(self, num_iterations: int) -> tuple[State, Float[np.ndarray, " done"], float] | None:
        """State, values and seconds of the run in the file; None if there is no file.

        Raises `InputError` if the file is damaged, or of another or a longer run.
        """
        if not self.path.exists():
            return None
        # Whatever a damaged file makes the readers raise, the remedy is the same. A zip file checks its sums.
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            identity = json.loads(bytes(found["identity"]).decode())
            values, at_start, seconds = found["values"], found["at_start"], float(found["seconds"])
            leaves = [found[f"leaf {i}"] for i in range(len(identity["shapes of params and optimiser"]))]
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(
                    f"cannot read the checkpoint {self.path} ({error.strerror}): mend its permissions, or give another "
                    "folder"
                ) from error
            raise self._damaged(error) from error
        other = [name for name, value in self.identity.items() if identity.get(name) != value]
        # On another kind of machine the same objective rounds otherwise.
        if not other and not np.allclose(at_start, self.at_start, rtol=1e-3, atol=1e-3, equal_nan=True):
            other = ["values of the objective at the start"]
        if other:
            raise InputError(
                f"the checkpoint {self.path} is of another run (not the same {', '.join(other)}): "
                "give another folder, or what that run was given"
            )
        likes, structure = jax.tree.flatten(self.like)
        state = jax.tree.unflatten(structure, [_leaf(raw, like) for raw, like in zip(leaves, likes)])
        if int(state.iteration) != len(values):
            raise self._damaged(ValueError("iterations and values do not match"))
        if len(values) > num_iterations:
            raise InputError(
                f"the checkpoint {self.path} holds {len(values):,} iterations, more than num_iterations = "
                f"{num_iterations:,}: raise it, or give another folder"
            )
        return state, values, seconds

    def save(self, state: State, values: Float[np.ndarray, " done"], seconds: float) -> None:
        """Writes the file beside its place, and renames it."""
        arrays: dict[str, Any] = {
            f"leaf {i}": np.frombuffer(_bytes(leaf), np.uint8) for i, leaf in enumerate(jax.tree.leaves(state))
        }
        arrays |= {"identity": np.frombuffer(json.dumps(self.identity).encode(), np.uint8), "seconds": seconds}
        arrays |= {"values": values, "at_start": self.at_start}
        beside = self.path.with_name(f".{_NAME}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            raise InputError(
                f"cannot write the checkpoint {self.path} ({error.strerror or error}): make room there, mend its "
                "permissions, or give another folder; what was saved before is kept"
            ) from error

    def _damaged(self, error: Exception) -> InputError:
        reason = (str(error).splitlines() or [""])[0][:80] or type(error).__name__
        return InputError(f"the checkpoint {self.path} is damaged ({reason}): delete it to begin anew")


def _data(leaf: Array) -> Array:
    """The numbers of a key; other arrays are their own."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _bytes(leaf: Array) -> bytes:
    # Not the array itself: NumPy cannot write every type that JAX has.
    return np.asarray(_data(leaf)).tobytes()


def _leaf(raw: np.ndarray, like: Array) -> Array:
    data = _data(like)
    value = jnp.asarray(np.frombuffer(raw.tobytes(), data.dtype).reshape(data.shape))
    return value if data is like else jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
