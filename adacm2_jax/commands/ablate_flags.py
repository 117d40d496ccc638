"""The flags of ``adacm2 ablate``, without what the command itself imports."""

import argparse


def add_flags(made: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    made.add_argument(
        "--model", action="append", required=True, metavar="RUN", help="may be given several times"
    )
    made.add_argument(
        "--memory",
        action="append",
        required=True,
        metavar="SPEC",
        help="POLICY, or LABEL=POLICY:FIELD=VALUE:…, such as adacm2:decay=0.5; may be given "
        "several times. A size that it does not name is that of the others, rounded up",
    )
    made.add_argument(
        "--tokens",
        default=None,
        metavar="N,…",
        help="that a layer is to hold, whatever the policy (default: what the run's ratios give)",
    )
    made.add_argument(
        "--frames", default=None, metavar="T,…", help="lengths of the videos (default: the run's)"
    )
    made.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=V,…",
        help="a field of the experiment and its values, such as data.suite.tasks=needle,order",
    )
    made.add_argument(
        "--set", action="append", default=[], metavar="FIELD=V", help="a field of the experiment"
    )
    made.add_argument("--split", default=None, help="that is asked about (default: the run's)")
    made.add_argument("--limit", type=int, default=0, help="questions of a cell (default: all)")
    made.add_argument(
        "--output", required=True, metavar="DIR", help="tables, figures and every answer go there"
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
