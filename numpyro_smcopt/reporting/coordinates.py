# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Numbers of a tree side by side: flat, and named."""

from typing import Any

import jax
import numpy as np
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.constraints import Constraint


def ravel(tree: Any, trailing: int | None = None) -> np.ndarray:
    """The leaves of a tree side by side, [Q]; with ``trailing`` the last axis of that length is kept, [Q, trailing]."""
    shape = (-1,) if trailing is None else (-1, trailing)
    leaves = [np.asarray(leaf, float).reshape(shape) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros((0, *shape[1:]))


def unravel(values: np.ndarray, like: Any) -> Any:
    """[Q, ...] as a tree whose leaves have the shapes of ``like``, further axes behind."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1].astype(int)
    pieces = np.split(np.asarray(values), ends)
    shaped = [piece.reshape((*np.shape(leaf), *values.shape[1:])) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def coordinate_names(tree: Any) -> tuple[str, ...]:
    """``"beta[0]"``, ``"cov[1,0]"``, one for each number in a tree, in the order of `ravel`."""
    names: list[str] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        site = str(path[0].key) + "".join(f".{_key(key)}" for key in path[1:])
        names += [site + (f"[{','.join(map(str, index))}]" if index else "") for index in np.ndindex(np.shape(leaf))]
    return tuple(names)


def acts_elementwise(constraint: Constraint) -> bool:
    """True if each constrained number comes from one unconstrained number."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    transform = biject_to(constraint)
    return transform.domain.event_dim == 0 and transform.codomain.event_dim == 0


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
