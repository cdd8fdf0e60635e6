"""Configuration files: every subcommand takes ``--config FILE.yaml``.

Its keys are the names of the command's options ("-" and "_" are equal).  What the command line says wins over the file.
"""

import argparse
import json

from .option_types import Numbers, json_object


def config_option(parser):
    """--config."""
    parser.add_argument("--config", metavar="FILE", help="YAML with options of this command; the command line wins")


def configured(argv: list[str]) -> str | None:
    """The file that ``--config`` names in ``argv``, if any."""
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None


def configure(parser: argparse.ArgumentParser, path: str) -> None:
    """Makes what a YAML file says the defaults of ``parser``.

    Raises:
        ValueError: not a mapping, an unknown key or a bad value; the key is named.
        OSError: the file cannot be read.
    """
    import yaml

    with open(path, encoding="utf-8-sig") as file:
        try:
            content = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"config {path} must be YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config {path} must map options to values, got {type(content).__name__}")
    known = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config", "traceback")}
    for key, value in content.items():
        action = known.get(str(key).replace("-", "_"))
        if action is None:
            listed = ", ".join(sorted(known))
            raise ValueError(f"config {path}: key must be one of {listed}, got {key!r}")
        try:
            action.default = _value(action, value)
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            raise ValueError(f"config {path}: value of {key} {_reason(error, value)}") from None
        action.required = False


def _value(action, value):
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"must be true or false, got {value!r}")
        return value
    if action.nargs == "?" and isinstance(value, bool):  # a switch that may name a kind
        return action.const if value else None
    if value is None:
        return None
    if action.nargs == "+" or isinstance(action, argparse._AppendAction):
        if isinstance(value, dict):
            value = [f"{k}={v}" for k, v in value.items()]
        found = [_one(action, v) for v in (value if isinstance(value, list) else [value])]
        return [number for part in found for number in part] if isinstance(action, Numbers) else found
    if isinstance(value, dict) and action.type is json_object:
        return json_object(json.dumps(value))
    if isinstance(value, (list, dict)):
        raise argparse.ArgumentTypeError(f"must be a single value, got {value!r}")
    return _one(action, value)


def _one(action, value):
    found = action.type(str(value)) if action.type else str(value)
    if action.choices is not None and found not in action.choices:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return found


def _reason(error, value):
    text = str(error)
    return text if text.startswith("must") else f"must have the option's type, got {value!r}"
