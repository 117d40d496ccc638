"""What the scripts share: flags, configuration files, and errors fit for people."""

import itertools
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence

from adacm2_jax import distributed
from adacm2_jax.errors import UserError


def run(
    main: Callable[[], int | None],
    argv: Sequence[str],
    user_errors: tuple[type[Exception], ...],
    complete: Callable[[Sequence[str]], list[str]] = list,
) -> None:
    """Parses absl flags, as ``complete`` fills them up, runs ``main`` and exits.

    Flags that every script has: ``--debug``, and those that join several processes.

    An error that its reader can mend (a ``UserError``, one of ``user_errors``, a wrong flag or
    configuration field, a full disk) becomes one line on stderr and exit status 2, another process
    that is gone likewise and status 75; ``--debug`` shows where it was raised.
    """
    from absl import flags, logging

    flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")
    flags.DEFINE_boolean("distributed", False, "One of several processes, as TPU or SLURM say.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0, to name them by hand.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds until all processes must have come.")
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    debug = "--debug" in argv
    expected: tuple[type[Exception], ...] = (UserError, flags.Error, *user_errors)
    try:
        argv = complete(argv)
        _check_config_file(argv)
        sys.argv = argv  # ml_collections looks for overrides there, whatever is parsed
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags start with --, try --help")
        _join_others()
        status = main()
        distributed.wait_for_all()
    except expected as error:
        _report(error, debug, distributed.leave_together)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if explained := distributed.explain(error):
            _report(explained, debug, distributed.leave)
        if not _from_configuration(error):
            raise
        _report(_missing_field(argv) or error, debug)
    else:
        sys.exit(status or 0)


def directory(name: str, path: str) -> str:
    """The value of a flag that names a directory to write to or to find a run in.

    Raises:
      UserError: for an address in a bucket: each process would take it for a local directory.
    """
    if "://" in path:
        raise UserError(
            f"--{name}={path} must be a directory of a mounted file system, not an address in a "
            "bucket; docs/tpu.md says how to mount one"
        )
    return path


def _check_config_file(argv: Sequence[str]) -> None:
    """Says in one line what ml_collections says in six."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            path = (value if equals else following).split(":")[0]
            if not pathlib.Path(path).is_file():
                raise UserError(f"--config {path}: no such file; experiments are in configs/")


def _join_others() -> None:
    from absl import flags

    given = flags.FLAGS
    distributed.initialize(
        given.distributed,
        given.coordinator,
        given.num_processes,
        given.process_id,
        given.join_timeout,
    )


def _from_configuration(error: Exception) -> bool:
    """Whether ml_collections raised it while reading a configuration file or an override."""
    if not isinstance(error, AttributeError | LookupError | TypeError | ValueError | OSError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any("ml_collections" in frame.filename for frame in frames[-3:])


def _missing_field(argv: Sequence[str]) -> UserError | None:
    """The first override of a field that the configuration does not have: ml_collections raises
    its bare name. None if there is no such override."""
    words = dict(word.lstrip("-").partition("=")[::2] for word in argv if word.startswith("-"))
    following = dict(itertools.pairwise(argv))
    given = words.get("config") or following.get("--config") or following.get("-config") or ""
    path, _, argument = given.partition(":")
    overrides = [name for name in words if re.fullmatch(r"config(\.\w+)+", name)]
    if not overrides or not pathlib.Path(path).is_file():
        return None
    config = runpy.run_path(path)["get_config"](*([argument] if argument else []))
    for name in overrides:
        section, place = config, "the configuration"
        for field in name.split(".")[1:]:
            if not hasattr(section, "keys"):
                return UserError(f"--{name}: there is no such field; {place} is a single value")
            if field not in section:
                accepted = ", ".join(sorted(map(str, section.keys())))
                return UserError(
                    f"--{name}: there is no such field; those of {place} are {accepted}"
                )
            before = "" if place == "the configuration" else f"{place}."
            section, place = section[field], before + field
    return None


def _report(error: Exception, debug: bool, leave: Callable[[int], None] = sys.exit) -> None:
    if debug:
        traceback.print_exception(error)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {message}", file=sys.stderr, flush=True)
    leave(error.status if isinstance(error, UserError) else UserError.status)
