"""The options of each command, and the few lines that hand them on."""

import dataclasses
from pathlib import Path
from typing import ClassVar

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

    when_stopped: ClassVar[str] = "what was saved is kept: go on with lehr train --resume FOLDER"

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Estimation:
    """What `lehr evidence` and `lehr compare` have in common."""

    data: Path | None = None
    """JSON file with one object: the model's arguments by name; lists of numbers become arrays"""
    tolerance: float = 0.05
    """nats that either end of the bracket may be from the estimate"""
    max_gradients: float = 1e6
    """of the target, for each model, tuning included; 1e6 or 1000000"""
    batch_size: int | None = None
    """particles in memory at once (default: 4 populations a device)"""
    x64: bool = False
    """compute in float64"""
    seed: int = 0
    """of every random number"""
    json: bool = False
    """print the result as JSON instead of a table"""
    plot: Path | None = None
    """file for a picture of the result, such as out.png"""


@dataclasses.dataclass(frozen=True)
class Evidence(_Estimation):
    """Estimate the log evidence of a model, with its error and a bracket, without tuning.

    The model is FILE.py:NAME: in that Python file a NumPyro model, a lehr.Problem, a PyMC model, or a function that
    returns one of the latter two. NumPyro models and functions are called with the data. Or it is a reference target
    with verified log evidence: sonar, ionosphere, breast-cancer, seeds, brownian, lorenz, pines, diabetes, gaussian,
    funnel, many-well.

    Exit code 0 if the estimate converged, 3 if it did not (the result says why), 2 for a fault in what was given.
    """

    target: tyro.conf.Positional[str]
    """FILE.py:NAME, or the name of a reference target"""
    data_dir: Path | None = None
    """folder of the reference targets' data (default: bayes in the folder LEHR_DATA)"""

    when_stopped: ClassVar[str] = "there was no estimate yet"

    def run(self, arguments: list[str]) -> int:
        """Estimates, reports, and returns the exit code."""
        del arguments
        from lehr.command_evidence import estimate

        return estimate(self)


@dataclasses.dataclass(frozen=True)
class Compare(_Estimation):
    """Rank models of the same data by their log evidence: Bayes factors and posterior probabilities.

    Models are given as to lehr evidence, FILE.py:NAME, two or more; all are called with the same data, and count as
    equally probable beforehand. What is known of each is said on standard error when it is done.

    Exit code 0 if every estimate converged, 3 if one did not, 2 for a fault in what was given.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """FILE.py:NAME of each model"""

    when_stopped: ClassVar[str] = "not every model was estimated, so there is no comparison; give fewer of them"

    def run(self, arguments: list[str]) -> int:
        """Estimates and compares, reports, and returns the exit code."""
        del arguments
        from lehr.command_evidence import rank

        return rank(self)


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
class Figure1:
    """Figure 1 of the DAIS paper: the gap of the bound on linear regression against the number of steps.

    Exact and simulated, with full refreshment, persistent momentum and mini-batches; slopes beside theorem 1.
    """

    out: Path = Path("runs/figure1")
    """folder for figure1.json and figure1.png"""
    num_chains: int = 100
    """chains of each simulation"""
    max_steps: int = 100_000
    """the largest number of steps K, up to 10,000,000"""
    seed: int = 0
    """of the data"""
    json: bool = False
    """print the result as JSON too"""

    def run(self, arguments: list[str]) -> int:
        """Runs the study; returns the exit code."""
        del arguments
        from lehr.studies.figure1 import figure1

        return figure1(self)


@dataclasses.dataclass(frozen=True)
class GradientNoise:
    """What mini-batches cost the bound, and what helps: the gap against data touched, for each remedy.

    Linear and logistic regression on synthetic data like those of land cover; step sizes by the exact analysis.
    """

    out: Path = Path("runs/gradient-noise")
    """folder for gradient-noise.json and gradient-noise.png"""
    num_data: int = 100_000
    """observations"""
    num_chains: int = 100
    """chains of each measurement"""
    seed: int = 0
    """of the data"""
    json: bool = False
    """print the result as JSON too"""

    def run(self, arguments: list[str]) -> int:
        """Runs the study; returns the exit code."""
        del arguments
        from lehr.studies.gradient_noise import gradient_noise

        return gradient_noise(self)


@dataclasses.dataclass(frozen=True)
class Sticking:
    """Variance and signal-to-noise of the gradient rules (plain, STL, control variate, DReG) along training runs.

    On embedded data: five bounds, each for a posterior outside the base's family and for one inside.
    """

    out: Path = Path("runs/sticking")
    """folder for sticking.json and sticking.png"""
    num_iterations: int = 2000
    """of each training run"""
    num_keys: int = 400
    """gradients at each iterate and rule"""
    seed: int = 0
    """of every random number of the study"""
    json: bool = False
    """print the result as JSON too"""

    def run(self, arguments: list[str]) -> int:
        """Runs the study; returns the exit code."""
        del arguments
        from lehr.studies.sticking import sticking

        return sticking(self)


@dataclasses.dataclass(frozen=True)
class Study:
    """List the studies: figures and tables of the papers, each a command `lehr study NAME` with options of its own."""

    def run(self, arguments: list[str]) -> int:
        """Prints the studies; returns the exit code."""
        del arguments
        for name, what in _STUDIES.items():
            print(f"lehr study {name:15} {what}")
        return 0


_STUDIES = {
    "figure1": "gap of the bound on linear regression against the number of steps, and its rates",
    "figure2 RUN": "likelihood of a trained run by IWAE, AIS, HAIS and DAIS against gradients",
    "gradient-noise": "gap of the bound against data touched, with mini-batches and what helps",
    "sticking": "variance of the gradient rules along training, down to the exact posterior",
    "gaussian": "Metropolis-Hastings: excursions of alternatives, variance of every scheme and baseline",
    "mixture": "Metropolis-Hastings: entropy of a discrete posterior, and the ascent to its maximum",
    "ising": "Metropolis-Hastings: specific heat, its derivative, and the ascent to its maximum",
    "proposal": "Metropolis-Hastings: proposals tuned by the gradient of the autocorrelation",
    "couplings": "Metropolis-Hastings: variance times cost of every coupling over dimension",
    "dimension": "Metropolis-Hastings: a network as the energy, with up to a million parameters",
}
