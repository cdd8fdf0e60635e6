"""Sums of probabilities and maps of blocks, against whole score matrices."""

import pytest
import torch

import seal_ops
from seal_ops import masks
from seal_ops.ops import attention_maps, block_selection
from seal_ops.ops.backends import reference
from seal_ops.ops.visibility import Visibility

MASKS = [None, masks.full(), masks.window(9), masks.streaming(3, 9), masks.shifted_groups(16, sinks=2)]


def problem(mask, sq=50, sk=70):
    q, k = (torch.randn(2, s, h, 8, dtype=torch.float64) for s, h in ((sq, 4), (sk, 2)))
    _, lse = seal_ops.attention(q, k, k, mask=mask or masks.causal(), return_lse=True)
    seen = Visibility(*(mask or masks.causal()).resolve(4)).allowed(sq, sk, 4)
    p = torch.stack([reference._softmax(q[b], k[b], 8**-0.5, seen)[0] for b in range(2)])
    return q, k, lse, p


@pytest.mark.parametrize("elements", [1 << 25, 2 * 4 * 70 * 7])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sq, sk", [(50, 70), (70, 50)])
def test_sums_and_maxima(mask, sq, sk, elements, monkeypatch):
    monkeypatch.setattr(attention_maps, "_ELEMENTS", elements)
    q, k, lse, p = problem(mask, sq, sk)
    torch.testing.assert_close(attention_maps.column_sums(q, k, lse, mask), p.sum(2))
    spans = [(0, 4), (4, sk), (7, 7)]
    want = torch.stack([p[..., begin:end].sum(-1) for begin, end in spans], -1)
    torch.testing.assert_close(attention_maps.span_mass(q, k, lse, spans, mask), want)
    maxima = attention_maps.block_maxima(q, k, lse, 16, mask)
    padded = torch.nn.functional.pad(p, (0, -sk % 16, 0, -sq % 16))
    want = padded.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).amax((3, 5))
    torch.testing.assert_close(maxima, want)


@pytest.mark.parametrize("elements", [1 << 25, 2 * 4 * 70 * 7])
def test_block_lists_are_a_mask_too(elements, monkeypatch):
    monkeypatch.setattr(attention_maps, "_ELEMENTS", elements)
    q, k = (torch.randn(2, 70, h, 8, dtype=torch.float64) for h in (4, 2))
    visited = torch.rand(2, 4, 3, 3) < 0.6
    mask = masks.blocks(visited, 32, masks.streaming(3, 40))
    _, lse = seal_ops.attention(q, k, k, mask=mask, return_lse=True)
    seen = Visibility(*masks.streaming(3, 40).resolve(4)).allowed(70, 70, 4)
    seen = seen & visited.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :70, :70]
    p = torch.stack([reference._softmax(q[b], k[b], 8**-0.5, seen[b])[0] for b in range(2)])
    torch.testing.assert_close(attention_maps.column_sums(q, k, lse, mask), p.sum(2))
    torch.testing.assert_close(attention_maps.span_mass(q, k, lse, [(5, 66)], mask)[..., 0], p[..., 5:66].sum(-1))
    padded = torch.nn.functional.pad(p, (0, 58, 0, 58)).unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).amax((3, 5))
    torch.testing.assert_close(attention_maps.block_maxima(q, k, lse, 16, mask), padded[..., :5, :5])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_packed_sequences_are_what_they_are_alone(mask):
    """The real tokens of padded rows, say: of other lengths than their keys, and none of a sequence."""
    lengths, lengths_k = (13, 0, 40, 5), (30, 4, 33, 5)
    q, k = (torch.randn(sum(n), h, 8, dtype=torch.float64) for n, h in ((lengths, 4), (lengths_k, 2)))
    cu, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (lengths, lengths_k))
    packed = dict(cu_seqlens=cu, cu_seqlens_k=cu_k)
    _, lse = seal_ops.attention(q, k, k, mask=mask or masks.causal(), return_lse=True, **packed)
    spans = [(0, 3), (4, 33)]
    sums = attention_maps.column_sums(q, k, lse, mask, **packed)
    shares = attention_maps.span_mass(q, k, lse, spans, mask, **packed)
    maxima = attention_maps.block_maxima(q, k, lse, 16, mask, **packed)
    assert len(maxima) == 4
    for n, (a, b) in enumerate(zip(cu.tolist(), cu_k.tolist())):
        if n == 4 or not lengths[n]:
            continue
        one_q, one_k = q[None, a : a + lengths[n]], k[None, b : b + lengths_k[n]]
        _, own = seal_ops.attention(one_q, one_k, one_k, mask=mask or masks.causal(), return_lse=True)
        alone = one_q, one_k, own
        torch.testing.assert_close(sums[:, b : b + lengths_k[n]], attention_maps.column_sums(*alone, mask)[0])
        inside = [(min(x, lengths_k[n]), min(y, lengths_k[n])) for x, y in spans]
        torch.testing.assert_close(shares[:, a : a + lengths[n]], attention_maps.span_mass(*alone, inside, mask)[0])
        torch.testing.assert_close(maxima[n], attention_maps.block_maxima(*alone, 16, mask)[0])
    assert not sums[:, cu_k[1] : cu_k[2]].any()


def test_keys_that_no_query_of_a_chunk_sees_are_not_read(monkeypatch):
    """Half of the scores of causal attention, and a window's share of them, are formed."""
    monkeypatch.setattr(attention_maps, "_ELEMENTS", 4 * 512 * 32)
    q, k = (torch.randn(1, 512, h, 8) for h in (4, 2))
    for mask, most in ((masks.causal(), 0.54), (masks.window(32), 0.13), (masks.full(), 1.0)):
        _, lse = seal_ops.attention(q, k, k, mask=mask, return_lse=True)
        formed = sum(p.numel() for _, _, p in attention_maps._probabilities(q, k, lse, mask, None))
        assert formed <= most * 4 * 512 * 512


def test_memory_is_a_chunks():
    """No tensor as large as the scores is made."""
    q, k, lse, _ = problem(None)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    before, attention_maps._ELEMENTS = attention_maps._ELEMENTS, 2 * 4 * 70 * 5
    try:
        with Watch():
            attention_maps.column_sums(q, k, lse)
    finally:
        attention_maps._ELEMENTS = before
    assert max(sizes) <= 2 * 4 * 70 * 8


def test_vertical_slash_finds_the_columns_and_diagonals_that_were_put_in():
    """Keys 5 and 70 get attention from everywhere, and so does the key 40 tokens back."""
    length, size = 192, 32
    p = torch.zeros(1, 1, length, length)
    q, k = torch.zeros(1, length, 1, 2 * length), torch.zeros(1, length, 1, 2 * length)
    k[0, :, 0, :length] = torch.eye(length) * 10
    for i in range(length):
        for j in {5, 70, i - 40} - {n for n in (5, 70, i - 40) if n > i or n < 0}:
            q[0, i, 0, j], p[0, 0, i, j] = 10, 1
    found = block_selection.vertical_slash(q, k, 2, 1, size=size, last=16, softmax_scale=1.0)
    want = p.unflatten(3, (-1, size)).unflatten(2, (-1, size)).amax((3, 5)) > 0
    want |= torch.eye(length // size, dtype=torch.bool)
    want[..., 0] = True
    # A column is visited from every later block, also where its queries were not among the last.
    want |= (torch.arange(6) == 70 // size) & (torch.arange(6)[:, None] >= 70 // size)
    assert torch.equal(found, want)


def test_a_map_of_everything_is_causal_attention():
    q, k = torch.randn(1, 130, 4, 16), torch.randn(1, 130, 2, 16)
    visited = block_selection.vertical_slash(q, k, 130, 130, size=32)
    out = seal_ops.attention(q, k, k, mask=masks.blocks(visited, 32))
    torch.testing.assert_close(out, seal_ops.attention(q, k, k))
    streamed = seal_ops.attention(q, k, k, mask=masks.blocks(block_selection.a_shape(q, k, 4, 40, size=32), 32))
    exact = seal_ops.attention(q, k, k, mask=masks.blocks(visited, 32, masks.streaming(4, 40)))
    assert not torch.allclose(streamed, exact)  # whole blocks against single keys
    fine = masks.blocks(block_selection.a_shape(q, k, 4, 40, size=32), 32, masks.streaming(4, 40))
    torch.testing.assert_close(seal_ops.attention(q, k, k, mask=fine), exact)


def test_heads_for_which_a_shape_is_enough():
    q, k = torch.zeros(1, 100, 2, 100), torch.zeros(1, 100, 2, 100)
    k[0, :, :] = torch.eye(100)[:, None] * 10
    q[0, torch.arange(100), 0, torch.arange(100)] = 10  # head 0 looks at itself
    q[0, :, 1, 40] = 10  # head 1 at the middle
    assert block_selection.cheaper_a_shape(q, k, 4, 20, 0.9, softmax_scale=1.0).tolist() == [[True, False]]


def test_bad_arguments_get_a_sentence():
    q, k, lse, _ = problem(None)
    with pytest.raises(ValueError, match=r"attention_maps: lse must have shape \[2, 4, 50\], got \[2, 4, 3\]"):
        attention_maps.column_sums(q, k, lse[..., :3])
    packed, cu = q.flatten(0, 1), torch.tensor([0, 50, 100], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"q must have shape \[B, S, H, D\] without cu_seqlens, got \[100, 4, 8\]"):
        attention_maps.column_sums(packed, k, lse)
    with pytest.raises(ValueError, match=r"k must have shape \[T, H, D\] with cu_seqlens, got \[2, 70, 2, 8\]"):
        attention_maps.span_mass(packed, k, lse, [], cu_seqlens=cu)
    with pytest.raises(ValueError, match="mask must be a plain one with cu_seqlens, got block lists"):
        lists = masks.blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool))
        attention_maps.block_maxima(packed, k.flatten(0, 1), lse, 16, lists, cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"k must have q's head_dim and heads that divide q's 4, got \[2, 70, 3, 8\]"):
        attention_maps.column_sums(q, torch.randn(2, 70, 3, 8), lse)
    with pytest.raises(ValueError, match=r"spans must lie from 0 to 70 \(the keys\), got \(3, 71\)"):
        attention_maps.span_mass(q, k, lse, [(3, 71)])
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        attention_maps.block_maxima(q, k, lse, 0)
    with pytest.raises(ValueError, match="block_selection: slashes must be at least 0, got -1"):
        block_selection.vertical_slash(q, k, 1, -1)
