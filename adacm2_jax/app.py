"""What the scripts share: flags, configuration files, and errors fit for people."""

import sys
import traceback
from collections.abc import Callable, Sequence

from adacm2_jax.errors import UserError


def run(main: Callable[[], int | None], argv: Sequence[str], user_errors: tuple[type, ...]) -> None:
    """Parses absl flags, runs ``main`` and exits.

    An error that its reader can mend (a ``UserError``, one of ``user_errors``, a wrong flag or
    configuration field) becomes one line on stderr and exit status 2; ``--debug`` shows where it was
    raised.
    """
    from absl import flags, logging

    flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    debug = "--debug" in argv
    try:
        rest = flags.FLAGS(list(argv))[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags start with --, try --help")
        status = main()
    except (UserError, flags.Error, *user_errors) as error:
        _report(error, debug)
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        if not _from_configuration(error):
            raise
        _report(error, debug)
    else:
        sys.exit(status or 0)


def _from_configuration(error: Exception) -> bool:
    """Whether ml_collections raised it while reading a configuration file or an override."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any("ml_collections" in frame.filename for frame in frames[-3:])


def _report(error: Exception, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
