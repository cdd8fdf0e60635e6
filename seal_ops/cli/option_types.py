"""The types of options: what a word of the command line must look like, and the value that it becomes."""

import argparse
import json
import os


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


class Numbers(argparse.Action):
    """Positive integers, written ``300 600`` or ``300,600``."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs="+", type=numbers, metavar=options.pop("metavar", "N"), **options)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [number for part in values for number in part])


def numbers(text: str) -> list[int]:
    """``300,600`` as a list of integers of at least 1."""
    try:
        return [positive(part) for part in str(text).split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers like 300,600, got {text}") from None


def plot_file(text: str) -> str:
    """A file name that ends like a plot."""
    from ..report.plots import FORMATS

    if os.path.splitext(text)[1].lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end with one of {', '.join(FORMATS)}, got {text}")
    return text


def chat_format(text: str):
    """auto, on, off, or a format with {prompt} in it."""
    known = {"auto": None, "on": True, "off": False, "True": True, "False": False}  # the last two: YAML's on and off
    return known.get(text, text)


def json_object(text: str) -> dict:
    """A JSON object, like ``{"enable_thinking": false}``."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object like {_EXAMPLE}, got {text} ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object like {_EXAMPLE}, got {text}")
    return found


_EXAMPLE = '{"enable_thinking": false}'


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return number


def positive_number(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def setting(text: str) -> tuple[str, object]:
    """``KEY=VALUE``, the value read as YAML: ``depths=5``, ``LoRA=[2e-4, 2e-3]``; numbers may be written ``2e-4``."""
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"must look like KEY=VALUE, got {text}")
    try:
        return key.strip(), _numbers(yaml.safe_load(value))
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"must have a YAML value, got {text}") from None


def extension(text: str) -> tuple[str, dict]:
    """``METHOD`` or ``METHOD:key=value,...`` of `seal_ops.extend`: ``self_extend:group=8,window=1024``."""
    from ..huggingface.context_extension.methods import METHODS

    method, _, rest = text.partition(":")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"must begin with one of {', '.join(METHODS)}, got {text}")
    return method, dict(setting(part) for part in rest.split(",") if part)


def _numbers(value):
    # YAML 1.1 reads 2e-4, without a point, as text.
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
