# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The algorithms, one public class per file, and what an algorithm of your own is made of."""

from numpyro_smcopt.algorithms.base import ParticleAlgorithm
from numpyro_smcopt.runs.algorithm import ParticleState

__all__ = ["ParticleAlgorithm", "ParticleState"]
