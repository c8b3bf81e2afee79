"""Training throughput of each objective of the table in docs/results.md, in images per second.

    python benchmarks/throughput.py [--batches 20]

One compiled epoch of `batches` batches of 128 MNIST-sized images (random grey: the content does not matter),
784-200-200-50 tanh networks; compilation and the first epoch excluded, the best of three epochs taken.
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

from lehr.vae.setting import Setting
from lehr.vae.train import initial_state, make_epoch

SETTINGS = {
    "VAE": Setting(objective="elbo", num_particles=1),
    "IWAE S=5": Setting(objective="iwae", num_particles=5),
    "IWAE S=50": Setting(objective="iwae", num_particles=50),
    "DAVI K=10 S=5": Setting(objective="davi", num_steps=10, num_particles=5),
    "DAVI adapt K=10 S=5": Setting(objective="davi-adapt", num_steps=10, num_particles=5),
    "AIWAE K=5 T=5 L=5": Setting(objective="aiwae", num_steps=5, num_particles=5, num_leapfrog=5),
}


def images_per_second(setting: Setting, batches: int) -> float:
    images = np.random.default_rng(0).random((batches * setting.batch_size, 784), np.float32)
    state, epoch, on_device = initial_state(setting, images), make_epoch(setting, len(images)), jnp.asarray(images)
    best = 0.0
    for repeat in range(4):
        started = time.perf_counter()
        state, bounds = epoch(state, on_device)
        bounds.block_until_ready()
        if repeat:
            best = max(best, len(images) / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20)
    batches = parser.parse_args().batches
    for name, setting in SETTINGS.items():
        print(f"{name:22s} {images_per_second(setting, batches):10,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
