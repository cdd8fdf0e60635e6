"""Masks: what their makers mean, against the oracle on every backend, against LongLoRA's form, and what they cost."""

import dataclasses

import pytest
import torch
from cases import Case, gradients_of, make, run, run_plain
from layouts import dtypes, half
from mask_cases import MASKED
from measure import assert_close, oracle
from torch.library import opcheck

import seal_ops
from seal_ops import masks
from seal_ops.ops.visibility import Visibility

FAR = masks.UNBOUNDED


def call(backend, mask=None, **more):
    """The op; `mask`: in place of the integers of the inputs."""
    if mask is not None:
        return lambda **inputs: seal_ops.attention(**inputs, mask=mask, **more, backend=backend, return_lse=True)
    return lambda **inputs: torch.ops.seal.attention(**inputs, **more, backend=backend)


# ---- the description


def by_words(mask: masks.Mask, sq: int, sk: int, head: int, heads: int) -> torch.Tensor:
    """The sentence of masks.Mask, one pair after the other."""
    found = torch.zeros(sq, sk, dtype=torch.bool)
    shift = mask.shift if head >= heads - round(mask.shifted_heads * heads) else 0
    for i in range(sq):
        p = i + sk - sq
        for j in range(sk):
            banded = mask.lower <= j - p <= mask.upper
            if mask.chunk:
                distance = (j + shift) // mask.chunk - (p + shift) // mask.chunk
                banded = banded and mask.chunk_lower <= distance <= mask.chunk_upper
            found[i, j] = banded or (j < mask.sinks and j <= p)
    return found


@pytest.mark.parametrize("case", MASKED, ids=str)
@pytest.mark.parametrize("sq, sk", [(13, 13), (5, 17), (17, 5)])
def test_the_integers_say_what_the_words_say(case, sq, sk):
    small = {name: 1 + getattr(case.mask, name) // 8 for name in ("chunk", "sinks") if getattr(case.mask, name)}
    mask = dataclasses.replace(case.mask, **small)
    mask = dataclasses.replace(mask, shift=min(mask.shift, max(0, mask.chunk - 1)))
    seen = Visibility(*mask.resolve(6)).allowed(sq, sk, 6)
    for head in range(6):
        assert torch.equal(seen[head % len(seen)], by_words(mask, sq, sk, head, 6)), head


def rows(mask: masks.Mask, length: int, head: int = 0, heads: int = 2) -> list[str]:
    seen = Visibility(*mask.resolve(heads)).allowed(length, length, heads)
    return ["".join(".x"[int(pair)] for pair in row) for row in seen[head % len(seen)]]


def test_what_the_makers_make():
    assert rows(masks.causal(), 3) == ["x..", "xx.", "xxx"]
    assert rows(masks.full(), 2) == ["xx", "xx"]
    assert rows(masks.window(2), 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(masks.streaming(1, 2), 5) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]
    assert rows(masks.chunks(2), 5) == ["x....", "xx...", "..x..", "..xx.", "....x"]
    assert rows(masks.chunks(2, before=(1, 1)), 5) == [".....", ".....", "xx...", "xx...", "..xx."]
    assert rows(masks.chunks(1, before=(2, None)), 4) == ["....", "....", "x...", "xx.."]
    assert rows(masks.band(-1, 1), 3) == ["xx.", "xxx", ".xx"]
    assert rows(masks.band(None, -2), 4) == ["....", "....", "x...", "xx.."]
    shifted = masks.shifted_groups(4, sinks=1)
    assert rows(shifted, 7) == ["x......", "xx.....", "xxx....", "xxxx...", "x...x..", "x...xx.", "x...xxx"]
    assert rows(shifted, 7, head=1) == ["x......", "xx.....", "x.x....", "x.xx...", "x.xxx..", "x.xxxx.", "x.....x"]


def test_masks_are_values():
    a, b = masks.streaming(4, 32), masks.streaming(4, 32)
    assert a == b and hash(a) == hash(b) and a != masks.streaming(5, 32) and len({a, b}) == 1
    assert repr(a) == "Mask(lower=-31, upper=0, sinks=4)" and repr(masks.full()) == "Mask()"
    assert eval(repr(masks.shifted_groups(8)), {"Mask": masks.Mask}) == masks.shifted_groups(8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.sinks = 3


def test_what_resolves_to_the_eight_integers():
    none = [0, -FAR, FAR, 0, FAR, 0]
    assert masks.causal().resolve(8) == [-FAR, 0, *none]
    assert masks.window(2**40).resolve(8)[:2] == [1 - FAR, 0]
    assert masks.streaming(4, 32).resolve(8) == [-31, 0, *none[:-1], 4]
    assert masks.shifted_groups(64).resolve(8) == [-FAR, 0, 64, 0, 0, 32, 4, 0]
    assert masks.shifted_groups(64, shifted_heads=0).resolve(8) == [-FAR, 0, 64, 0, 0, 0, FAR, 0]
    assert masks.shifted_groups(65, shifted_heads=1 / 3).resolve(9) == [-FAR, 0, 65, 0, 0, 32, 6, 0]
    assert masks.chunks(64, before=(2, None)).resolve(8) == [-FAR, 0, 64, -FAR, -2, 0, FAR, 0]


@pytest.mark.parametrize(
    "make_it, sentence",
    [
        (lambda: masks.window(0), "window: size must be an integer of at least 1, got 0"),
        (lambda: masks.window(2.5), "window: size must be an integer of at least 1, got 2.5"),
        (lambda: masks.streaming(-1, 4), "streaming: sinks must be an integer of at least 0, got -1"),
        (lambda: masks.streaming(4, 0), "streaming: window must be an integer of at least 1, got 0"),
        (lambda: masks.shifted_groups(0), "shifted_groups: group must be an integer of at least 1, got 0"),
        (lambda: masks.shifted_groups(-8), "shifted_groups: group must be an integer of at least 1, got -8"),
        (lambda: masks.shifted_groups(8, 1.5), "shifted_groups: shifted_heads must be a share from 0 to 1, got 1.5"),
        (
            lambda: masks.shifted_groups(8, sinks=None),
            "shifted_groups: sinks must be an integer of at least 0, got None",
        ),
        (lambda: masks.chunks(0), "chunks: size must be an integer of at least 1, got 0"),
        (
            lambda: masks.chunks(4, before=(2, 1)),
            "chunks: before must be (least, most) chunks with 0 <= least <= most (most None: any number), got (2, 1)",
        ),
        (
            lambda: masks.chunks(4, before=1),
            "chunks: before must be (least, most) chunks with 0 <= least <= most (most None: any number), got 1",
        ),
        (lambda: masks.band(1, 0), "band: lower must not be above upper (0), got 1"),
        (lambda: masks.band("a", 0), f"band: lower must be an integer of at least {-FAR}, got 'a'"),
        (
            lambda: masks.shifted_groups(8).resolve(9),
            "Mask: shifted_heads must be a share that gives whole heads of 9, got 0.5",
        ),
    ],
)
def test_bad_descriptions_get_a_sentence(make_it, sentence):
    with pytest.raises(ValueError) as error:
        make_it()
    assert str(error.value) == f"seal_ops.masks.{sentence}"


def test_a_mask_that_is_none():
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="seal::attention: mask must be made by seal_ops.masks .*, got Tensor"):
        seal_ops.attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool))


# ---- on every backend


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_against_the_oracle(backend, device, case):
    for dtype in dtypes(backend, device):
        if backend == "cuda" and case.blocks:
            pytest.skip("the CUDA kernels take no block lists")
        inputs = make(case, dtype, device)
        assert_close(run(call(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize(
    "mask, shorthand",
    [
        (masks.causal(), dict()),
        (masks.full(), dict(causal=False)),
        (masks.window(9), dict(window=9)),
        (masks.band(-8, 8), dict(causal=False, window=9)),
    ],
    ids=str,
)
def test_the_shorthands_are_masks(backend, device, mask, shorthand):
    """Bit for bit."""
    case = Case(33, 40, heads=(4, 2), head_dim=32, batch=2)
    inputs = make(case, half(backend, device), device)
    del inputs["causal"], inputs["window"]
    first = run(call(backend, mask=mask, deterministic=True), case, inputs)
    for name, value in run(call(backend, **shorthand, deterministic=True), case, inputs).items():
        assert torch.equal(value, first[name]), name


# Of 16-bit rows, of which P and the result are rounded; one key more or less moves a row of these lengths by a tenth.
HALF = 4e-2


def worst_row(found: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error of a row of channels, as a share of its norm or, where that is small, of the mean norm of the
    head's rows."""
    found, want = found.double(), want.double()
    norms = want.norm(dim=-1)
    return ((found - want).norm(dim=-1) / norms.maximum(norms.mean(-2, keepdim=True))).max().item()


@pytest.mark.parametrize("case", [MASKED[4], MASKED[14]], ids=str)
def test_rotation_before_a_mask(backend, device, case):
    inputs = make(case, half(backend, device), device)
    del inputs["causal"], inputs["window"]
    cos, sin = seal_ops.rope_tables(128, seal_ops.rope_frequencies(case.head_dim)[0], device=device)
    turned = dict(inputs)
    at = {}
    if case.packed:
        at["positions"] = seal_ops.packed_positions(inputs["cu_seqlens"], len(inputs["q"]), inputs["cu_seqlens_k"])
        at["positions_k"] = seal_ops.packed_positions(inputs["cu_seqlens_k"], len(inputs["k"]))
    grad_out, _ = gradients_of(case, inputs)

    def results(function, given):
        leaves = {n: given[n].detach().requires_grad_() for n in "qkv"}
        out, lse = function({**given, **leaves})
        return out, lse, *torch.autograd.grad(out, list(leaves.values()), grad_out)

    def separately(a):
        a["q"], a["k"] = seal_ops.rope(a["q"], a["k"], cos, sin, **at, backend=backend)
        return call(backend)(**a)

    fused = lambda a: seal_ops.rope_attention(cos=cos, sin=sin, **a, backend=backend, return_lse=True)
    for a, b in zip(results(fused, inputs), results(separately, turned)):
        if a.dtype == torch.float32 and a.shape[-1] != case.head_dim:  # lse
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        else:
            assert worst_row(a, b) < {torch.float32: 1e-4}.get(a.dtype, HALF)


@pytest.mark.parametrize("case", [MASKED[3], MASKED[14]], ids=str)
def test_opcheck(backend, device, case):
    if backend == "triton" and device.type == "cpu" and case.packed:
        pytest.skip("one case is enough under the interpreter")
    inputs = make(case, half(backend, device), device)
    leaves = {
        n: t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()
    }
    positional = [leaves.pop(n, None) for n in ("q", "k", "v", "scale", "offset", "cu_seqlens", "cu_seqlens_k")]
    opcheck(torch.ops.seal.attention.default, positional, dict(leaves, backend=backend), rtol=1e-2, atol=1e-2)


def test_compiles_as_one_graph_and_not_again_for_a_new_length(backend, device):
    torch._dynamo.reset()
    mask = masks.shifted_groups(8, sinks=1)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(q, k, v):
        return seal_ops.attention(2 * q, k, v, mask=mask, backend=backend).float().square().sum()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (24, 31, 40):
            q, k, v = (
                torch.randn(1, length, heads, 32, device=device, dtype=half(backend, device), requires_grad=True)
                for heads in (4, 2, 2)
            )
            layer(q, k, v).backward()
            compiled, q.grad = q.grad, None
            seal_ops.attention(2 * q, k, v, mask=mask, backend=backend).float().square().sum().backward()
            torch.testing.assert_close(compiled, q.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "mask",
    [
        masks.streaming(2, 2),
        masks.shifted_groups(4, sinks=1),
        masks.chunks(2, before=(1, 1)),
        dataclasses.replace(masks.chunks(3), upper=-1),
    ],
    ids=str,
)
def test_gradcheck_in_fp64(backend, mask):
    q, k, v = (torch.randn(1, 7, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 2, 2))

    def function(*qkv):
        out, lse = call(backend, mask=mask)(**dict(zip("qkv", qkv)))
        return out, torch.where(torch.isfinite(lse), lse, 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_shifted_heads_that_split_a_group_are_refused():
    q, k = torch.randn(1, 8, 6, 16), torch.randn(1, 8, 2, 16)
    with pytest.raises(ValueError, match="mask must shift whole groups of 3 query heads, .* got heads from 4 on"):
        seal_ops.attention(q, k, k, mask=masks.shifted_groups(4, shifted_heads=1 / 3))
    seal_ops.attention(q, k, k, mask=masks.shifted_groups(4))


# ---- the published form


def longlora_without_wrap(q, k, v, group: int):
    """LongLoRA's S²-Attn (arXiv 2309.12307, section 3.2) where nothing wraps around: half of the heads in groups of
    tokens, half of them in groups that begin half a group later, whose first half group is alone."""
    batch, length, heads, head_dim = q.shape
    outs = []
    for half_of_heads in range(2):
        own = slice(half_of_heads * heads // 2, (half_of_heads + 1) * heads // 2)
        borders = [0, *range(group // 2 if half_of_heads else group, length, group), length]
        parts = []
        for begin, end in zip(borders, borders[1:]):
            part = [t[:, begin:end, own].transpose(1, 2) for t in (q, k, v)]
            parts.append(torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True))
        outs.append(torch.cat(parts, 2).transpose(1, 2))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("length, group", [(96, 32), (96, 24), (70, 20), (33, 64)])
def test_shifted_groups_are_longloras_path_without_wrap_around(backend, device, length, group):
    dtype = torch.float64 if backend in ("cpu", "reference") else half(backend, device)
    low = [torch.randn(2, length, 4, 32, device=device).to(dtype).requires_grad_() for _ in range(3)]
    q, k, v = (t.detach().double().requires_grad_() for t in low)
    g = torch.randn_like(low[0])
    want = longlora_without_wrap(q, k, v, group)
    wanted = [want, *torch.autograd.grad(want, (q, k, v), g.double())]
    got = seal_ops.attention(*low, mask=masks.shifted_groups(group), backend=backend)
    found = [got, *torch.autograd.grad(got, low, g)]
    for a, b in zip(found, wanted):
        assert worst_row(a, b) < {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, HALF)


# ---- block lists


def test_blocks_are_a_mask_of_their_own(backend, device):
    """masks.blocks through the wrapper is a boolean mask, and a map with everything is the mask alone."""
    if backend == "cuda":
        pytest.skip("the CUDA kernels take no block lists")
    dtype = half(backend, device)
    q, k, v = (torch.randn(1, 100, heads, 32, device=device, dtype=dtype) for heads in (4, 2, 2))
    visited = torch.rand(1, 4, 4, 4, device=device) < 0.5
    out = seal_ops.attention(q, k, v, mask=masks.blocks(visited, 32), backend=backend)
    seen = visited.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :100, :100].tril()
    heads = [t.double().transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    want = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).nan_to_num().transpose(1, 2)
    bound = {torch.float32: 1e-4, torch.float64: 1e-12}.get(dtype, HALF)
    assert worst_row(out, want) < bound
    window = masks.window(40)
    everything = masks.blocks(torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device), 32, window)
    a, b = (seal_ops.attention(q, k, v, mask=m, backend=backend) for m in (everything, window))
    assert worst_row(a, b) < bound


@pytest.mark.parametrize("mask", [masks.causal(), masks.streaming(40, 50), masks.shifted_groups(64)], ids=str)
@pytest.mark.parametrize("sq, sk", [(256, 256), (100, 300), (300, 100)])
def test_the_cover_of_a_mask_leaves_nothing_out_and_little_in(mask, sq, sk):
    seen, size = Visibility(*mask.resolve(4)), 32
    pairs = seen.allowed(sq, sk, 4)
    padded = torch.nn.functional.pad(pairs, (0, -sk % size, 0, -sq % size))
    needed = padded.unflatten(1, (-1, size)).unflatten(3, (-1, size)).any(4).any(2)
    cover = seen.cover(sq, sk, size, 4, "cpu").expand(len(needed), -1, -1)
    assert not (needed & ~cover).any() and cover.sum() <= needed.sum() + needed.shape[0] * needed.shape[1]


def test_lists_hold_the_blocks_that_are_visited_and_seen():
    pytest.importorskip("triton")
    from seal_ops.ops.backends.triton.host import BlockLists, Geometry

    q = torch.zeros(1, 128, 2, 16)
    visited = torch.rand(1, 2, 4, 4) < 0.6
    lists = BlockLists(visited, 32, Geometry.of(q, q, None, True, None, None, None, None))
    want = visited & torch.ones(4, 4, dtype=torch.bool).tril()
    for found, each in ((lists.of_keys, want), (lists.of_queries, want.transpose(2, 3))):
        order, counts = found[:2]
        for head in range(2):
            for row in range(4):
                mine = order[0, head, row, : counts[0, head, row]].tolist()
                assert mine == each[0, head, row].nonzero()[:, 0].tolist()


def test_a_size_of_blocks_that_does_not_fit_a_tile():
    with pytest.raises(ValueError, match=r"seal_ops.masks.blocks: size must be a multiple of 32, got 48"):
        masks.blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), 48)
