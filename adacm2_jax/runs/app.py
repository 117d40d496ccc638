"""What scripts and commands share: flags, configuration files, and errors fit for people."""

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from adacm2_jax import distributed, interrupt
from adacm2_jax.errors import UserError, check_text, printable, show_warnings
from adacm2_jax.runs import command_line

#: Switches the compilation cache off, or names another directory for it.
CACHE = "ADACM2_JAX_CACHE"


def run(
    main: Callable[[], int | None],
    argv: Sequence[str],
    doc: str,
    complete: Callable[[Sequence[str]], list[str]] = list,
) -> None:
    """Parses absl flags, as ``complete`` fills them up, runs ``main`` and exits.

    Flags that every script has: ``--help``, ``--debug``, and those that join several processes.

    Args:
      main: returns an exit status.
      argv: the command line.
      doc: what the script does; ``--help`` begins with it.
      complete: adds to the command line.
    """
    from absl import flags

    flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")
    flags.DEFINE_boolean("distributed", False, "One of several processes, as TPU or SLURM say.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0, to name them by hand.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds until all processes must have come.")
    if {"--help", "-help", "-h", "--helpfull"} & set(argv[1:]):
        print(_help(doc))
        sys.exit(0)

    def parsed() -> int | None:
        words = complete([check_text(word, "an argument") for word in argv])
        sys.argv = words  # ml_collections looks for overrides there, whatever is parsed
        command_line.parse(words)
        _join_others()
        return main()

    guarded(parsed, "--debug" in argv)


def guarded(main: Callable[[], int | None], debug: bool = False) -> None:
    """Runs ``main`` and exits with its status.

    An error that its reader can mend (a ``UserError``, a full disk, a package that an extra
    installs) becomes one line on stderr and exit status 2, another process that is gone likewise
    and status 75, Ctrl-C likewise and status 130; ``debug`` shows where an error was raised. Where
    nobody reads what is printed any more, as after ``| head``, it ends silently.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is ASCII alone
    show_warnings()
    keep_compiled()
    try:
        with interrupt.raised():
            status = main()
            distributed.wait_for_all()
    except UserError as error:
        _report(error, debug, distributed.leave_together)
    except KeyboardInterrupt:
        interrupt.say()
        distributed.leave(interrupt.STATUS)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            distributed.leave(128 + signal.SIGPIPE)
        if explained := distributed.explain(error):
            _report(explained, debug, distributed.leave)
        if missing := command_line.missing_package(error):
            _report(missing, debug)
        raise
    else:
        sys.exit(status or 0)


def keep_compiled() -> None:
    """Keeps what XLA compiles between processes, in the user's cache directory.

    ``ADACM2_JAX_CACHE`` names another directory, ``off`` switches it off; a cache that JAX has been
    given (``JAX_COMPILATION_CACHE_DIR``) stays.
    """
    import jax

    given = os.environ.get(CACHE, "")
    if given == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    jax.config.update(
        "jax_compilation_cache_dir", given or os.path.join(home, "adacm2_jax", "compiled")
    )
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A command compiles dozens of small programs, which together take seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def directory(name: str, path: str) -> str:
    """The value of a flag that names a directory to write to or to find a run in.

    Raises:
      UserError: for an address in a bucket: each process would take it for a local directory; or
        for what is there and is none.
    """
    if not path:
        raise UserError(f"--{name} is empty; name a directory")
    if "://" in path:
        raise UserError(
            f"--{name}={path} must be a directory of a mounted file system, not an address in a "
            "bucket; docs/tpu.md says how to mount one"
        )
    given = f"--{name}={printable(path)}"
    if os.path.isfile(path):
        raise UserError(f"{given} is a file; name a directory")
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # nor can it ever be made
            raise UserError(f"{given}: {error.strerror}; name another directory") from None
    if os.path.lexists(path) and not os.path.isdir(path):
        what = "a link to nothing" if os.path.islink(path) else "no directory"
        raise UserError(f"{given} is {what}; name a directory")
    return path


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is closed, or no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _help(doc: str) -> str:
    from absl import flags

    given = flags.FLAGS
    lines = [doc.strip(), "", "Flags:"]
    for name in sorted(given):
        # Libraries define dozens of their own.
        module = given.find_module_defining_flag(name) or ""
        if not (module == sys.argv[0] or module.startswith(__package__.partition(".")[0])):
            continue
        flag = given[name]
        default = "" if flag.default in (None, False, "", []) else f" (default {flag.default})"
        lines.append(f"  --{name:15} {flag.help or ''}{default}")
    lines.append("  --config.FIELD=VALUE overrides a field; docs/configuration.md has them all")
    return "\n".join(lines)


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


def _report(error: Exception, debug: bool, leave: Callable[[int], None] = sys.exit) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr, flush=True)
    leave(error.status if isinstance(error, UserError) else UserError.status)
