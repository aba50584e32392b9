# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A NumPyro model as a target. From the top down:

latents_to_params   a handler that turns latents into parameters
svi_view            a cloud in the shape of SVI: model and guide
precision           double precision inside of programs of single precision
log_scale           programs that keep the logarithms of positive numbers
log_rules           what becomes of these, operation by operation
observed            observed values, pointwise log likelihood, names of axes
energy              `Target`: energy terms, prior draws, constrained values
sites               what one abstract trace tells of a model
proper_latents      densities that integrate to one for masked latents and unwrapped angles
checks              what is refused, and why
tracing             one run of a model under chosen values
arguments           arrays among the arguments of a model, and the static rest
conversions         from any container to an array, without loss

No other part of the package traces models.
"""

from numpyro_smcopt.potential.arguments import (
    StaticArguments,
    fingerprint,
    join_arguments,
    split_arguments,
)
from numpyro_smcopt.potential.checks import check_init_params, check_key, check_start
from numpyro_smcopt.potential.conversions import as_array, strong
from numpyro_smcopt.potential.energy import Target, flat_terms, make_target
from numpyro_smcopt.potential.latents_to_params import latents_to_params
from numpyro_smcopt.potential.observed import axis_names, observed_data, pointwise_log_likelihood
from numpyro_smcopt.potential.precision import double_allowed, double_may_be_needed
from numpyro_smcopt.potential.sites import Sites, read_sites
from numpyro_smcopt.potential.svi_view import SVIView, make_svi_view

__all__ = [
    "SVIView",
    "Sites",
    "StaticArguments",
    "Target",
    "as_array",
    "axis_names",
    "check_init_params",
    "check_key",
    "check_start",
    "double_allowed",
    "double_may_be_needed",
    "fingerprint",
    "flat_terms",
    "join_arguments",
    "latents_to_params",
    "make_svi_view",
    "make_target",
    "observed_data",
    "pointwise_log_likelihood",
    "read_sites",
    "split_arguments",
    "strong",
]
