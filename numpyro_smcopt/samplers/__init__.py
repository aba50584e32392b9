# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Sources of the samples of `ImplicitDiffusion`. To add a sampler, write a file beside these."""

from numpyro_smcopt.samplers.base import Assessed, Sampler
from numpyro_smcopt.samplers.chains import Chains, as_sampler
from numpyro_smcopt.samplers.euler_maruyama import EulerMaruyama, Gradient, Paths

__all__ = ["Assessed", "Chains", "EulerMaruyama", "Gradient", "Paths", "Sampler", "as_sampler"]
