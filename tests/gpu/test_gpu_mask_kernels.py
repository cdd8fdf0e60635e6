"""The CUDA kernels' own paths under masks with chunks and sinks: tiles that are skipped between sinks and band, several
tiles to a thread block, whole groups of heads in one, both modes of the backward, each of its kernels alone, decoding
in several splits."""

import dataclasses
import itertools

import pytest
import torch
from cases import Case, Rotation, gradients_of, make, run, run_plain
from measure import assert_close, oracle

import seal_ops
from seal_ops import masks
from seal_ops.ops.dispatch import extension, why_not

STREAMING, MANY_SINKS, GROUPS = masks.streaming(4, 150), masks.streaming(140, 70), masks.shifted_groups(150, sinks=3)
BEFORE, EARLIER = masks.chunks(130, before=(1, 1)), masks.chunks(100, before=(2, None))
BOTH_SIDES = dataclasses.replace(masks.chunks(200), lower=-90, upper=70)


@pytest.fixture(autouse=True)
def hopper():
    reason = why_not("cuda", "attention", torch.device("cuda", 0), torch.bfloat16, 64)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def launch(request):
    """What the launch assumes of the device."""
    extension().set_launch_overrides(**request.param)
    yield
    torch.cuda.synchronize()
    extension().set_launch_overrides()


def with_whole_groups(mask, heads):
    """Shifted heads are whole groups of query heads: where there is one group, all of them."""
    return dataclasses.replace(mask, shifted_heads=1.0) if mask.shifted_heads and heads[1] == 1 else mask


def check(case, dtype=torch.bfloat16, op="attention", modes=(False, True)):
    """Both modes of the backward against one oracle."""
    inputs = make(case, dtype, "cuda")
    rotation = Rotation(case, inputs) if op == "rope_attention" else None
    exact, plain = oracle(case, inputs, rotation=rotation), run_plain(case, inputs, rotation=rotation)

    def function(q, k, v, **arguments):
        arguments |= dict(deterministic=deterministic, return_lse=True, backend="cuda")
        if rotation is None:
            return seal_ops.attention(q, k, v, **arguments)
        return seal_ops.rope_attention(q, k, v, *rotation.tables, **arguments)

    for deterministic in modes:  # noqa: B007 (read by `function`)
        assert_close(run(function, case, inputs), exact, plain)


SHAPES = [
    dict(sq=300, sk=300, heads=(4, 2), batch=3),
    dict(sq=257, sk=513, heads=(6, 1), batch=2),
    dict(sq=500, sk=403, heads=(4, 4), batch=2),
    dict(sq=400, sk=400, heads=(48, 1)),
    dict(sq=(113, 0, 1, 500, 64), sk=(113, 0, 1, 500, 64), heads=(4, 2)),
    dict(sq=(3, 17, 0, 140) * 10, sk=(5, 317, 2, 0) * 10, heads=(4, 2)),
]
FACTORS = [
    dict(scale="zeros"),
    dict(scale="zeros", offset=True),
    dict(scale=None, lse=True),
    dict(scale="row-channel", lse=True),
]


def forced():
    turn = itertools.count()
    for head_dim, shape, mask in itertools.product((64, 128, 256), SHAPES, (STREAMING, MANY_SINKS, GROUPS, BEFORE)):
        n = next(turn)
        op = "rope_attention" if n % 2 and shape["sq"] == shape["sk"] else "attention"
        mask = with_whole_groups(mask, shape["heads"])
        case = Case(**shape, head_dim=head_dim, mask=mask, **FACTORS[n // 2 % 4])
        yield pytest.param(case, (torch.bfloat16, torch.float16)[n // 3 % 2], op, id=f"{case}-{op}")


@pytest.mark.parametrize(
    "launch", [dict(enough_ctas=1, sms=3), dict(enough_ctas=1 << 30, sms=2)], ids=str, indirect=True
)
@pytest.mark.parametrize("case, dtype, op", list(forced()))
def test_few_thread_blocks(launch, case, dtype, op):
    check(case, dtype, op)


@pytest.mark.parametrize("mask", [STREAMING, MANY_SINKS, GROUPS, BEFORE, EARLIER, BOTH_SIDES], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_training_shapes(head_dim, mask):
    """As many tiles as multiprocessors and more, groups of two heads in a thread block, scales with zeros."""
    check(Case(1000, 1000, heads=(4, 2), head_dim=head_dim, batch=17, mask=mask, scale="zeros"))


@pytest.mark.parametrize("mask", [STREAMING, GROUPS, EARLIER], ids=str)
def test_chained_tiles_at_head_dim_64(mask):
    check(Case(1000, 1000, heads=(6, 2), batch=8, mask=mask, scale="head", offset=True))


BORDERS = [63, 64, 65, 79, 80, 81, 127, 128, 129, 160, 191, 192, 193]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_borders_at_and_beside_those_of_tiles(head_dim, border):
    """Sinks, window, chunk and shift end there."""
    other = dict(head_dim=head_dim, heads=(4, 2), scale="channel", lse=True)
    check(Case(420, 420, mask=masks.streaming(border, border), **other))
    check(Case(420, 500, mask=masks.streaming(1, border), **other), modes=(False,))
    check(Case(500, 420, mask=masks.shifted_groups(border), **other), modes=(False,))
    check(
        Case(
            420,
            420,
            mask=dataclasses.replace(masks.chunks(2 * border, before=(0, 1)), shift=border, shifted_heads=0.5),
            **other,
        )
    )
    check(Case(420, 420, mask=masks.chunks(border, before=(1, 1)), **other), modes=(False,))
    check(Case(420, 420, mask=masks.band(-border, border), **other))
    check(Case(420, 420, mask=masks.band(None, -border), **other))


@pytest.mark.parametrize("mask", [MANY_SINKS, GROUPS, EARLIER], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("wanted", ["k", "v", "q", "scale", "qv", "kv"], ids=str)
def test_gradients_that_are_asked_for_alone(head_dim, mask, wanted):
    """Each kernel of the backward without the others."""
    wanted = ("scale",) if wanted == "scale" else tuple(wanted)
    case = Case(333, 333, heads=(4, 2), head_dim=head_dim, mask=mask, scale="zeros")
    inputs = make(case, torch.bfloat16, "cuda")
    exact, plain = oracle(case, inputs), run_plain(case, inputs)
    out, lse = torch.ops.seal.attention(**inputs, backend="cuda")
    grad_out, grad_lse = gradients_of(case, inputs)
    names = ("q", "k", "v", "scale", "offset")
    found = torch.ops.seal.attention_backward(
        grad_out, grad_lse, out=out, lse=lse, **inputs, needs=[name in wanted for name in names], backend="cuda"
    )
    got = {"out": out, "lse": lse} | {f"grad_{name}": g for name, g in zip(names, found) if name in wanted}
    for name in set(exact) - set(got):
        del exact[name]
    assert len(exact) == 2 + len(wanted)
    assert_close(got, exact, plain)


@pytest.mark.parametrize(
    "mask",
    [
        masks.streaming(300, 2000),
        masks.shifted_groups(1501, sinks=4),
        masks.chunks(700, before=(1, 1)),
        masks.chunks(700, before=(2, None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decoding(head_dim, mask):
    """Few queries over many keys: the split kernels, whose blocks of keys begin at the band."""
    for sq, heads in ((1, (8, 2)), (4, (16, 2)), (7, (2, 2)), (16, (8, 2))):
        check(
            Case(sq, 5000, heads=heads, head_dim=head_dim, batch=2, mask=mask, scale="channel", offset=True),
            modes=(False,),
        )
    lengths = (1, 4, 0, 3, 1), (5000, 300, 70, 0, 1)
    check(Case(*lengths, heads=(8, 2), head_dim=head_dim, mask=mask, scale="row-head"), modes=(False,))
