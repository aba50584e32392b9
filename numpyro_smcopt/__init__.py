# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maximum marginal likelihood for NumPyro models, by sequential Monte Carlo.

Declare what is to be estimated with `numpyro.param` and what is to be integrated out with `numpyro.sample`, then::

    result = SMCOptimizer(model).run(random.key(0), 1000, *args)

Map of the package, from the top down:

    inference_data   to ArviZ
    plots            pictures (imported by its name, because it needs Matplotlib)
    comparison       models beside one another, likelihood-ratio tests
    evidence         log marginal likelihood of any model
    handlers         what steers updates from outside: control, adaptation of step sizes, limits of theta
    algorithms/      SMCOptimizer, MomentumParticleMLE, ImplicitDiffusion, and what they share (from `base` down)
    samplers/        where the samples of ImplicitDiffusion come from
    reporting/       standard errors, intervals, log evidence, samples of a fit
    laplace          modes and curvatures of the latents, the warm start of theta
    theta_step/      how theta moves
    theta_momentum, latent_momentum    how theta and the particles move with momentum
    objectives/      what is minimised: marginal likelihood, reward, divergences, energy-based likelihood
    uncertainty      information from particles
    control_variates weights that take the noise out of the gradient
    runs/            many updates: what an algorithm is, starts, the loop, checkpoints, convergence
    population/      a cloud at one theta: first particles, tempering, gradients, budgets
    adaptation       rules: (state, observed) -> state
    target/          NumPyro model -> energy terms; the only folder that traces models
    results          what a user keeps
    kernels/         Markov moves of one particle
    resampling       four schemes
    effects          sites and handlers; the only file that touches the handler stack
    noise            random numbers of a whole cloud at once
    weights          weights, effective sample size, log evidence
    blocks           groups of independent latents
    sums             energy terms added up where they are made
    branching        what a program does now and then
    traces           functions that are traced once
    types            the glossary
"""

from numpyro_smcopt import handlers, kernels, objectives, resampling, samplers
from numpyro_smcopt.algorithms.implicit_diffusion import ImplicitDiffusion
from numpyro_smcopt.algorithms.momentum.damping import Damping
from numpyro_smcopt.algorithms.momentum.momentum_particle_mle import MomentumParticleMLE
from numpyro_smcopt.algorithms.smc_optimizer import SMCOptimizer
from numpyro_smcopt.block_search import find_blocks
from numpyro_smcopt.blocks import one_block
from numpyro_smcopt.comparison import compare, likelihood_ratio_test
from numpyro_smcopt.evidence import LogEvidence, log_evidence
from numpyro_smcopt.inference_data import to_arviz
from numpyro_smcopt.potential import latents_to_params
from numpyro_smcopt.reporting.report import Report
from numpyro_smcopt.results import RunResult, Runs, Status
from numpyro_smcopt.runs.convergence import EarlyStop

__version__ = "0.1.0"

__all__ = [
    "Damping",
    "EarlyStop",
    "ImplicitDiffusion",
    "LogEvidence",
    "MomentumParticleMLE",
    "Report",
    "RunResult",
    "Runs",
    "SMCOptimizer",
    "Status",
    "compare",
    "find_blocks",
    "handlers",
    "kernels",
    "latents_to_params",
    "likelihood_ratio_test",
    "log_evidence",
    "objectives",
    "one_block",
    "resampling",
    "samplers",
    "to_arviz",
]
