"""Every kernel of the cuda backend once or twice on small odd shapes: what run_all.sh runs under compute-sanitizer.

usage: sanitize.py [forward] [decode] [backward] [rope] [paths] [masks] [grid]     (default: all but the grid)

`paths` leads small shapes where large ones go (_C.set_launch_overrides): several tiles to a thread block, whole groups
of query heads in one, several heads whose scale holds zeros, more packed sequences than a warp has lanes. `grid` is
the packed half of test_gpu_grid.py, forward and backward, without an oracle: every mask, factor and dtype on sequences
that end inside a tile.
"""

import itertools
import pathlib
import sys

import torch

import seal_ops
from seal_ops import rope_frequencies, rope_tables
from seal_ops.ops.dispatch import extension

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "fixtures")]  # cases.py

BACKEND = dict(backend="cuda")


def tensors(tokens, heads=(4, 2), head_dim=64, batch=1, dtype=torch.bfloat16):
    shape = lambda h: (tokens, h, head_dim) if batch is None else (batch, tokens, h, head_dim)
    return [torch.randn(shape(h), device="cuda").to(dtype) for h in (heads[0], heads[1], heads[1])]


def forward():
    for head_dim in (64, 128, 256):
        scale = torch.randn(4, head_dim, device="cuda")
        q, k, v = tensors(217, head_dim=head_dim)
        yield seal_ops.attention(q, k, v, scale, **BACKEND)
        yield seal_ops.attention(q[:, :113], k, v, scale[:, 0].contiguous(), window=40, **BACKEND)
        yield seal_ops.attention(q, k[:, :129], v[:, :129], causal=False, **BACKEND)
        q, k, v = tensors(200, head_dim=head_dim, batch=None, dtype=torch.float16)
        lengths = torch.tensor([0, 70, 70, 200], device="cuda", dtype=torch.int32)
        yield seal_ops.attention(q, k, v, scale, scale, cu_seqlens=lengths, **BACKEND)


def decode():
    """Few queries: 1, 2 and 4 row tiles, one split and several, a window, packed sequences with more queries than
    promised."""
    for head_dim in (64, 128, 192, 256):
        for queries, group in ((1, 4), (8, 4), (8, 8)):
            q, k, v = tensors(1300, heads=(2 * group, 2), head_dim=head_dim, batch=2)
            scale = torch.randn(2 * group, head_dim, device="cuda")
            for keys in (1300, 77):
                yield seal_ops.attention(q[:, :queries], k[:, :keys], v[:, :keys], scale, scale, **BACKEND)
            yield seal_ops.attention(q[:, :queries], k, v, scale, window=600, **BACKEND)
        q, k, v = tensors(1200, head_dim=head_dim, batch=None, dtype=torch.float16)
        cu_q, cu_k = (
            torch.tensor(lengths, device="cuda", dtype=torch.int32) for lengths in ([0, 1, 1, 40], [0, 700, 700, 1200])
        )
        yield seal_ops.attention(q[:40], k, v, cu_seqlens=cu_q, cu_seqlens_k=cu_k, max_seqlen=4, **BACKEND)


def backward():
    for head_dim in (64, 128, 256):
        for deterministic in (False, True):
            q, k, v = (t.requires_grad_() for t in tensors(217, head_dim=head_dim))
            scale, offset = (torch.randn(4, head_dim, device="cuda", requires_grad=True) for _ in range(2))
            options = dict(deterministic=deterministic, **BACKEND)
            out = seal_ops.attention(q, k, v, scale, offset, **options)
            yield from torch.autograd.grad(out, (q, k, v, scale, offset), torch.randn_like(out))
            table = rope_tables(217, rope_frequencies(head_dim)[0], device="cuda")
            out = seal_ops.rope_attention(q, k, v, *table, scale=scale, window=90, **options)
            yield from torch.autograd.grad(out, (q, k, v, scale), torch.randn_like(out))
            q, k, v = (t.requires_grad_() for t in tensors(200, head_dim=head_dim, batch=None))
            lengths = torch.tensor([0, 70, 70, 200], device="cuda", dtype=torch.int32)
            out = seal_ops.attention(q, k, v, scale, cu_seqlens=lengths, **options)
            yield from torch.autograd.grad(out, (q, k, v, scale), torch.randn_like(out))


def rope():
    for head_dim, rotary, interleaved in ((128, 128, False), (128, 64, True), (80, 32, False), (72, 20, True)):
        q, k, _ = tensors(113, head_dim=head_dim, batch=2)
        table = rope_tables(113, rope_frequencies(rotary)[0], device="cuda")
        yield from seal_ops.rope(q, k, *table, interleaved=interleaved, **BACKEND)
        yield from seal_ops.rope(q[:, -5:], k, *table, interleaved=interleaved, inverse=True, **BACKEND)


def paths():
    for head_dim, (ctas, sms) in itertools.product((64, 128, 256), ((1, 3), (1 << 30, 2))):
        extension().set_launch_overrides(enough_ctas=ctas, sms=sms)
        scale = torch.randn(4, head_dim, device="cuda")
        scale[:, ::7] = 0.0
        offset = torch.randn(2, 4, head_dim, device="cuda").requires_grad_()
        table = rope_tables(217, rope_frequencies(head_dim)[0], device="cuda")
        lengths = torch.tensor([n % 4 * 9 for n in range(40)], device="cuda").cumsum(0).to(torch.int32)
        for deterministic in (False, True):
            options = dict(deterministic=deterministic, **BACKEND)
            q, k, v, s = (t.requires_grad_() for t in (*tensors(217, head_dim=head_dim, batch=2), scale))
            out = seal_ops.attention(q, k, v, s, **options)
            yield from torch.autograd.grad(out, (q, k, v, s), torch.randn_like(out))
            out = seal_ops.attention(q, k, v, s, offset, window=70, **options)
            yield from torch.autograd.grad(out, (q, k, v, s, offset), torch.randn_like(out))
            out = seal_ops.rope_attention(q, k, v, *table, scale=s, causal=False, **options)
            yield from torch.autograd.grad(out, (q, k, v, s), torch.randn_like(out))
            q, k, v = (t.requires_grad_() for t in tensors(int(lengths[-1]), head_dim=head_dim, batch=None))
            out = seal_ops.attention(q, k, v, s, cu_seqlens=lengths, **options)
            yield from torch.autograd.grad(out, (q, k, v, s), torch.randn_like(out))
    extension().set_launch_overrides()


def masks():
    """The kernels for sinks and chunks: sinks apart from the band and beside it, several tiles to a thread block."""
    kinds = seal_ops.masks.streaming(70, 60), seal_ops.masks.shifted_groups(90, sinks=3)
    for head_dim, mask in itertools.product((64, 128, 256), kinds):
        scale = torch.randn(4, head_dim, device="cuda")
        scale[:, ::7] = 0.0
        q, k, v = tensors(700, head_dim=head_dim, batch=2)
        yield seal_ops.attention(q[:, :3], k, v, scale, mask=mask, **BACKEND)
        lengths = torch.tensor([0, 70, 70, 400], device="cuda", dtype=torch.int32)
        for deterministic, sms in ((False, 3), (True, 0)):
            extension().set_launch_overrides(sms=sms)
            options = dict(mask=mask, deterministic=deterministic, **BACKEND)
            q, k, v, s = (t.requires_grad_() for t in (*tensors(433, head_dim=head_dim), scale.detach()))
            out = seal_ops.attention(q, k, v, s, **options)
            yield from torch.autograd.grad(out, (q, k, v, s), torch.randn_like(out))
            q, k, v = (t.requires_grad_() for t in tensors(400, head_dim=head_dim, batch=None))
            out = seal_ops.attention(q, k, v, s, cu_seqlens=lengths, **options)
            yield from torch.autograd.grad(out, (q, k, v, s), torch.randn_like(out))
    extension().set_launch_overrides()


def grid():
    from cases import make, run
    from test_gpu_grid import PACKED, covering

    for case, dtype in covering(PACKED, (64, 128, 256)):
        function = lambda **arguments: seal_ops.attention(**arguments, return_lse=True, **BACKEND)
        got = run(function, case, make(case, dtype, "cuda"))
        del got["lse"]  # -inf where a row sees no key
        yield from got.values()


def main():
    known = dict(forward=forward, decode=decode, backward=backward, rope=rope, paths=paths, masks=masks, grid=grid)
    parts = sys.argv[1:] or [part for part in known if part != "grid"]
    torch.manual_seed(0)
    results = [t for part in parts for t in known[part]()]
    torch.cuda.synchronize()
    bad = sum(not bool(t.detach().cpu().isfinite().all()) for t in results)
    print(f"{len(results)} results of {', '.join(parts)}, {bad} of them not finite")
    sys.exit(bad > 0)


main()
