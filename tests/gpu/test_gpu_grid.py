"""The odd-shape grid: every result and gradient within twice plain PyTorch's error, both against fp64."""

import itertools

import pytest
import torch
from cases import Case, make, run, run_plain
from measure import assert_close, oracle

import seal_ops
from seal_ops.ops.dispatch import why_not

# Lengths around every tile edge, single rows, and both orders of unequal lengths.
LENGTHS = [
    (1, 1),
    (3, 3),
    (64, 128),
    (128, 192),
    (256, 256),
    (239, 1),
    (799, 3),
    (113, 203),
    (113, 128),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (384, 256),
    (640, 128),
    (512, 256),
    (1024, 1024),
    (1023, 1024),
    (1024, 1023),
    (217, 217),
]
HEADS = [(6, 6), (6, 2), (6, 1)]
MASKS = [dict(causal=True), dict(causal=False), dict(causal=True, window=57), dict(causal=False, window=31)]
FACTORS = [
    dict(scale="channel"),
    dict(scale="head", offset=True),
    dict(scale=None, lse=True),
    dict(scale="row-channel", lse=True),
    dict(scale="row-head", offset=True),
]
DTYPES = [torch.bfloat16, torch.float16]
PACKED = [
    ((113, 0, 1, 217, 64), (113, 0, 1, 217, 64)),
    ((0, 0, 130), (0, 5, 130)),
    ((1,) * 9, (1,) * 9),
    ((128, 129, 127), (256, 3, 129)),
    ((1023, 3), (1023, 3)),
    ((70, 0, 65), (0, 65, 70)),
]


def covering(shapes, head_dims):
    """Every (lengths, head_dim) once with every mask; heads, factors and dtypes take turns, so that all pairs of them
    meet."""
    turn = itertools.count()
    for head_dim, (sq, sk), masked in itertools.product(head_dims, shapes, MASKS):
        n = next(turn)
        batch = 1 if isinstance(sq, tuple) else 1 + n % 3
        yield (
            Case(sq, sk, heads=HEADS[n % 3], head_dim=head_dim, batch=batch, **masked, **FACTORS[(n // 2) % 5]),
            DTYPES[(n // 3) % 2],
        )


def named(pairs):
    return [pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case, dtype in pairs]


def check(backend, device, case, dtype, **options):
    reason = why_not(backend, "attention", device, dtype, case.head_dim)
    if reason is not None:
        pytest.skip(reason)
    inputs = make(case, dtype, device)
    function = lambda **arguments: seal_ops.attention(**arguments, **options, backend=backend, return_lse=True)
    assert_close(run(function, case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("case, dtype", named(covering(LENGTHS, (64, 128, 256))))
def test_dense(backend, device, case, dtype):
    check(backend, device, case, dtype)


@pytest.mark.parametrize("case, dtype", named(covering(PACKED, (64, 128, 256))))
def test_packed(backend, device, case, dtype):
    check(backend, device, case, dtype)


@pytest.mark.parametrize("case, dtype", named(covering([(113, 203), (256, 256), (1023, 1024)], (32, 80, 96, 160, 192))))
def test_other_head_dims(backend, device, case, dtype):
    check(backend, device, case, dtype)


@pytest.mark.parametrize("case, dtype", named(covering([(128, 217), (1024, 1023), (384, 256)], (64, 128, 256))))
def test_deterministic_mode(backend, device, case, dtype):
    check(backend, device, case, dtype, deterministic=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("masked", MASKS, ids=str)
def test_long(backend, device, head_dim, masked):
    check(
        backend,
        device,
        Case(4224, 4224, heads=(2, 1), head_dim=head_dim, **masked, scale="channel", offset=True),
        torch.bfloat16,
    )
