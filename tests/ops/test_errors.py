"""Bad input gets one sentence: op, argument, what was expected, what came."""
import pytest
import torch

import seal_ops
from seal_ops.ops.dispatch import choose, why_not

D = 16


def good(**changes):
    torch.manual_seed(0)
    arguments = dict(q=torch.randn(2, 6, 4, D), k=torch.randn(2, 6, 2, D), v=torch.randn(2, 6, 2, D))
    return {**arguments, **changes}


def packed(**changes):
    arguments = dict(q=torch.randn(6, 4, D), k=torch.randn(6, 2, D), v=torch.randn(6, 2, D),
                     cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))
    return {**arguments, **changes}


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


ATTENTION = {
    "rank": (good(q=torch.randn(6, 4, D)), r"q must have the layout \[B, S, H, D\] .* got 3 dimensions \[6, 4, 16\]"),
    "packed rank": (packed(q=torch.randn(1, 6, 4, D)), r"q must have the layout packed \[T, H, D\] .* got 4 dimensions"),
    "heads": (good(q=torch.randn(2, 6, 3, D)), "q must have a number of heads that is a multiple of k's 2, got 3"),
    "no heads": (good(k=torch.randn(2, 6, 0, D), v=torch.randn(2, 6, 0, D)), "multiple of k's 0, got 4"),
    "head_dim": (good(k=torch.randn(2, 6, 2, 8), v=torch.randn(2, 6, 2, 8)), "k must have q's head_dim 16, got 8"),
    "head_dim range": (dict(zip("qkv", torch.randn(3, 1, 2, 1, 257))), "head_dim from 1 to 256, got 257"),
    "batch": (good(k=torch.randn(1, 6, 2, D)), "k must have q's batch size 2, got 1"),
    "v shape": (good(v=torch.randn(2, 5, 2, D)), r"v must have k's shape \[2, 6, 2, 16\], got \[2, 5, 2, 16\]"),
    "dtypes differ": (good(k=torch.randn(2, 6, 2, D).half()), "k must have q's dtype torch.float32, got torch.float16"),
    "integer": (good(q=torch.ones(2, 6, 4, D, dtype=torch.int32)), "q must be bfloat16, float16, float32 or float64, got"),
    "device": (good(v=torch.randn(2, 6, 2, D, device="meta")), "v must be on q's device cpu, got meta"),
    "scale shape": (good(scale=torch.ones(3)), r"scale must have shape \[4\] \(per head\), \[4, 16\] \(per channel\).* got \[3\]"),
    "scale dtype": (good(scale=torch.ones(4).bfloat16()), "scale must be torch.float32 .* got torch.bfloat16"),
    "scale device": (good(scale=torch.ones(4, device="meta")), "scale must be on q's device cpu, got meta"),
    "offset shape": (good(offset=torch.ones(4)), r"offset must have shape \[4, 16\] or, per batch row, .* got \[4\]"),
    "window": (good(window=0), "window must be at least 1 .* got 0"),
    "softmax_scale": (good(softmax_scale=float("nan")), "softmax_scale must be a number, got nan"),
    "max_seqlen alone": (good(max_seqlen=6), "come with cu_seqlens"),
    "cu start": (packed(cu_seqlens=cu(1, 2, 6)), "cu_seqlens must start at 0, never fall and end at 6"),
    "cu falls": (packed(cu_seqlens=cu(0, 4, 2, 6)), r"never fall .* got \[0, 4, 2, 6\]"),
    "cu end": (packed(cu_seqlens=cu(0, 2, 5)), r"end at 6 .* got \[0, 2, 5\]"),
    "cu dtype": (packed(cu_seqlens=cu(0, 2, 6, dtype=torch.int64)), "cu_seqlens must be int32"),
    "cu_k missing": (packed(k=torch.randn(5, 2, D), v=torch.randn(5, 2, D)), "cu_seqlens_k must be given where k"),
    "cu_k shape": (packed(cu_seqlens_k=cu(0, 6)), "cu_seqlens_k must have cu_seqlens' shape"),
    "backend name": (good(backend="cudnn"), "backend must be one of auto, cuda, triton, cpu, reference, got 'cudnn'"),
    "backend cuda": (good(backend="cuda"), "seal::attention: backend cuda"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    arguments, sentence = ATTENTION[name]
    with pytest.raises(ValueError, match=f"seal::attention: .*{sentence}" if "seal::" not in sentence else sentence) as e:
        seal_ops.attention(**arguments)
    assert "\n" not in str(e.value)


def turning(**changes):
    arguments = good(cos=torch.ones(8, D // 2), sin=torch.zeros(8, D // 2))
    return {**arguments, **changes}


ROPE = {
    "too wide": (turning(cos=torch.ones(8, D), sin=torch.ones(8, D)), "cos must turn at most head_dim 16 channels .* got 16"),
    "sin": (turning(sin=torch.zeros(7, D // 2)), r"sin must have cos' shape \[8, 8\], got \[7, 8\]"),
    "short table": (turning(cos=torch.ones(5, 8), sin=torch.ones(5, 8)), "cos must have a row for each of 6 positions"),
    "gathered": (turning(cos=torch.ones(2, 5, 8), sin=torch.ones(2, 5, 8)), r"cos must have shape \[2 or 1, 6, R/2\]"),
    "gathered and positions": (turning(cos=torch.ones(2, 6, 8), sin=torch.ones(2, 6, 8), positions=torch.arange(6)),
                               "positions must be None with cos and sin already gathered"),
    "position range": (turning(positions=torch.arange(3, 9)), r"positions must lie from 0 to 7 .* got 3 to 8"),
    "position dtype": (turning(positions=torch.ones(6)), "positions must be int32 or int64"),
    "position shape": (turning(positions=torch.arange(5)), r"positions must have shape \[6\] or \[2, 6\], got \[5\]"),
    "integer table": (turning(cos=torch.ones(8, 8, dtype=torch.int32)), "cos must be of a floating dtype"),
    "positions_k alone": (turning(positions_k=torch.arange(6)), "positions must be given where positions_k is"),
    "lengths differ": (turning(q=torch.randn(2, 3, 4, D), positions=torch.arange(3)), "positions_k must be given where"),
}


@pytest.mark.parametrize("op", ["rope", "rope_attention"])
@pytest.mark.parametrize("name", ROPE)
def test_rope(op, name):
    arguments, sentence = ROPE[name]
    if op == "rope":
        arguments = {n: t for n, t in arguments.items() if n != "v"}
    with pytest.raises(ValueError, match=f"seal::{op}: .*{sentence}"):
        getattr(seal_ops, op)(**arguments)


def test_packed_rope_needs_positions():
    with pytest.raises(ValueError, match="seal::rope: positions must be given for packed q and k"):
        seal_ops.rope(torch.randn(6, 4, D), torch.randn(6, 2, D), torch.ones(8, 8), torch.zeros(8, 8))


def test_backward():
    a = good()
    out, lse = torch.ops.seal.attention(**a)
    call = lambda grad_out, grad_lse=None, needs=(True, True, True, False, False): torch.ops.seal.attention_backward(
        grad_out, grad_lse, a["q"], a["k"], a["v"], out, lse, needs=needs)
    with pytest.raises(ValueError, match=r"seal::attention_backward: grad_out must be like q \(\[2, 6, 4, 16\]"):
        call(out[:, :5])
    with pytest.raises(ValueError, match=r"grad_lse must have shape \[2, 4, 6\]"):
        call(out, lse[:, :3])
    with pytest.raises(ValueError, match=r"needs\[scale\] must be False where scale is None, got True"):
        call(out, needs=(True,) * 5)


def test_a_wrong_call_fails_while_it_is_traced():
    compiled = torch.compile(lambda **a: seal_ops.attention(**a), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="multiple of k's 2, got 3"):
        compiled(**good(q=torch.randn(2, 6, 3, D)))


def test_forced_backend_raises_the_sentence_that_backends_prints():
    table = seal_ops.backends("cpu")
    reason = why_not("cuda", "attention", torch.device("cpu"), torch.bfloat16, 128)
    assert table["attention"]["cuda"] == reason and table["attention"]["chosen"] == "cpu"
    with pytest.raises(ValueError) as e:
        choose("cuda", "attention", torch.device("cpu"), torch.bfloat16, 128)
    assert str(e.value) == f"seal::attention: {reason}"
