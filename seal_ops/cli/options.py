"""Options that several subcommands of ``seal`` have, and what is made of them: the model, the task, the prompts."""

import os
import sys

from .option_types import chat_format, extension, json_object, not_negative, positive, setting


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


def check_backend(args, needs: str, given: bool) -> None:
    """ValueError where ``--backend`` would choose nothing: attention runs as ops where there are scales."""
    if args.backend is not None and not given:
        raise ValueError(f"--backend must be given with {needs}, whose attention it chooses, got {args.backend} alone")


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
