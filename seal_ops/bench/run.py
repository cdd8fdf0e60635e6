"""`seal bench`: gate, then time, shape by shape, and write every row as soon as it is there."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import shlex
import time

import torch
from torch import Tensor

from ..ops.backends import reference
from ..utils.usage import Help
from . import gate, host_time, report, timing, training_sizes
from .contestants import FORWARD_ONLY, OPERATIONS, Contestant, DecodeProblem, Problem, Run, all_contestants
from .shapes import MODELS, SUITES, Shape, parse_shape, part_of

EXAMPLE = """examples:
  seal bench --suite headline --fa3 ./fa3 --output results --budget-s 240
  for i in 1 2 3; do CUDA_VISIBLE_DEVICES=$i seal bench --part $i/3 --name h & done; wait; seal bench --merge benchmarks/results/h-part*.json"""  # noqa: E501
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `seal bench`."""
    parser.add_argument(
        "--suite",
        choices=[*SUITES, training_sizes.SUITE],
        help="registered shapes (headline on a GPU, smoke on a CPU, unless --shape is given), or whole training steps",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="MODEL:LENGTH[:BATCH]",
        help=f"a shape of your own, more than once if you like; MODEL is one of {', '.join(MODELS)}",
    )
    parser.add_argument(
        "--ops",
        help=f"comma-separated operations of {', '.join(OPERATIONS)} (the suite decode: decode; masks: attention; "
        "others: all but decode)",
    )
    parser.add_argument("--only", metavar="NAMES", help="comma-separated contestants (all that can run here)")
    parser.add_argument("--no-compiled", action="store_true", help="leave out contestants under torch.compile")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU, unless given")
    parser.add_argument("--device", help="cuda where there is one, unless given")
    parser.add_argument(
        "--fa3", metavar="FOLDER", help="folder with FlashAttention-3's library, a peer for timing only"
    )
    parser.add_argument(
        "--budget-s", type=float, default=600, metavar="SECONDS", help="start no new rows after this time"
    )
    parser.add_argument("--row-ms", type=float, default=180, metavar="MS", help="device time for each figure")
    parser.add_argument(
        "--output", default="benchmarks/results", metavar="FOLDER", help="folder for NAME.csv, .json, .md and .png"
    )
    parser.add_argument("--name", help="of the result files (suite and GPU)")
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="only the I-th of N parts of the shapes, each its own process, on a GPU of its own or later",
    )
    training_sizes.add_options(parser)
    parser.add_argument("--resume", action="store_true", help="keep what NAME.json holds already and measure the rest")
    parser.add_argument(
        "--merge",
        nargs="+",
        metavar="JSON",
        help="measure nothing: one report of these result files, such as the parts",
    )


def command_line(options: argparse.Namespace) -> str:
    """The options as typed, leaving out those at their defaults: what a result file records.  A folder that is named
    from the root of this machine says nothing on another, and is left out."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = ["seal", "bench"]
    for action in parser._actions:
        value = getattr(options, action.dest, action.default)
        if action.dest == "help" or value == action.default:
            continue
        if action.nargs == "+":
            words += [action.option_strings[0], *value]
            continue
        for item in value if isinstance(value, list) else [value]:
            shown = "FOLDER" if os.path.isabs(str(item)) else str(item)
            words += [action.option_strings[0]] if item is True else [action.option_strings[0], shown]
    return shlex.join(words)


@dataclasses.dataclass
class Session:
    """What the rows of a run share."""

    device: torch.device
    dtype: torch.dtype
    clock: timing.Clock
    ceilings: timing.Ceilings | None
    row_ms: float


def oracle(operation: str, problem: Problem, scaled: bool, grad: Tensor, cache: dict) -> dict[str, Tensor]:
    """fp64 results for the last key/value head of the last batch row; `grad` is the incoming gradient [S, G, D]
    there."""
    key = (operation, scaled)
    if key not in cache:
        g = problem.shape.geometry
        group = slice(g.heads - g.heads // g.kv_heads, g.heads)
        inputs = (
            problem.q[-1, :, group].detach(),
            problem.k[-1, :, -1].detach(),
            problem.v[-1, :, -1].detach(),
            grad,
            problem.scale.detach()[group] if scaled else None,
            problem.shape.visibility.by_heads(g.heads)[-1][1],
        )
        cache[key] = (
            gate.rotated_attention_slice(*inputs, problem.cos, problem.sin)
            if operation == "rope_attention"
            else gate.attention_slice(*inputs)
        )
    return cache[key]


def check_attention(
    operation: str, problem: Problem, contestant: Contestant, run: Run, cache: dict
) -> tuple[float, float, tuple]:
    """Runs a contestant once. Returns its worst error, its peak memory in MiB above the inputs, and (out, grad) for
    timing."""
    g = problem.shape.geometry
    group = slice(g.heads - g.heads // g.kv_heads, g.heads)
    if operation == "attention_o_proj":
        grad = problem.grad_out.flatten(2)  # of the projected [B, S, H * D]
        columns = problem.weight.view(-1, g.heads, g.head_dim)[:, group].double()
        grad_slice = torch.einsum("sc,cgd->sgd", grad[-1].double(), columns)
    else:
        grad = problem.grad_out
        grad_slice = grad[-1, :, group]
    expected = oracle(operation, problem, contestant.scaled, grad_slice, cache)
    before = _peak_reset(problem.device)
    out = run.forward()
    grads = torch.autograd.grad(out, run.inputs, grad, retain_graph=True)
    peak = _peak_since(problem.device, before)
    found = {"grad_q": grads[0][-1, :, group], "grad_k": grads[1][-1, :, -1], "grad_v": grads[2][-1, :, -1]}
    if operation != "attention_o_proj":
        found["out"] = out[-1, :, group]
    errors = [gate.error(found[name].detach(), expected[name], True) for name in found]
    if contestant.scaled:
        found_scale = grads[3]
        if (
            problem.shape.batch > 1
        ):  # summed over all rows, while the oracle saw the last: take it again from that row alone
            last = torch.zeros_like(grad)
            last[-1] = grad[-1]
            (found_scale,) = torch.autograd.grad(out, run.inputs[3], last, retain_graph=True)
        errors.append(
            gate.error(found_scale.detach().reshape(problem.scale.shape)[group], expected["grad_scale"], False)
        )
    return max(errors), peak, (out, grad)


def check_rope(problem: Problem, run: Run) -> tuple[float, float]:
    """Worst error of both rotated tensors against fp64 on the last batch row, and peak memory in MiB."""
    before = _peak_reset(problem.device)
    found = run.forward()
    peak = _peak_since(problem.device, before)
    cos, sin = problem.cos.double()[:, None], problem.sin.double()[:, None]
    expected = [reference.turn(t.detach()[-1].double(), cos, sin, False) for t in (problem.q, problem.k)]
    return max(gate.error(x[-1], y, True) for x, y in zip(found, expected)), peak


def check_decode(problem: DecodeProblem, contestant: Contestant, run: Run) -> tuple[float, float]:
    """Worst error of one step against fp64 on the last key/value head of the last batch row, and peak memory in MiB."""
    g = problem.shape.geometry
    group = slice(g.heads - g.heads // g.kv_heads, g.heads)
    before = _peak_reset(problem.device)
    out = run.forward()
    peak = _peak_since(problem.device, before)
    expected, _ = reference.attention(
        problem.q[-1:, :, group].double(),
        problem.k[-1:, :, -1:].double(),
        problem.v[-1:, :, -1:].double(),
        problem.scale[group].double() if contestant.scaled else None,
        mask=problem.shape.visibility.by_heads(g.heads)[-1][1],
    )
    return gate.error(out[-1, 0, group], expected[0, 0], False), peak


def _peak_reset(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_since(device: torch.device, before: int) -> float:
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else 0.0


def measure(
    operation: str, problem: Problem, contestants: list[Contestant], session: Session, cache: dict
) -> list[dict]:
    """Gates every contestant, then times those that passed in turn: a row for each direction of each."""
    rows, forwards, backwards, facts = [], {}, {}, {}
    for contestant in contestants:
        try:
            status = contestant.why_not(operation, problem)
            if status is None:
                run = contestant.prepare(operation, problem)
                if operation == "rope":
                    worst, peak = check_rope(problem, run)
                elif operation == "decode":
                    worst, peak = check_decode(problem, contestant, run)
                else:
                    worst, peak, (out, grad) = check_attention(operation, problem, contestant, run, cache)
                    backwards[contestant.name] = lambda out=out, run=run, grad=grad: torch.autograd.grad(
                        out, run.inputs, grad, retain_graph=True
                    )
                forwards[contestant.name] = run.forward
                facts[contestant.name] = (worst, peak)
                if worst > contestant.tolerance * gate.TOLERANCE[problem.dtype]:
                    status = f"wrong: relative error {worst:.1e}"
        except (
            Exception
        ) as reason:  # peers and compilers fail in many ways, at some shapes only: the row says how, the run goes on
            status = f"failed: {type(reason).__name__}: {(str(reason).strip() or '?').splitlines()[0][:160]}"
        if status is not None:
            forwards.pop(contestant.name, None), backwards.pop(contestant.name, None)
            rows.append(
                _row(
                    operation, "", contestant, problem, session, None, *facts.get(contestant.name, (None, None)), status
                )
            )
    timed = [("forward", timing.in_turn(forwards, session.clock, session.row_ms))]
    if operation not in FORWARD_ONLY:
        timed.append(("backward", timing.in_turn(backwards, session.clock, session.row_ms)))
    for direction, times in timed:
        rows += [
            _row(operation, direction, c, problem, session, times[c.name], *facts[c.name], "ok")
            for c in contestants
            if c.name in times
        ]
    return rows


def _row(operation, direction, contestant, problem, session, times, worst, peak, status) -> dict:
    shape, g = problem.shape, problem.shape.geometry
    row = dict.fromkeys(report.FIELDS, "")
    row |= dict(
        operation=operation,
        direction=direction,
        contestant=contestant.name,
        model=shape.model,
        batch=shape.batch,
        seqlen=shape.seqlen,
        heads=g.heads,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        window="" if g.window is None else g.window,
        dtype=str(problem.dtype).removeprefix("torch."),
        status=status,
    )
    if worst is not None:
        row |= dict(worst_error=float(f"{worst:.2e}"), peak_mib=round(peak, 1))
    if times is not None:
        row |= dict(
            ms=round(times.median, 4), ms_p20=round(times.p20, 4), ms_p80=round(times.p80, 4), calls=times.calls
        )
        limit = session.ceilings
        if operation in FORWARD_ONLY:
            gbps = shape.moved_elements(operation) * problem.dtype.itemsize / times.median / 1e6
            row |= dict(gbps=round(gbps, 1), copy_share=round(gbps / limit.copy_gbps, 4) if limit else "")
        else:
            tflops = (2.5 if direction == "backward" else 1.0) * shape.forward_flops / times.median / 1e9
            row |= dict(tflops=round(tflops, 4), matmul_share=round(tflops / limit.matmul_tflops, 4) if limit else "")
    return row


def show(shape: Shape, operation: str, rows: list[dict], seconds: float) -> None:
    if rows:
        print(f"{shape}  {operation}  (at {seconds:.0f} s)")
    by_name: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_name.setdefault(row["contestant"], {})[row["direction"]] = row
    for name, found in by_name.items():
        if "" in found:
            print(f"  {name:20s} {found['']['status']}")
            continue
        parts = [
            f"{d} {r['ms']:9.3f} ms " + (f"{r['gbps']:6.0f} GB/s" if r["gbps"] != "" else f"{r['tflops']:6.1f} TFLOP/s")
            for d, r in found.items()
        ]
        first = next(iter(found.values()))
        peak = f"   peak {first['peak_mib']:.0f} MiB" if first["peak_mib"] else ""  # not counted on a CPU
        print(f"  {name:20s} {'   '.join(parts)}   error {first['worst_error']:.1e}{peak}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="seal bench", description=__doc__, epilog=EXAMPLE, formatter_class=Help)
    add_options(parser)
    options = parser.parse_args(argv)
    try:
        return bench(options)
    except (ValueError, OSError) as reason:
        parser.error(str(reason))


def _chosen(option: str, given: str | None, known: list[str]) -> list[str]:
    names = known if given is None else [n for n in given.split(",") if n]
    for name in names or [given]:
        if name not in known:
            raise ValueError(f"{option} must name some of {', '.join(known)}, got {name!r}")
    return names


def _device(given: str | None) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(given or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {given!r}")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"--device must be one that torch sees, got {given} with {gpus} GPUs")
    return device


def _check_times(budget_s: float, row_ms: float) -> None:
    if math.isnan(budget_s) or budget_s < 0:
        raise ValueError(f"--budget-s must be at least 0, got {budget_s:g}")
    if not (row_ms > 0 and math.isfinite(row_ms)):
        raise ValueError(f"--row-ms must be above 0 and finite, got {row_ms:g}")


def bench(options: argparse.Namespace) -> int:
    """Runs the benchmark that `add_options` describes. Returns 1 where a contestant was wrong; raises ValueError in one
    sentence."""
    started = time.monotonic()
    _check_times(options.budget_s, options.row_ms)
    if options.merge:
        record = report.Record(
            options.output, options.name or "merged", report.joined(options.merge), command_line(options)
        )
        record.save()
        record.finish(all_contestants())
        return 0
    device = _device(options.device)
    if options.suite == training_sizes.SUITE:
        from .training_steps import bench_training  # with transformers, which the other suites do not need

        return bench_training(options)
    on_gpu = device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
    contestants = all_contestants(options.fa3)
    only = _chosen("--only", options.only, [c.name for c in contestants])
    shapes = [parse_shape(text) for text in options.shape or ()]
    suite = options.suite or (None if shapes else "headline" if on_gpu else "smoke")
    unless_given = {"decode": "decode", "masks": "attention"}.get(
        suite, ",".join(o for o in OPERATIONS if o != "decode")
    )
    operations = _chosen("--ops", options.ops or unless_given, list(OPERATIONS))
    shapes += SUITES[suite] if suite else []

    if options.part is not None:
        shapes = part_of(shapes, options.part)

    facts = report.environment(device)
    name = (
        options.name
        or f"{suite or 'shapes'}-{facts['gpu'].removeprefix('NVIDIA ').replace(' ', '-').lower() if on_gpu else 'cpu'}"
    )
    if options.part is not None:
        name += "-part" + options.part.replace("/", "of")
    run = report.Measured(command_line(options), facts, [])
    record = report.Record(options.output, name, [run], run.command)
    if options.resume and os.path.exists(record.stem + ".json"):
        resume(run, record.stem + ".json")
    clock = timing.Clock(device)
    limits = None
    if "matmul_tflops" in facts:  # resumed: those of the same run
        limits = timing.Ceilings(float(facts["matmul_tflops"]), float(facts["copy_gbps"]))
    elif on_gpu:
        limits = timing.ceilings(clock, dtype)
        facts["matmul_tflops"], facts["copy_gbps"] = f"{limits.matmul_tflops:.1f}", f"{limits.copy_gbps:.1f}"
    if limits:
        print(
            f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}: matrix product {limits.matmul_tflops:.0f} TFLOP/s, "  # noqa: E501
            f"copy {limits.copy_gbps:.0f} GB/s",
            flush=True,
        )
    if on_gpu:  # on a CPU a call ends when its work ends
        facts["host_us"] = facts.get("host_us") or host_time.sentence(host_time.host_times(device, dtype))
        print(facts["host_us"], flush=True)
    session = Session(device, dtype, clock, limits, options.row_ms)

    left_out = 0
    done = {(*report.group_key(row), row["contestant"]) for row in run.rows}
    # Contestants under torch.compile come in a second pass: their start-up costs seconds a shape and must not eat the
    # others' time. The projection, whose rows repeat the attention's, comes last in each.
    passes = sorted(itertools.product(operations, (False, True)), key=lambda p: (p[1], p[0] == "attention_o_proj"))
    for (operation, compiled), shape in itertools.product(passes, shapes):
        group = [c for c in contestants if c.name in only and c.compiled == compiled and operation in c.operations]
        if (
            not group
            or (compiled and options.no_compiled)
            or all((operation, shape.model, shape.batch, shape.seqlen, c.name) in done for c in group)
        ):
            continue
        if time.monotonic() - started > options.budget_s:
            left_out += 1
            continue
        rows = measure_shape(operation, shape, group, session)
        record.add(rows)
        show(shape, operation, [r for r in rows if not r["status"].startswith("runs on")], time.monotonic() - started)
    if left_out:
        print(f"{left_out} rows were left out: the budget of {options.budget_s:.0f} s was used up")
    record.finish(contestants)
    return 1 if any(r["status"].startswith("wrong") for r in record.rows) else 0


def resume(run: report.Measured, path: str) -> None:
    """Puts the rows and ceilings of an earlier, unfinished run into `run`. Raises ValueError where it is not the same
    run."""
    (earlier, *others) = report.load(path)
    for name, value in run.environment.items():
        if others or earlier.environment.get(name) != value:
            raise ValueError(
                f"--resume must find an unfinished run of the same {name} {value}, got {path} with {earlier.environment.get(name)}"  # noqa: E501
            )
    run.environment.update(earlier.environment)
    run.rows += earlier.rows


def measure_shape(operation: str, shape: Shape, group: list[Contestant], session: Session) -> list[dict]:
    """One shape from fresh tensors, freed afterwards, and compiled code with it."""
    try:
        problem = (DecodeProblem if operation == "decode" else Problem)(shape, session.dtype, session.device)
        return measure(operation, problem, group, session, {})
    finally:
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        if any(c.compiled for c in group):
            torch.compiler.reset()
