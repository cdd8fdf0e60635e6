"""Times several builds of seal_ops beside each other: is a change of the kernels faster, and is no shape slower?

    pip install --no-build-isolation --no-deps --target /tmp/before CHECKOUT_A      # SEAL_BUILD_CUDA=1
    pip install --no-build-isolation --no-deps --target /tmp/after CHECKOUT_B
    python benchmarks/compare_builds.py before=/tmp/before after=/tmp/after --rounds 3 --only hd128 --output out.json

Each build lives in a process of its own. The processes take turns: one times a shape while the others wait, every
second round in the reverse order, so that all meet the same clock and heat. A case that raises is reported and does not
stop the rest. The table gives the median of every build and the first build's time divided by it (above 1: faster than
the first). The JSON has `cases`, and `builds` with what `seal env` says in each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

K = 1024
# name: batch, tokens, query heads, key heads, head_dim
SHAPES = {
    "tiny": (1, 64, 4, 2, 64),  # only where --only names it: do all builds run, also without a GPU?
    "hd128-32/32-1k": (32, 1 * K, 32, 32, 128),
    "hd128-32/8-2k": (16, 2 * K, 32, 8, 128),
    "hd128-32/32-4k": (8, 4 * K, 32, 32, 128),
    "hd128-32/8-8k": (4, 8 * K, 32, 8, 128),
    "hd128-64/8-8k": (2, 8 * K, 64, 8, 128),
    "hd128-32/8-32k": (1, 32 * K, 32, 8, 128),
    "hd64-64/64-4k": (8, 4 * K, 64, 64, 64),
    "hd64-64/64-16k": (2, 16 * K, 64, 64, 64),
    "hd256-16/16-8k": (4, 8 * K, 16, 16, 256),
    "hd256-32/2-8k": (4, 8 * K, 32, 2, 256),
}
WHAT = ("forward", "window", "backward", "deterministic", "rope_backward")


def worker(folder: str) -> None:
    """Reads `case` lines from standard input and answers each with the milliseconds of some calls, as JSON."""
    sys.path.insert(0, folder)
    import torch

    import seal_ops
    from seal_ops.bench.timing import Clock
    from seal_ops.ops.environment import facts

    if not os.path.abspath(seal_ops.__file__).startswith(os.path.abspath(folder)):
        raise SystemExit(f"compare_builds: {folder} must hold an installed seal_ops, got {seal_ops.__file__}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device)
    calls: dict[tuple[str, str], object] = {}

    def build(shape, what):
        batch, tokens, heads, kv_heads, dim = SHAPES[shape]
        torch.manual_seed(0)
        randn = lambda h: torch.randn(batch, tokens, h, dim, device=device, dtype=torch.bfloat16)
        q, k, v, scale = randn(heads), randn(kv_heads), randn(kv_heads), torch.rand(heads, dim, device=device) + 0.5
        if what in ("forward", "window"):
            window = 1024 if what == "window" else None
            return lambda: seal_ops.attention(q, k, v, scale, window=window)
        leaves = [t.requires_grad_() for t in (q, k, v, scale)]
        options = {"deterministic": what == "deterministic"}
        if what == "rope_backward":
            cos, sin = seal_ops.rope_tables(tokens, seal_ops.rope_frequencies(dim)[0], device=device)
            out = seal_ops.rope_attention(q, k, v, cos, sin, None, None, scale)
        else:
            out = seal_ops.attention(q, k, v, scale, **options)
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    print(json.dumps(facts()), flush=True)
    for line in sys.stdin:
        shape, what, repeat = json.loads(line)
        try:
            if (shape, what) not in calls:
                calls.clear()  # one case at a time in memory
                calls[shape, what] = build(shape, what)
                clock(calls[shape, what], 1)
            answer = {"ms": clock(calls[shape, what], repeat, 3)}
        except Exception as error:  # the other cases go on
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="cases whose SHAPE WHAT contains one of these words")
    parser.add_argument("--output", help="JSON of all times")
    args = parser.parse_args()
    builds = dict(b.partition("=")[::2] for b in args.builds)
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--worker", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name, folder in builds.items()
    }

    def answer_of(name):
        process = processes[name]
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"compare_builds: the process of {name} must answer, it ended with {process.wait()}")
        return json.loads(line)

    def ask(name, case):
        processes[name].stdin.write(json.dumps(case) + "\n")
        processes[name].stdin.flush()
        return answer_of(name)

    results = {}
    content = {"builds": {name: answer_of(name) for name in builds}, "cases": results}
    print(f"{'case':34}" + "".join(f"{name:>12}" for name in builds) + "   first / each")
    for shape in SHAPES:
        for what in WHAT:
            title = f"{shape} {what}"
            words = [word for word in args.only if word in title]
            if (args.only and not words) or (shape == "tiny" and "tiny" not in " ".join(words)):
                continue
            times, errors = {name: [] for name in builds}, {}
            for turn in range(args.rounds):
                for name in list(builds)[:: -1 if turn % 2 else 1]:
                    answer = ask(name, (shape, what, 8))
                    if "error" in answer:
                        errors[name] = answer["error"]
                    else:
                        times[name] += answer["ms"]
            medians = {name: statistics.median(t) if t else float("nan") for name, t in times.items()}
            first = medians[next(iter(builds))]
            shares = "  ".join(f"{first / medians[name]:.3f}" for name in list(builds)[1:])
            print(f"{title:34}" + "".join(f"{medians[n]:12.3f}" for n in builds) + f"   {shares}", flush=True)
            for name, error in errors.items():
                print(f"  {name}: {error}", flush=True)
            results[title] = {"ms": medians, "errors": errors}
            if args.output:
                with open(args.output, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main()
