"""Training: one epoch is one compiled scan over batches, with the data on the device."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from lehr import objectives
from lehr.annealer import Annealer
from lehr.errors import InputError
from lehr.kernels import Hamiltonian, Metropolis
from lehr.path import Schedule
from lehr.tuning import adapt_step_size
from lehr.vae.data import binarise
from lehr.vae.model import VAE
from lehr.vae.setting import Setting


class Trainable(eqx.Module):
    """The model, and the sampler that may train with it."""

    model: VAE
    schedule: Schedule
    kernel: Any


class TrainState(eqx.Module):
    """All that a run needs to go on: `epoch` epochs are done; random keys derive from the seed and the epoch."""

    trainable: Trainable
    optimiser: Any
    epoch: Array


def initial_state(setting: Setting, train_images: Float[np.ndarray, "n pixels"]) -> TrainState:
    """The state before the first epoch.

    Raises `InputError` if a batch is larger than the data.
    """
    if setting.batch_size > len(train_images):
        raise InputError(
            f"a batch of {setting.batch_size} is larger than the {len(train_images)} training images: "
            f"give a batch_size of at most {len(train_images)}"
        )
    model = VAE(
        _keys(setting)["model"], train_images.mean(axis=0), latent_dim=setting.latent_dim, hidden=setting.hidden
    )
    shape_per_step = (setting.num_steps, 1)
    if setting.objective == "aiwae":
        kernel = Metropolis(Hamiltonian(jnp.full(shape_per_step, setting.step_size), num_leapfrog=setting.num_leapfrog))
    elif setting.objective == "davi-adapt":
        # One size per step and one scale per dimension: their quotient is what moves a particle.
        kernel = Hamiltonian(
            jnp.full(shape_per_step, setting.step_size),
            jnp.full(shape_per_step, setting.persistence) if setting.persistence else 0.0,
            jnp.ones(setting.latent_dim),
        )
    else:
        kernel = Hamiltonian(setting.step_size, setting.persistence)
    trainable = Trainable(model, Schedule.linear(setting.num_steps), kernel)
    optimiser = _optimiser(setting, len(train_images))
    return TrainState(trainable, optimiser.init(_split_trained(setting, trainable)[0]), jnp.zeros((), jnp.int32))


def image_bound(
    setting: Setting, trainable: Trainable, image: Float[Array, " pixels"], key: PRNGKeyArray
) -> tuple[Float[Array, ""], Array | None]:
    """The objective for one image, and the acceptance by temperature where there is one."""
    base, joint = trainable.model.posterior(image), trainable.model.joint(image)
    annealer = Annealer(base, trainable.schedule, trainable.kernel)
    particles = setting.num_particles
    match setting.objective:
        case "elbo":
            return objectives.elbo(base, joint, key, num_samples=particles), None
        case "iwae":
            return objectives.iwae(base, joint, key, num_samples=particles), None
        case "davi" | "davi-adapt":
            return objectives.davi(annealer, joint, key, num_particles=particles), None
        case "aiwae":
            bound, weighted = objectives.aiwae(annealer, joint, key, num_particles=particles)
            return bound, weighted.acceptance
        case _:
            raise InputError(f"no objective is called {setting.objective!r}")


def learning_rates(epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """1e-3 * 10^(-i/7) for 3^i passes, i = 0..7 (3,280 in all), compressed in proportion to `epochs`.

    Source: Burda, Grosse, Salakhutdinov 2016, section 5.
    """
    ends = np.cumsum(3.0 ** np.arange(8))
    boundaries = np.round(ends[:-1] / ends[-1] * epochs * steps_per_epoch)

    def learning_rate(step):
        stage = jnp.sum(step >= jnp.asarray(boundaries))
        return 1e-3 * 10 ** (-stage / 7)

    return learning_rate


def make_epoch(setting: Setting, num_images: int) -> Callable[[TrainState, Array], tuple[TrainState, Array]]:
    """A compiled function `(state, images) -> (state, bounds)`: one pass over the images, freshly binarised.

    `bounds` has the mean objective of each batch, in nats per image. From the first batch whose bound or gradient is
    not finite no work is done, the bounds are NaN, and the state is not to be used. Images that do not fill a batch
    wait for another epoch's order.
    """
    steps = num_images // setting.batch_size
    optimiser = _optimiser(setting, num_images)

    def batch_loss(trained: Any, rest: Any, images: Array, key: PRNGKeyArray) -> tuple[Array, Any]:
        trainable = eqx.combine(trained, rest)
        keys = jax.random.split(key, len(images))
        bounds, acceptance = jax.vmap(lambda image, key: image_bound(setting, trainable, image, key))(images, keys)
        return -jnp.mean(bounds), acceptance

    def update(state: TrainState, images: Array, key: PRNGKeyArray) -> tuple[TrainState, Array]:
        trained, rest = _split_trained(setting, state.trainable)
        (loss, acceptance), gradient = jax.value_and_grad(batch_loss, has_aux=True)(trained, rest, images, key)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, trained)
        trainable = eqx.combine(eqx.apply_updates(trained, updates), rest)
        if acceptance is not None:
            adapted = adapt_step_size(trainable.kernel, acceptance.mean(axis=0), target=0.6, rate=0.05)
            trainable = eqx.tree_at(lambda t: t.kernel, trainable, adapted)
        finite = jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradient))]).all()
        return TrainState(trainable, optimiser_state, state.epoch), jnp.where(finite, -loss, jnp.nan)

    @eqx.filter_jit
    def epoch(state: TrainState, images: Array) -> tuple[TrainState, Array]:
        key_order, key_batches = jax.random.split(jax.random.fold_in(_keys(setting)["epochs"], state.epoch))
        order = jax.random.permutation(key_order, num_images)[: steps * setting.batch_size]
        arrays, static = eqx.partition(state, eqx.is_array)

        def step(carry, inputs):
            rows, key = inputs

            def go_on(arrays):
                key_binarise, key_bound = jax.random.split(key)
                batch = binarise(key_binarise, images[rows])
                new, bound = update(eqx.combine(arrays, static), batch, key_bound)
                return eqx.filter(new, eqx.is_array), bound

            arrays, sound = carry
            arrays, bound = jax.lax.cond(sound, go_on, lambda arrays: (arrays, jnp.full((), jnp.nan)), arrays)
            return (arrays, jnp.isfinite(bound)), bound

        batches = order.reshape(steps, setting.batch_size), jax.random.split(key_batches, steps)
        (arrays, _), bounds = jax.lax.scan(step, (arrays, jnp.ones((), bool)), batches)
        state = eqx.combine(arrays, static)
        return eqx.tree_at(lambda s: s.epoch, state, state.epoch + 1), bounds

    return epoch


def make_test_bound(setting: Setting) -> Callable[[Trainable, Array], Array]:
    """A compiled function `(trainable, images) -> ()`: the mean objective on binarised images, with the same keys."""

    @eqx.filter_jit
    def test_bound(trainable: Trainable, images: Array) -> Array:
        keys = jax.random.split(_keys(setting)["test"], len(images))
        one = lambda pair: image_bound(setting, trainable, *pair)[0]  # noqa: E731
        return jnp.mean(jax.lax.map(one, (images, keys), batch_size=min(128, len(images))))

    return test_bound


def _optimiser(setting: Setting, num_images: int) -> optax.GradientTransformation:
    return optax.adam(learning_rates(setting.epochs, num_images // setting.batch_size), eps=1e-4)


def _split_trained(setting: Setting, trainable: Trainable) -> tuple[Any, Any]:
    """What the optimiser trains (the model, and the sampler if it adapts), and the rest."""
    trained = jax.tree.map(eqx.is_inexact_array, trainable)
    if setting.objective != "davi-adapt":
        trained = eqx.tree_at(
            lambda t: (t.schedule, t.kernel), trained, replace_fn=lambda part: jax.tree.map(lambda leaf: False, part)
        )
    return eqx.partition(trainable, trained)


def _keys(setting: Setting) -> dict[str, PRNGKeyArray]:
    names = ("model", "epochs", "test")
    return dict(zip(names, jax.random.split(jax.random.key(setting.seed), len(names))))
