"""A path as tuning leaves it: temperatures, step sizes and scales, respaced after each run by what that run saw."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lehr.annealer import Annealer
from lehr.kernels import Hamiltonian, Metropolis
from lehr.path import Schedule
from lehr.pilot import Pilot
from lehr.smc import PathStatistics

#: mean acceptance that step sizes are tuned to
TARGET_ACCEPTANCE = 0.8


@dataclasses.dataclass(frozen=True)
class TunedPath:
    """Temperatures, and step size and scales at each, in float64 on the host.

    `betas` `(K + 1,)`, `log_step_size` `(K,)` in units of the scales, `log_scale` `(K, dim)`, and `num_leapfrog`.
    """

    betas: np.ndarray
    log_step_size: np.ndarray
    log_scale: np.ndarray
    num_leapfrog: int

    @classmethod
    def from_pilot(cls, run: Pilot, *, max_steps: int = 512) -> "TunedPath":
        """The path of a pilot, with the number of steps and leapfrogs that its barrier and step sizes ask for.

        With K steps of equal discrepancy and a barrier B, each step's weights have relative variance (B / K)^2, in all
        B^2 / K a particle: steps and particles reduce the variance alike, and cost alike. Tails that the base hardly
        reaches are found by moves, not by draws of the base, and so K = 8 B^2, at least 16, with as few particles as
        resampling allows: with half the steps and twice the particles a heavy-tailed target came out low by 0.3 errors.
        The leapfrogs make a trajectory of about a quarter of a period of a standard Gaussian, pi / 2.
        """
        size = int(run.num_steps)
        barrier = np.concatenate([[0.0], np.asarray(run.barrier[:size], np.float64)])
        log_step_size = np.asarray(run.log_step_size[:size], np.float64)
        num_steps = _rounded_up(int(np.clip(math.ceil(8 * barrier[-1] ** 2), 16, max_steps)))
        num_leapfrog = int(np.clip(round(math.pi / 2 / math.exp(np.median(log_step_size))), 1, 10))
        betas = np.concatenate([[0.0], np.asarray(run.betas[:size], np.float64)])
        log_scale = np.asarray(run.log_scale[:size], np.float64)
        return _spaced(betas, barrier, log_step_size, log_scale, num_steps, num_leapfrog)

    def after(self, seen: PathStatistics) -> "TunedPath":
        """After a run of several populations: equal steps of the barrier it saw, its scales, and its acceptance."""
        mean = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).mean(axis=0), seen)
        barrier = np.concatenate([[0.0], np.cumsum(np.sqrt(np.maximum(mean.discrepancy, 1e-12)))])
        log_step_size = self.log_step_size + mean.acceptance - TARGET_ACCEPTANCE
        log_scale = np.log(np.maximum(mean.scale, 1e-12))
        return _spaced(self.betas, barrier, log_step_size, log_scale, self.num_steps, self.num_leapfrog)

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.log_step_size)

    @property
    def num_gradients(self) -> int:
        """Gradients of the target that one particle takes along the path."""
        return self.num_steps * self.num_leapfrog + 1

    def annealer(self, base: Any, dtype: Any) -> Annealer:
        """The annealer with HMC moves along this path."""
        increments = np.maximum(np.diff(self.betas), 1e-30)
        move = Hamiltonian(
            jnp.asarray(np.exp(self.log_step_size), dtype)[:, None],
            momentum_scale=jnp.asarray(np.exp(-self.log_scale), dtype),
            num_leapfrog=self.num_leapfrog,
        )
        return Annealer(base, Schedule(jnp.asarray(np.log(increments), dtype)), Metropolis(move))


def _rounded_up(num_steps: int) -> int:
    """To one of 8, 10, 12, 14, 16, 20, 24, ...: what is compiled for one run then often serves another."""
    step = 2 ** max((num_steps - 1).bit_length() - 3, 0)
    return -(-num_steps // step) * step


def _spaced(
    betas: np.ndarray,
    barrier: np.ndarray,
    log_step_size: np.ndarray,
    log_scale: np.ndarray,
    num_steps: int,
    num_leapfrog: int,
) -> TunedPath:
    """Interpolates all along the barrier, at `num_steps` equal steps of it.

    Source: Syed, Bouchard-Cote, Chern, Doucet 2024, section 4.
    """
    # A straight floor under the barrier keeps the spacing bounded where the run saw (almost) no discrepancy.
    barrier = barrier + 0.05 * max(barrier[-1], 1e-6) * betas
    at = np.linspace(0, barrier[-1], num_steps + 1)
    new = np.interp(at, barrier, betas)
    new[0], new[-1] = 0, 1

    def along(values: np.ndarray) -> np.ndarray:
        return np.interp(at[1:], barrier[1:], values)

    return TunedPath(
        new, along(log_step_size), np.stack([along(column) for column in log_scale.T], axis=1), num_leapfrog
    )
