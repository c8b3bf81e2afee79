"""`lehr evaluate`: the likelihood of a trained model, with its errors, bounds and brackets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lehr.errors import InputError
from lehr.vae import likelihood, plots
from lehr.vae.command_train import load_run, say
from lehr.vae.data import ImageData, fixed_subset
from lehr.vae.model import VAE
from lehr.vae.run_folder import RunFolder, to_json, write_faults
from lehr.vae.sampler import BASES, METHODS, Sampler, tune
from lehr.vae.setting import check_name, check_seed
from lehr.vae.train import initial_state

if TYPE_CHECKING:
    from lehr.commands import Evaluate

_NUM_TUNING_IMAGES = 16


def evaluate(options: "Evaluate") -> int:
    """Runs the command; returns the exit code. Raises `InputError` for faults of the user's."""
    _check(options)
    console = Console(stderr=True)
    folder = RunFolder.open(options.folder)
    setting, data = load_run(folder, options.data_dir)
    state = folder.restore(initial_state(setting, data.train), lambda fault: say(console, f"lehr: {fault}"))
    with _progress(console) as stage:
        result = measure(state.trainable.model, data, options, stage)
    result = {"run": folder.path.name, "epochs": int(state.epoch), "objective": setting.objective, **result}
    name = f"evaluation-{options.method}"
    folder.write_json(f"{name}.json", result)
    with write_faults(folder.path):
        plots.draw_evaluation(folder.path / f"{name}.png", result)
    if options.json:
        print(to_json(result))
    else:
        Console().print(_table(result))
        say(console, f"{name}.json and {name}.png are in {folder.path}")
    return 0


def measure(
    model: VAE, data: ImageData, options: "Evaluate", stage: Callable[[str, int], Callable[[int], None]]
) -> dict[str, Any]:
    """All that `lehr evaluate` reports, in nats per image; `stage(name, total)` returns the progress of one part."""
    key_tune, key_test, key_bounds, key_train, key_simulate = jax.random.split(jax.random.key(options.seed), 5)
    test = jnp.asarray(fixed_subset(data.test, options.num_images))
    train = jnp.asarray(fixed_subset(data.train, options.num_images))
    bounds = {
        name: likelihood.importance_bounds(
            key,
            model,
            images,
            num_samples=options.num_samples,
            on_batch=stage(f"L_{options.num_samples} ({name})", len(images)),
        )
        for name, key, images in (("test", key_bounds, test), ("train", key_train, train))
    }
    importance, elbo = bounds["test"]
    evidence, tuning, simulated, gradients = importance, None, None, 0
    if options.method != "iwae":
        sampler = Sampler(
            options.method,
            options.num_temperatures,
            options.num_chains,
            options.num_leapfrog,
            options.persistence,
            options.base,
        )
        # Tuning sees training images only: the estimate is of other images, with the kernel held fixed.
        tuning_images = jnp.asarray(fixed_subset(data.train, _NUM_TUNING_IMAGES))
        tuning_done = stage("tuning", 1)
        tuned = tune(key_tune, model, tuning_images, sampler)
        tuning_done(1)
        kernel, tuning = tuned.kernel(sampler), tuned.report()
        evidence = likelihood.annealed_evidence(
            key_test, model, test, sampler, kernel, on_batch=stage(options.method, len(test))
        )
        gradients = sampler.gradients_per_image
        if options.num_simulated:
            lower, upper = likelihood.sandwich(
                key_simulate,
                model,
                sampler,
                kernel,
                num_images=options.num_simulated,
                on_batch=stage("sandwich", options.num_simulated),
            )
            simulated = _bracket(lower, upper)
    nll, over_images, over_chains = evidence.negative_log_likelihood()
    sizes = np.asarray(evidence.effective_sample_size)
    return {
        "method": options.method,
        "num_images": len(test),
        "num_temperatures": options.num_temperatures,
        "num_chains": options.num_chains,
        "num_leapfrog": options.num_leapfrog,
        "base": options.base,
        "gradients_per_image": gradients,
        "nll": {"mean": nll, "error_over_images": over_images, "error_over_chains": over_chains},
        "effective_sample_size": {"median": float(np.median(sizes)), "smallest": float(np.min(sizes))},
        "mean_acceptance": None if evidence.acceptance is None else float(np.mean(evidence.acceptance)),
        "num_samples": options.num_samples,
        "importance_bound": _value(importance),
        "elbo": _value(elbo),
        "variational_gap": _difference(evidence, elbo),
        "generalisation_gap": _gap_between_sets(bounds["train"][0], importance),
        "active_units": likelihood.active_units(model, jnp.asarray(fixed_subset(data.test, 10_000))),
        "latent_dim": model.latent_dim,
        "simulated": simulated,
        "tuning": tuning,
        "log_likelihood_by_image": evidence.log_evidence.tolist(),
    }


def _check(options: "Evaluate") -> None:
    check_name("method", options.method, ("iwae", *METHODS))
    check_name("base", options.base, BASES)
    for name in ("num_temperatures", "num_chains", "num_leapfrog", "num_images", "num_samples"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} must be at least 1, but it is {getattr(options, name)}")
    if options.num_simulated < 0:
        raise InputError(f"num_simulated must be 0 or more, but it is {options.num_simulated}")
    if not 0 <= options.persistence < 1:
        raise InputError(f"persistence must be in [0, 1), but it is {options.persistence}")
    check_seed(options.seed)


def _value(evidence: likelihood.Evidence) -> dict[str, float]:
    nll, over_images, over_samples = evidence.negative_log_likelihood()
    return {"mean": -nll, "error_over_images": over_images, "error_over_samples": over_samples}


def _difference(a: likelihood.Evidence, b: likelihood.Evidence) -> dict[str, float]:
    """Mean of a - b over the same images."""
    return _mean_and_error(a.log_evidence - b.log_evidence)


def _gap_between_sets(train: likelihood.Evidence, test: likelihood.Evidence) -> dict[str, float]:
    """Mean over training images minus mean over test images, by the same bound."""
    a, b = _mean_and_error(train.log_evidence), _mean_and_error(test.log_evidence)
    return {"mean": a["mean"] - b["mean"], "error": float(np.hypot(a["error"], b["error"]))}


def _bracket(lower: likelihood.Evidence, upper: likelihood.Evidence) -> dict[str, Any]:
    return {
        "num_images": len(lower.log_evidence),
        "lower": _mean_and_error(lower.log_evidence),
        "upper": _mean_and_error(upper.log_evidence),
        "gap": _difference(upper, lower),
        "lower_by_image": lower.log_evidence.tolist(),
        "upper_by_image": upper.log_evidence.tolist(),
    }


def _mean_and_error(values: Any) -> dict[str, float]:
    mean, error = likelihood.mean_and_error(values)
    return {"mean": mean, "error": error}


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        "quantity", "nats per image", "standard error", title=f"{result['run']}: {result['num_images']} test images"
    )
    nll, size = result["nll"], result["effective_sample_size"]
    kind = "samples" if result["method"] == "iwae" else "chains"
    table.add_row(
        f"negative log-likelihood ({result['method']})",
        f"{nll['mean']:.3f}",
        f"{nll['error_over_images']:.3f} over images, {nll['error_over_chains']:.3f} over {kind}",
    )
    table.add_row(
        f"effective {kind} an image", f"{size['median']:.1f}", f"(median; the smallest {size['smallest']:.1f})"
    )
    for label, name in ((f"-L_{result['num_samples']}", "importance_bound"), ("-ELBO", "elbo")):
        row = result[name]
        table.add_row(
            label,
            f"{-row['mean']:.3f}",
            f"{row['error_over_images']:.3f} over images, {row['error_over_samples']:.3f} over samples",
        )
    table.add_row(
        "variational gap", f"{result['variational_gap']['mean']:.3f}", f"{result['variational_gap']['error']:.3f}"
    )
    gap = result["generalisation_gap"]
    table.add_row(f"generalisation gap (L_{result['num_samples']})", f"{gap['mean']:.3f}", f"{gap['error']:.3f}")
    if result["simulated"]:
        for name in ("lower", "upper", "gap"):
            row = result["simulated"][name]
            table.add_row(f"simulated images: {name}", f"{row['mean']:.3f}", f"{row['error']:.3f}")
    table.add_row("active units", f"{result['active_units']} of {result['latent_dim']}", "")
    return table


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    with Progress(console=console) as progress:

        def stage(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.update(task, completed=done)

        yield stage
