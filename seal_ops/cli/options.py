"""What the subcommands of ``seal`` share: option types, groups of options, and configuration files.

Every subcommand takes ``--config FILE.yaml``, whose keys are the names of its options ("-" and "_" are equal); what the
command line says wins over the file.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand; ``run`` returns the exit code, None being 0, and ``kept`` what an interrupted one has left."""

    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    kept: Callable[[argparse.Namespace], str] | None = None


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there are any; examples as they are written."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


# ---------------------------------------------------------------------------------------------------- option types


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


# --------------------------------------------------------------------------------------------------- option groups


def model_options(parser, required=True):
    """What :func:`seal_ops.huggingface.loading.load_model` takes; a model of its own kind in commands with
    ``required=False``.

    --model, --device, --dtype; where the model is required also --device-map, --quantization, --revision and
    --trust-remote-code.
    """
    from ..huggingface.loading import DTYPE_CHOICES, QUANTIZATIONS

    parser.add_argument("--model", required=required, metavar="NAME", help="model folder, name on the hub, or smollm2")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="default", choices=DTYPE_CHOICES,
        help="default: bfloat16 on a GPU, else float32; auto: the checkpoint's own",
    )  # fmt: skip
    if not required:
        return
    parser.add_argument("--device-map", metavar="MAP", help="spread a large model over devices: auto, balanced, ...")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="load in 4 (NF4) or 8 bits with bitsandbytes")
    parser.add_argument("--revision", help="of a model on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model on the hub")


def extend_option(parser):
    """--extend, which `load` heeds."""
    parser.add_argument(
        "--extend", type=extension, metavar="METHOD[:KEY=VALUE,...]",
        help="read beyond the trained length, like self_extend:group=8,window=1024 (docs/context_extension.md)",
    )  # fmt: skip


def task_options(parser, required=True):
    """--task, --task-option, --chat-format and --chat-template-kwargs."""
    parser.add_argument(
        "--task",
        default="lines" if required else None,
        help="name of a task (docs/tasks.md), documents:FILE, or module:Class",
    )
    parser.add_argument(
        "--task-option",
        type=setting,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options of the task, like keys=32",
    )
    chat_option(parser)


def chat_option(parser):
    """--chat-format and --chat-template-kwargs."""
    parser.add_argument(
        "--chat-format", type=chat_format, default="auto", metavar="FORMAT",
        help="auto (the tokenizer's, if it has one), on, off, or a text like 'USER: {prompt} ASSISTANT:'",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template-kwargs", type=json_object, metavar="JSON",
        help="variables of the chat template, like '{\"enable_thinking\": true}' (default: that is false)",
    )  # fmt: skip


def noise_option(parser):
    """--quadrant-noise."""
    parser.add_argument(
        "--quadrant-noise", type=not_negative, default=2.0, metavar="ERRORS",
        help="a unit is harmful or helpful where its change is more than so many standard errors from 0",
    )  # fmt: skip


def prompts(args) -> dict:
    """What the chat options say, as the functions that draw samples take it."""
    return {"chat_template": args.chat_format, "chat_template_kwargs": args.chat_template_kwargs}


def backend_option(parser):
    """--backend."""
    parser.add_argument(
        "--backend", default=None, help="of the fused ops: cuda, triton, cpu, reference (default: chosen)"
    )


# `train`'s argument by the option's value; a configuration file's `false` is None.
_CHECKPOINTING = {"off": False, None: False, "on": True}


def checkpointing_option(parser, planned=True):
    """--gradient-checkpointing; with ``planned`` it may be auto, which is the default."""
    text = "what layers keep for the backward pass: on, their input alone; selective, the attention's results too; off, all"  # noqa: E501
    parser.add_argument(
        "--gradient-checkpointing", nargs="?", const="on", default="auto" if planned else "off",
        choices=["auto"] * planned + ["selective", "on", "off"],
        help=text + ("; auto, what memory allows (seal plan shows it)" if planned else ""),
    )  # fmt: skip


def frozen_linears_option(parser):
    """--frozen-linears."""
    parser.add_argument(
        "--frozen-linears", choices=["fp8"],
        help="multiply with the frozen linear layers in this while training (a bfloat16 model; default: 16 bits)",
    )  # fmt: skip


def checkpointing(args) -> bool | str:
    """What --gradient-checkpointing says, as :func:`seal_ops.train` takes it."""
    return _CHECKPOINTING.get(args.gradient_checkpointing, args.gradient_checkpointing)


def task(args):
    """The task that ``args`` name."""
    return named_task(args.task, **dict(args.task_option))


def named_task(name, **options):
    """A task by its name on the command line; ``module:Class`` may lie in the working directory."""
    from .. import tasks

    if ":" in name and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return tasks.make(name, **options) if options else tasks.get(name)


def load(args):
    """``(model, tokenizer)`` that ``args`` name."""
    from ..huggingface.loading import load_model

    model, tokenizer = load_model(
        args.model, device=args.device, dtype=args.dtype, device_map=args.device_map, quantization=args.quantization,
        revision=args.revision, trust_remote_code=args.trust_remote_code, call=f"seal {args.command}",
    )  # fmt: skip
    if getattr(args, "extend", None) is not None:
        from ..huggingface.context_extension.extending import extend

        method, options = args.extend
        extend(model, method, **options)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------- configuration files


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

    with open(path, encoding="utf-8") as file:
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


def restart_option(parser):
    """--restart."""
    parser.add_argument("--restart", action="store_true", help="begin anew, where --output holds an unfinished run")


def method_options(parser):
    parser.add_argument("--samples", type=positive, default=50, help="training samples")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")


def load_model_fn(args):
    """A function that loads the model anew."""
    return lambda: load(args)


def folder_option(parser, what="tables and plots"):
    parser.add_argument("--output", required=True, metavar="DIR", help=f"folder for {what}; a second run continues it")


def kept(args) -> str:
    """What an interrupted run leaves that is continued by the same command."""
    again = "the same command without --restart" if getattr(args, "restart", False) else "the same command"
    return f"what is finished lies in {args.output}; {again} goes on from there"


def log(line):
    print(line, flush=True)


def list_files(folder, names):
    for name in names:
        print(os.path.join(folder, name))
