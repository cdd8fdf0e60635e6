"""Masks on a GPU: out, log-sum-exp and all gradients in every cell, lengths around tile borders, and time that follows
what is seen."""

import dataclasses
import itertools

import pytest
import torch
from cases import Case, make, run, run_plain
from mask_cases import MASKED
from measure import assert_close, oracle

import seal_ops
from seal_ops import masks

MASKS = [
    masks.streaming(4, 100),
    masks.streaming(130, 64),
    masks.streaming(64, 1),
    masks.shifted_groups(128),
    masks.shifted_groups(127, sinks=4),
    masks.shifted_groups(200, sinks=65),
    masks.chunks(64),
    masks.chunks(129, before=(1, 1)),
    masks.chunks(50, before=(2, None)),
    masks.chunks(96, before=(0, 1)),
    masks.band(None, -63),
    masks.band(-64, 65),
    masks.band(5, 90),
    dataclasses.replace(masks.chunks(70), upper=-1),
    dataclasses.replace(masks.band(-200, -20), sinks=9),
]
LENGTHS = [(113, 203), (256, 256), (384, 256), (1023, 1024), (1024, 1023), (128, 641)]
PACKED = [((300, 0, 513, 64), (300, 0, 513, 64)), ((7, 128, 0, 255, 1), (130, 128, 64, 100, 0))]
HEADS = [(6, 6), (8, 4), (4, 1)]
FACTORS = [
    dict(scale="channel", lse=True),
    dict(scale="head", offset=True),
    dict(scale=None, lse=True),
    dict(scale="row-channel", lse=True),
    dict(scale="row-head", offset="row"),
]


def cases():
    """Every mask with every length; heads, factors and head_dims in turn."""
    heads, factors, dims = (itertools.cycle(turn) for turn in (HEADS, FACTORS, (64, 128, 256, 128, 64)))
    for mask, (sq, sk) in itertools.product(MASKS, [*LENGTHS, *PACKED]):
        own = next(heads)
        if mask.shifted_heads and own[0] == 4:  # one group of heads: none or all of them
            mask = dataclasses.replace(mask, shifted_heads=1.0)
        batch = {} if isinstance(sq, tuple) else dict(batch=2)
        yield Case(sq, sk, heads=own, head_dim=next(dims), mask=mask, **batch, **next(factors))


def attention(backend: str, **more):
    """The op by its own arguments: the inputs of `make` have integers and block lists."""
    return lambda **a: torch.ops.seal.attention(**a, **more, backend=backend)


BLOCKS = [
    Case(300, 300, heads=(8, 2), head_dim=128, batch=2, mask=masks.causal(), blocks=64, lse=True),
    Case(200, 513, heads=(4, 2), head_dim=64, batch=2, mask=masks.streaming(4, 200), blocks=128, scale="head"),
    Case(513, 513, heads=(4, 4), head_dim=256, mask=masks.causal(), blocks=96, lse=True),
    Case(700, 700, heads=(4, 1), head_dim=80, mask=masks.shifted_groups(256, shifted_heads=1.0), blocks=128),
]


@pytest.mark.parametrize("case", [*MASKED, *BLOCKS, *cases()], ids=str)
def test_every_result_in_every_cell(backend, device, case):
    if case.blocks and backend == "cuda":
        pytest.skip("the CUDA kernels take no block lists")
    for dtype in (torch.bfloat16, torch.float16):
        inputs = make(case, dtype, device)
        assert_close(run(attention(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("mask", [masks.shifted_groups(1024, sinks=4), masks.streaming(100, 1000)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long(backend, device, head_dim, mask):
    case = Case(4224, 4224, heads=(4, 2), head_dim=head_dim, mask=mask, scale="channel", offset=True)
    inputs = make(case, torch.bfloat16, device)
    assert_close(run(attention(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("mask", [masks.shifted_groups(64, sinks=4), masks.streaming(4, 50)], ids=str)
def test_gradients_under_a_mask_repeat_bit_for_bit(backend, device, mask):
    case = Case(700, 700, heads=(8, 2), mask=mask, lse=True)
    inputs = make(case, torch.bfloat16, device)
    function = attention(backend, deterministic=True)
    first = run(function, case, inputs)
    for _ in range(20):
        assert all(torch.equal(first[name], value) for name, value in run(function, case, inputs).items())


def milliseconds(backend: str, length: int, mask) -> float:
    """Forward and backward, median of seven."""
    q, k, v = (
        torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (32, 8, 8)
    )
    scale = torch.ones(32, 128, device="cuda", requires_grad=True)
    g = torch.randn_like(q)
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = seal_ops.attention(q, k, v, scale, mask=mask, backend=backend)
        torch.autograd.grad(out, (q, k, v, scale), g)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[3]


@pytest.mark.alone
@pytest.mark.parametrize(
    "length, mask, most",
    [(32768, masks.shifted_groups(8192), 0.35), (131072, masks.streaming(4, 4096), 0.10)],
    ids=["shifted groups of a quarter at 32k", "streaming(4, 4096) at 128k"],
)
def test_time_follows_the_mask(backend, device, alone, length, mask, most):
    share = milliseconds(backend, length, mask) / milliseconds(backend, length, None)
    print(f"{backend}: {share:.3f} of full causal attention")
    assert share <= most


@pytest.mark.alone
def test_time_follows_block_lists(backend, device, alone):
    """A quarter of the blocks below the diagonal."""
    if backend == "cuda":
        pytest.skip("the CUDA kernels take no block lists")
    visited = torch.rand(1, 32, 256, 256, device=device) < 0.25
    visited |= torch.eye(256, dtype=torch.bool, device=device)
    share = milliseconds(backend, 32768, masks.blocks(visited, 128)) / milliseconds(backend, 32768, None)
    print(f"{backend}: {share:.3f} of full causal attention")
    assert share <= 0.45
