"""Exact derivatives of finite chains: by quadrature of the kernel on a line, and by powers of it on finite spaces."""

import numpy as np


def on_a_line(log_density, f, scale: float, num_steps: int, burn_in: int, x0: float, half_width: float = 9.0) -> float:
    """The mean over steps burn_in + 1 ... num_steps of E[f(X_i)], for a random walk of this scale from x0 on a line.

    u_i(x) = E[f(X_i) | X_0 = x] is found backwards: u_{i+1} = P u_i, with the kernel P on a grid.
    """
    x = np.linspace(x0 - half_width, x0 + half_width, 1201)
    step = x[1] - x[0]
    log_p = log_density(x)
    q = np.exp(-(((x[:, None] - x) / scale) ** 2) / 2) / (scale * np.sqrt(2 * np.pi)) * step
    moves = q * np.exp(np.minimum(log_p - log_p[:, None], 0))
    kernel = moves + np.diag(1 - moves.sum(axis=1))
    u, total = f(x), 0.0
    for i in range(1, num_steps + 1):
        u = kernel @ u
        total += u[len(x) // 2] * (i > burn_in)
    return total / (num_steps - burn_in)


def on_states(log_p, proposal, f, num_steps: int, burn_in: int, start: int) -> np.ndarray:
    """The same on a finite space: log_p of each state, proposal probabilities (symmetric), f `(states, m)`."""
    moves = proposal * np.exp(np.minimum(log_p - log_p[:, None], 0))
    kernel = moves + np.diag(1 - moves.sum(axis=1))
    law, total = np.eye(len(log_p))[start], 0
    for i in range(1, num_steps + 1):
        law = law @ kernel
        if i > burn_in:
            total = total + law @ f
    return total / (num_steps - burn_in)


def derivative(of, at: float, step: float = 1e-4):
    """By central differences, in float64."""
    return (of(at + step) - of(at - step)) / (2 * step)
