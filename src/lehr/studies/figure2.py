"""Figure 2 of the DAIS paper: the likelihood of one trained model by IWAE, AIS, HAIS and DAIS, against gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from lehr.errors import InputError
from lehr.vae import likelihood
from lehr.vae.command_train import load_run, say
from lehr.vae.data import fixed_subset
from lehr.vae.model import VAE
from lehr.vae.run_folder import RunFolder, to_json, write_faults
from lehr.vae.sampler import Sampler, tune
from lehr.vae.train import initial_state

if TYPE_CHECKING:
    from lehr.commands import Figure2

#: leapfrogs per temperature; HAIS and DAIS keep momentum instead
_LEAPFROGS = {"ais": 10, "hais": 1, "dais": 1}


def figure2(options: "Figure2") -> int:
    """Runs the study on a trained run, writes figure2.json and figure2.png there; returns the exit code."""
    if options.num_images < 2 or options.num_chains < 2 or options.max_gradients < 10:
        raise InputError("figure2 needs at least 2 images, 2 chains and 10 gradients: give larger numbers")
    console = Console(stderr=True)
    tell = functools.partial(say, console)
    folder = RunFolder.open(options.folder)
    setting, data = load_run(folder, options.data_dir)
    model = folder.restore(initial_state(setting, data.train), tell).trainable.model
    test = jnp.asarray(fixed_subset(data.test, options.num_images))
    tuning_images = jnp.asarray(fixed_subset(data.train, 16))
    budgets = _budgets(options.max_gradients)
    rows = measure(jax.random.key(options.seed), model, test, tuning_images, budgets, options.num_chains, tell)
    result = {
        "run": folder.path.name,
        "num_images": len(test),
        "num_chains": options.num_chains,
        "rows": rows,
        "agreement": _agreement(rows, budgets[-1]),
    }
    folder.write_json("figure2.json", result)
    with write_faults(folder.path):
        draw(result).savefig(folder.path / "figure2.png", dpi=120)
    if options.json:
        print(to_json(result))
    for line in result["agreement"]:
        tell(
            f"{line['pair']} at {budgets[-1]:,} gradients a chain: {line['difference']:+.3f} ± {line['error']:.3f} nats"
        )
    tell(f"figure2.json and figure2.png are in {folder.path}")
    return 0


def measure(
    key: jax.Array,
    model: VAE,
    test: jax.Array,
    tuning_images: jax.Array,
    budgets: list[int],
    num_chains: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per method and budget (gradients a chain; an importance sample counts as one): NLL and its chain error.

    AIS and HAIS have their step sizes tuned to 65 % acceptance by temperature; DAIS has one, tuned at 50 steps by its
    bound and scaled by K^(-1/4), the best rate of the paper's theorem 1.
    """
    rows = []
    key_tune, key_run = jax.random.split(key)
    samplers = {
        method: Sampler(method, num_chains=num_chains, num_leapfrog=num_leapfrog)
        for method, num_leapfrog in _LEAPFROGS.items()
    }
    tunings = {name: tune(key_tune, model, tuning_images, sampler) for name, sampler in samplers.items()}
    for budget in budgets:
        # Keys of their own: points and methods must not share their starts, or their errors would not be independent.
        keys = jax.random.split(jax.random.fold_in(key_run, budget), 1 + len(samplers))
        importance, _ = likelihood.importance_bounds(keys[0], model, test, num_samples=budget * num_chains)
        rows.append(_row("iwae", budget, importance))
        for key_method, (method, sampler) in zip(keys[1:], samplers.items()):
            sampler = dataclasses.replace(sampler, num_temperatures=budget // sampler.num_leapfrog)
            kernel = tunings[method].kernel(sampler)
            evidence = likelihood.annealed_evidence(key_method, model, test, sampler, kernel, batch_size=len(test))
            rows.append(_row(method, budget, evidence))
        tell(f"{budget} gradients a chain: " + ", ".join(f"{r['method']} {r['nll']:.3f}" for r in rows[-4:]))
    return rows


def draw(result: dict[str, Any]) -> Figure:
    """NLL against gradients, a line a method, with the error over chains."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    markers = {"iwae": "s", "ais": "o", "hais": "^", "dais": "D"}
    for method, marker in markers.items():
        rows = [row for row in result["rows"] if row["method"] == method]
        axes.errorbar(
            [row["gradients"] for row in rows],
            [row["nll"] for row in rows],
            yerr=[row["error"] for row in rows],
            marker=marker,
            markersize=5,
            capsize=3,
            label=method.upper(),
        )
    axes.set_xscale("log")
    axes.set(
        xlabel="gradients a chain (importance samples a chain for IWAE)",
        ylabel="negative log-likelihood, nats",
        title=f"{result['run']}: {result['num_images']} test images, {result['num_chains']} chains",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    return figure


def _budgets(largest: int) -> list[int]:
    """Half-decades from 10 to the largest, which is one of them; whole tens, so that every method can spend them."""
    ladder = [int(round(10 ** (k / 2), -1)) for k in range(2, 2 * len(str(largest)) + 1)]
    return [budget for budget in ladder if budget < largest] + [largest // 10 * 10]


def _row(method: str, budget: int, evidence: likelihood.Evidence) -> dict[str, Any]:
    nll, over_images, over_chains = evidence.negative_log_likelihood()
    return {
        "method": method,
        "gradients": budget,
        "nll": nll,
        "error": over_chains,
        "error_over_images": over_images,
    }


def _agreement(rows: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Differences of the annealed methods at the largest budget; the images are the same, so their spread cancels."""
    last = {row["method"]: row for row in rows if row["gradients"] == budget}
    return [
        {
            "pair": f"{a} - {b}",
            "difference": last[a]["nll"] - last[b]["nll"],
            "error": float(np.hypot(last[a]["error"], last[b]["error"])),
        }
        for a, b in (("ais", "hais"), ("ais", "dais"), ("hais", "dais"))
    ]
