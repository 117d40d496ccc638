"""Trains AdaCM² on videos with questions and answers.

    python train.py --config configs/needle.py:first --workdir runs/first [--config.train.steps=100]

The same command goes on with a run that was stopped, from its newest checkpoint, also on another
mesh, with another number of processes (see adacm2_jax/distributed.py), or to more steps.
"""

if __name__ == "__main__":  # Ctrl-C ends the imports, too, which take seconds
    from adacm2_jax import interrupt

    interrupt.end_at_once()

import sys

from absl import flags
from ml_collections import config_flags

from adacm2_jax.commands.train import train_and_evaluate
from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError
from adacm2_jax.inference.evaluate import table
from adacm2_jax.runs import app, experiment


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", lock_config=True, help_string="The experiment.")
    flags.DEFINE_string("workdir", None, "Where the run is kept.")
    flags.DEFINE_integer("profile", 0, "Steps to trace into WORKDIR/profile; 0: none.", 0)


def main() -> None:
    args = flags.FLAGS
    for name, example in (("config", "configs/needle.py"), ("workdir", "runs/mine")):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing: give one, such as --{name} {example}")
    workdir = app.directory("workdir", args.workdir)
    results = train_and_evaluate(experiment.read(args.config), workdir, args.profile)
    if is_main():
        print(table(results))


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, __doc__)
