# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maximum marginal likelihood for NumPyro models, by sequential Monte Carlo.

Declare what is to be estimated with `numpyro.param` and what is to be integrated out with `numpyro.sample`, then::

    result = SMCOptimizer(model).run(random.key(0), 1000, *args)

Map of the package. Every line stands on those below it:

    inference_data, plots    fits for ArviZ, pictures (plots is imported by its name, because it needs Matplotlib)
    comparison, handlers     models beside one another; control of updates from outside
    evidence                 log marginal likelihood of any model
    algorithms/              SMCOptimizer, MomentumParticleMLE, ImplicitDiffusion, and their base
    reporting/, samplers/    standard errors, intervals and log evidence of a fit; samples for ImplicitDiffusion
    runs/                    many updates: the contract of an algorithm, starts, the loop, checkpoints, convergence
    population/              a cloud at one theta: first particles, tempering, gradients, budgets, warm start
    faults                   everything that can be wrong with a run, with its remedy
    objectives/, laplace     losses of theta; modes and curvatures of the latents
    kernels/, theta_step/    Markov moves of one particle; steps of theta
    potential/               NumPyro model -> energy terms; the only room that traces models
    effects, adaptation      sites and handlers, the only file that touches the handler stack; rules for tuning
    resampling, control_variates, information, results
    weights, block_search    weights and effective sample size; the search for independent latents
    blocks                   groups of independent latents
    term_sums, random_numbers, traces, branching    what makes programs fast
    types                    the glossary
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
