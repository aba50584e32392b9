# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Markov kernels: moves of one particle. To add one, write a file beside these and see `kernels.base`."""

from numpyro_smcopt.kernels.base import InvariantKernel, Kernel, Point, Potential, Step, WeightedKernel, is_kernel
from numpyro_smcopt.kernels.hamiltonian import HMC
from numpyro_smcopt.kernels.langevin import MALA, ULA
from numpyro_smcopt.kernels.preconditioners import Preconditioner, Preconditioning
from numpyro_smcopt.kernels.random_walk import RandomWalk
from numpyro_smcopt.kernels.underdamped import MetropolisUnderdamped, Underdamped, VelocityKernel

__all__ = [
    "HMC",
    "MALA",
    "ULA",
    "InvariantKernel",
    "Kernel",
    "MetropolisUnderdamped",
    "Point",
    "Potential",
    "Preconditioner",
    "Preconditioning",
    "RandomWalk",
    "Step",
    "Underdamped",
    "VelocityKernel",
    "WeightedKernel",
    "is_kernel",
]
