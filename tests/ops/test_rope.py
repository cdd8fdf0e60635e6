"""rope and rope_attention on every backend, and the frequency schedules."""

import math

import pytest
import torch
from layouts import half, strided
from torch.library import opcheck

import seal_ops
from seal_ops import rope_frequencies, rope_tables
from seal_ops.ops.backends import reference

seal = torch.ops.seal


def inputs(device, dtype, *, sq=11, sk=11, batch=2, heads=(4, 2), head_dim=32, rotary=32):
    q = torch.randn(batch, sq, heads[0], head_dim).to(device, dtype)
    k = torch.randn(batch, sk, heads[1], head_dim).to(device, dtype)
    cos, sin = rope_tables(64, rope_frequencies(rotary)[0], device=device)
    return q, k, cos, sin


def tolerance(dtype):
    return dict(rtol=0, atol={torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 4 * torch.finfo(dtype).eps))


def check(backend, q, k, cos, sin, *positions, **options):
    got = seal_ops.rope(q, k, cos, sin, *positions, **options, backend=backend)
    want = reference.rope(q.double(), k.double(), cos.double(), sin.double(), *positions, **options)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, **tolerance(q.dtype))
    return got


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("rotary", [32, 16], ids=["whole", "partial"])
def test_rope_against_the_oracle(backend, device, interleaved, rotary):
    dtype = half(backend, device)
    q, k, cos, sin = inputs(device, dtype, rotary=rotary)
    at = torch.randint(0, 64, (2, 11), device=device)
    check(backend, q, k, cos, sin, interleaved=interleaved)
    check(backend, q, k, cos, sin, at, interleaved=interleaved)
    check(backend, q, k, cos, sin, at[0].int(), interleaved=interleaved, inverse=True)
    check(backend, q, k, cos[at], sin[at], interleaved=interleaved)
    check(backend, q, k, cos[None, :11].to(torch.bfloat16), sin[None, :11].to(torch.bfloat16), interleaved=interleaved)


def test_rope_of_strided_packed_and_short_queries(backend, device):
    dtype = half(backend, device)
    q, k, cos, sin = inputs(device, dtype)
    for how in ("transposed", "packed-qkv", "odd-stride", "misaligned", "last-not-1"):
        check(backend, strided(q, how), strided(k, how), cos, sin)
    check(backend, q[:, -3:], k, cos, sin)
    check(backend, q[:, -3:], k, cos, sin, torch.arange(8, 11, device=device), torch.arange(11, device=device))
    check(backend, q[0], k[0], cos, sin, torch.arange(11, device=device))
    check(backend, q[:, :0], k[:, :0], cos, sin)


def test_rope_turns_back(backend, device):
    q, k, cos, sin = inputs(device, half(backend, device))
    turned = seal_ops.rope(q, k, cos, sin, backend=backend)
    for a, b in zip(seal_ops.rope(*turned, cos, sin, inverse=True, backend=backend), (q, k)):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(a.dtype).eps)


def test_rope_at_far_positions(backend, device):
    """Angles at 128k tokens are formed in fp64, so neighbours still differ by exactly one step."""
    cos, sin = rope_tables(131_072, rope_frequencies(64)[0], device=device)
    q, k = (torch.randn(1, 5, 2, 64).to(device, half(backend, device)) for _ in range(2))
    check(backend, q, k, cos, sin, torch.tensor([0, 1, 65_535, 131_070, 131_071], device=device))


def test_rope_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = inputs("cpu", torch.float32)
    double = lambda t: torch.cat((t[:11], t[:11]), -1)[None]
    want = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), double(cos), double(sin))
    for a, b in zip(seal_ops.rope(q, k, cos, sin), want):
        torch.testing.assert_close(a, b.transpose(1, 2))


@pytest.mark.parametrize(
    "options",
    [dict(), dict(interleaved=True), dict(window=4, softmax_scale=0.3)],
    ids=["half-split", "interleaved", "window"],
)
def test_rope_attention_is_rope_then_attention(backend, device, options):
    dtype = half(backend, device)
    q, k, cos, sin = inputs(device, dtype, head_dim=64, rotary=64)
    v = torch.randn_like(k)
    scale = torch.randn(4, 64, device=device)
    inter = {n: options[n] for n in options if n == "interleaved"}
    rest = {n: options[n] for n in options if n != "interleaved"}
    g = torch.randn_like(q)

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, scale)]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, g)

    fused = gradients(
        lambda q, k, v, s: seal_ops.rope_attention(q, k, v, cos, sin, scale=s, **options, backend=backend)
    )
    exact = gradients(
        lambda q, k, v, s: seal_ops.attention(
            *seal_ops.rope(q.double(), k.double(), cos, sin, **inter, backend="reference"),
            v.double(),
            s.double(),
            **rest,
            backend="reference",
        )
    )
    steps = gradients(
        lambda q, k, v, s: seal_ops.attention(
            *seal_ops.rope(q, k, cos, sin, **inter, backend=backend), v, s, **rest, backend=backend
        )
    )
    for a, b, c in zip(fused, exact, steps):
        error, unfused = ((t.double() - b.double()).abs().max() for t in (a, c))
        assert error <= 1.5 * unfused + torch.finfo(dtype).eps * b.abs().max()


def test_rope_attention_packed_restarts_positions(backend, device):
    dtype = half(backend, device)
    q, k, cos, sin = inputs(device, dtype, head_dim=64, rotary=64, batch=1, sq=20, sk=20)
    v = torch.randn_like(k)
    cu = torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=device)
    packed = seal_ops.rope_attention(q[0], k[0], v[0], cos, sin, cu_seqlens=cu, backend=backend)
    for a, b in ((0, 7), (7, 20)):
        alone = seal_ops.rope_attention(q[:, a:b], k[:, a:b], v[:, a:b], cos, sin, backend=backend)
        torch.testing.assert_close(packed[a:b], alone[0], rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_packed_positions():
    cu, cu_k = (torch.tensor(t, dtype=torch.int32) for t in ([0, 2, 2, 5], [0, 4, 5, 7]))
    assert seal_ops.packed_positions(cu, 5).tolist() == [0, 1, 0, 1, 2]
    assert seal_ops.packed_positions(cu_k, 7).tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert seal_ops.packed_positions(cu, 5, cu_k).tolist() == [2, 3, 0, 0, 1]


def test_rope_opcheck_and_gradcheck(backend, device):
    q, k, cos, sin = inputs(device, half(backend, device), batch=1, sq=5, sk=5)
    at = torch.arange(5, device=device)
    opcheck(
        seal.rope.default,
        [q.requires_grad_(), k.requires_grad_(), cos, sin, at],
        dict(interleaved=True, backend=backend),
        rtol=1e-2,
        atol=1e-2,
    )
    q, k, cos, sin = inputs(device, half(backend, device), batch=1, sq=5, sk=5, head_dim=64, rotary=64)
    scale = torch.randn(4, 64, device=device, requires_grad=True)
    opcheck(
        seal.rope_attention.default,
        [q.requires_grad_(), k.requires_grad_(), torch.randn_like(k).requires_grad_(), cos, sin, None, None, scale],
        dict(backend=backend),
        rtol=1e-2,
        atol=1e-2,
    )
    if backend in ("cpu", "reference"):
        q, k, cos, sin = inputs(device, torch.float64, batch=1, sq=3, sk=4, heads=(2, 1), head_dim=8, rotary=4)
        v = torch.randn_like(k)
        scale = torch.randn(2, 8, dtype=torch.float64)
        torch.autograd.gradcheck(
            lambda q, k, v, s: seal_ops.rope_attention(q, k, v, cos, sin, scale=s, interleaved=True, backend=backend),
            [t.requires_grad_() for t in (q, k, v, scale)],
        )
        torch.autograd.gradcheck(lambda q, k: seal_ops.rope(q, k, cos, sin, backend=backend), [q, k])


# Frequency schedules.

BASE = rope_frequencies(64)[0].double()
FROM_TRANSFORMERS = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=256),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256),
    "longrope": dict(
        short_factor=[1.0] * 32,
        long_factor=[1.0 + i / 8 for i in range(32)],
        factor=4.0,
        original_max_position_embeddings=256,
    ),
}


@pytest.mark.parametrize("rope_type", FROM_TRANSFORMERS)
def test_schedules_equal_those_of_a_transformers_model(rope_type):
    """cos and sin of our tables against LlamaRotaryEmbedding's own, at a length beyond the original window."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters, length = FROM_TRANSFORMERS[rope_type], 1000
    window = 1024 if "original_max_position_embeddings" in parameters else 512
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=window,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10_000.0, **parameters},
    )
    if "original_max_position_embeddings" in parameters:
        config.original_max_position_embeddings = parameters["original_max_position_embeddings"]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    frequencies, factor = rope_frequencies(64, rope_type, seq_len=length, max_position_embeddings=window, **parameters)
    ours = rope_tables(length, frequencies, factor)
    for a, b in zip(ours, (cos, sin)):
        torch.testing.assert_close(a, b[0, :, :32], rtol=0, atol=2e-4)  # transformers forms the angle in fp32
    assert (frequencies.double() - BASE).abs().max() > 1e-6


def test_schedules_of_our_own():
    i = torch.arange(32, dtype=torch.float64)
    ntk = rope_frequencies(64, "ntk", factor=4.0)[0].double()
    torch.testing.assert_close(ntk, (10_000 * 4 ** (64 / 62)) ** (-i / 32), rtol=1e-6, atol=0)
    torch.testing.assert_close(ntk[-1] * 4, BASE[-1], rtol=1e-6, atol=0)  # the slowest pair is interpolated fully
    power = rope_frequencies(64, "power", k=2.0)[0].double()
    torch.testing.assert_close(power, BASE * (1 - i / 32) ** 2, rtol=1e-6, atol=0)
    low, high, rho = 2 * math.pi / 2048, 2 * math.pi / 16, 2 * math.pi / 512
    truncated = rope_frequencies(64, "truncated", low=low, high=high, rho=rho)[0].double()
    for f, t in zip(BASE, truncated):
        torch.testing.assert_close(
            t, f if f >= high else torch.tensor(rho if f > low else 0.0).double(), rtol=1e-6, atol=0
        )
    assert rope_frequencies(64, partial_rotary_factor=0.25)[0].shape == (8,)


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (dict(rope_type="cubic"), "rope_type must be one of default, ntk"),
        (dict(rope_type="ntk"), r"takes the parameters \['factor'\], got \[\]"),
        (dict(rope_type="linear"), "needs the parameter 'factor'"),
        (dict(rope_type="truncated", low=2.0, high=1.0, rho=0.1), "0 <= low <= high, got 2.0 and 1.0"),
        (dict(partial_rotary_factor=0.01), "must be even and at least 2, got 0"),
    ],
)
def test_bad_schedules(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        rope_frequencies(64, **arguments)
