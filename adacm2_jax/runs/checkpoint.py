"""What a run leaves on disk, and how it is read back (Orbax).

::

    workdir/config.json                 the experiment, written once
    workdir/{qformer,llm}_tokenizer/    Hugging Face tokenizers
    workdir/frozen/                     parameters that never change, written once (if any)
    workdir/frozen.json                 or where they are: a converted checkpoint, its fingerprint
    workdir/checkpoints/<step>/         learned parameters, optimiser, place in the data

A converted checkpoint (``python -m adacm2_jax.port``), called a base, holds ``config.json`` with
the model alone, the tokenizers, ``params/`` with all parameters and ``base.json``, which says where
they are from. A run that starts from a base does not copy what it leaves as it is; what counts is
the base's fingerprint, not its place.

A step's directory gets its name when it is complete, so a process that is killed while it saves
leaves a directory with a temporary name, which nobody reads. One that is killed while it removes an
old step may leave a part of that; the newest step is then complete.

Of several processes each writes its shards, process 0 all else; the directory must be one that all
of them share. Nothing on disk depends on the mesh or on the number of processes.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from adacm2_jax.damage import reading
from adacm2_jax.distributed import is_main, wait_for_all
from adacm2_jax.errors import UserError
from adacm2_jax.training.step import TrainState

#: Directory of all parameters in a converted checkpoint.
PARAMS_DIR = "params"
#: Of a run that starts from a base: where that is, and its fingerprint.
LINK = "frozen.json"


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: of the run.
      keep: how many of the newest steps stay on disk.
      keep_every: steps that divide by it stay for ever; 0: none.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        self._workdir = pathlib.Path(workdir).absolute()
        policies = ocp.checkpoint_managers
        stay: list = [policies.LatestN(keep)]
        stay += [policies.EveryNSteps(keep_every)] if keep_every else []
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(stay),
                create=True,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, data: dict) -> None:
        """Saves a step in the background; an error of it is raised by :meth:`check` or by the next
        save.

        Args:
          state: after the step.
          data: the place in the data, for JSON.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                learned=ocp.args.StandardSave(state.learned),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                data=ocp.args.JsonSave(data),
            ),
        )

    def save_frozen(self, frozen: dict, init_from: str = "") -> None:
        """Writes the frozen parameters before the first step is saved, in place of older ones.

        Args:
          frozen: by path.
          init_from: what the run starts from. What a base has is not written, but named.
        """
        if is_main():
            shutil.rmtree(self._workdir / "frozen", ignore_errors=True)
            (self._workdir / LINK).unlink(missing_ok=True)
        wait_for_all()
        if init_from and is_base(init_from):
            stored = stored_shapes(_absolute(init_from) / PARAMS_DIR)
            write_link(self._workdir, init_from)
            frozen = {path: leaf for path, leaf in frozen.items() if path not in stored}
        if frozen:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._workdir / "frozen", frozen)

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, state: TrainState) -> tuple[TrainState, dict]:
        """The newest step, in the shapes and on the devices of ``state``; its place in the data.

        Args:
          state: arrays, or shapes with shardings; on any mesh. ``frozen`` stays as it is.

        Raises:
          UserError: if the checkpoint is damaged.
        """
        step = self._manager.latest_step()
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        with reading(self._workdir / "checkpoints" / str(step) / "*"):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    learned=ocp.args.StandardRestore(_abstract(state.learned)),
                    optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        return state.replace(learned=restored["learned"], **restored["optimizer"]), restored["data"]

    def check(self) -> None:
        """Raises the error of a save that has failed in the background; does not wait for one."""
        if not self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()

    def wait(self) -> None:
        """Waits until what is being written is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees what was used."""
        self._manager.close()


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The complete steps of a run, the newest last."""
    names = [path.name for path in (epath.Path(workdir) / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def is_base(directory: str | os.PathLike) -> bool:
    """Whether this is a converted checkpoint, complete."""
    return (epath.Path(directory) / "base.json").exists()


def read_base(directory: str | os.PathLike) -> dict:
    """What a converted checkpoint says of itself: ``fingerprint``, ``sources`` …; {} for a run."""
    return _read_json(epath.Path(directory) / "base.json")


def read_link(workdir: str | os.PathLike) -> dict:
    """``path`` and ``fingerprint`` of the base that a run has its frozen parameters of; or {}."""
    return _read_json(epath.Path(workdir) / LINK)


def write_link(workdir: str | os.PathLike, base: str | os.PathLike) -> None:
    """Notes where the base of a run is; process 0 alone does."""
    link = {"path": str(_absolute(base)), "fingerprint": read_base(base)["fingerprint"]}
    if is_main():
        write_json(epath.Path(workdir) / LINK, link)


def find_base(workdir: str | os.PathLike, init_from: str = "") -> epath.Path | None:
    """The base that a run has its frozen parameters of; None if it keeps them itself.

    Args:
      workdir: of the run.
      init_from: where the base may be now; else it is where it was when the run started.

    Raises:
      UserError: if it is in neither place.
    """
    link = read_link(workdir)
    if not link:
        return None
    found = []
    for place in filter(None, dict.fromkeys([init_from, link["path"]])):
        fingerprint = read_base(place).get("fingerprint")
        if fingerprint == link["fingerprint"]:
            return _absolute(place)
        what = f"another one, fingerprint {fingerprint[:12]}" if fingerprint else "none"
        found.append(f"there is {what} at {place}")
    raise UserError(
        f"{workdir} needs the converted checkpoint with fingerprint {link['fingerprint'][:12]} for "
        f"its frozen parameters, but {' and '.join(found)}; if it has moved, name its place: "
        "--config.init_from=NEW"
    )


def find_params(
    directory: str | os.PathLike,
    abstract: dict,
    step: int | None = None,
    missing: Sequence[str] = (),
    base: str = "",
) -> dict[epath.Path, dict[str, jax.ShapeDtypeStruct]]:
    """Where a model's parameters are, without reading one.

    Args:
      directory: of a run, or of a converted checkpoint.
      abstract: the parameter tree as ``jax.ShapeDtypeStruct`` leaves with shardings.
      step: of a run: which; by default the newest.
      missing: regular expressions over paths that need not be there.
      base: see :func:`find_base`.

    Returns:
      The leaves of ``abstract`` by path, for each Orbax tree that holds some of them.

    Raises:
      UserError: if there is no checkpoint, it is damaged, or its parameters are not the model's.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    found: dict = {}
    lines = []
    for part in param_trees(directory, step, base):
        stored = stored_shapes(part)
        before = {path for paths in found.values() for path in paths}
        found[part] = {p: flat[p] for p in stored if p in flat and p not in before}
        for path, shape in sorted(stored.items()):
            if path not in flat:
                lines.append(f" - {path} {shape}")
            elif shape != flat[path].shape and path not in before:
                lines += [f" - {path} {shape}", f" + {path} {flat[path].shape}"]
    if lines:
        raise UserError(
            f"{directory} holds parameters of another model (- stored, + expected):\n"
            + "\n".join(lines[:40])
        )
    absent = sorted(set(flat) - {path for part in found.values() for path in part})
    refused = [path for path in absent if not any(re.fullmatch(name, path) for name in missing)]
    if refused:
        raise UserError(
            f"{directory} lacks {len(refused)} parameters of the model, the first is {refused[0]}; "
            "was it saved with another configuration? What may start fresh is named by init_missing"
        )
    return found


def stored_shapes(tree: epath.Path) -> dict[str, tuple[int, ...]]:
    """path → shape of what an Orbax tree with flat names holds.

    Raises:
      UserError: if it is damaged.
    """
    with reading(tree), contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        stored = handler.metadata(tree).tree
        return {path: tuple(leaf.shape) for path, leaf in stored.items()}


def restore_params(
    directory: str | os.PathLike,
    abstract: dict,
    step: int | None = None,
    missing: Sequence[str] = (),
    base: str = "",
    paths: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """The parameters that :func:`find_params` finds, by path: on any mesh, on one device.

    Args:
      directory, abstract, step, missing, base: of :func:`find_params`.
      paths: those to read; by default all.

    Raises:
      UserError: as :func:`find_params` does.
    """
    restored: dict = {}
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        for part, leaves in find_params(directory, abstract, step, missing, base).items():
            wanted = {p: leaf for p, leaf in leaves.items() if paths is None or p in paths}
            if not wanted:
                continue
            with reading(part):
                places = ocp.checkpoint_utils.construct_restore_args(wanted)
                args = ocp.args.PyTreeRestore(wanted, restore_args=places, partial_restore=True)
                restored |= handler.restore(part, args=args)
    return restored


def param_trees(
    directory: str | os.PathLike, step: int | None = None, base: str = ""
) -> list[epath.Path]:
    """The Orbax trees, with flat names, that make up a model; of a path that is in several, the
    first counts.

    Args:
      directory: of a run, or of a converted checkpoint.
      step: of a run: which; by default the newest.
      base: see :func:`find_base`.

    Raises:
      UserError: if there is none.
    """
    root = _absolute(directory)
    if is_base(root):
        return [root / PARAMS_DIR]
    if (root / PARAMS_DIR).exists():
        raise UserError(f"{root} is half of a converted checkpoint; convert it again")
    steps = saved_steps(root)
    if not steps:
        raise UserError(f"{root}: no checkpoint here; train first, or name another directory")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"{root}: no checkpoint of step {step}; there are {steps}")
    frozen = [root / "frozen"] if (root / "frozen").exists() else []
    linked = find_base(root, base)
    frozen += [linked / PARAMS_DIR] if linked else []
    return [root / "checkpoints" / str(step) / "learned", *frozen]


def _absolute(directory: str | os.PathLike) -> epath.Path:
    path = epath.Path(directory)
    return path if "://" in os.fspath(directory) else path.absolute()


def write_config(workdir: str | os.PathLike, config: dict) -> None:
    """Writes ``config.json`` beside, then renames it; process 0 alone does."""
    if is_main():
        write_json(epath.Path(workdir) / "config.json", config)


def read_config(workdir: str | os.PathLike) -> dict:
    """The experiment that made a run.

    Raises:
      UserError: if there is none, or it is no JSON.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{workdir}: no config.json here; is this a directory of train.py?"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it from where the run was started"
        ) from None


def check_same(
    stored: dict, current: dict, workdir: str | os.PathLike, free: tuple[str, ...]
) -> None:
    """Refuses to go on with a run under another configuration.

    Args:
      stored: configuration of the run.
      current: that of this command.
      workdir: of the run.
      free: dotted prefixes of fields that may change between commands.

    Raises:
      UserError: with a readable difference.
    """
    if lines := _difference(stored, current, free):
        raise UserError(
            f"{workdir} holds a run of another configuration (- stored, + this command); use "
            "another --workdir, or the stored values:\n" + "\n".join(lines)
        )


def check_alike(stored: dict, current: dict) -> None:
    """Refuses to join processes that were started with different configurations.

    Args:
      stored: the configuration of process 0.
      current: that of this one.

    Raises:
      UserError: with a readable difference.
    """
    if lines := _difference(stored, current):
        raise UserError(
            f"process {jax.process_index()} was started with another configuration than process 0 "
            "(- process 0, + this one); start all by the same command:\n" + "\n".join(lines)
        )


def _difference(old: dict, new: dict, free: tuple[str, ...] = ()) -> list[str]:
    """The fields that differ, but those whose names start with one of ``free``, for people."""
    old, new = _flatten(old), _flatten(new)
    lines = []
    for name in sorted(set(old) | set(new)):
        same = (name in old) == (name in new) and old.get(name) == new.get(name)
        if not same and not name.startswith(free):
            lines += [f" - {name} = {old[name]!r}"] if name in old else []
            lines += [f" + {name} = {new[name]!r}"] if name in new else []
    return lines


def _read_json(path: epath.Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: pathlib.Path | epath.Path, value: Any) -> None:
    """Writes a JSON file beside, then renames it: there is never half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)


def _abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, item in tree.items()
        for name, value in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }
