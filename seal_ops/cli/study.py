"""``seal study``."""

import os
from dataclasses import fields

from ..huggingface.loading import shipped
from .command import Command, kept, list_files, log
from .option_types import Numbers, positive, setting
from .options import chat_option, folder_option, model_options, noise_option


def options(parser):
    from ..experiments.comparison import METHODS
    from ..experiments.study import Settings

    default = {f.name: f.default for f in fields(Settings)}
    model_options(parser, required=False)
    parser.add_argument("--task", default=default["task"], help="compared, and whose heads are looked at")
    parser.add_argument("--lengths", action=Numbers, default=list(default["lengths"]), help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=default["cases"], help="test cases at each length")
    parser.add_argument("--samples", type=positive, default=default["samples"], help="training samples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is compared")
    parser.add_argument(
        "--rates", type=setting, nargs="+", default=[], metavar="METHOD=RATES", help="as in seal compare"
    )
    parser.add_argument(
        "--transfer-tasks", nargs="+", default=list(default["transfer_tasks"]), metavar="TASK", help="of the matrix"
    )
    parser.add_argument("--transfer-method", choices=METHODS, default=default["transfer_method"], help="of the matrix")
    parser.add_argument("--transfer-length", type=positive, default=default["transfer_length"], help="of the matrix")
    parser.add_argument("--heads-lengths", action=Numbers, default=list(default["heads_lengths"]), help="tokens")
    parser.add_argument("--heads-cases", type=positive, default=default["heads_cases"], help="samples at each of them")
    parser.add_argument("--factor", type=float, default=default["factor"], help="a small step besides removal")
    noise_option(parser)
    parser.add_argument("--seed", type=int, default=default["seed"], help="draws all samples")
    chat_option(parser)
    folder_option(parser, "tables, plots and a report")
    group = parser.add_argument_group(
        "a study of a pretrained model",
        "many small jobs; as many processes as there are GPUs may share the output folder",
    )
    group.add_argument(
        "--preset",
        choices=["smollm2", "smollm2-4bit", "smollm2-context"],
        help="the study of docs/real_model.md, docs/qeft.md or docs/context_extension.md instead; only the options "
        "below count",
    )
    group.add_argument("--budget-s", type=float, metavar="SECONDS", help="begin no job that would end later")
    group.add_argument("--workers", type=int, default=0, help="processes that draw samples ahead")
    group.add_argument("--text", metavar="FILE", help="English text for the perplexity; without it none is measured")
    group.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="only these, in this order")
    group.add_argument(
        "--summary", action="store_true", help="run nothing: tables, plots and a report of what is finished"
    )
    group.add_argument(
        "--plan", type=setting, nargs="+", default=[], metavar="KEY=VALUE", help="other settings, like cases=20"
    )


def run(args):
    if args.preset:
        return _preset(args)
    from ..experiments import study

    args.chat_template = args.chat_format
    values = {f.name: getattr(args, f.name) for f in fields(study.Settings)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    values |= {"rates": dict(args.rates), "model": shipped(args.model or study.Settings.model)}
    results = study.run(study.Settings(**values), args.output, log=log)
    print("\n" + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items()))
    list_files(args.output, ["report.html", "study.json", "comparison.csv", "transfer.csv", "heads.csv"])


def _settings(args, known):
    """What --plan gives of the fields ``known`` of a study's plan."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in args.plan}
    for key in given:
        if key not in known:
            raise ValueError(f"seal study: plan must be among {', '.join(sorted(known))}, got {key!r}")
    return given


def _quantized(args):
    from ..experiments.quantized_study.driver import STUDY, write_summary
    from ..experiments.quantized_study.plan import Plan

    _tabled(args, Plan, STUDY, write_summary)


def _context(args):
    from ..experiments.context_study.driver import STUDY
    from ..experiments.context_study.plan import Plan
    from ..experiments.context_study.summary import write_summary

    _tabled(args, Plan, STUDY, write_summary)


def _tabled(args, plan_of, study, write_summary):
    """A study whose summary is tables and plots, or that summary."""
    from ..huggingface.model_packages import resolve

    if args.summary:
        names = write_summary(args.output)
        if not names:
            raise ValueError(f"seal study: output must hold a finished job, got none in {args.output}")
        list_files(args.output, names)
        return
    known = {field.name for field in fields(plan_of)}
    given = {"text": args.text} | _settings(args, known)
    if args.sections:
        if "sections" not in known:
            raise ValueError(f"seal study: sections must not be given with {args.preset}, got {args.sections}")
        given["sections"] = tuple(args.sections)
    model = shipped(args.model) if args.model else resolve("smollm2", call="seal study", log=log)
    study.run(
        model, args.output, plan_of(**given), device=args.device, dtype=args.dtype, workers=args.workers,
        budget=args.budget_s, log=log,
    )  # fmt: skip


def _preset(args):
    if args.preset != "smollm2":
        return {"smollm2-4bit": _quantized, "smollm2-context": _context}[args.preset](args)
    from ..experiments.pretrained_study.driver import STUDY
    from ..experiments.pretrained_study.plan import Plan
    from ..experiments.pretrained_study.summary import write_summary
    from ..huggingface.model_packages import resolve
    from ..report.html import write_report

    given = _settings(args, {field.name for field in fields(Plan)})
    given |= {"text": args.text} | ({"sections": tuple(args.sections)} if args.sections else {})
    if args.summary:
        names = write_summary(args.output)
        if not names:
            raise ValueError(
                f"seal study: output must hold a finished job of the main table, got none in {args.output}"
            )
        list_files(args.output, [*names, os.path.basename(write_report(args.output, title=f"SEAL on {args.preset}"))])
        return
    model = shipped(args.model) if args.model else resolve(args.preset, call="seal study", log=log)
    STUDY.run(
        model,
        args.output,
        Plan(**given),
        device=args.device,
        dtype=args.dtype,
        workers=args.workers,
        budget=args.budget_s,
        log=log,
    )


COMMAND = Command(
    "comparison, transfer matrix and head importance in one run, with a report",
    "seal study --model models/seal-tiny --output study",
    options,
    run,
    kept,
)
