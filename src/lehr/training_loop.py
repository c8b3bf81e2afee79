"""One compiled loop of gradient steps, for any number of iterations, and what it keeps beside the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from paramax import NonTrainable

#: iterations in one call of the loop, at most
LONGEST_BLOCK = 1000
#: skipped iterations in a row after which a run stops
MOST_SKIPPED = 20
#: a value has fallen that is so many standard deviations of its own, and so many nats, below the best smoothed one
_FAR, _FAR_NATS = 5.0, 1.0


class Task(NamedTuple):
    """What is maximised and how; objects without arrays are what the loop is compiled for."""

    objective: Callable[[Any, Array], Any]
    optimiser: optax.GradientTransformation
    has_aux: bool
    rest: Any
    static: Any

    def value(self, trained: Any, key: Array) -> Array:
        """The objective."""
        found = self.objective(eqx.combine(trained, self.rest), key)
        return found[0] if self.has_aux else found


class Rules(NamedTuple):
    """Numbers that decide how the iterates are judged; arrays, so that others are not compiled for."""

    window: Int[Array, ""]
    stop_when_diverged: Bool[Array, ""]


class State(eqx.Module):
    """All that a run needs to go on; the random keys derive from the key of the run and `iteration`.

    `mean` and `variance` are those of the smoothed values so far, the same with `best_` at the best iterate. `fallen`
    counts values in a row that are far below the best mean.
    """

    iteration: Int[Array, ""]
    trained: Any
    optimiser: Any
    mean: Float[Array, ""]
    variance: Float[Array, ""]
    best: Any
    best_iteration: Int[Array, ""]
    best_mean: Float[Array, ""]
    best_variance: Float[Array, ""]
    num_skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    fallen: Int[Array, ""]


def split(params: Any) -> tuple[Any, Any]:
    """What is trained, as arrays of a fixed type, and the rest."""
    trained, rest = eqx.partition(params, eqx.is_inexact_array, is_leaf=lambda node: isinstance(node, NonTrainable))
    # Without the weak type of a Python number: it would change after a step.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), trained), rest


def start(trained: Any, optimiser_state: Any, values: Float[Array, " num_evaluations"]) -> State:
    """The state before the first iteration; the start is the best so far, with the mean of values there."""
    mean, variance = jnp.mean(values), jnp.var(values)
    none = jnp.zeros((), jnp.int32)
    return State(
        iteration=none,
        trained=trained,
        optimiser=optimiser_state,
        mean=jnp.zeros_like(mean),
        variance=jnp.zeros_like(variance),
        best=trained,
        best_iteration=none,
        # Where it is infinite for some keys any other iterate is better.
        best_mean=jnp.where(jnp.isfinite(mean), mean, -jnp.inf),
        best_variance=jnp.where(jnp.isfinite(variance), variance, 0),
        num_skipped=none,
        skipped_in_a_row=none,
        fallen=none,
    )


@eqx.filter_jit
def evaluate(task: Task, trained: Any, keys: Array) -> Float[Array, " num_evaluations"]:
    """The objective for each key, one after the other: it takes no more memory than an iteration."""
    return jax.lax.map(lambda key: task.value(trained, key), keys)


def goes_on(state: State, rules: Rules) -> Bool[Array, ""]:
    """Whether no reason to stop early has come up."""
    diverged = rules.stop_when_diverged & (state.fallen >= rules.window)
    return (state.skipped_in_a_row < MOST_SKIPPED) & ~diverged


@eqx.filter_jit
def block(
    task: Task, key: PRNGKeyArray, rules: Rules, state: State, stop: Int[Array, ""]
) -> tuple[State, Float[Array, " block"]]:
    """Iterations up to `stop`, or until there is a reason to stop; and their values, in front of an array of zeros.

    A loop and not a scan: one program serves every number of iterations, so that where a run is cut into blocks, by
    its speed or by an interruption, cannot change how its numbers round.
    """
    first = state.iteration

    def body(carry):
        state, values = carry
        new, value = _step(task, key, rules, state)
        return new, values.at[state.iteration - first].set(value)

    def condition(carry):
        state, _ = carry
        return (state.iteration < stop) & goes_on(state, rules)

    return jax.lax.while_loop(condition, body, (state, jnp.zeros(LONGEST_BLOCK, state.mean.dtype)))


def _step(task: Task, key: PRNGKeyArray, rules: Rules, state: State) -> tuple[State, Array]:
    """One iteration, and the value of the objective before it."""
    key_now = jax.random.fold_in(key, state.iteration)
    loss, gradient = jax.value_and_grad(lambda trained: -task.value(trained, key_now))(state.trained)
    full_state = eqx.combine(state.optimiser, task.static)
    optimiser = optax.with_extra_args_support(task.optimiser)
    updates, new_optimiser = optimiser.update(gradient, full_state, state.trained, value=loss)
    new_trained = optax.apply_updates(state.trained, updates)
    new_optimiser = jax.tree.map(
        lambda new, old: new.astype(old.dtype), eqx.filter(new_optimiser, eqx.is_array), state.optimiser
    )
    finite = _all_finite((loss, gradient, new_trained)) & _stays_finite(state.optimiser, new_optimiser)
    value = -loss
    mean, variance = _smoothed(state, rules, value)
    num_sound = state.iteration + 1 - state.num_skipped
    better = finite & (num_sound >= rules.window) & (mean > state.best_mean)
    far = jnp.maximum(_FAR * jnp.sqrt(state.best_variance), _FAR_NATS)
    fallen = jnp.where(value < state.best_mean - far, state.fallen + 1, 0)
    new = State(
        iteration=state.iteration + 1,
        trained=_where(finite, new_trained, state.trained),
        optimiser=_where(finite, new_optimiser, state.optimiser),
        mean=jnp.where(finite, mean, state.mean),
        variance=jnp.where(finite, variance, state.variance),
        # The iterate that gave the value, not the one after it.
        best=_where(better, state.trained, state.best),
        best_iteration=jnp.where(better, state.iteration, state.best_iteration),
        best_mean=jnp.where(better, mean, state.best_mean),
        best_variance=jnp.where(better, variance, state.best_variance),
        num_skipped=state.num_skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        fallen=jnp.where(finite, fallen, state.fallen),
    )
    return new, value


def _smoothed(state: State, rules: Rules, value: Array) -> tuple[Array, Array]:
    """Mean and variance with one more value: the plain ones at first, then with weights that decay exponentially.

    At a rate of 2 / (window + 1) the mean has the variance of a plain mean of `window` values.
    """
    count = state.iteration + 1 - state.num_skipped
    rate = jnp.maximum(1 / count, 2 / (rules.window + 1)).astype(value.dtype)
    step = value - state.mean
    return state.mean + rate * step, (1 - rate) * (state.variance + rate * step**2)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _all_finite(tree: Any) -> Array:
    return jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _stays_finite(old: Any, new: Any) -> Array:
    """Whether nothing has become infinite or NaN (some optimisers start with an infinity)."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new))
    sound = [jnp.all(jnp.isfinite(b) | ~jnp.isfinite(a)) for a, b in pairs if eqx.is_inexact_array(b)]
    return jnp.array([True, *sound]).all()
