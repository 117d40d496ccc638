"""What a run leaves on disk, and how it is read back (Orbax).

::

    workdir/config.json                 the experiment, written once
    workdir/{qformer,llm}_tokenizer/    Hugging Face tokenizers
    workdir/frozen/                     parameters that never change, written once (if any)
    workdir/checkpoints/<step>/         learned parameters, optimiser, data iterator

A step's directory gets its name when it is complete, so a killed process leaves at most a directory
with a temporary name, which nobody reads.
"""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from adacm2_jax.errors import UserError
from adacm2_jax.optim import merge_params
from adacm2_jax.train_step import TrainState


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: of the run.
      keep: how many of the newest steps stay on disk.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self._workdir = pathlib.Path(workdir).absolute()
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
        )

    def save(self, state: TrainState, data: Any) -> None:
        """Saves a step in the background.

        Args:
          state: after the step.
          data: how Orbax saves the data iterator's place, e.g. ``grain.checkpoint.CheckpointSave``.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                learned=ocp.args.StandardSave(state.learned),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                data=data,
            ),
        )

    def save_frozen(self, frozen: dict) -> None:
        """Writes the frozen parameters before the first step is saved, in place of older ones."""
        if frozen:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._workdir / "frozen", frozen, force=True)

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, state: TrainState, data: Any) -> TrainState:
        """The newest step, in the shapes and on the devices of ``state``.

        Args:
          state: of the run's shapes.
          data: how Orbax puts the data iterator in its place, e.g.
            ``grain.checkpoint.CheckpointRestore``.

        Raises:
          UserError: if the checkpoint is damaged.
        """
        step = self._manager.latest_step()
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    learned=ocp.args.StandardRestore(_abstract(state.learned)),
                    optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
                    data=data,
                ),
            )
        except Exception as error:
            raise _damaged(self._workdir / "checkpoints" / str(step) / "*", error) from error
        return state.replace(learned=restored["learned"], **restored["optimizer"])

    def wait(self) -> None:
        """Waits until what is being written is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees what was used."""
        self._manager.close()


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The complete steps of a run, the newest last."""
    names = [path.name for path in (pathlib.Path(workdir) / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def restore_params(workdir: str | os.PathLike, abstract: dict, step: int | None = None) -> dict:
    """The parameters of a run, without optimiser or data: on any mesh, on one device.

    Args:
      workdir: of the run.
      abstract: the parameter tree as ``jax.ShapeDtypeStruct`` leaves with shardings.
      step: which; by default the newest.

    Raises:
      UserError: if there is no checkpoint, it is damaged, or its parameters are not the model's.
    """
    from flax import traverse_util

    root, steps = pathlib.Path(workdir).absolute(), saved_steps(workdir)
    if not steps:
        raise UserError(f"{workdir}: no checkpoint here; train first, or name another directory")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"{workdir}: no checkpoint of step {step}; there are {steps}")
    path = root / "checkpoints" / str(step)
    parts = [path / "learned"] + ([root / "frozen"] if (root / "frozen").exists() else [])
    flat = traverse_util.flatten_dict(abstract, sep="/")
    found: dict = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for part in parts:
            try:
                stored = checkpointer.metadata(part).item_metadata.tree
                wanted = {name: flat[name] for name in stored if name in flat}
                extra = sorted(set(stored) - set(flat))
                wrong = sorted(n for n in wanted if tuple(stored[n].shape) != wanted[n].shape)
                if not (extra or wrong):
                    found |= checkpointer.restore(part, wanted)
            except Exception as error:
                raise _damaged(part, error) from error
            if extra or wrong:
                lines = [f" - {name} {tuple(stored[name].shape)}" for name in extra + wrong]
                lines += [f" + {name} {flat[name].shape}" for name in wrong]
                raise UserError(
                    f"{part} holds parameters of another model (- stored, + expected):\n"
                    + "\n".join(lines[:40])
                )
    missing = sorted(set(flat) - set(found))
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} parameters of the model, the first is {missing[0]}; was "
            "it saved with another configuration?"
        )
    return merge_params(found, {})


def write_config(workdir: str | os.PathLike, config: dict) -> None:
    """Writes ``config.json`` beside, then renames it."""
    write_json(pathlib.Path(workdir) / "config.json", config)


def read_config(workdir: str | os.PathLike) -> dict:
    """The experiment that made a run.

    Raises:
      UserError: if there is none, or it is no JSON.
    """
    path = pathlib.Path(workdir) / "config.json"
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
    old, new = _flatten(stored), _flatten(current)
    lines = []
    for name in sorted(set(old) | set(new)):
        same = (name in old) == (name in new) and old.get(name) == new.get(name)
        if not same and not name.startswith(free):
            lines += [f" - {name} = {old[name]!r}"] if name in old else []
            lines += [f" + {name} = {new[name]!r}"] if name in new else []
    if lines:
        raise UserError(
            f"{workdir} holds a run of another configuration (- stored, + this command); use "
            "another --workdir, or the stored values:\n" + "\n".join(lines)
        )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file beside, then renames it: there is never half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)


def _abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    first_line = str(error).strip().split("\n")[0][:120]
    remedy = f"delete {path.parent} to go on from an older step"
    if path.name == "frozen":
        remedy = "restore it from a copy, or train again"
    return UserError(
        f"checkpoint {path} is damaged or half-written ({type(error).__name__}: {first_line}); "
        + remedy
    )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, item in tree.items()
        for name, value in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }
