"""Checkpoints of a run, and parameters read back from one (Orbax); workdir.py has the files."""

import contextlib
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

from adacm2_jax.distributed import is_main, wait_for_all
from adacm2_jax.errors import UserError
from adacm2_jax.models.params import STACKS, Layers, split
from adacm2_jax.models.quantized import (
    kind_of,
    quantize,
    quantize_stack,
    require_qwix,
    scale_path,
)
from adacm2_jax.runs.damage import reading
from adacm2_jax.runs.stored import open_array
from adacm2_jax.runs.workdir import LINK, PARAMS_DIR, absolute, is_base, param_trees, write_link
from adacm2_jax.training.step import TrainState

#: Numbers of a parameter that is read by itself.
_LARGE = 1 << 24


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: of the run.
      keep: how many of the newest steps stay on disk.
      keep_every: steps that divide by it stay for ever; 0: none.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        self._workdir = pathlib.Path(absolute(workdir))
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
            stored = stored_leaves(absolute(init_from) / PARAMS_DIR)
            write_link(self._workdir, init_from)
            frozen = {
                path: leaf
                for path, leaf in frozen.items()
                if path not in stored or kind_of(leaf.dtype) != kind_of(stored[path].dtype)
            }
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
      base: see ``workdir.find_base``.

    Returns:
      The leaves of ``abstract`` by path, for each Orbax tree that holds some of them. A kernel that
      is to be quantised has the dtype in which it is stored, and its scales are not there.

    Raises:
      UserError: if there is no checkpoint, it is damaged, or its parameters are not the model's.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    found: dict = {}
    lines = []
    before: set[str] = set()
    for part in param_trees(directory, step, base):
        stored = {p: leaf for p, leaf in stored_leaves(part).items() if p not in before}
        found[part] = {p: _as_stored(p, stored, flat, directory) for p in stored if p in flat}
        before |= set(found[part])
        before |= {scale_path(p) for p, leaf in found[part].items() if leaf.dtype != flat[p].dtype}
        for path, shape in sorted((path, leaf.shape) for path, leaf in stored.items()):
            if path not in flat:
                lines.append(f" - {path} {shape}")
            elif shape != flat[path].shape:
                lines += [f" - {path} {shape}", f" + {path} {flat[path].shape}"]
    if lines:
        raise UserError(
            f"{directory} holds parameters of another model (- stored, + expected):\n"
            + "\n".join(lines[:40])
        )
    absent = sorted(set(flat) - before)
    refused = [path for path in absent if not any(re.fullmatch(name, path) for name in missing)]
    if refused:
        raise UserError(
            f"{directory} lacks {len(refused)} parameters of the model, the first is {refused[0]}; "
            "was it saved with another configuration? What may start fresh is named by init_missing"
        )
    return found


def _as_stored(path: str, stored: dict, flat: dict, directory: str | os.PathLike) -> Any:
    """The leaf of a parameter as it is to be read: where it is quantised then, as it is stored.

    Raises:
      UserError: if it is stored in eight bits and wanted otherwise.
    """
    leaf, wanted = stored[path], flat[path]
    held, kind = kind_of(leaf.dtype), kind_of(wanted.dtype)
    if held == kind:
        return wanted
    if held:
        raise UserError(
            f"{directory} holds its language model in {held} alone: set model.llm.quantize (or "
            f"--quantize) to {held!r}, or convert the original again"
        )
    require_qwix()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted.sharding)


def stored_leaves(tree: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """path → shape and dtype of what an Orbax tree with flat names holds.

    Raises:
      UserError: if it is damaged.
    """
    with reading(tree), contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        stored = handler.metadata(tree).tree
        return {
            path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
            for path, leaf in stored.items()
        }


def restore_params(
    directory: str | os.PathLike,
    abstract: dict,
    step: int | None = None,
    missing: Sequence[str] = (),
    base: str = "",
    paths: Collection[str] | None = None,
    apart: bool = False,
) -> dict[str, Any]:
    """The parameters that :func:`find_params` finds, by path: on any mesh, on one device.

    Large parameters are read one after the other, and quantised as they are read.

    Args:
      directory, abstract, step, missing, base: of :func:`find_params`.
      paths: those to read; by default all.
      apart: what is stacked over layers is read layer by layer, and is ``params.Layers``: no more
        than a layer is held twice. For one device.

    Raises:
      UserError: as :func:`find_params` does.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    restored: dict = {}
    stacks = tuple("/".join(stack) + "/" for stack in STACKS) if apart else ()
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:

        def restore(part: epath.Path, wanted: dict) -> dict:
            with reading(part):
                places = ocp.checkpoint_utils.construct_restore_args(wanted)
                args = ocp.args.PyTreeRestore(wanted, restore_args=places, partial_restore=True)
                return handler.restore(part, args=args)

        for part, leaves in find_params(directory, abstract, step, missing, base).items():
            wanted = {p: leaf for p, leaf in leaves.items() if paths is None or p in paths}
            for path in sorted(p for p in wanted if stacks and p.startswith(stacks)):
                with reading(part):
                    restored |= _read_layers(part, path, wanted.pop(path), flat)
            # Orbax holds all that it restores at once on the host, too.
            for path in sorted(p for p, leaf in wanted.items() if leaf.size > _LARGE):
                leaf = wanted.pop(path)
                if apart:
                    with reading(part):
                        values = open_array(part, path).read().result().astype(leaf.dtype)
                        restored[path] = jax.device_put(values, leaf.sharding)
                else:
                    restored |= _as_wanted(restore(part, {path: leaf}), flat)
            if wanted:
                restored |= _as_wanted(restore(part, wanted), flat)
    return restored


def _read_layers(tree: epath.Path, path: str, leaf: Any, flat: dict) -> dict[str, Layers]:
    """One stacked parameter layer by layer; quantised, where it is to be, with its scales."""
    stored, wanted = open_array(tree, path), flat[path]
    made, scales = Layers(), Layers()
    for number, like in enumerate(split(wanted)):
        values = stored[number].read().result().astype(leaf.dtype)
        if leaf.dtype == wanted.dtype:
            made.append(jax.device_put(values, like.sharding))
            continue
        scale = split(flat[scale_path(path)])[number]
        pair = quantize(jax.device_put(values, like.sharding), scale.shape, wanted.dtype)
        made.append(jax.block_until_ready(pair)[0])
        scales.append(jax.device_put(pair[1], scale.sharding))
    jax.block_until_ready(list(made))
    return {path: made} | ({scale_path(path): scales} if scales else {})


def _as_wanted(found: dict[str, jax.Array], flat: dict) -> dict[str, jax.Array]:
    """What has been read; of it that is quantised which is to be."""
    made = dict(found)
    for path, leaf in found.items():
        if leaf.dtype != flat[path].dtype:
            scale = scale_path(path)
            pair = quantize_stack(leaf, flat[path], flat[scale])
            made[path], made[scale] = jax.block_until_ready(pair)
            leaf.delete()
    return made


def _abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
