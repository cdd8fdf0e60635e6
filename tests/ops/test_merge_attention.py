"""seal::merge_attention: attention over parts of the keys, put together, on every backend."""

import itertools

import pytest
import torch
from torch.library import opcheck

import seal_ops

seal = torch.ops.seal
DTYPES = {"reference": torch.float64, "cpu": torch.float64, "triton": torch.float32, "cuda": torch.float16}


@pytest.fixture
def dtype(backend):
    if backend == "cuda":
        pytest.skip("the kernel is Triton's")
    return DTYPES[backend]


def parts(count=3, batch=2, tokens=37, heads=3, head_dim=24, dtype=torch.float64, device="cpu", packed=False, seed=0):
    """Outputs and log-sum-exps; row 0 no part sees, rows 1 and 2 not the first or the last, where the output is NaN."""
    g = torch.Generator().manual_seed(seed)
    lead = () if packed else (batch,)
    outs = [torch.randn(*lead, tokens, heads, head_dim, generator=g, dtype=torch.float64) for _ in range(count)]
    lses = [4 * torch.randn(*lead, heads, tokens, generator=g, dtype=torch.float64) for _ in range(count)]
    for n, rows in ((0, [0, 1]), (count - 1, [0, 2]), *((n, [0]) for n in range(count))):
        lses[n][..., rows] = -torch.inf
        outs[n][..., rows, :, :] = torch.nan
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(device, dtype) for t in outs], [t.to(device, statistics) for t in lses]


def by_hand(outs, lses):
    """The formula over stacked tensors, in fp64, differentiable; rows that a part does not see are cut out."""
    lses = torch.stack([t.double() for t in lses])
    outs = torch.stack([t.double() for t in outs])
    seen = lses > -torch.inf
    outs = torch.where(seen.transpose(-1, -2)[..., None], outs, 0.0)
    finite = torch.where(seen, lses, -1e30)
    weights = torch.where(seen, finite.softmax(0), 0.0)
    lse = torch.where(seen.any(0), finite.logsumexp(0), -torch.inf)
    return (weights.transpose(-1, -2)[..., None] * outs).sum(0), lse


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count, head_dim", [(1, 16), (2, 24), (3, 64), (5, 8)])
def test_it_is_the_formula(backend, device, dtype, count, head_dim, packed):
    outs, lses = parts(count, head_dim=head_dim, dtype=dtype, device=device, packed=packed)
    leaves = [t.requires_grad_() for t in (*outs, *lses)]
    out, lse = seal_ops.merge_attention(outs, lses, backend=backend)
    want, want_lse = by_hand(outs, lses)
    assert (
        out.dtype == dtype
        and not out.isnan().any()
        and (lse[..., 0] == -torch.inf).all()
        and not out[..., 0, :, :].any()
    )
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), want, **tolerance)
    torch.testing.assert_close(lse.double(), want_lse, **tolerance)
    seen = want_lse > -torch.inf
    g, g_lse = torch.randn_like(want), torch.randn_like(want_lse)
    g_lse[~seen] = torch.nan  # not read where no part sees anything
    loss = lambda o, l: (o.double() * g).sum() + torch.where(seen, l.double() * g_lse.nan_to_num(), 0.0).sum()
    for grad, right, leaf in zip(
        torch.autograd.grad(loss(out, lse), leaves), torch.autograd.grad(loss(want, want_lse), leaves), leaves
    ):
        assert grad.dtype == leaf.dtype
        right = right.double().nan_to_num()
        bound = tolerance | dict(atol=2 * tolerance["atol"] * max(1.0, right.abs().max().item()))  # sums over channels
        torch.testing.assert_close(grad.double(), right, **bound)
    raw = seal.merge_attention_backward(g.to(dtype), g_lse.to(lse.dtype), outs, lses, backend=backend)
    assert raw[0].isfinite().all() and raw[1].isfinite().all()


def test_one_gradient_alone(backend, device, dtype):
    """Into the log-sum-exp, or for one part."""
    outs, lses = parts(2, dtype=dtype, device=device)
    outs[0].requires_grad_()
    lses[1].requires_grad_()
    out, lse = seal_ops.merge_attention(outs, lses, backend=backend)
    (into_lse,) = torch.autograd.grad(lse[..., 3:].sum(), [lses[1]], retain_graph=True)
    torch.testing.assert_close(into_lse[..., 3:], torch.exp(lses[1] - lse)[..., 3:].detach())
    (into_out,) = torch.autograd.grad(out.sum(), [outs[0]])
    weight = torch.exp(lses[0] - lse).nan_to_num().transpose(-1, -2)[..., None]
    torch.testing.assert_close(into_out, weight.expand_as(into_out).to(dtype))


def test_views_of_any_stride(backend, device, dtype):
    outs, lses = parts(2, batch=3, dtype=dtype, device=device)
    want = seal_ops.merge_attention(outs, lses, backend=backend)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in outs], [t.mT.contiguous().mT for t in lses]
    for a, b in zip(seal_ops.merge_attention(*turned, backend=backend), want):
        assert torch.equal(a, b) and a.is_contiguous()


def test_16_bit_is_rounded_once(backend, device):
    if backend == "cuda":
        pytest.skip("the kernel is Triton's")
    outs, lses = parts(3, dtype=torch.float16, device=device)  # Triton's interpreter cuts bf16
    out, _ = seal_ops.merge_attention(outs, lses, backend=backend)
    want, _ = by_hand(outs, lses)
    assert out.dtype == torch.float16
    assert ((out.double() - want).abs() <= 2**-11 * want.abs() + 1e-6).all()


@pytest.mark.parametrize("cut", [1, 16, 31, 50])
def test_attention_over_two_halves_is_attention(cut):
    """With scale and grouped heads: outputs, log-sum-exp and every gradient, in fp64."""
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    q, k, v, scale = rand(2, 33, 4, 16), rand(2, 51, 2, 16), rand(2, 51, 2, 16), rand(4, 16)
    whole = seal_ops.attention(q, k, v, scale, causal=False, return_lse=True)
    halves = [
        seal_ops.attention(q, k[:, s], v[:, s], scale, causal=False, return_lse=True)
        for s in (slice(cut), slice(cut, 51))
    ]
    merged = seal_ops.merge_attention(*zip(*halves))
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in whole]
    grads = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(found, weights)), (q, k, v, scale))
        for found in (whole, merged)
    ]
    for a, b in zip((*whole, *grads[0]), (*merged, *grads[1])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    outs, lses = parts(3, batch=1, tokens=4, heads=2, head_dim=3)
    outs = [o.nan_to_num() for o in outs]  # a finite difference of nothing: rows that are not read

    def merged(*tensors):
        out, lse = seal_ops.merge_attention(tensors[:3], tensors[3:])
        return out, torch.where(lse > -torch.inf, lse, 0.0)

    finite = [torch.where(t == -torch.inf, -2.0, t) for t in lses]
    assert torch.autograd.gradcheck(merged, [t.requires_grad_() for t in (*outs, *finite)])


def test_opcheck(backend, device, dtype):
    outs, lses = parts(2, batch=1, tokens=5, heads=2, head_dim=16, dtype=dtype, device=device)
    outs = [o.nan_to_num() for o in outs]  # opcheck compares with allclose
    leaves = [[t.detach().requires_grad_() for t in each] for each in (outs, lses)]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    opcheck(seal.merge_attention.default, tuple(leaves), dict(backend=backend), test_utils=tests)
    g, g_lse = torch.randn_like(outs[0]), torch.randn_like(lses[0])
    opcheck(seal.merge_attention_backward.default, (g, g_lse, outs, lses), dict(backend=backend))


def test_compiled():
    outs, lses = parts(2, batch=1, tokens=5)
    outs = [o.nan_to_num().requires_grad_() for o in outs]

    def f(outs, lses):
        return seal_ops.merge_attention(outs, lses)[0] * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a, b = f(outs, lses), compiled(outs, lses)
    assert torch.equal(a, b)
    for x, y in zip(torch.autograd.grad(a.sum(), outs), torch.autograd.grad(b.sum(), outs)):
        assert torch.equal(x, y)


def test_second_derivatives_are_refused():
    outs, lses = parts(2, batch=1, tokens=5)
    outs = [o.nan_to_num().requires_grad_() for o in outs]
    out, _ = seal_ops.merge_attention(outs, lses)
    grads = torch.autograd.grad(out.square().sum(), outs, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of a merge"):
        grads[0].sum().backward()


O, L = torch.zeros(2, 5, 3, 16), torch.zeros(2, 3, 5)
WRONG = {
    "no part": ([], [], "outs must hold at least one part, got none"),
    "count": ([O, O], [L], "lses must be as many as outs (2), got 1"),
    "rank": ([O[0, 0]], [L], "outs[0] must have the layout [B, S, H, D] or packed [T, H, D], got 2 dimensions"),
    "integer": ([O.int()], [L], "outs[0] must be bfloat16, float16, float32 or float64, got torch.int32"),
    "another shape": ([O, O[:, :4]], [L, L], "outs[1] must be like outs[0] ([2, 5, 3, 16] torch.float32 on cpu), got [2, 4, 3, 16] torch.float32 on cpu"),  # noqa: E501
    "another dtype": ([O, O.double()], [L, L], "outs[1] must be like outs[0] ([2, 5, 3, 16] torch.float32 on cpu), got [2, 5, 3, 16] torch.float64 on cpu"),  # noqa: E501
    "another device": ([O, O.to("meta")], [L, L], "outs[1] must be like outs[0] ([2, 5, 3, 16] torch.float32 on cpu), got [2, 5, 3, 16] torch.float32 on meta"),  # noqa: E501
    "tokens first": ([O], [L.mT], "lses[0] must be [2, 3, 5] torch.float32 on cpu, got [2, 5, 3] torch.float32 on cpu"),
    "lse dtype": ([O.bfloat16()], [L.bfloat16()], "lses[0] must be [2, 3, 5] torch.float32 on cpu, got [2, 3, 5] torch.bfloat16 on cpu"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_parts(name):
    outs, lses, sentence = WRONG[name]
    with pytest.raises(ValueError) as e:
        seal_ops.merge_attention(outs, lses)
    assert str(e.value) == f"seal::merge_attention: {sentence}"


@pytest.mark.parametrize("argument, wrong", [("grad_out", O[:1]), ("grad_lse", L.double())])
def test_bad_gradients(argument, wrong):
    a = dict(grad_out=O, grad_lse=L) | {argument: wrong}
    with pytest.raises(ValueError, match=f"seal::merge_attention_backward: {argument} must be "):
        seal.merge_attention_backward(a["grad_out"], a["grad_lse"], [O], [L])


def test_backends_that_cannot():
    with pytest.raises(ValueError, match="seal::merge_attention: backend cuda"):
        seal_ops.merge_attention([O], [L], backend="cuda")
    tangent = lambda t: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
    with pytest.raises(NotImplementedError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        seal_ops.merge_attention([tangent(O)], [L])


def test_no_rows(backend, device, dtype):
    for shape in itertools.product((0, 2), (0, 3)):
        o = torch.zeros(shape[0], shape[1], 2, 16, dtype=dtype, device=device)
        l = torch.zeros(
            shape[0], 2, shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device
        )
        out, lse = seal_ops.merge_attention([o, o], [l, l], backend=backend)
        assert out.shape == o.shape and lse.shape == l.shape
