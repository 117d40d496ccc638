"""Command lines of absl flags and configuration files: what is wrong with one, in one line."""

import itertools
import pathlib
import re
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from adacm2_jax.errors import UserError, printable, reason

#: Package → the extra that installs it.
_EXTRAS = {
    **dict.fromkeys(
        ("av", "PIL", "tokenizers", "transformers", "sentencepiece", "safetensors"), "video"
    ),
    **dict.fromkeys(("torch",), "port"),
    **dict.fromkeys(("qwix",), "int8"),
    **dict.fromkeys(
        (
            "fastapi",
            "prometheus_client",
            "pydantic",
            "python_multipart",
            "starlette",
            "uvicorn",
        ),
        "serve",
    ),
    **dict.fromkeys(("gradio",), "demo"),
    **dict.fromkeys(("grain", "ml_collections", "array_record", "tensorflow_datasets"), "run"),
    **dict.fromkeys(("matplotlib", "sklearn", "absl", "ml_dtypes"), "run"),
}
#: Type of a flag, as absl names it → what it takes.
_ACCEPTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "tuple": "values in parentheses, such as \"('a', 'b')\"",
}
_GIVE = "give a file of configs/, such as configs/needle.py"


def parse(argv: Sequence[str]) -> None:
    """Parses absl flags, ``--config`` and the overrides of its fields among them.

    Raises:
      UserError: for a file that is no experiment, a field that does not exist, a value of another
        type, and an argument that is no flag.
    """
    from absl import flags

    if (config := _configuration(argv)) is not None:
        _check_fields(argv, config)
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_value(str(error), argv)) from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    except Exception as error:
        if not _from_configuration(error):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(str(message)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; flags start with --, try --help")


def missing_package(error: BaseException) -> UserError | None:
    """How to install what is not there, if one of our extras has it."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    if package in ("data", "configs"):
        return UserError(
            "this command needs the repository (data/ and configs/): run it in a clone, at its root"
        )
    if package not in _EXTRAS:
        return None
    return UserError(
        f"the package {package} is not installed: pip install 'adacm2-jax[{_EXTRAS[package]}]', "
        f"or in a clone pip install --editable '.[{_EXTRAS[package]}]'"
    )


def _configuration(argv: Sequence[str]) -> Any:
    """What the file of ``--config`` gives, None where none is named.

    absl reads it again; this one says in one line what is wrong with it.
    """
    words = itertools.zip_longest(argv, argv[1:], fillvalue="")
    for word, following in words:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            path, colon, argument = (value if equals else following).partition(":")
            return _run(path, [argument] if colon else [])
    return None


def _run(path: str, arguments: Sequence[str]) -> Any:
    name = f"--config {printable(path)}"
    if not pathlib.Path(path).is_file():
        raise UserError(f"{name}: no such file; experiments are in configs/")
    try:
        made = runpy.run_path(path)
        if "get_config" not in made:
            raise UserError(f"{name} defines no get_config(); {_GIVE}")
        config = made["get_config"](*arguments)
    except UserError:
        raise
    except Exception as error:
        if missing_package(error):
            raise
        if isinstance(error, SyntaxError) and error.filename in (None, path):
            line = f", line {error.lineno}" if error.lineno else ""
            raise UserError(
                f"{name} is no Python file ({printable(error.msg)}{line}); {_GIVE}"
            ) from error
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f" at line {lines[-1]}" if lines else ""
        raise UserError(
            f"{name} cannot be run: {type(error).__name__}{where}: {printable(reason(error))}; "
            "correct it, --debug shows more"
        ) from error
    if not hasattr(config, "to_dict"):
        raise UserError(
            f"{name}: its get_config() gives {printable(repr(config)[:40])}; it must give a "
            "ConfigDict, see configs/base.py"
        )
    return config


def _check_fields(argv: Sequence[str], config: Any) -> None:
    """Refuses overrides of fields that there are not: ml_collections raises their bare names."""
    words = [word.lstrip("-").partition("=")[0] for word in argv if word.startswith("-")]
    for name in words:
        if not re.fullmatch(r"(no)?config(\.\w+)+", name):
            continue
        section, place = config, "the configuration"
        for field in name.split(".")[1:]:
            if not hasattr(section, "keys"):
                raise UserError(f"--{name}: there is no such field; {place} is a single value")
            if field not in section:
                accepted = ", ".join(sorted(map(str, section.keys())))
                raise UserError(
                    f"--{name}: there is no such field; those of {place} are {accepted}"
                )
            before = "" if place == "the configuration" else f"{place}."
            section, place = section[field], before + field


def _wrong_value(message: str, argv: Sequence[str]) -> str:
    """Field, value and what is accepted, of what absl says of a value that it cannot read."""
    from absl import flags

    found = re.fullmatch(r"flag --([\w.]+)=(.*?): (.*)", message, re.DOTALL)
    if not found or found[1] not in flags.FLAGS:
        return reason(ValueError(message), 300)
    name, value, why = found.groups()
    given = [word.partition("=") for word in argv]
    value = next((text for flag, _, text in given if flag.lstrip("-") == name and text), value)
    parser = flags.FLAGS[name].parser
    accepted = _ACCEPTED.get(parser.flag_type())
    if not accepted:
        return f"--{name}={printable(value)}: {printable(reason(ValueError(why)))}"
    least = getattr(parser, "lower_bound", None)
    bound = "" if least is None else f" of at least {least}"
    return f"--{name}={printable(value)}: it must be {accepted}{bound}"


def _from_configuration(error: Exception) -> bool:
    """Whether ml_collections raised it while reading an override."""
    if not isinstance(error, AttributeError | LookupError | TypeError | ValueError | OSError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any("ml_collections" in frame.filename for frame in frames[-3:])
