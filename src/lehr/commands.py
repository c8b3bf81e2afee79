"""The options of each command, and the few lines that hand them on."""

import dataclasses
from pathlib import Path

import tyro

from lehr.vae.setting import Setting


@dataclasses.dataclass(frozen=True)
class Train(Setting):
    """Train a latent-variable model on images by a differentiable evidence bound, and certify its likelihood.

    Without options: DAVI on scikit-learn's digits, under two minutes on two CPU cores.
    """

    data: str = "digits"
    """digits (embedded), mnist, omniglot, or npz with --file"""
    file: Path | None = None
    """your own array of images in [0, 1], for --data npz"""
    data_dir: Path | None = None
    """folder of the data files (default: the folder in LEHR_DATA, else a download)"""
    out: Path | None = None
    """folder of the run (default: a new one, runs/DATA-OBJECTIVE)"""
    resume: Path | None = None
    """go on with the run in this folder; its configuration holds"""

    def __post_init__(self):
        """Checks nothing: Tyro would frame the message. `run` makes the `Setting` itself."""

    def run(self, arguments: list[str]) -> int:
        """Trains, reports, and returns the exit code."""
        from lehr.vae.command_train import train

        return train(self, arguments)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Estimate the test likelihood of a trained model, with its error, and bracket it on simulated data.

    Step sizes are tuned on training images. Also reports L_5000, the ELBO, the variational and generalisation gaps and
    the active units.
    """

    folder: tyro.conf.Positional[Path]
    """folder of the run, as lehr train wrote it"""
    method: str = "ais"
    """ais (HMC), hais (HMC with persistent momentum), dais (uncorrected) or iwae (importance samples)"""
    num_temperatures: int = 1000
    """annealing steps"""
    num_chains: int = 16
    """chains for each image"""
    num_leapfrog: int = 10
    """leapfrogs (gradients) at each temperature"""
    num_images: int = 100
    """test images, the first of a fixed shuffle"""
    num_simulated: int = 50
    """images simulated from the model, for the lower and upper bound (0: none)"""
    num_samples: int = 5000
    """importance samples of L_5000"""
    persistence: float = 0.9
    """of the momentum of hais and dais, in [0, 1)"""
    base: str = "posterior"
    """where annealing starts: posterior (the encoder's q(z | x)) or prior"""
    data_dir: Path | None = None
    """folder of the data files (default: the folder in LEHR_DATA, else a download)"""
    seed: int = 0
    """of every random number of the evaluation"""
    json: bool = False
    """print the result as JSON instead of a table"""

    def run(self, arguments: list[str]) -> int:
        """Evaluates, reports, and returns the exit code."""
        del arguments
        from lehr.vae.command_evaluate import evaluate

        return evaluate(self)


@dataclasses.dataclass(frozen=True)
class Figure2:
    """Figure 2 of the DAIS paper on a trained run: likelihood by IWAE, AIS, HAIS and DAIS against gradients."""

    folder: tyro.conf.Positional[Path]
    """folder of the run, as lehr train wrote it"""
    num_images: int = 32
    """test images, the first of a fixed shuffle"""
    num_chains: int = 16
    """chains for each image"""
    max_gradients: int = 10_000
    """the largest number of gradients a chain"""
    data_dir: Path | None = None
    """folder of the data files (default: the folder in LEHR_DATA, else a download)"""
    seed: int = 0
    """of every random number of the study"""
    json: bool = False
    """print the result as JSON too"""

    def run(self, arguments: list[str]) -> int:
        """Runs the study; returns the exit code."""
        del arguments
        from lehr.studies.figure2 import figure2

        return figure2(self)


@dataclasses.dataclass(frozen=True)
class Study:
    """List the studies: figures and tables of the papers, each a command `lehr study NAME` with options of its own."""

    def run(self, arguments: list[str]) -> int:
        """Prints the studies; returns the exit code."""
        del arguments
        print("lehr study figure2 RUN   likelihood of a trained run by IWAE, AIS, HAIS and DAIS against gradients")
        return 0
