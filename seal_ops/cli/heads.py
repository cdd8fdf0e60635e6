"""``seal heads``."""

import os

from .command import Command, kept, list_files
from .option_types import Numbers, positive
from .options import (
    backend_option,
    checkpointing,
    checkpointing_option,
    extend_option,
    folder_option,
    load,
    model_options,
    noise_option,
    prompts,
    task,
    task_options,
)


def options(parser):
    from ..experiments.head_importance import METHODS

    model_options(parser)
    extend_option(parser)
    parser.add_argument("--scales", metavar="DIR", help="trained scales to put on the model")
    task_options(parser)
    parser.add_argument("--lengths", action=Numbers, required=True, help="tokens a sample fills")
    parser.add_argument("--cases", type=positive, default=20, help="samples at each length")
    parser.add_argument("--granularity", choices=["head", "channel"], default="head", help="what is taken away")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="how its effect is measured"
    )
    parser.add_argument("--factor", type=float, default=0.0, help="what ablation multiplies a scale by")
    parser.add_argument("--units", type=positive, help="ablate only so many, drawn by the seed (channels are many)")
    parser.add_argument("--batch-size", type=positive, help="variants in a forward pass (default: by length)")
    checkpointing_option(parser, planned=False)
    parser.add_argument(
        "--quadrants", action="store_true", help="then scale harmful units x0.9, helpful ones x1.1, measure"
    )
    parser.add_argument("--quadrant-cases", type=positive, default=50, help="test cases of that, at each length")
    parser.add_argument("--quadrant-measure", choices=["accuracy", "logprob", "gradient"], default="accuracy",
                        help="what decides harmful and helpful")  # fmt: skip
    noise_option(parser)
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")
    folder_option(parser)
    backend_option(parser)


def run(args):
    from ..adapters import attachment
    from ..experiments.head_importance import measure_head_importance
    from ..experiments.quadrants import group_by_sign, quadrant_experiment
    from ..report.writers import describe_agreement, write_head_importance, write_quadrants

    if args.quadrants and args.quadrant_measure != "gradient" and "ablation" not in args.methods:
        raise ValueError(f"--quadrant-measure {args.quadrant_measure} needs --methods ablation, got {args.methods}")
    model, tokenizer = load(args)
    if args.scales is not None:
        attachment.load(model, args.scales, backend=args.backend)
    found = measure_head_importance(
        model,
        tokenizer,
        task(args),
        args.lengths,
        args.cases,
        granularity=args.granularity,
        methods=args.methods,
        factor=args.factor,
        limit=args.units,
        batch_size=args.batch_size,
        seed=args.seed,
        **prompts(args),
        gradient_checkpointing=checkpointing(args),
        backend=args.backend,
        output=os.path.join(args.output, "heads.json"),
        resume=True,
    )
    write_head_importance(found, args.output)
    measure = "logprob" if "ablation" in args.methods else "gradient"
    change = found.change(measure)
    order = [i for i in change.argsort().tolist() if change[i] == change[i]]
    print(
        f"{len(found.units)} {args.granularity}s; largest changes of the answer's log-probability (nats, mean of all cases):"  # noqa: E501
    )
    for i in [*order[:5], *order[-5:]] if len(order) > 10 else order:
        layer, *place = found.units[i]
        print(f"   layer {layer:>2} {args.granularity} {'.'.join(map(str, place)):>6}: {change[i]:+8.3f}")
    print(describe_agreement(found))
    if args.quadrants:
        results = quadrant_experiment(
            model, tokenizer, found, task(args), args.lengths, args.quadrant_cases, measure=args.quadrant_measure,
            noise=args.quadrant_noise, output=os.path.join(args.output, "quadrants"), seed=args.seed, resume=True,
            backend=args.backend, **prompts(args),
        )  # fmt: skip
        groups = group_by_sign(found, args.quadrant_measure, args.quadrant_noise)
        write_quadrants(results, groups, found.units, args.output, args.quadrant_measure, args.quadrant_noise)
        for result in results.values():
            print(f"{result.name}\n{result.table()}")
    list_files(args.output, ["heads.json", "heads.csv", "heads.png", *(["quadrants.png"] if args.quadrants else [])])


COMMAND = Command(
    "what every head, or channel, does for retrieval: by ablation and by gradient",
    "seal heads --model models/seal-tiny --lengths 512 1024 --cases 10 --quadrants --output heads",
    options,
    run,
    kept,
)
