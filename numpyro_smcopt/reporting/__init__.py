# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From a fit to an answer. From the top down:

assembly         from an exploration to a report: warnings
exploration      fresh particles at a fixed theta, and what they tell
programs         the compiled parts of it
islands          independent sets of draws, and the log evidence from them
transport        latents that move along with theta: derivatives without noise
reference        a distribution of known density where the posterior lies
standard_errors  from noisy information to a covariance
flat_directions  directions that the data do not determine
boundaries       maxima on the boundary of a support
coordinates      numbers of a tree side by side
report           what a user keeps
"""
