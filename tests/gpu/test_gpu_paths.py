"""The paths of real training, which short shapes do not take: whole GQA groups in a thread block of the backward,
several heads there whose scale holds zeros, several tiles to a thread block of the forward, more packed sequences than
a warp has lanes.

Large shapes take them by themselves (132 multiprocessors). Small ones are led there by `_C.set_launch_overrides`, both
ways.
"""

import itertools
import random

import pytest
import torch
from cases import Case, Rotation, make, run, run_plain
from measure import assert_close, oracle

import seal_ops
from seal_ops.ops.dispatch import extension, why_not

MASKS = [dict(causal=True), dict(causal=False), dict(causal=True, window=129), dict(causal=False, window=67)]
BATCH = {64: 34, 128: 34, 256: 17}  # times two key/value heads of 1,000 tokens: enough key tiles for whole groups
random.seed(5)
LENGTHS = tuple(random.choice((0, 1, 17, 64, 128, 129, 300, 511, 700)) for _ in range(70))
OTHERS = tuple(random.choice((0, 1, 63, 128, 200, 700)) for _ in range(70))


def named(cases):
    return [pytest.param(*case, id="-".join(map(str, case))) for case in cases]


def check(backend, device, case, dtype, op="attention", modes=(False, True)):
    """Both modes of the backward against one oracle."""
    reason = why_not(backend, "attention", device, dtype, case.head_dim)
    if reason is not None:
        pytest.skip(reason)
    inputs = make(case, dtype, device)
    rotation = Rotation(case, inputs) if op == "rope_attention" else None
    exact, plain = oracle(case, inputs, rotation=rotation), run_plain(case, inputs, rotation=rotation)

    def function(q, k, v, **arguments):
        arguments |= dict(deterministic=deterministic, return_lse=True, backend=backend)
        if rotation is None:
            return seal_ops.attention(q, k, v, **arguments)
        return seal_ops.rope_attention(q, k, v, *rotation.tables, **arguments)

    for deterministic in modes:  # noqa: B007 (read by `function`)
        assert_close(run(function, case, inputs), exact, plain)


def training():
    for n, (head_dim, masked, factor, op) in enumerate(
        itertools.product(
            (64, 128, 256),
            MASKS[:3],
            (dict(scale="zeros"), dict(scale="zeros", offset=True), dict(scale="row-channel", lse=True)),
            ("attention", "rope_attention"),
        )
    ):
        dtype = (torch.bfloat16, torch.float16)[n // 2 % 2]
        yield Case(1000, 1000, heads=(4, 2), head_dim=head_dim, batch=BATCH[head_dim], **masked, **factor), dtype, op


@pytest.mark.parametrize("case, dtype, op", named(training()))
def test_training_shapes(backend, device, case, dtype, op):
    if backend == "triton" and (op != "attention" or case.window):
        pytest.skip("a Triton program owns one tile whatever the shape: the grid has these variants")
    check(backend, device, case, dtype, op)


def chained():
    for masked, op in itertools.product(MASKS, ("attention", "rope_attention")):
        yield Case(1000, 1000, heads=(6, 2), batch=8, scale="head", **masked), torch.bfloat16, op
    yield Case(700, 1000, heads=(6, 3), batch=9, scale="channel", offset="row"), torch.float16, "attention"
    yield Case(1000, 700, heads=(6, 6), batch=8, scale=None, lse=True), torch.bfloat16, "attention"


@pytest.mark.parametrize("case, dtype, op", named(chained()))
def test_more_tiles_than_multiprocessors_at_head_dim_64(backend, device, case, dtype, op):
    check(backend, device, case, dtype, op)


def packed():
    for n, (head_dim, masked) in enumerate(itertools.product((64, 128, 256), MASKS)):
        factor = (dict(scale="zeros", offset=True), dict(scale="row-channel", lse=True), dict(scale="row-head"))[n % 3]
        others = (LENGTHS, OTHERS)[n // 2 % 2]
        op = "attention" if others is OTHERS or n % 2 else "rope_attention"
        yield Case(LENGTHS, others, heads=(4, 2), head_dim=head_dim, **masked, **factor), torch.bfloat16, op


@pytest.mark.parametrize("n", range(12))
def test_seventy_packed_sequences(backend, device, n):
    check(backend, device, *list(packed())[n])


@pytest.mark.parametrize("heads, batch", [((48, 1), 2), ((71, 1), 2), ((48, 1), 30)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_groups_of_more_than_32_heads(backend, device, heads, batch, head_dim):
    check(backend, device, Case(400, 400, heads=heads, head_dim=head_dim, batch=batch, scale="channel"), torch.bfloat16)


@pytest.fixture(params=[dict(enough_ctas=1, sms=3), dict(enough_ctas=1 << 30, sms=2), dict(enough_ctas=1)], ids=str)
def launch(request, backend):
    """Few thread blocks, and every head of a group in one of them, or each in its own."""
    if backend != "cuda":
        pytest.skip("only the cuda kernels have persistent grids")
    extension().set_launch_overrides(**request.param)
    yield
    torch.cuda.synchronize()
    extension().set_launch_overrides()


SHAPES = [
    dict(sq=300, sk=300, heads=(4, 2), batch=3),
    dict(sq=257, sk=513, heads=(6, 1), batch=2),
    dict(sq=300, sk=203, heads=(4, 4), batch=2),
    dict(sq=200, sk=200, heads=(48, 1), batch=1),
    dict(sq=(113, 0, 1, 300, 64), sk=(113, 0, 1, 300, 64), heads=(4, 2)),
    dict(sq=(3, 17, 0, 40) * 10, sk=(5, 17, 2, 0) * 10, heads=(4, 2)),
]
FACTORS = [
    dict(scale="zeros"),
    dict(scale="zeros", offset=True),
    dict(scale="row-head-2d", offset="row"),
    dict(scale="one-channel", lse=True),
    dict(scale=None, lse=True),
    dict(scale="row-channel", offset="row", lse=True),
    dict(scale="one-head"),
]


def forced():
    turn = itertools.count()
    for head_dim, shape, masked in itertools.product((64, 128, 256), SHAPES, MASKS):
        n = next(turn)
        dtype = (torch.bfloat16, torch.float16)[n // 3 % 2]
        op = "rope_attention" if n % 2 and shape["sq"] == shape["sk"] else "attention"
        yield Case(**shape, head_dim=head_dim, **masked, **FACTORS[n % 7]), dtype, op


@pytest.mark.parametrize("case, dtype, op", named(forced()))
def test_small_shapes_on_the_paths_of_large_ones(backend, device, launch, case, dtype, op):
    check(backend, device, case, dtype, op)
