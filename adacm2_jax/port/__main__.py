"""PyTorch checkpoints to adacm2-jax and back; docs/porting.md has the recipes.

    python -m adacm2_jax.port import --src instructblip-vicuna-7b --dst weights [--verify]
    python -m adacm2_jax.port import --src eva_vit_g.pth instruct_blip_vicuna7b_trimmed.pth
        vicuna-7b-v1.1 --bert bert-base-uncased --dst weights
    python -m adacm2_jax.port import --src instructblip-vicuna-7b checkpoint_best.pth --dst weights
    python -m adacm2_jax.port export --src weights --dst instructblip --format hf|lavis

Several paths after --src are laid over each other, the last on top.
"""

if __name__ == "__main__":  # Ctrl-C ends the imports, too, which take seconds
    from adacm2_jax import interrupt

    interrupt.end_at_once()

import argparse
import contextlib
import logging
import os
import pathlib
import signal
import sys
import traceback

from adacm2_jax import interrupt
from adacm2_jax.errors import UserError
from adacm2_jax.port.destination import stop


def main(argv: list[str], program: str = "python -m adacm2_jax.port") -> int:
    """The whole command; returns its exit status.

    Args:
      argv: what stands behind ``program``.
      program: how it was called, for ``--help``.

    Raises:
      SystemExit: after ``--help``, for a flag that there is not, and after SIGTERM.
    """
    args = parse(argv, program)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports what no user needs
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with interrupt.raised():
            use_cpu()
            return run(args)
    except UserError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupt.say("; nothing was written")
        return interrupt.STATUS
    finally:
        signal.signal(signal.SIGTERM, before)


def use_cpu() -> None:
    """Leaves accelerators alone unless the environment names one: the comparison is in float32, as
    torch's is, and a TPU that is not there would report that in front of it."""
    if not os.environ.get("JAX_PLATFORMS"):
        import jax

        jax.config.update("jax_platforms", "cpu")


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program,
        description=(__doc__ or "").replace("python -m adacm2_jax.port", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--dst", required=True, help="directory to be made; import also takes gs://")
    both.add_argument("--force", action="store_true", help="replace what is there")
    both.add_argument("--debug", action="store_true", help="show the traceback of an error")
    both.add_argument(
        "--verify", action="store_true", help="read both sides again and compare values and outputs"
    )
    into = commands.add_parser("import", parents=[both], help="PyTorch to ours")
    into.add_argument("--src", required=True, nargs="+", help="parts, the last on top")
    into.add_argument(
        "--bert", help="Q-Former tokenizer, for LAVIS: bert-base-uncased or vocab.txt"
    )
    into.add_argument("--allow-llm", default="", help="a version of Vicuna besides v1.1, e.g. v1.5")
    into.add_argument(
        "--dtype",
        default="",
        choices=["float32", "bfloat16", "float16"],
        help="of the result; by default each parameter's own",
    )
    into.add_argument(
        "--quantize",
        default="",
        choices=["int8", "fp8"],
        help="keep the matrices of the language model's layers in eight bits",
    )
    out = commands.add_parser("export", parents=[both], help="ours to PyTorch")
    out.add_argument("--src", required=True, help="a converted checkpoint or a run of train.py")
    out.add_argument("--format", required=True, choices=["hf", "lavis"])
    out.add_argument(
        "--drop-temporal", action="store_true", help="hf: leave the temporal table out"
    )
    for made in (into, out):
        made.set_defaults(error=made.error)  # which shows its own usage
    args, rest = parser.parse_known_args(argv)
    if rest:
        args.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def run(args: argparse.Namespace) -> int:
    if args.command == "import":
        from adacm2_jax.port.importer import import_checkpoint

        base = import_checkpoint(
            args.src,
            args.dst,
            bert=args.bert,
            allow_llm=args.allow_llm,
            dtype=args.dtype,
            quantize=args.quantize,
            force=args.force,
        )
        print(f"{args.dst}: {base['parameters']:,} parameters, fingerprint {base['fingerprint']}")
        if base["missing"]:
            print(f"not in the source: {', '.join(base['missing'])} (see init_missing)")
        return verify(args.src, args.dst) if args.verify else 0
    from adacm2_jax.port.exporter import export_checkpoint

    export_checkpoint(
        args.src, args.dst, args.format, drop_temporal=args.drop_temporal, force=args.force
    )
    print(f"{args.dst}: written")
    return verify(exported_parts(args.dst, args.format), args.src) if args.verify else 0


def exported_parts(directory: str, form: str) -> list[str]:
    """What ``import --src`` would be given to read an export back."""
    root = pathlib.Path(directory)
    if form == "hf":
        return [str(root)]
    return [str(path) for path in (*sorted(root.glob("*.pth")), root / "vicuna")]


def verify(theirs: list[str], ours: str) -> int:
    """Prints both tables; 1 if anything differs."""
    from adacm2_jax.port.formats import TorchParams, open_checkpoint
    from adacm2_jax.port.store import open_ours
    from adacm2_jax.port.verify import compare_outputs, compare_values, given_table, table

    with contextlib.closing(open_checkpoint(theirs)) as source:
        config, params = open_ours(ours)
        stored = TorchParams(source)
        print(given_table(source, stored))
        rows = compare_values(stored, params)
        print(table("values, bit by bit", rows))
        try:
            import torch
        except ImportError:
            print("outputs were not compared: torch is not installed")
        else:
            with torch.inference_mode():
                outputs = compare_outputs(source.config, stored, params, config.llm.quantize)
            print(table("outputs, relative to the largest", outputs))
            rows += outputs
    bad = [row.what for row in rows if not row.good]
    print(f"differs: {', '.join(bad)}" if bad else "verified")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
