# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Trees of arrays in one file: a zip archive of ``.npy`` members and a JSON header.

Nothing in the file is code: no pickle, no class names. The structure of a tree comes from the program that reads it,
the file only says what is to be found at which path, with shape and type. It can be looked at with `numpy.load`.

A file is replaced by `os.replace` after its successor has reached the disk, so a process that is killed at any moment
leaves the old file or the new one, never a part. Every member carries a checksum.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

FORMAT = 1
HEADER = "header.json"
_DAMAGE = (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError, NotImplementedError, AttributeError)
_KEY = "key "  # begins the type of PRNG keys; the generator follows


class Saved(NamedTuple):
    """Contents of such a file.

    Attributes:
        header: What the writer said about it; JSON.
        arrays: NumPy arrays and typed PRNG keys by path, as `jax.tree_util.keystr` spells it.
    """

    header: dict[str, Any]
    arrays: dict[str, Any]


def save(path: str | os.PathLike, header: Mapping[str, Any], tree: Any) -> None:
    """Write a tree of arrays, replacing a file that is there.

    Args:
        path: The file.
        header: What JSON can hold.
        tree: A pytree of arrays (typed PRNG keys among them).

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    leaves = [(jax.tree_util.keystr(where), leaf) for where, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    arrays = {where: _plain(leaf) for where, leaf in leaves}
    types = {where: _type(leaf) for where, leaf in leaves}
    described = {"format": FORMAT, "header": header, "arrays": types}
    # One name for all unfinished files of a path: those of killed processes do not pile up.
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(HEADER, json.dumps(described, indent=1))
            for where, array in arrays.items():
                with archive.open(f"{where}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync_directory(path.parent)


def load(path: str | os.PathLike) -> Saved:
    """Read a file that `save` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no such file, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            described = json.loads(archive.read(HEADER))
            version = described["format"]
            types = described["arrays"].items() if version == FORMAT else ()
            saved = Saved(
                described.get("header"), {where: _typed(_read(archive, where), name) for where, name in types}
            )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no checkpoint at '{path}'. It is written by run(..., checkpoint='{path}')."
        ) from error
    except (PermissionError, IsADirectoryError):
        raise
    # A damaged directory may send a read anywhere, or ask for a password.
    except (*_DAMAGE, OSError, RuntimeError) as error:
        raise ValueError(f"'{path}' is no checkpoint of this package, or it is damaged ({error}).") from error
    if version != FORMAT:
        raise ValueError(f"'{path}' is a checkpoint of format {version}, this version reads {FORMAT}.")
    return saved


def restore(saved: Saved, name: str, template: Any) -> Any:
    """The tree that was saved under ``name`` in the outermost dictionary.

    Args:
        saved: What was read.
        name: Key of the outermost dictionary that was saved.
        template: A tree of that structure whose leaves have ``shape`` and ``dtype``; a dimension of -1 may be any.

    Raises:
        ValueError: If structure, shapes or types differ; the message names the first that does.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path({name: template})
    wanted = {jax.tree_util.keystr(where): leaf for where, leaf in leaves}
    found = {where for where in saved.arrays if where.startswith(f"['{name}']")}
    for where in sorted(wanted.keys() ^ found):
        has, needs = ("nothing", "an array") if where in wanted else ("an array", "nothing")
        raise ValueError(
            f"The checkpoint has {has} at {where}, but with this model and these settings there is {needs}."
        )
    for where, leaf in wanted.items():
        value = saved.arrays[where]
        fits = len(value.shape) == len(leaf.shape) and all(
            b in (-1, a) for a, b in zip(value.shape, leaf.shape, strict=True)
        )
        if not fits or value.dtype != leaf.dtype:
            needed = str(tuple(leaf.shape)).replace("-1", "any")
            raise ValueError(
                f"The checkpoint has {value.dtype} of shape {value.shape} at {where}, where this model with these "
                f"settings has {leaf.dtype} of shape {needed}."
            )
    return jax.tree.unflatten(treedef, [saved.arrays[where] for where in wanted])[name]


def without_addresses(text: str) -> str:
    """The text of a `repr` without what changes from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def digest(program: Any) -> str:
    """A short name for a closed jaxpr, its constants included, that is the same in every process."""
    total = hashlib.sha256(without_addresses(str(program.jaxpr)).encode())
    for constant in program.consts:
        total.update(_plain(jnp.asarray(constant)).tobytes())
    return total.hexdigest()[:16]


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _type(leaf: Any) -> str:
    """The name of a type of numbers, or of a generator of random numbers."""
    return _KEY + str(random.key_impl(leaf)) if _is_key(leaf) else str(leaf.dtype)


def _plain(leaf: Any) -> np.ndarray:
    array = np.asarray(random.key_data(leaf) if _is_key(leaf) else leaf)
    # Types that NumPy does not know (bfloat16) are written as the bytes that they are.
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _typed(array: np.ndarray, name: str) -> Any:
    """Undo `_plain`."""
    if name.startswith(_KEY):
        return random.wrap_key_data(jnp.asarray(array), impl=name.removeprefix(_KEY))
    return array if str(array.dtype) == name else array.view(jnp.dtype(name))


def _read(archive: zipfile.ZipFile, where: str) -> np.ndarray:
    whole = archive.read(f"{where}.npy")  # verifies the checksum before anything is believed
    return np.lib.format.read_array(io.BytesIO(whole), allow_pickle=False)


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
