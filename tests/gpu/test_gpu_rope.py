"""rope on the GPU: sizes that fit no vector, every kind of table and position, 128k positions, more than 2^31
elements."""

import itertools

import pytest
import torch
from cases import plain_pytorch

import seal_ops
from seal_ops import rope_frequencies, rope_tables
from seal_ops.ops.backends import reference
from seal_ops.ops.dispatch import why_not

SIZES = [  # batch, tokens, query heads, key heads, head_dim, rotary_dim
    (2, 113, 32, 8, 128, 128),
    (1, 1, 4, 4, 64, 64),
    (3, 217, 6, 2, 256, 256),
    (2, 33, 5, 1, 80, 32),
    (1, 19, 2, 2, 72, 20),
    (1, 40, 71, 1, 64, 64),
    (1, 7, 3, 3, 96, 96),
    (2, 5, 2, 1, 250, 246),
    (1, 4224, 2, 1, 128, 64),
]
TABLES = ["counted", "int32", "int64 a row", "gathered", "packed"]


def assert_rotated(got, want):
    """Within one rounding of the exact result, plus fp32's own in the products."""
    eps = torch.finfo(got.dtype).eps
    bound = want.abs() * (0.5 * eps + 2e-7) + 4e-7 * want.abs().amax().clamp_min(1)
    worst = (got.double() - want).abs() - bound
    assert not worst.isnan().any() and worst.max() <= 0, f"beyond one rounding by {worst.max():.2e}"


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("table", TABLES)
def test_rope(backend, device, size, table, poisoned):
    batch, tokens, heads, kv_heads, head_dim, rotary = size
    for dtype, angles, interleaved, inverse in itertools.product(
        (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16), (False, True), (False, True)
    ):
        qkv = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
        q, k = qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads]  # views of a packed projection
        if table == "int32":
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        cos, sin = (t.to(angles) for t in rope_tables(5000, rope_frequencies(rotary)[0], device=device))
        at = ()
        if table == "int32":
            at = (torch.randint(0, 5000, (tokens,), device=device, dtype=torch.int32),)
        elif table == "int64 a row":
            at = (torch.randint(0, 5000, (batch, tokens), device=device),)
        elif table == "gathered":
            where = torch.randint(0, 5000, (batch, tokens), device=device)
            cos, sin = cos[where], sin[where]
        elif table == "packed":
            q, k, at = q.flatten(0, 1), k.flatten(0, 1), (torch.randint(0, 5000, (batch * tokens,), device=device),)
        got = seal_ops.rope(q, k, cos, sin, *at, interleaved=interleaved, inverse=inverse, backend=backend)
        want = reference.rope(
            q.double(), k.double(), cos.double(), sin.double(), *at, interleaved=interleaved, inverse=inverse
        )
        for a, b in zip(got, want):
            assert_rotated(a, b)


def test_positions_to_128k_and_back(backend, device):
    """The angle comes from the table, so the last position is as exact as the first; turning back restores the
    input."""
    cos, sin = rope_tables(131_072, rope_frequencies(128, base=500_000.0)[0], device=device)
    at = torch.tensor([0, 1, 65_537, 131_070, 131_071], device=device)
    q, k = torch.randn(1, 5, 8, 128, device=device).bfloat16(), torch.randn(1, 5, 2, 128, device=device).bfloat16()
    turned = seal_ops.rope(q, k, cos, sin, at, backend=backend)
    for a, b in zip(turned, reference.rope(q.double(), k.double(), cos.double(), sin.double(), at)):
        assert_rotated(a, b)
    for a, b in zip(seal_ops.rope(*turned, cos, sin, at, inverse=True, backend=backend), (q, k)):
        torch.testing.assert_close(a, b, rtol=0, atol=0.04)  # two roundings of values up to about 4


def test_queries_are_the_last_positions(backend, device):
    cos, sin = rope_tables(64, rope_frequencies(64)[0], device=device)
    q, k = torch.randn(2, 5, 4, 64, device=device).bfloat16(), torch.randn(2, 40, 2, 64, device=device).bfloat16()
    got = seal_ops.rope(q, k, cos, sin, backend=backend)
    for a, b in zip(got, reference.rope(q.double(), k.double(), cos.double(), sin.double())):
        assert_rotated(a, b)


@pytest.mark.parametrize("backend", ["cuda"])
def test_a_position_outside_the_table_is_nan_not_a_stray_read(backend):
    """A kernel cannot raise, and must not read past the table."""
    reason = why_not(backend, "rope", torch.device("cuda", 0), torch.bfloat16, 64)
    if reason:
        pytest.skip(reason)
    cos, sin = rope_tables(16, rope_frequencies(64)[0], device="cuda")
    q = torch.randn(1, 4, 2, 64, device="cuda").bfloat16()
    at = torch.tensor([3, 16, -1, 2**40], device="cuda")
    turned, _ = seal_ops.rope(q, q, cos, sin, at, backend=backend)
    assert turned[:, 0].isfinite().all() and turned[:, 1:].isnan().all()


def test_more_than_2_31_elements(backend, device, alone):
    tokens, heads, head_dim = 140_000, 128, 128  # 2.29e9 elements of q, 4.6 GB
    cos, sin = rope_tables(tokens, rope_frequencies(head_dim)[0], device=device)
    q = torch.empty(1, tokens, heads, head_dim, device=device, dtype=torch.bfloat16).normal_()
    k = q[:, :, :1]
    assert q.numel() > 2**31
    got, got_k = seal_ops.rope(q, k, cos, sin, backend=backend)
    for rows in (slice(0, 3), slice(131_070, 131_075), slice(tokens - 3, tokens)):
        at = torch.arange(tokens, device=device)[rows]
        want, want_k = reference.rope(q[:, rows].double(), k[:, rows].double(), cos.double(), sin.double(), at)
        assert_rotated(got[:, rows], want)
        assert_rotated(got_k[:, rows], want_k)


ROPE_ATTENTION = [  # sq, sk, (heads, kv_heads), head_dim, rotary_dim, interleaved, positions, window
    (217, 217, (6, 2), 64, 64, False, "counted", None),
    (1023, 1023, (4, 4), 128, 128, False, "random", None),
    (113, 203, (4, 1), 128, 128, True, "counted", None),
    (256, 512, (4, 2), 256, 256, False, "random", 100),
    (129, 129, (2, 2), 256, 256, True, "gathered", None),
    (333, 333, (6, 1), 64, 32, True, "random", 57),
    (640, 640, (8, 2), 128, 64, False, "gathered", None),
    (1, 300, (8, 2), 128, 128, False, "counted", None),
    # the gradients' way back: 16-byte reads of a table in 16 bits; of part of the channels; and tables they do not fit
    (201, 201, (4, 2), 128, 128, False, "bf16", None),
    (201, 201, (2, 1), 256, 64, False, "random", None),
    (201, 201, (4, 2), 64, 48, False, "bf16", None),
    (201, 201, (4, 2), 64, 40, False, "counted", None),
    (201, 201, (4, 2), 128, 128, False, "view", None),
    (201, 201, (4, 2), 128, 128, False, "view of bf16", None),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", ROPE_ATTENTION, ids=lambda s: "-".join(map(str, s)))
def test_rope_attention(backend, device, shape, deterministic):
    """out, the rotated q and k, and all gradients: within twice the error of plain PyTorch on bf16, both against
    fp64."""
    sq, sk, (heads, kv_heads), head_dim, rotary, interleaved, where, window = shape
    randn = lambda *n: torch.randn(*n, device=device)
    q, grad_out = randn(2, sq, heads, head_dim).bfloat16(), randn(2, sq, heads, head_dim).bfloat16()
    k, v = randn(2, sk, kv_heads, head_dim).bfloat16(), randn(2, sk, kv_heads, head_dim).bfloat16()
    scale = randn(heads, head_dim)
    cos, sin = rope_tables(3000, rope_frequencies(rotary)[0], device=device)
    at_q = at_k = None
    if where == "random":
        at_q, at_k = (
            torch.randint(0, 3000, (2, sq), device=device),
            torch.randint(0, 3000, (2, sk), device=device, dtype=torch.int32),
        )
    elif where == "gathered":
        rows = torch.randint(0, 3000, (2, sq), device=device)
        cos, sin = cos[rows], sin[rows]
    if "bf16" in where:
        cos, sin = cos.bfloat16(), sin.bfloat16()
    if "view" in where:  # begins beside a multiple of 16 bytes
        cos, sin = (torch.nn.functional.pad(t, (1, 3))[:, 1:-3] for t in (cos, sin))
        assert cos.data_ptr() % 16

    def by_hand(q, k, v, scale):
        turned = []
        for x, at, first in ((q, at_q, sk - sq), (k, at_k, 0)):
            c, s = (
                reference.angles(t, at, x.shape[1], first, torch.promote_types(x.dtype, torch.float32))
                for t in (cos, sin)
            )
            turned.append(reference.turn(x, c, s, interleaved))
        return plain_pytorch(*turned, v, scale, window=window)[0]

    def fused(q, k, v, scale):
        return seal_ops.rope_attention(
            q,
            k,
            v,
            cos,
            sin,
            at_q,
            at_k,
            scale,
            interleaved=interleaved,
            window=window,
            deterministic=deterministic,
            backend=backend,
        )

    def results(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)] + [
            scale.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        ]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))

    exact, plain, got = (
        results(by_hand, torch.float64),
        results(by_hand, torch.bfloat16),
        results(fused, torch.bfloat16),
    )
    for name, a, b, c in zip(("out", "grad_q", "grad_k", "grad_v", "grad_scale"), got, plain, exact):
        error, other = ((t.double() - c).abs().max().item() for t in (a, b))
        allowed = 2 * other + torch.finfo(a.dtype).eps * c.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (PyTorch's own {other:.3e})"
