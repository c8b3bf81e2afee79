"""The report at the end of a training run: a likelihood with its error, pictures, report.json."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lehr.vae import likelihood, plots, sampler
from lehr.vae.data import ImageData, fixed_subset
from lehr.vae.run_folder import RunFolder, write_faults
from lehr.vae.session import kernel_summary
from lehr.vae.setting import Setting
from lehr.vae.train import TrainState, initial_state

#: what the closing estimate costs is seconds; `lehr evaluate` is for the real one
_SAMPLER = sampler.Sampler(num_temperatures=100, num_chains=8, num_leapfrog=5)
_NUM_IMAGES = 50


def write_report(folder: RunFolder, setting: Setting, data: ImageData, images_per_second: float) -> str:
    """Evaluates the finished run on a few test images, writes report.json and the pictures; returns what to print."""
    state: TrainState = folder.restore(
        initial_state(setting, data.train), lambda fault: print(f"lehr: {fault}", file=sys.stderr)
    )
    model = state.trainable.model
    key_tune, key_test, key_samples = jax.random.split(jax.random.fold_in(jax.random.key(setting.seed), 1), 3)
    test = jnp.asarray(fixed_subset(data.test, _NUM_IMAGES))
    tuning = sampler.tune(key_tune, model, jnp.asarray(fixed_subset(data.train, 16)), _SAMPLER)
    evidence = likelihood.annealed_evidence(
        key_test, model, test, _SAMPLER, tuning.kernel(_SAMPLER), batch_size=_NUM_IMAGES
    )
    nll, over_images, over_chains = evidence.negative_log_likelihood()
    metrics = folder.metrics()
    last = next((row for row in metrics if row["epoch"] == int(state.epoch)), {})
    report = {
        "epochs": int(state.epoch),
        "train_bound": last.get("train_bound", math.nan),
        "test_bound": last.get("test_bound", math.nan),
        "test_nll": {
            "mean": nll,
            "error_over_images": over_images,
            "error_over_chains": over_chains,
            "num_images": len(test),
            "method": "ais",
            "num_temperatures": _SAMPLER.num_temperatures,
            "num_chains": _SAMPLER.num_chains,
            "num_leapfrog": _SAMPLER.num_leapfrog,
            "mean_acceptance": float(np.mean(evidence.acceptance)) if evidence.acceptance is not None else None,
        },
        "images_per_second": round(images_per_second, 1),
        "sampler": kernel_summary(state),
    }
    folder.write_json("report.json", report)
    with write_faults(folder.path):
        _draw(folder, setting, data, state, test[:30], key_samples)
    return (
        f"{setting.objective} on {data.name}, {report['epochs']} epochs: test bound {report['test_bound']:.2f} nats\n"
        f"test negative log-likelihood {nll:.2f} nats, standard error {over_images:.2f} over {len(test)} images and "
        f"{over_chains:.2f} over chains (AIS, {_SAMPLER.num_temperatures} temperatures)\n"
        f"report.json and the pictures are in {folder.path}; a larger estimate: lehr evaluate {folder.path}"
    )


def _draw(
    folder: RunFolder, setting: Setting, data: ImageData, state: TrainState, images: Array, key: PRNGKeyArray
) -> None:
    model = state.trainable.model
    plots.draw_bounds(folder.path / "bounds.png", folder.metrics(), setting.objective)
    means = jax.vmap(lambda image: model.mean_pixels(model.posterior(image).loc))(images)
    plots.draw_reconstructions(
        folder.path / "reconstructions.png", np.asarray(images), np.asarray(means), data.image_shape
    )
    latents = model.prior().sample(key, (50,))
    plots.draw_samples(folder.path / "samples.png", np.asarray(jax.vmap(model.mean_pixels)(latents)), data.image_shape)
    if setting.objective in ("davi", "davi-adapt", "aiwae"):
        plots.draw_schedule(folder.path / "schedule.png", kernel_summary(state))
