"""What is particular to the Triton backend; that it honours the contract is tests/ops/test_ops.py's business."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from devices import device_of

from seal_ops.ops.dispatch import why_not

if (_reason := why_not("triton", "attention", device_of("triton"), torch.float16, 64)) is not None:
    pytest.skip(_reason, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from cases import SMALL, Case, gradients_of, make, run, run_plain  # noqa: E402
from measure import assert_close, oracle  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

import seal_ops.ops.backends.triton as kernels  # noqa: E402
from seal_ops import masks  # noqa: E402
from seal_ops.ops.backends.triton import configs, forward, rotary, tiling, walk  # noqa: E402
from seal_ops.ops.visibility import Visibility  # noqa: E402

DEVICE = device_of("triton")
NEEDS = (True, True, True, True, False)


@triton.jit(
    do_not_specialize=["len_q", "len_k", "lower", "upper", "chunk", "chunk_lower", "chunk_upper", "shift", "sinks"]
)
def _blocks(
    out_ptr, len_q, len_k, lower, upper, chunk, chunk_lower, chunk_upper, shift, sinks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bounds = (len_q, len_k, lower, upper, chunk, chunk_lower, chunk_upper, shift, sinks)
    if OF_KEYS:
        blocks = walk.key_blocks(pid * BLOCK_M, bounds, BLOCK_M, BLOCK_N)
    else:
        blocks = walk.query_blocks(pid * BLOCK_N, bounds, BLOCK_M, BLOCK_N)
    BLOCK: tl.constexpr = BLOCK_N if OF_KEYS else BLOCK_M
    visits = out_ptr + pid * 64  # 0: not visited; 1: as a full block; 2: as a masked one
    lower, upper = walk.loop_range(blocks, False)
    for i in range(lower, upper):
        tl.store(visits + walk.block_start(i, blocks, BLOCK, False) // BLOCK, 1)
    lower, upper = walk.loop_range(blocks, True)
    for i in range(lower, upper):
        block = walk.block_start(i, blocks, BLOCK, True) // BLOCK
        tl.store(visits + block, tl.load(visits + block) + 2)


WALKED = [
    masks.causal(),
    masks.full(),
    masks.window(5),
    masks.window(40),
    masks.band(-8, 8),
    masks.band(0, 0),
    masks.band(None, -20),
    masks.band(3, 9),
    masks.streaming(4, 16),
    masks.streaming(20, 7),
    masks.streaming(1000, 1),
    masks.chunks(16),
    masks.chunks(17),
    masks.chunks(24, before=(1, 1)),
    masks.chunks(7, before=(2, None)),
    dataclasses.replace(masks.chunks(24, before=(1, 1)), shift=11, sinks=30),
    dataclasses.replace(masks.chunks(20, before=(0, 1)), shift=3, upper=masks.UNBOUNDED, chunk_upper=1, lower=-25),
    dataclasses.replace(masks.band(None, -30), sinks=20),
    dataclasses.replace(masks.band(30, 40), sinks=4),
]


@pytest.mark.parametrize("of_keys", [True, False], ids=["key_blocks", "query_blocks"])
@pytest.mark.parametrize("sq,sk", [(1, 1), (40, 40), (23, 61), (61, 23), (64, 64), (7, 100)])
@pytest.mark.parametrize("mask", WALKED, ids=str)
def test_a_walk_visits_what_is_seen_once_and_little_else(of_keys, sq, sk, mask):
    """Every pair that is seen lies in a block that is visited once, full blocks are seen whole, and what no pair needs
    is skipped: outside the sinks' and the band's ranges nothing is visited."""
    m, n = 16, 8
    integers = mask.resolve(1)
    integers[5:7] = mask.shift, 0  # shifted
    seen = Visibility(*integers)
    none = lambda value: None if value is None or abs(value) >= masks.UNBOUNDED else value
    lower, upper, chunk, chunk_lower, chunk_upper, shift, _, sinks = integers
    chunked = (chunk, none(chunk_lower), none(chunk_upper), shift) if chunk else (None,) * 4
    (allowed,) = seen.allowed(sq, sk)
    tile, block, length = (m, n, sq) if of_keys else (n, m, sk)
    allowed = allowed if of_keys else allowed.T
    tiles = triton.cdiv(length, tile)
    found = torch.zeros((tiles, 64), dtype=torch.int32, device=DEVICE)
    _blocks[(tiles,)](found, sq, sk, none(lower), none(upper), *chunked, sinks or None, m, n, of_keys)
    visited = 0
    for t, kinds in enumerate(found.tolist()):
        mine = allowed[t * tile : (t + 1) * tile]
        for b, kind in enumerate(kinds):
            part = mine[:, b * block : (b + 1) * block]
            assert kind in (0, 1, 2), f"tile {t} visits block {b} twice"
            assert kind or not part.any(), f"tile {t} leaves out block {b}"
            assert kind != 1 or (part.shape[1] == block and part.all()), f"tile {t} takes block {b} for full"
            visited += kind > 0
    needed = sum(bool(part.any()) for rows in allowed.split(tile) for part in rows.split(block, 1))
    # A tile across the border of two chunks also visits what lies between its rows' ranges, a tile of keys with one
    # sink all later queries.
    assert visited <= needed + (3 * tiles if not sinks or of_keys else tiles * triton.cdiv(sq, m))


@triton.jit
def _owners(owner_ptr, cu_ptr, num_seqs, tiles, BLOCK: tl.constexpr):
    head, batch, seq, tile, start, length, _, _ = tiling.locate(
        tl.program_id(0), tiles, 1, num_seqs, cu_ptr, cu_ptr, 0, 0, BLOCK
    )
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(owner_ptr + start + rows, seq + 1, mask=rows < length)


@pytest.mark.parametrize("lengths", [(5, 0, 33, 1), (0, 0, 16, 0), (7,), (1,) * 9, (64, 31, 2)])
def test_every_packed_token_has_exactly_one_tile(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    owner = torch.zeros(sum(lengths), dtype=torch.int32, device=DEVICE)
    tiles = sum(lengths) // 16 + len(lengths)
    _owners[(tiles,)](owner, cu.to(DEVICE), len(lengths), tiles, 16)
    assert owner.tolist() == [n + 1 for n, length in enumerate(lengths) for _ in range(length)]


def direct(q, k, v, scale=None, offset=None, sink=None, gate=None, **arguments):
    """attention under autograd, straight into the backend."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, scale, offset, sink, gate):
            out, lse = kernels.attention(q, k, v, scale, offset, sink=sink, gate=gate, **arguments)
            ctx.save_for_backward(q, k, v, scale, offset, sink, gate, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            q, k, v, scale, offset, sink, gate, out, lse = ctx.saved_tensors
            needs = (True, True, True, *(t is not None for t in (scale, offset, sink, gate)))
            found = kernels.attention_backward(
                grad_out, grad_lse, q, k, v, out, lse, scale, offset, needs=needs, sink=sink, gate=gate, **arguments
            )
            return tuple(g if need else None for g, need in zip(found, needs))

    return Function.apply(q, k, v, scale, offset, sink, gate)


@pytest.mark.parametrize("case", [SMALL[4], SMALL[5], SMALL[9], SMALL[12]], ids=str)
def test_pointers_give_what_descriptors_give(case, monkeypatch):
    """GPUs without TMA read tiles through pointers; here both ways run. Compiled, they differ in the layout of a tile
    and so in the order of some sums; the interpreter has one order."""
    inputs = make(case, torch.float16, DEVICE)
    through_descriptors = run(direct, case, inputs)
    monkeypatch.setenv("SEAL_TRITON_TMA", "0")
    monkeypatch.setattr(configs, "_chosen", dict(configs._chosen))  # the same tiles
    for name, value in run(direct, case, inputs).items():
        if DEVICE.type == "cpu":
            assert torch.equal(value, through_descriptors[name]), name
        else:
            largest = through_descriptors[name].abs().nan_to_num(posinf=0.0).max().item()
            torch.testing.assert_close(value, through_descriptors[name], rtol=2e-3, atol=1e-3 * largest, msg=name)


@pytest.mark.parametrize("tma", ["1", "0"])
def test_nan_of_the_next_sequence_does_not_leak(tma, monkeypatch):
    monkeypatch.setenv("SEAL_TRITON_TMA", tma)
    case = Case((21, 30), (21, 30), heads=(2, 1), scale="row-channel")
    inputs = make(case, torch.float16, DEVICE)
    grad_out, _ = gradients_of(case, inputs)
    arguments = {n: inputs[n] for n in ("causal", "cu_seqlens")}

    def first_sequence():
        q, k, v, scale = (inputs[n] for n in ("q", "k", "v", "scale"))
        out, lse = kernels.attention(q, k, v, scale, **arguments)
        found = kernels.attention_backward(grad_out, None, q, k, v, out, lse, scale, needs=NEEDS, **arguments)
        return [out[:21], lse[:, :21], *(g[:21] for g in found[:3]), found[3][0]]

    clean = first_sequence()
    for tensor in (*(inputs[n] for n in "qkv"), grad_out):
        tensor[21:] = torch.nan
    for a, b in zip(clean, first_sequence()):
        assert torch.isfinite(a).all() and torch.equal(a, b)


@pytest.mark.parametrize("softmax_scale", [-0.3, 0.0, 2.0])
def test_any_softmax_scale(softmax_scale):
    """The running maximum of sigma * s is not sigma times that of s where sigma is not positive."""
    from seal_ops.ops.backends import reference

    case = Case(37, 41, scale="head")
    inputs = make(case, torch.float32, DEVICE)
    got = kernels.attention(**inputs, softmax_scale=softmax_scale)
    for a, b in zip(got, reference.attention(**inputs, softmax_scale=softmax_scale)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_bf16_in_the_interpreter_or_on_the_gpu():
    case = Case(20, 33, heads=(2, 1), scale="head")
    inputs = make(case, torch.bfloat16, DEVICE)
    assert_close(run(direct, case, inputs), oracle(case, inputs), run_plain(case, inputs))


def test_a_tile_that_does_not_fit_gives_way_to_the_next(monkeypatch):
    big, small = configs.Tile(128, 128, 8, 4), configs.Tile(32, 32, 4, 1)
    monkeypatch.setattr(configs, "_chosen", {})
    monkeypatch.setattr(configs, "candidates", lambda kernel, like: [big, small])
    tried = []

    def launch(tile):
        tried.append(tile)
        if tile is big:
            raise OutOfResources(300_000, 232_448, "shared memory")

    q = torch.empty(1, 4, 1, 64, device=DEVICE)
    assert configs.choose("forward", q, launch) is small and tried == [big, small]
    assert configs.choose("forward", q, launch) is small and tried == [big, small, small]  # remembered
    configs._chosen[next(iter(configs._chosen))] = big  # a variant that needs more than the one it was chosen for
    assert configs.choose("forward", q, launch) is small
    monkeypatch.setattr(configs, "candidates", lambda kernel, like: [big])
    with pytest.raises(RuntimeError, match="no tile for head_dim 64"):
        configs.choose("other", q, launch)


def test_refusals_are_sentences():
    assert kernels.why_not("attention", torch.bfloat16, 128) is None
    assert "got float64" in kernels.why_not("attention", torch.float64, 128)
    assert "head_dim of 16 to 256, got 512" in kernels.why_not("attention", torch.float16, 512)
    assert kernels.why_not("rope", torch.float16, 512) is None


def test_importing_the_library_does_not_load_the_kernels():
    code = "import sys, seal_ops, seal_ops.ops.backends.triton; sys.exit('seal_ops.ops.backends.triton.forward' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter compiles nothing")
def test_a_new_length_compiles_nothing():
    def lengths(*all_lengths):
        for length in all_lengths:
            q, k, v = (torch.randn(2, length, heads, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2, 2))
            kernels.attention(q, k, v)

    def variants():
        return sum(len(cache[0]) for cache in forward._forward.device_caches.values())

    lengths(128)
    before = variants()
    lengths(1, 16, 113, 1024, 4224)
    assert variants() == before


@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_properties(0).total_memory < 70 << 30,
    reason="needs 50 GB of GPU memory",
)
def test_more_than_two_to_the_31_elements():
    """The last rows of 2.2e9 elements, against the oracle on a slice of the sequence: a window of 64 sees nothing
    else."""
    from seal_ops.ops.backends import reference

    length, heads, tail = 540_000, 32, 100
    q, grad_out = (torch.randn(1, length, heads, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, length, 1, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    scale = torch.randn(heads, 128, device=DEVICE)
    assert q.numel() > 2**31
    out, lse = kernels.attention(q, k, v, scale, window=64)
    grad_q, grad_k, grad_v, *_ = kernels.attention_backward(
        grad_out, None, q, k, v, out, lse, scale, needs=NEEDS, window=64
    )
    ends = [t[:, -n:].double() for t, n in ((grad_out, tail), (q, tail), (k, 2 * tail), (v, 2 * tail))]
    exact_out, exact_lse = reference.attention(*ends[1:], scale.double(), window=64)
    exact = reference.attention_backward(
        ends[0], None, *ends[1:], exact_out, exact_lse, scale.double(), needs=NEEDS, window=64
    )
    seen_by_tail = 36  # the last keys, whose queries are all in the slice
    for got, want in (
        (out[:, -tail:], exact_out),
        (lse[..., -tail:], exact_lse),
        (grad_q[:, -tail:], exact[0]),
        (grad_k[:, -seen_by_tail:], exact[1][:, -seen_by_tail:]),
        (grad_v[:, -seen_by_tail:], exact[2][:, -seen_by_tail:]),
    ):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 2e-2, error


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_position_outside_the_table_gives_nan_and_no_read(interleaved):
    x = torch.randn(1, 4, 1, 16, device=DEVICE)
    cos, sin = torch.ones(3, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    positions = torch.tensor([0, 2, 3, -1], device=DEVICE)
    for rotated in kernels.rope(x, x, cos, sin, positions, interleaved=interleaved):
        assert torch.equal(rotated[:, :2], x[:, :2]) and torch.equal(rotated[..., 8:], x[..., 8:])
        assert rotated[:, 2:, :, :8].isnan().all()


@pytest.mark.parametrize("absent", ["q", "k"])
def test_the_compiler_gets_a_pointer_for_a_gradient_that_nobody_wants(absent, monkeypatch):
    """The interpreter never looks into the branch of a tensor without heads; a compiler does."""
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append(args)

    monkeypatch.setattr(rotary, "_rope", Recorder())
    gradients = {name: torch.randn(1, 8, 2, 16, device=DEVICE) for name in ("q", "k")}
    gradients[absent] = None
    cos, sin = torch.rand(2, 8, 4, device=DEVICE)
    rotary.rotate_in_place(gradients["q"], gradients["k"], 8, 8, cos, sin, None, None, False)
    ((q, k, q_out, k_out, *_),) = seen
    assert all(isinstance(t, torch.Tensor) for t in (q, k, q_out, k_out))
