"""``seal card``."""

from .command import Command


def options(parser):
    parser.add_argument("--scales", required=True, metavar="DIR", help="trained scales, whose model card is written")
    parser.add_argument(
        "--before", required=True, nargs="+", metavar="FILE", help="results of `seal eval --output` without the scales"
    )
    parser.add_argument(
        "--after", required=True, nargs="+", metavar="FILE", help="results with the scales, in the same order"
    )


def run(args):
    from ..adapters.model_card import update_card
    from ..evaluation.model_card_results import card_results
    from ..evaluation.results import Evaluation

    if len(args.before) != len(args.after):
        raise ValueError(f"--before and --after must name as many files, got {len(args.before)} and {len(args.after)}")
    pairs = [(Evaluation.load(before), Evaluation.load(after)) for before, after in zip(args.before, args.after)]
    print(update_card(args.scales, [result for pair in pairs for result in card_results(*pair)]))


COMMAND = Command(
    "write the accuracy before and after into the model card of scales",
    "seal card --scales my-scales --before base.json --after result.json",
    options,
    run,
)
