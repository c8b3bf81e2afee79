"""Differentiable Metropolis-Hastings: proposals, couplings, and the estimators to compare with."""

from lehr.mh_gradient.baselines import (
    covariance_expectation as covariance_expectation,
    difference_expectation as difference_expectation,
    score_expectation as score_expectation,
)
from lehr.mh_gradient.couplings import (
    CommonRandomNumbers as CommonRandomNumbers,
    FullKernelMaximal as FullKernelMaximal,
    GCRefl as GCRefl,
    Independent as Independent,
    MaximalIndependent as MaximalIndependent,
    MaximalReflection as MaximalReflection,
    MonotoneSpin as MonotoneSpin,
)
from lehr.mh_gradient.diagnostics import Diagnostics as Diagnostics
from lehr.mh_gradient.discrete import DiscreteUniform as DiscreteUniform, SpinFlip as SpinFlip
from lehr.mh_gradient.expectation import MHExpectation as MHExpectation, mh_expectation as mh_expectation
from lehr.mh_gradient.heat_bath import HeatBath as HeatBath
from lehr.mh_gradient.proposals import (
    MALA as MALA,
    PCN as PCN,
    Independence as Independence,
    RandomWalk as RandomWalk,
)
from lehr.mh_gradient.target import DensityRatio as DensityRatio
