# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Many updates: the contract of an algorithm, its start, runs, checkpoints, convergence."""
