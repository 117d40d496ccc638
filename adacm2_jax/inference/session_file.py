"""A saved session: one file of safetensors that gets its name when it is complete."""

import json
import os
import pathlib
import struct
from typing import Any

import jax

from adacm2_jax.errors import UserError, printable, reason
from adacm2_jax.files import check_writable, write_bytes
from adacm2_jax.inference.session_steps import SessionState

#: Of the file's own form, in every saved session.
_VERSION = 1
_KEY = "adacm2"


def write(path: str | os.PathLike, about: dict[str, Any], state: SessionState) -> None:
    """Writes a session beside, then renames it.

    Args:
      path: of the file.
      about: what is no array, as JSON takes it.
      state: what is.

    Raises:
      UserError: if it cannot be written.
    """
    from safetensors.flax import save

    path = pathlib.Path(path)
    check_writable(path.parent, f"the session goes to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {_KEY: json.dumps({"version": _VERSION} | about)}
    try:
        write_bytes(path, save(named(state), header))
    except OSError as error:
        raise UserError(
            f"the session cannot be written to {printable(str(path))} ({error.strerror}); make "
            "room there, or name another place"
        ) from None


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """What :func:`write` wrote: what is no array, and the arrays by name.

    Raises:
      UserError: for a file that is none, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = pathlib.Path(path)
    _check_file(path)
    try:
        with safe_open(path, framework="flax") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            leaves = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, reason(error)) from error
    return _checked(path, about), leaves


def read_about(path: str | os.PathLike) -> dict[str, Any]:
    """What is no array, and nothing else of the file.

    Raises:
      UserError: for a file that is none, or is damaged.
    """
    path = pathlib.Path(path)
    _check_file(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 1 << 24)))
        about = json.loads(header["__metadata__"][_KEY])
    except (OSError, KeyError, ValueError, TypeError, RecursionError, struct.error) as error:
        raise _damaged(path, reason(error)) from error
    return _checked(path, about)


def with_leaves(
    state: SessionState, leaves: dict[str, jax.Array], path: str | os.PathLike
) -> SessionState:
    """A state of the same form, with the arrays of a file.

    Raises:
      UserError: if they are not those of such a state.
    """
    expected = named(state)
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    if shapes != {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}:
        raise UserError(
            f"the session {printable(str(path))} is damaged: its arrays are not those of a session"
        )
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in expected])


def named(state: SessionState) -> dict[str, jax.Array]:
    """The leaves of a state by name, in its order."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():
        raise UserError(
            f"there is no session at {printable(str(path))}; give a file that Session.save wrote"
        )


def _checked(path: pathlib.Path, about: Any) -> dict[str, Any]:
    if not isinstance(about, dict):
        raise _damaged(path, "its header is no table")
    if about.get("version") != _VERSION:
        raise UserError(
            f"the session {printable(str(path))} has form {about.get('version')}, this version "
            f"reads {_VERSION}; resume it with the version that saved it"
        )
    return about


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"{printable(str(path))} is no session, or damaged ({printable(why)}); give a file that "
        "Session.save wrote"
    )
