# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Steps of theta. To add one, write a file beside these and see `theta_step.base`."""

from numpyro_smcopt.theta_step.base import StepContext, ThetaStep
from numpyro_smcopt.theta_step.fisher_step import FisherState, FisherStep
from numpyro_smcopt.theta_step.natural_step import NaturalState, NaturalStep, inverse_metric, running_mean
from numpyro_smcopt.theta_step.optimizers import GradientFlow, OptimizerStep, as_theta_step

__all__ = [
    "FisherState",
    "FisherStep",
    "GradientFlow",
    "NaturalState",
    "NaturalStep",
    "OptimizerStep",
    "StepContext",
    "ThetaStep",
    "as_theta_step",
    "inverse_metric",
    "running_mean",
]
