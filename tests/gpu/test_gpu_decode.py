"""Few queries over many keys on a GPU: the op on ugly lengths, and the CUDA kernels with every number of splits."""

import ctypes
import itertools
import shutil

import pytest
import torch
from cases import Case
from decode_cases import CASES, assert_every_row, exact, in_cache, inputs_of

import seal_ops

from .decode_kit import build, decode

needs_kit = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or shutil.which("nvcc") is None,
    reason="needs a Hopper GPU and nvcc",
)

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 300, 1023, 2048, 4099]
GROUPS = [(4, 4), (6, 2), (8, 2), (71, 1), (32, 1), (64, 1), (128, 2)]
HEAD_DIMS = [64, 128, 256]
QUERIES = [
    (1, True, None),
    (1, True, 50),
    (2, True, None),
    (5, True, 33),
    (8, True, None),
    (8, False, None),
    (3, False, 40),
    (7, False, 1),
]


def cases(lengths=LENGTHS):
    """Every length with every head_dim; groups, masks and factors in turn."""
    groups, queries = itertools.cycle(GROUPS), itertools.cycle(QUERIES)
    factors = itertools.cycle(
        [("channel", False), ("head", True), (None, False), ("row-channel", True), ("row-head", False)]
    )
    dims = itertools.cycle([64, 128, 256, 80, 192, 8, 136])
    for length, head_dim in itertools.product(lengths, HEAD_DIMS):
        for own in (head_dim, next(dims)):
            (sq, causal, window), (scale, offset) = next(queries), next(factors)
            yield Case(
                sq,
                length,
                heads=next(groups),
                head_dim=own,
                batch=1 + length % 3,
                causal=causal,
                window=window,
                scale=scale,
                offset=offset,
            )


ALL = [*CASES, *cases()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_row_of_every_head(backend, device, case, dtype):
    if backend == "triton" and (case.head_dim < 16 or ALL.index(case) % 4):
        pytest.skip("every fourth case: a head_dim or kind of mask more is one compilation more")
    inputs = inputs_of(case, dtype, device)
    assert_every_row(*seal_ops.attention(**inputs, backend=backend, return_lse=True), inputs)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 999, heads=(8, 2), head_dim=128, batch=3),
        Case(4, 130, heads=(4, 1), head_dim=64, batch=2, window=77),
        Case(1, 511, heads=(4, 4), head_dim=256, batch=2),
        Case(2, 64, heads=(4, 2), head_dim=72),
    ],
    ids=str,
)
def test_a_view_of_a_longer_cache(backend, device, case, heads_first, poisoned):
    inputs = inputs_of(case, torch.bfloat16, device)
    expected = exact(inputs)
    views = {n: in_cache(inputs[n], 70, heads_first) for n in ("k", "v")}
    assert_every_row(*seal_ops.attention(**{**inputs, **views}, backend=backend, return_lse=True), inputs, expected)


def test_rotation_before_it(backend, device):
    case = Case(1, 700, heads=(8, 2), head_dim=128, batch=2)
    inputs = inputs_of(case, torch.bfloat16, device)
    cos, sin = seal_ops.rope_tables(700, seal_ops.rope_frequencies(128)[0], device=device)
    q, k = seal_ops.rope(inputs["q"], inputs["k"], cos, sin, backend=backend)
    out, lse = seal_ops.rope_attention(
        inputs["q"], inputs["k"], inputs["v"], cos, sin, scale=inputs["scale"], backend=backend, return_lse=True
    )
    assert_every_row(out, lse, {**inputs, "q": q, "k": k})


def test_one_cuda_graph_serves_every_content(backend, device):
    case = Case(1, 3000, heads=(8, 2), head_dim=128, batch=2, offset=True)
    inputs = inputs_of(case, torch.bfloat16, device)

    def call():
        return seal_ops.attention(**inputs, backend=backend, return_lse=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2):
        for name, value in inputs_of(case, torch.bfloat16, device, seed).items():
            if isinstance(value, torch.Tensor):
                inputs[name].copy_(value)
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call()))


def test_the_op_repeats_bit_for_bit(backend, device):
    inputs = inputs_of(Case(1, 9000, heads=(8, 2), head_dim=128, batch=2), torch.bfloat16, device)
    first = seal_ops.attention(**inputs, backend=backend, return_lse=True)
    for _ in range(200):
        assert all(
            torch.equal(a, b) for a, b in zip(first, seal_ops.attention(**inputs, backend=backend, return_lse=True))
        )


SPLIT_CASES = [
    Case(1, 1000, heads=(8, 2), head_dim=128, batch=2),
    Case(1, 513, heads=(71, 1), head_dim=64, scale="head", offset=True),
    Case(8, 700, heads=(8, 2), head_dim=128, window=90),
    Case(1, 300, heads=(4, 4), head_dim=256, scale="row-channel", batch=2, offset=True),
    Case(2, 140, heads=(64, 2), head_dim=192, scale=None),
    Case(8, 333, heads=(16, 2), head_dim=256, causal=False, window=60),
    Case(16, 400, heads=(4, 1), head_dim=64),
    Case(8, 5, heads=(4, 2), head_dim=64, offset=True),
    Case(3, 0, heads=(4, 2), head_dim=64, offset=True),
]


@needs_kit
@pytest.mark.parametrize("splits", [0, 1, 2, 3, 5, 16, 37, 512])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_split_kernels_with_any_number_of_splits(case, splits, poisoned):
    """Also more splits than blocks of keys, with everything that nobody writes filled with NaN."""
    inputs = inputs_of(case, torch.bfloat16, "cuda")
    framed = {n: in_cache(inputs[n], 5, True) for n in ("q", "k", "v")}
    out, lse, plan = decode(build(), **{**inputs, **framed}, splits=splits)
    assert plan["splits"] == splits or splits == 0
    assert_every_row(out, lse, inputs)
    again = decode(build(), **{**inputs, **framed}, splits=splits)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@needs_kit
@pytest.mark.parametrize("splits", [1, 2, 9])
@pytest.mark.parametrize("bound", [1, 4, 40])
def test_split_kernels_on_packed_sequences(bound, splits, poisoned):
    """One query to a cache, more of them than `max_seqlen` promised, and sequences without queries or keys."""
    case = Case(
        (1, 5, 0, 40, 3, 1), (700, 130, 64, 90, 0, 1), heads=(8, 2), head_dim=128, scale="row-channel", offset=True
    )
    inputs = inputs_of(case, torch.bfloat16, "cuda")
    out, lse, _ = decode(build(), **inputs, max_seqlen=bound, splits=splits)
    assert_every_row(out, lse, inputs)


@needs_kit
def test_split_kernels_repeat_a_thousand_times_bit_for_bit():
    inputs = inputs_of(Case(1, 5000, heads=(8, 2), head_dim=128, batch=2), torch.bfloat16, "cuda")
    first, first_lse, plan = decode(build(), **inputs)
    assert plan["splits"] > 1
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out, lse, _ = decode(build(), **inputs)
        different += (out != first).sum() + (lse != first_lse).sum()
    assert different.item() == 0


@needs_kit
def test_split_kernels_serve_decoding_and_not_training():
    """Decoding goes through these kernels, training shapes do not."""

    def prefers(heads, kv, sq, sk, left=-1, right=0, batch=1) -> bool:
        return bool(build().kit_prefers(*map(ctypes.c_int64, (batch, heads, kv, sk, left, right, sq))))

    assert (
        prefers(32, 8, 1, 32768) and prefers(32, 8, 8, 32768) and prefers(32, 32, 64, 32768) and prefers(71, 1, 1, 100)
    )
    assert (
        not prefers(32, 8, 2048, 2048)
        and not prefers(32, 8, 17, 32768)
        and not prefers(32, 32, 64, 64)
        and not prefers(4, 4, 1, 3)
    )
    assert not prefers(32, 8, 8, 32768, left=9) and not prefers(32, 32, 64, 512, batch=32)
