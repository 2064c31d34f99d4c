"""A command line from a dataclass of settings: help, limits and a settings file stand in its fields."""

import math
import sys
from collections.abc import Sequence
from dataclasses import field, fields
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from clinical_lf.files import WORDS, InputError

LIMITS = {"low": ("at least", ge), "high": ("at most", le), "above": ("above", gt), "below": ("below", lt)}


def setting(default: Any, help_text: str, hint: str = "", alone: str = "", **limits: Any) -> Any:
    """Return a field: help, its limits low, high (allowed), above, below (not) and a hint beside them.

    alone: the value where its option stands alone.
    """
    metadata: dict[str, Any] = {"nargs": "?", "const": alone} if alone else {}
    metadata |= {"limits": limits, "hint": hint, "help": help_text.replace("%", "%%")}  # a lone % is argparse's
    start = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**start, metadata=metadata)


def cli_name(name: str) -> str:
    """Return the option of a setting: `d_model` is `--d-model`."""
    return f"--{name.replace('_', '-')}"


def settings_from(argv: Sequence[str] | None, kind: Any, description: str | None) -> Any:
    """Return a command line's settings, options over a first *.yaml; code 2 (notebook: InputError) if unsound."""
    from transformers import HfArgumentParser

    class SettingsParser(HfArgumentParser):
        def add_argument(self, *names: str, limits: Any = None, hint: str = "", **options: Any) -> Any:
            return super().add_argument(*names, **options)  # argparse knows no limits

        def error(self, message: str) -> Any:
            said = f"{message.replace('unrecognized arguments:', 'unknown option')}. --help lists all options."
            if "ipykernel" in sys.modules:  # where a SystemExit says nothing
                raise InputError(said) from None
            self.exit(2, f"error: {said}\n")

    summary = str(description).split("\n\n")[0]
    parser = SettingsParser(kind, description=summary, allow_abbrev=False, **WORDS["command_line"])
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml")):
        path = Path(words.pop(0))
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"{path}: cannot be read as a settings file ({type(error).__name__})")
        if not isinstance(content, dict):
            parser.error(f"{path}: no settings file; it holds lines such as 'max_epochs: 20'")
        if unknown := [str(name) for name in content if name not in kind.__dataclass_fields__]:
            parser.error(f"{path}: unknown settings {', '.join(unknown)}")
        parser.set_defaults(**content)
    return kind(**vars(parser.parse_args(words)))


def check_limits(settings: Any) -> None:
    """Refuse a value of another type, outside its field's limits or not among its choices (InputError)."""
    kinds = get_type_hints(type(settings))
    for entry in fields(settings):
        value, kind, limits = getattr(settings, entry.name), kinds[entry.name], entry.metadata["limits"]
        wanted = " and ".join(f"{LIMITS[side][0]} {limit:g}" for side, limit in limits.items())
        if get_origin(kind) is Literal:
            is_sound, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
        else:
            is_of_kind = isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)
            is_sound = is_of_kind and isinstance(value, bool) == (kind is bool) and value not in (math.inf, -math.inf)
            is_sound = is_sound and all(LIMITS[side][1](value, limit) for side, limit in limits.items())
        if not is_sound:
            must_be = (wanted or f"of type {kind.__name__}") + entry.metadata["hint"]
            raise InputError(f"{cli_name(entry.name)} {value}: out of range; it must be {must_be}.")
