# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Losses of theta. To add an objective, write a file beside these and see `objectives.base`."""

from numpyro_smcopt.objectives.base import Cloud, Estimate, Objective, Scene, expectation, term_coefficients
from numpyro_smcopt.objectives.divergences import ForwardKL, ReverseKL
from numpyro_smcopt.objectives.energy_based_likelihood import EnergyBasedLikelihood
from numpyro_smcopt.objectives.marginal_likelihood import MarginalLikelihood
from numpyro_smcopt.objectives.path_kl import PathKL
from numpyro_smcopt.objectives.reward import Reward, as_objective

__all__ = [
    "Cloud",
    "EnergyBasedLikelihood",
    "Estimate",
    "ForwardKL",
    "MarginalLikelihood",
    "Objective",
    "PathKL",
    "ReverseKL",
    "Reward",
    "Scene",
    "as_objective",
    "expectation",
    "term_coefficients",
]
