"""``seal study``."""

from dataclasses import fields

from ..huggingface.loading import shipped
from .options import Command, Numbers, folder_option, list_files, log, model_options, positive, setting


def options(parser):
    from ..experiments.comparison import METHODS
    from ..experiments.study import Settings

    default = {f.name: f.default for f in fields(Settings)}
    model_options(parser, required=False)
    parser.set_defaults(model=default["model"])
    parser.add_argument("--task", default=default["task"], help="compared, and whose heads are looked at")
    parser.add_argument("--lengths", action=Numbers, default=list(default["lengths"]), help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=default["cases"], help="test cases at each length")
    parser.add_argument("--samples", type=positive, default=default["samples"], help="training samples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is compared")
    parser.add_argument("--rates", type=setting, nargs="+", default=[], metavar="METHOD=RATES", help="as in seal compare")
    parser.add_argument(
        "--transfer-tasks", nargs="+", default=list(default["transfer_tasks"]), metavar="TASK", help="of the matrix"
    )
    parser.add_argument("--transfer-method", choices=METHODS, default=default["transfer_method"], help="of the matrix")
    parser.add_argument("--transfer-length", type=positive, default=default["transfer_length"], help="of the matrix")
    parser.add_argument("--heads-lengths", action=Numbers, default=list(default["heads_lengths"]), help="tokens")
    parser.add_argument("--heads-cases", type=positive, default=default["heads_cases"], help="samples at each of them")
    parser.add_argument("--factor", type=float, default=default["factor"], help="a small step besides removal")
    parser.add_argument("--seed", type=int, default=default["seed"], help="draws all samples")
    folder_option(parser, "tables, plots and a report")


def run(args):
    from ..experiments import study

    values = {f.name: getattr(args, f.name) for f in fields(study.Settings)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    values |= {"rates": dict(args.rates), "model": shipped(args.model)}
    results = study.run(study.Settings(**values), args.output, log=log)
    print("\n" + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items()))
    list_files(args.output, ["report.html", "study.json", "comparison.csv", "transfer.csv", "heads.csv"])


COMMAND = Command(
    "comparison, transfer matrix and head influence in one run, with a report",
    "seal study --model models/seal-tiny --output study",
    options,
    run,
)
