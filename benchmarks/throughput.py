"""Training throughput of each objective of the table in docs/results.md, in images per second.

    python benchmarks/throughput.py [--batches 20]

One compiled epoch of `batches` batches of 128 MNIST-sized images (random grey: the content does not matter),
784-200-200-50 tanh networks; compilation and the first epoch excluded: mean and standard error over five epochs.
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

from lehr.vae.setting import Setting
from lehr.vae.train import initial_state, make_epoch

EPOCHS = 5

SETTINGS = {
    "VAE": Setting(objective="elbo", num_particles=1),
    "IWAE S=5": Setting(objective="iwae", num_particles=5),
    "IWAE S=50": Setting(objective="iwae", num_particles=50),
    "DAVI K=10 S=5": Setting(objective="davi", num_steps=10, num_particles=5),
    "DAVI adapt K=10 S=5": Setting(objective="davi-adapt", num_steps=10, num_particles=5),
    "AIWAE K=5 T=5 L=5": Setting(objective="aiwae", num_steps=5, num_particles=5, num_leapfrog=5),
}


def images_per_second(setting: Setting, batches: int) -> tuple[float, float]:
    """Mean, and standard error over epochs."""
    images = np.random.default_rng(0).random((batches * setting.batch_size, 784), np.float32)
    state, epoch, on_device = initial_state(setting, images), make_epoch(setting, len(images)), jnp.asarray(images)
    rates = []
    for repeat in range(1 + EPOCHS):
        started = time.perf_counter()
        state, bounds = epoch(state, on_device)
        bounds.block_until_ready()
        if repeat:
            rates.append(len(images) / (time.perf_counter() - started))
    return float(np.mean(rates)), float(np.std(rates, ddof=1) / EPOCHS**0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20)
    batches = parser.parse_args().batches
    for name, setting in SETTINGS.items():
        mean, error = images_per_second(setting, batches)
        print(f"{name:22s} {mean:10,.0f} +- {error:,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
