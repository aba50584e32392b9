# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From a fit to an answer. From the top down:

build_report      from a state to a report: what is computed
report_texts      what a report says of it
boundaries        maxima that no finite theta reaches
edges             what arrives at an edge there, in the parameter's own terms
evidence_at       the log evidence as a function of theta: fresh particles, and what they tell
programs          the compiled parts of it
derivatives       of the log evidence in theta
replicates        independent sets of draws, and the log evidence from them
transport         latents that move along with theta: derivatives without noise
proposal_mixture  a distribution of known density where the posterior lies
effort            how many draws are taken
laplace_fit       where maximum likelihood by Laplace's approximation would end
standard_errors   from noisy information to a covariance
flat_directions   directions that the data do not determine
report            what a user keeps
coordinates       numbers of a tree side by side, and their names
"""
