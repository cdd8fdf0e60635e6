"""The harness as a pytest-benchmark suite: one benchmark for each shape, operation, contestant and direction.

pytest-benchmark's own figures are wall-clock times of a synchronised call. The device-event median and what follows
from it (TFLOP/s or GB/s) stand in each benchmark's extra_info; compare those.
"""

import pytest
import torch

from seal_ops.bench import gate, timing
from seal_ops.bench.contestants import FORWARD_ONLY, OPERATIONS, DecodeProblem, Problem, all_contestants
from seal_ops.bench.run import check_attention, check_decode, check_rope
from seal_ops.bench.shapes import SUITES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def pytest_generate_tests(metafunc):
    suite = metafunc.config.getoption("--suite") or ("headline" if DEVICE.type == "cuda" else "smoke")
    contestants = all_contestants(metafunc.config.getoption("--fa3"))
    cases = [
        pytest.param(
            shape,
            operation,
            contestant,
            direction,
            id=f"{shape}-{operation}-{contestant.name}-{direction}".replace(" ", ""),
        )
        for shape in SUITES[suite]
        for operation in OPERATIONS
        if (operation == "decode") == (suite == "decode")
        for contestant in contestants
        if operation in contestant.operations
        for direction in (("forward",) if operation in FORWARD_ONLY else ("forward", "backward"))
    ]
    metafunc.parametrize("shape, operation, contestant, direction", cases)


@pytest.fixture(scope="module")
def clock():
    return timing.Clock(DEVICE)


def test_speed(benchmark, clock, shape, operation, contestant, direction):
    problem = (DecodeProblem if operation == "decode" else Problem)(shape, DTYPE, DEVICE)
    reason = contestant.why_not(operation, problem)
    if reason is not None:
        pytest.skip(reason)
    run = contestant.prepare(operation, problem)
    if operation == "rope":
        (worst, peak), call = check_rope(problem, run), run.forward
    elif operation == "decode":
        (worst, peak), call = check_decode(problem, contestant, run), run.forward
    else:
        worst, peak, (out, grad) = check_attention(operation, problem, contestant, run, {})
        call = (
            run.forward
            if direction == "forward"
            else lambda: torch.autograd.grad(out, run.inputs, grad, retain_graph=True)
        )
    assert worst <= contestant.tolerance * gate.TOLERANCE[DTYPE], "wrong, so not timed"

    def synchronised():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    times = timing.in_turn({contestant.name: call}, clock, 60)[contestant.name]
    benchmark.group = f"{shape} {operation} {direction}"
    benchmark.extra_info |= {
        "device_ms": times.median,
        "device_ms_p20": times.p20,
        "device_ms_p80": times.p80,
        "worst_error": worst,
        "peak_mib": peak,
    }
    if operation in FORWARD_ONLY:
        benchmark.extra_info["gbps"] = shape.moved_elements(operation) * DTYPE.itemsize / times.median / 1e6
    else:
        benchmark.extra_info["tflops"] = (
            (1.0 if direction == "forward" else 2.5) * shape.forward_flops / times.median / 1e9
        )
    benchmark.pedantic(synchronised, rounds=5, warmup_rounds=1)
