"""The folder of a run: its configuration, metrics and checkpoints, written so that an interruption loses nothing."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import orbax.checkpoint as ocp

from lehr.errors import InputError

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
_SUMS = "SHA256SUMS"


class RunFolder:
    """One run on disk.

        config.json    what decides the numbers
        metrics.jsonl  one line an epoch
        checkpoints/   the newest states, each complete or absent (Orbax renames them into place), with SHA256SUMS
        damaged/       checkpoints whose files have changed

    Every file is written beside its place and renamed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._checkpoints: ocp.CheckpointManager | None = None

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> "RunFolder":
        """A folder for a new run.

        Raises `InputError` if it holds another run (or what is left of one), or cannot hold one.
        """
        if any((path / name).exists() for name in (_CONFIG, _METRICS, _CHECKPOINTS)):
            raise InputError(
                f"{path} already holds a run: go on with it by --resume {path}, or give another folder with --out"
            )
        # Orbax looks for what it has saved by a pattern, in which [ begins a set of characters.
        if "[" in str(path.absolute()):
            raise InputError(
                f"{path} cannot hold a run, because its checkpoints could not be read: use a path without ["
            )
        folder = cls(path)
        with write_faults(path):
            path.mkdir(parents=True, exist_ok=True)
        folder.write_json(_CONFIG, config)
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an existing run. Raises `InputError` if there is none."""
        if not (path / _CONFIG).is_file():
            raise InputError(f"{path} holds no run ({_CONFIG} is missing): give the folder that lehr train wrote")
        return cls(path)

    def config(self) -> dict[str, Any]:
        """The configuration. Raises `InputError` if the file is damaged."""
        try:
            return dict(json.loads((self.path / _CONFIG).read_text()))
        except (ValueError, TypeError) as error:  # of the encoding, of JSON, or of something else than an object
            raise InputError(f"{self.path / _CONFIG} is damaged ({error}): restore it, or train anew") from error

    def write_json(self, name: str, content: Any) -> Path:
        """Writes a JSON file atomically."""
        return self._write(name, to_json(content, indent=2) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics, one dictionary an epoch; a line that is damaged or cut off does not count."""
        path = self.path / _METRICS
        rows = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            # A flipped byte may leave JSON that is no row.
            with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):
                row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
                _ = int(row["epoch"]), float(row["train_bound"]), float(row["test_bound"])
                rows.append(row)
        return rows

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one epoch's line, on disk before any checkpoint of that epoch."""
        with write_faults(self.path), (self.path / _METRICS).open("a") as file:
            file.write(to_json(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rewind_metrics(self, epoch: int) -> list[dict[str, Any]]:
        """Drops the lines after `epoch`, which will be computed again; returns the rest."""
        rows = [row for row in self.metrics() if row["epoch"] <= epoch]
        self._write(_METRICS, "".join(to_json(row) + "\n" for row in rows))
        return rows

    def save(self, epoch: int, state: Any) -> None:
        """Writes a checkpoint of the state after `epoch` epochs, and keeps the newest three."""
        arrays = _named_arrays(state)
        # TensorStore reports a full disk as a ValueError, after pages of tracebacks from its threads: look first.
        needed = 2 * sum(array.nbytes for array in arrays.values()) + 2**20
        with write_faults(self.path, Exception), _quiet_absl():
            if shutil.disk_usage(self.path).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._manager().latest_step() != epoch:
                self._manager().save(epoch, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays)))
                sums = _sha256sums(self.path / _CHECKPOINTS / str(epoch))
                self._write(f"{_CHECKPOINTS}/{epoch}/{_SUMS}", sums)

    def is_fresh(self) -> bool:
        """Whether nothing has been saved yet: the run was stopped before its first epoch."""
        return not ((self.path / _METRICS).exists() or (self.path / "damaged").exists() or self._manager().all_steps())

    def restore(self, like: Any, say: Callable[[str], None]) -> Any:
        """The newest sound checkpoint, in the structure of `like`; `say` hears of each damaged one.

        Raises `InputError` if there is none.
        """
        arrays = _named_arrays(like)
        for epoch in sorted(self._manager().all_steps(), reverse=True):
            # Whatever a damaged file makes the reader raise, the remedy is the checkpoint before it.
            try:
                self._check_files(epoch)
                with _quiet_absl():
                    found = self._manager().restore(
                        epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays))
                    )
            except Exception as error:
                fault = f"the checkpoint of epoch {epoch} is damaged ({_reason(error)})"
                say(f"{fault}: moved to {self._move_aside(epoch)}, going on with the one before it")
                continue
            static = eqx.filter(like, eqx.is_array, inverse=True)
            structure = jax.tree.structure(eqx.filter(like, eqx.is_array))
            return eqx.combine(jax.tree.unflatten(structure, [found["state"][name] for name in arrays]), static)
        raise InputError(f"{self.path} has no sound checkpoint: train anew, with another folder as --out")

    def close(self) -> None:
        """Releases the checkpoint manager."""
        if self._checkpoints is not None:
            self._checkpoints.close()
            self._checkpoints = None

    def _check_files(self, epoch: int) -> None:
        """Raises `ValueError` if a file is not what was written.

        TensorStore does not notice each flipped bit, and Orbax prints pages of tracebacks for those that it notices.
        """
        folder = self.path / _CHECKPOINTS / str(epoch)
        # Without the sums the run was stopped in the instant before they were written.
        if (folder / _SUMS).exists() and (folder / _SUMS).read_bytes() != _sha256sums(folder).encode():
            raise ValueError(f"its files do not match their {_SUMS}")

    def _move_aside(self, epoch: int) -> Path:
        """Moves a damaged checkpoint, so that its epoch can be saved again; nothing is deleted."""
        self.close()
        names = (str(epoch), *(f"{epoch}-{number}" for number in range(2, 10_000)))
        target = next(path for name in names if not (path := self.path / "damaged" / name).exists())
        with write_faults(self.path):
            target.parent.mkdir(exist_ok=True)
            (self.path / _CHECKPOINTS / str(epoch)).rename(target)
        return target

    def _manager(self) -> ocp.CheckpointManager:
        if self._checkpoints is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=False)
            with write_faults(self.path), _quiet_absl():
                self._checkpoints = ocp.CheckpointManager((self.path / _CHECKPOINTS).absolute(), options=options)
        return self._checkpoints

    def _write(self, name: str, text: str) -> Path:
        path = self.path / name
        beside = path.with_name(f".{path.name}.partial")
        with write_faults(self.path):
            with beside.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        return path


def _named_arrays(state: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(state, eqx.is_array))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _sha256sums(folder: Path) -> str:
    """A line for each file, as `sha256sum` writes and checks them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _SUMS not in path.name)
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files)


def to_json(content: Any, *, indent: int | None = None) -> str:
    """Strict JSON: what is not finite (the error of a single image) becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent, allow_nan=False)


@contextlib.contextmanager
def write_faults(path: Path, kinds: type[Exception] = OSError) -> Iterator[None]:
    """What goes wrong in writing to the folder `path` becomes an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(
            f"cannot write to {path} ({_reason(error)}): make room there, mend its permissions, or use another folder; "
            "what was saved before is kept"
        ) from error


def _reason(error: Exception) -> str:
    """In a few words; TensorStore hides the system's error number in a long message."""
    code = getattr(error, "errno", None) or next(iter(re.findall(r"os_error_code='(\d+)'", str(error))), None)
    lines = str(error).strip().splitlines()
    return os.strerror(int(code)) if code else lines[0][:80] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Orbax logs the traceback of each fault before it raises it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
