"""Why lehr solves no batched triangular system by LAPACK: two independent ones may wait for each other for ever.

`python -m benchmarks.deadlock` runs a program of six batched triangular solves two hundred times in a process of its
own, and says whether it ended within a minute (it takes seconds). Measured with jaxlib 0.10.2 on 2 cores: it does not.
Each solve runs on a thread of XLA's pool, and waits there for parts of its work that it has queued in the same pool.
"""

import subprocess
import sys

_LIMIT_S = 60
_PROGRAM = """
import jax, jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

scale = jnp.array([[[1.0, 0.0], [0.5, 2.0]]] * 2)
sides = [jnp.full((2, 2, 50_000), float(i)) for i in range(6)]
solve = jax.jit(lambda scale, sides: [solve_triangular(scale, side, lower=True) for side in sides])
for _ in range(200):
    jax.block_until_ready(solve(scale, sides))
"""

if __name__ == "__main__":
    try:
        subprocess.run([sys.executable, "-c", _PROGRAM], timeout=_LIMIT_S, check=True)
        print("it ended: this jaxlib does not deadlock on this machine")
    except subprocess.TimeoutExpired:
        print(f"it did not end within {_LIMIT_S} s: this jaxlib deadlocks on this machine")
        sys.exit(1)
