# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Sites and handlers: every site acts by every way to enter a handler, and nothing of it stays behind."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.handlers import block, scope, substitute, trace
from numpyro.primitives import Messenger, mutable

from numpyro_smcopt import ImplicitDiffusion, MomentumParticleMLE, SMCOptimizer, one_block
from numpyro_smcopt.adaptation import EssRule, FirstOrderLimit, RobbinsMonro
from numpyro_smcopt.handlers import adapt, adapt_learning_rate, adapt_step_size, anneal, control, limit_theta_step
from numpyro_smcopt.kernels import MALA, ULA, RandomWalk

Y = np.array([1.0, 2.0, 4.5], np.float32)


def normal(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def build(**options):
    """Resamples at every update, and walks far."""
    kernel = RandomWalk(0.3, target=None)
    return SMCOptimizer(
        normal, optax.sgd(0.05), kernel=kernel, num_particles=8, partition=one_block, ess_threshold=1.0, **options
    )


@pytest.fixture(scope="module")
def plain():
    optimizer = build()
    return optimizer, optimizer.init(random.key(0), Y)


# -- the matrix --------------------------------------------------------------------------------------------------------
def moved(old, new):
    return ~np.isin(new.points.x, old.points.x).all()


def shift(old, new):
    return float(abs(new.theta["mean"] - old.theta["mean"]))


# Site: a value, and whether an update looks as if it had acted.
SITES = {
    "step_size": (0.0, lambda old, new: not moved(old, new)),
    "ess_threshold": (0.0, lambda old, new: new.diagnostics["num_resampled"] == 0),
    "resample": (False, lambda old, new: new.diagnostics["num_resampled"] == 0),
    "learning_rate": (0.0, lambda old, new: shift(old, new) == 0),
    "theta_limit": (FirstOrderLimit(0.9999), lambda old, new: 0 < shift(old, new) < 0.02),
}


def ambient(handler, optimizer, state):
    with handler():
        return optimizer.update(state, Y)[0]


def bound(handler, optimizer, state):
    return build(handlers=[handler()]).update(state, Y)[0]


def inside_a_jit(handler, optimizer, state):
    def update(state):
        with handler():
            return optimizer.update(state, Y)[0]

    return jax.jit(update)(state)


def inside_a_scan(handler, optimizer, state):
    def body(state, _):
        with handler():
            return optimizer.update(state, Y)[0], None

    return jax.lax.scan(body, state, None, length=1)[0]


def in_run(handler, optimizer, state):
    with handler():
        return optimizer.run(random.key(0), 1, Y, progress_bar=False, init_state=state).state


WAYS = {way.__name__: way for way in (ambient, bound, inside_a_jit, inside_a_scan, in_run)}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", WAYS)
def test_every_site_acts_in_every_way_and_only_there(site, way, plain):
    optimizer, state = plain
    value, acted = SITES[site]
    assert not acted(state, optimizer.update(state, Y)[0])
    with jax.checking_leaks():
        new = WAYS[way](lambda: substitute(data={f"smcopt/{site}": value}), optimizer, state)
    assert acted(state, new)
    assert not acted(state, optimizer.update(state, Y)[0])


@pytest.mark.parametrize("site", SITES)
def test_scope_renames_and_block_hides(site, plain):
    optimizer, state = plain
    value, acted = SITES[site]
    with substitute(data={f"job/smcopt/{site}": value}), scope(prefix="job"):
        assert acted(state, optimizer.update(state, Y)[0])
    with substitute(data={f"smcopt/{site}": value}), scope(prefix="job"):
        assert not acted(state, optimizer.update(state, Y)[0])
    with substitute(data={f"smcopt/{site}": value}), block():
        assert not acted(state, optimizer.update(state, Y)[0])
    with block(hide=["smcopt/loss"]), control({f"smcopt/{site}": value}), scope(prefix="job"):
        assert acted(state, optimizer.update(state, Y)[0])


@pytest.fixture(scope="module")
def jitted(plain):
    optimizer, state = plain
    update = jax.jit(lambda state: optimizer.update(state, Y)[0])
    body = lambda state, _: (optimizer.update(state, Y)[0], None)  # noqa: E731
    scan = lambda state: jax.lax.scan(body, state, None, length=1)[0]  # noqa: E731
    update(state), scan(state)
    return update, scan


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("which", [0, 1], ids=["jit", "scan"])
def test_control_reaches_what_was_compiled_before_and_substitute_does_not(site, which, plain, jitted):
    _, state = plain
    function = jitted[which]
    value, acted = SITES[site]
    with substitute(data={f"smcopt/{site}": value}):
        assert not acted(state, function(state))
    with control(**{site: value}):
        assert acted(state, function(state))
    assert not acted(state, function(state))


# -- the other objects -------------------------------------------------------------------------------------------------
# Site: a value, and what of a state is another one if it acted.
OTHERS = {
    MomentumParticleMLE: {
        "step_size": (0.2, lambda state: state.theta["mean"]),
        "momentum": (0.5, lambda state: state.motion.velocity),
        "latent_step_size": (0.2, lambda state: state.points.x),
        "latent_momentum": (0.25, lambda state: state.cloud.velocity),
    },
    ImplicitDiffusion: {
        "learning_rate": (0.5, lambda state: state.theta["mean"]),
        "step_size": (0.1, lambda state: state.points.x),
    },
}


@pytest.fixture(scope="module")
def others():
    made = {
        MomentumParticleMLE: MomentumParticleMLE(
            normal, step_size=0.02, momentum=0.9, latent_step_size=0.1, latent_momentum=0.5, num_particles=8
        ),
        ImplicitDiffusion: ImplicitDiffusion(normal, optax.sgd(0.05), sampler=RandomWalk(0.3), num_particles=8),
    }
    return {kind: (optimizer, optimizer.init(random.key(0), Y)) for kind, optimizer in made.items()}


@pytest.mark.parametrize("kind", OTHERS)
def test_sites_of_the_other_objects_act_and_only_there(kind, others):
    optimizer, state = others[kind]
    sites = OTHERS[kind]
    with trace() as seen:
        plain = optimizer.update(state, Y)[0]
    controls = seen.keys() - {f"smcopt/{name}" for name in plain.diagnostics}
    assert {name.removeprefix("smcopt/") for name in controls} == sites.keys()
    assert {"loss", "grad_norm", "num_nonfinite", "num_refused", "ess", "acceptance_rate"} <= plain.diagnostics.keys()
    assert all(value.shape == seen[f"smcopt/{name}"]["value"].shape for name, value in plain.diagnostics.items())
    update = jax.jit(lambda state: optimizer.update(state, Y)[0])
    compiled = update(state)
    for site, (value, look) in sites.items():
        differs = lambda one, other, look=look: bool(np.any(look(one) != look(other)))  # noqa: E731
        with jax.checking_leaks(), substitute(data={f"smcopt/{site}": value}):
            assert differs(optimizer.update(state, Y)[0], plain)
        with control({site: value}):
            assert differs(update(state), compiled)
        assert not differs(update(state), compiled) and not differs(optimizer.update(state, Y)[0], plain)
    with control({site: value for site, (value, _) in sites.items()}):
        new = optimizer.run(None, 1, Y, progress_bar=False, init_state=state).state
    for _, look in sites.values():
        assert np.max(np.abs(look(new) - look(plain))) > 1e-4


def test_a_rule_that_would_never_act_is_refused(others, plain):
    for kind, (optimizer, state) in {**others, SMCOptimizer: plain}.items():
        with pytest.raises(ValueError, match=r"adapt\('nothing', .* steers 'nothing', but the sites here are"):
            with adapt("nothing", RobbinsMonro()):
                optimizer.update(state, Y)
        with pytest.raises(ValueError, match=r"observes 'colour', but the sites here are .*'loss'"):
            with adapt("step_size", RobbinsMonro(observes="colour")):
                kind(normal).init(random.key(0), Y) if kind is ImplicitDiffusion else optimizer.init(random.key(0), Y)


# -- control -----------------------------------------------------------------------------------------------------------
def test_controls_nest_and_the_outermost_wins(plain, jitted):
    _, state = plain
    update, _ = jitted
    with control(learning_rate=0.0), control(learning_rate=1.0):
        assert shift(state, update(state)) == 0
    with control(learning_rate=1.0):
        whole = shift(state, update(state))
        with control(resample=False):
            new = update(state)
        assert new.diagnostics["num_resampled"] == 0 and shift(state, new) == whole > 0


def test_control_compiles_nothing_for_new_numbers(plain, compilations):
    optimizer, state = plain
    with control(step_size=0.2):
        optimizer.update(state, Y)
    with compilations() as compiled:
        for value in (0.3, np.float32(0.4), np.array([0.5]), 1):
            with control(step_size=value):
                optimizer.update(state, Y)
    assert compiled == []


def test_control_takes_a_traced_value(plain):
    optimizer, state = plain

    @jax.jit
    def moved_by(rate):
        with control(learning_rate=rate):
            return optimizer.update(state, Y)[0].theta["mean"]

    assert moved_by(0.0) == 0 and moved_by(1.0) == 2 * moved_by(0.5) > 0


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"step_sise": 0.1},
            ValueError,
            r"control names \['step_sise'\], but the control sites here are .*'step_size'",
        ),
        ({"loss": 0.1}, ValueError, r"control names \['loss'\]"),
        (
            {"step_size": np.zeros(3)},
            ValueError,
            r"'smcopt/step_size' by a value of shape \(3,\).* broadcast to \(1,\)",
        ),
        ({"step_size": np.nan}, ValueError, "'smcopt/step_size' by .*must be finite, and at least 0"),
        ({"step_size": -1.0}, ValueError, "'smcopt/step_size' by .*must be finite, and at least 0"),
        ({"step_size": "big"}, ValueError, "'smcopt/step_size' by .*which is no number"),
        ({"theta_limit": 0.5}, ValueError, "'smcopt/theta_limit' by 0.5; it must be a function"),
        ({}, ValueError, "control needs values"),
    ],
)
def test_control_refuses_what_cannot_be(values, kind, message, plain):
    optimizer, state = plain
    with pytest.raises(kind, match=message), control(**values):
        optimizer.update(state, Y)
    optimizer.update(state, Y)  # nothing stays behind


# -- what is announced -------------------------------------------------------------------------------------------------
DIAGNOSTICS = {
    "loss", "log_evidence", "ess", "mean_ess", "step_ess", "acceptance_rate", "mean_step_size", "grad_norm",
    "num_nonfinite", "num_refused", "num_resampled",
}  # fmt: skip
PER_BLOCK = {"block_ess", "block_step_ess", "block_acceptance", "gradient"}  # of one block and one parameter here


def test_trace_finds_all_sites_and_run_records_the_scalars(plain):
    optimizer, state = plain
    with trace() as sites:
        new, loss = optimizer.update(state, Y)
    assert {name.removeprefix("smcopt/") for name in sites} == DIAGNOSTICS | PER_BLOCK | SITES.keys()
    assert all(site["type"] == "deterministic" for site in sites.values())
    assert sites["smcopt/loss"]["value"] == loss == new.diagnostics["loss"]
    assert all(new.diagnostics[name].shape == (1,) for name in PER_BLOCK)
    result = optimizer.run(random.key(0), 3, Y, progress_bar=False, init_state=state)
    assert result.diagnostics.keys() == DIAGNOSTICS
    assert all(np.all(np.isfinite(values)) and values.shape == (3,) for values in result.diagnostics.values())


def test_trace_inside_a_scan_gives_a_series(plain):
    optimizer, state = plain

    def body(state, _):
        with trace() as sites:
            state, _ = optimizer.update(state, Y)
        return state, sites["smcopt/ess"]["value"]

    with jax.checking_leaks():
        _, ess = jax.lax.scan(body, state, None, length=4)
    assert ess.shape == (4,) and np.all((ess > 0) & (ess <= 1))


# -- handlers with a state ---------------------------------------------------------------------------------------------
class Counter(Messenger):
    """What a user may write: counts, and steers by it."""

    def process_message(self, msg):
        if msg.get("name") == "smcopt/learning_rate":
            count = mutable("smcopt/counter", {"updates": jnp.zeros(())})
            msg["value"] = jnp.where(count["updates"] >= 2, 0.0, 1.0)
        elif msg.get("name") == "smcopt/loss":
            count = mutable("smcopt/counter")
            if count is not None:
                count["updates"] = count["updates"] + 1


def test_a_messenger_of_the_user_carries_its_state(plain):
    optimizer = build(handlers=[Counter()])
    with jax.checking_leaks():
        result = optimizer.run(random.key(0), 5, Y, progress_bar=False)
    # The announcement at init counts for such a handler, which does not look.
    moves = np.diff(np.concatenate([[0.0], result.trajectory["mean"]]))
    assert list(moves != 0) == [True, False, False, False, False]
    assert result.state.mutable_state["smcopt/counter"]["updates"] == 6


@dataclasses.dataclass(frozen=True)
class Halving:
    """A rule as short as the documentation promises."""

    observes: str = "num_resampled"

    def init(self, value):
        return value

    def value(self, state):
        return state

    def update(self, state, observed):
        return jnp.where(observed > 0, state / 2, state)


def test_a_rule_of_ten_lines_acts_eagerly_and_in_run(plain):
    optimizer = build(handlers=[adapt("step_size", Halving())])
    state = optimizer.init(random.key(0), Y)
    with jax.checking_leaks():
        for _ in range(3):
            state, _ = optimizer.update(state, Y)
    np.testing.assert_allclose(state.mutable_state["smcopt/adapt_step_size"]["state"], 0.3 / 2**3)
    run = optimizer.run(random.key(0), 3, Y, progress_bar=False)
    np.testing.assert_allclose(run.state.mutable_state["smcopt/adapt_step_size"]["state"], 0.3 / 2**3)
    np.testing.assert_allclose(run.state.points.x, state.points.x, rtol=1e-5)


def test_handlers_compose_and_pickle(plain):
    bound_ones = [
        anneal("learning_rate", optax.linear_schedule(0.0, 1.0, 2)),
        adapt_learning_rate(),
        adapt_step_size(),
        limit_theta_step(0.5),
        control(ess_threshold=0.5),
    ]
    optimizer = build(handlers=bound_ones)
    with jax.checking_leaks():
        result = optimizer.run(random.key(0), 4, Y, progress_bar=False)
    names = ("adapt_learning_rate", "adapt_step_size", "anneal_learning_rate")
    assert sorted(result.state.mutable_state) == [f"smcopt/{name}" for name in names]
    moves = np.diff(np.concatenate([[0.0], result.trajectory["mean"]]))
    assert moves[0] == 0 and np.all(moves[1:] != 0)  # annealing stands outside, so it wins
    assert result.state.mutable_state["smcopt/anneal_learning_rate"]["state"] == 4
    again = pickle.loads(pickle.dumps(build(handlers=bound_ones[2:]).handlers))
    assert repr(again) == repr(tuple(bound_ones[2:]))


def test_a_handler_with_a_state_must_be_there_from_the_start_and_stay(plain):
    optimizer, state = plain
    with pytest.raises(ValueError, match=r"brought the mutable site 'smcopt/adapt_step_size'.*Enter a handler"):
        with adapt_step_size():
            optimizer.update(state, Y)
    with adapt_step_size():
        with_state = optimizer.init(random.key(0), Y)
        optimizer.update(with_state, Y)
    with pytest.raises(ValueError, match=r"\['smcopt/adapt_step_size'\] were there at init, but no longer are"):
        optimizer.update(with_state, Y)


# -- rules at work -----------------------------------------------------------------------------------------------------
RULES = {
    "mala": (MALA(), [], "acceptance_rate", (0.5, 0.65)),
    "mala by handler": (MALA(target=None), [adapt_step_size(RobbinsMonro(0.574))], "acceptance_rate", (0.5, 0.65)),
    "ula": (ULA(target=0.9), [], "step_ess", (0.85, 0.95)),
    "ula by handler": (ULA(target=None), [adapt_step_size(EssRule(0.9, 1.1))], "step_ess", (0.85, 0.95)),
}


@pytest.mark.parametrize("name", RULES)
def test_step_sizes_a_thousand_times_off_are_mended_within_a_hundred_updates(name):
    kernel, handlers, site, (low, high) = RULES[name]
    optimizer = SMCOptimizer(
        normal, optax.adam(0.02), kernel=kernel, num_particles=100, partition=one_block, handlers=handlers
    )
    state = optimizer.init(random.key(0), Y)
    right = 0.05 if "ula" in name else 0.25  # both found by runs from there, to a factor of two
    for factor in (1e-3, 1e3):
        size = jnp.full(1, factor * right, jnp.float32)
        begin = state._replace(step=state.step._replace(size=size))
        if handlers:
            rule = handlers[0].rule
            begin = begin._replace(mutable_state={"smcopt/adapt_step_size": {"state": rule.init(size)}})
        result = optimizer.run(None, 140, Y, progress_bar=False, init_state=begin)
        # A hundred particles and forty updates: the mean has a standard error below 0.01.
        assert low < np.mean(result.diagnostics[site][100:]) < high
        assert not low < np.mean(result.diagnostics[site][:3]) < high


def test_rules_are_checked():
    with pytest.raises(TypeError, match="rule must be hashable"):
        adapt("step_size", [])
    with pytest.raises(ValueError, match=r"target must lie within \(0, 1\), got 1.5"):
        adapt_step_size(RobbinsMonro(1.5))
    with pytest.raises(ValueError, match=r"target_ess must lie within \(0, 1\), got 2"):
        limit_theta_step(2)
