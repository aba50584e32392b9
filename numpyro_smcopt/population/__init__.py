# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A cloud of particles at one theta; nothing here knows an algorithm."""
