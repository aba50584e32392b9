# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maximum marginal likelihood for NumPyro models, by sequential Monte Carlo.

Declare what is to be estimated with `numpyro.param` and what is to be integrated out with `numpyro.sample`, then::

    result = SMCOptimizer(model).run(random.key(0), 1000, *args)

Map of the package, from the top down:

    algorithms/      SMCOptimizer; base: what algorithms share
    laplace          modes and curvatures of the latents, the warm start of theta
    theta_step       how theta moves
    objectives       what is minimised
    uncertainty      information from particles
    control_variates weights that take the noise out of the gradient
    loop             many updates, progress
    tempering        from the prior to the posterior
    target           NumPyro model -> energy terms; the only file that traces models
    results          what a user keeps
    kernels/         Markov moves of one particle
    resampling       four schemes
    effects          sites and handlers; the only file that touches the handler stack
    weights          weights, effective sample size, log evidence
    blocks           groups of independent latents
    types            the glossary
"""

from numpyro_smcopt import kernels, objectives, resampling
from numpyro_smcopt.algorithms.smc_optimizer import SMCOptimizer
from numpyro_smcopt.blocks import find_blocks, one_block
from numpyro_smcopt.results import RunResult, Status
from numpyro_smcopt.target import latents_to_params

__version__ = "0.1.0"

__all__ = [
    "RunResult",
    "SMCOptimizer",
    "Status",
    "find_blocks",
    "kernels",
    "latents_to_params",
    "objectives",
    "one_block",
    "resampling",
]
