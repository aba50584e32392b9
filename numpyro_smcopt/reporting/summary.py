# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What fresh particles at an estimate say: a report, and the log evidence that several runs are ranked by."""

from typing import Any

from numpyro_smcopt.kernels import HMC, InvariantKernel
from numpyro_smcopt.population.start import Start
from numpyro_smcopt.potential import StaticArguments
from numpyro_smcopt.reporting.assembly import make_report
from numpyro_smcopt.reporting.exploration import Cloud, Exploration, LaplacePoint, explore, find_frame, laplace_at
from numpyro_smcopt.reporting.report import Report
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.types import Array, Params


def summarize(
    algorithm: Algorithm, rng_key: Array, arrays: list[Array], static: StaticArguments, state: Any, sandwich: bool
) -> Report:
    """See `ParticleAlgorithm.summarize`."""
    if sandwich and state.blocks.num_blocks == 1 and state.points.x.shape[1]:
        raise ValueError(
            "A sandwich covariance needs independent units, but all latents of this model depend on one another. "
            "Leave sandwich=True out."
        )
    start, cloud = _start(algorithm, arrays, static, state), _cloud(state)
    kernel, strategy = _kernel(algorithm), getattr(algorithm, "init_strategy", None)
    frame = find_frame(rng_key, start, state.params, cloud, algorithm._known_information(state))

    def explore_at(params: Params, continuous: bool) -> Exploration:
        return explore(
            rng_key,
            start,
            params,
            cloud,
            kernel,
            frame=frame,
            sandwich=sandwich,
            continuous=continuous,
            init_strategy=strategy,
        )

    def by_laplace(params: Params) -> LaplacePoint | str:
        return laplace_at(rng_key, start, params, cloud, frame, sandwich=sandwich)

    complete = None if frame is None else frame.complete
    return make_report(state.params, explore_at, by_laplace, start.target.sites.num_observations, complete)


def log_evidence_at(
    algorithm: Algorithm, rng_key: Array, arrays: list[Array], static: StaticArguments, state: Any
) -> tuple[float, float]:
    """Log evidence at the estimate of a state, and its error."""
    found = explore(
        rng_key,
        _start(algorithm, arrays, static, state),
        state.params,
        _cloud(state),
        _kernel(algorithm),
        init_strategy=getattr(algorithm, "init_strategy", None),
    )
    return found.log_evidence, found.std


def _start(algorithm: Algorithm, arrays: list[Array], static: StaticArguments, state: Any) -> Start:
    return Start(algorithm._program, static, arrays, algorithm._target(arrays, static), state.theta)


def _cloud(state: Any) -> Cloud:
    return Cloud(state.points.x, state.log_weights, state.blocks)


def _kernel(algorithm: Algorithm) -> InvariantKernel:
    """The kernel of the algorithm, or one that serves any model."""
    kernel = getattr(algorithm, "kernel", None)
    return kernel if isinstance(kernel, InvariantKernel) else HMC()
