"""Every target that estimates are scored against, by name.

    from benchmarks.targets import CALIBRATION, NAMES, target
    target("sonar").log_evidence

Those of `lehr.reference`, which come from data or from the literature, and those of `closed_form.py`. A name stands for
one object, so that what was compiled for it is used again.

| name | d | what it is |
|---|---|---|
| sonar, ionosphere, breast-cancer | 61, 35, 31 | logistic regressions |
| seeds | 26 | a random-effects logistic regression |
| brownian, lorenz | 32, 90 | state-space models |
| pines | 1600 | a log-Gaussian Cox process |
| diabetes, gaussian | 11, 20 | conjugate regressions |
| funnel, many-well | 10, 32 | from the literature |
| gmm-40 | 2 | forty modes |
| log-gamma, logit-beta | 8, 10 | skewed |
| mixture | 6 | two modes |
| student | 8 | heavy tails |
| banana | 10 | bent |
"""

import functools

from benchmarks.targets import closed_form
from lehr import reference as _reference
from lehr.reference import Reference

_CLOSED_FORM = {
    "log-gamma": closed_form.log_gamma,
    "logit-beta": closed_form.logit_beta,
    "mixture": closed_form.mixture,
    "student": closed_form.student,
    "banana": closed_form.banana,
    "gmm-40": closed_form.gmm40,
}

#: the names that `target` knows
NAMES = (*_reference.NAMES, *_CLOSED_FORM)

#: skewed (two), bimodal, heavy-tailed and bent, each with its exact evidence: what errors are calibrated on
CALIBRATION = ("log-gamma", "logit-beta", "mixture", "student", "banana")


@functools.cache
def target(name: str) -> Reference:
    """The target of that name, with its log evidence and the error of that.

    Raises `lehr.InputError` for an unknown name, or data that are not found.
    """
    return _CLOSED_FORM[name]() if name in _CLOSED_FORM else _reference.reference(name)
