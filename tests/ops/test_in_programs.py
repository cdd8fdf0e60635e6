"""What a program does around the ops: it writes into results, traces them, and hands over tensors of other kinds."""

import pytest
import torch

import seal_ops
from seal_ops import masks
from seal_ops.ops.dispatch import why_not

Q = (1 + torch.arange(2 * 6 * 4 * 16.0)).view(2, 6, 4, 16).sin()
K, V = Q[:, :, :2].contiguous(), Q[:, :, 2:].contiguous()
LSE = torch.zeros(2, 4, 6)
TABLE = torch.ones(6, 8), torch.zeros(6, 8)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_no_inputs(backend, dtype):
    """Even where there is nothing to do: one part to merge, one key, tensors that are their own k and v."""
    if (reason := why_not(backend, "attention", torch.device("cpu"), dtype, 16)) is not None:
        pytest.skip(reason)
    q, lse, cos, sin = (t.to(dtype) for t in (Q, LSE, *TABLE))
    seal = torch.ops.seal
    calls = [
        lambda: seal.merge_attention([q], [lse], backend=backend),
        lambda: seal.merge_attention_backward(q, lse, [q], [lse], backend=backend),
        lambda: seal.rope(q, q, cos, sin, backend=backend),
        lambda: seal.attention(q[:, :1], q[:, :1], q[:, :1], backend=backend),
        lambda: seal.attention_backward(q, None, q, q, q, q, lse, backend=backend),
        lambda: seal.rope_attention(q, q, q, cos, sin, backend=backend),
    ]
    given = {t.untyped_storage().data_ptr() for t in (q, lse, cos, sin)}
    for n, call in enumerate(calls):
        places = [t.untyped_storage().data_ptr() for t in call() if t.numel()]
        assert not given & {*places} and len({*places}) == len(places), n


# ---- tensors of other layouts


def jagged(t):
    return torch.nested.nested_tensor([t[0], t[1][:3]], layout=torch.jagged)


OTHERS = {
    "sparse": (lambda t: t.to_sparse(), "torch.sparse_coo"),
    "csr": (lambda t: t.to_sparse_csr(), "torch.sparse_csr"),
    "nested": (lambda t: torch.nested.nested_tensor([t[0], t[1]]), "a nested tensor"),
    "jagged": (jagged, "a nested tensor"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "a quantized tensor"),
    "mkldnn": (lambda t: t.to_mkldnn(), "torch._mkldnn"),
}
CALLS = {
    "attention: q": lambda t: seal_ops.attention(t, K, V),
    "attention: k": lambda t: seal_ops.attention(Q, t, V),
    "attention: v": lambda t: seal_ops.attention(Q, K, t, sink=torch.zeros(4)),
    "rope: q": lambda t: seal_ops.rope(t, K, *TABLE),
    "rope_attention: k": lambda t: seal_ops.rope_attention(Q, t, V, *TABLE),
    "merge_attention: outs[0]": lambda t: seal_ops.merge_attention([t], [LSE]),
}


@pytest.mark.filterwarnings("ignore:.*(beta state|prototype|deprecat).*")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_tensor_of_another_layout_is_one_sentence(kind, mode):
    """In inference mode autograd's check does not run, and torch recites its dispatch table."""
    make, said = OTHERS[kind]
    try:
        other = {n: make(Q if n.endswith(("q", "]")) else K) for n in CALLS}
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch makes no such tensor: {error}")
    for name, call in CALLS.items():
        with mode(), pytest.raises(ValueError) as caught:
            call(other[name])
        assert str(caught.value) == f"seal::{name} must be a dense tensor, got {said}"


def test_a_mistyped_backend_of_a_merge_is_one_sentence():
    with pytest.raises(ValueError, match="^seal::merge_attention: backend must be a text, got int$"):
        seal_ops.merge_attention([Q], [LSE], backend=3)


# ---- tracing


@pytest.mark.parametrize(
    "more",
    [dict(sink=torch.ones(4)), dict(gate=Q[..., :1]), dict(gate=Q[..., :1], gate_function="identity")],
    ids=["sink", "gate", "identity"],
)
def test_terms_compile_with_symbolic_sizes(more):
    """Where they are composed is asked while the trace has symbols for all sizes."""
    torch._dynamo.reset()
    call = lambda q, k, v: seal_ops.attention(q, k, v, **more)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(Q, K, V), seal_ops.attention(Q, K, V, **more))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_masks_and_packed_rotation_are_traced():
    """torch.jit.trace makes tensors of sizes; the number of tokens stays free."""
    mask = masks.shifted_groups(2, sinks=1)
    dense = torch.jit.trace(lambda q, k, v: seal_ops.attention(q, k, v, mask=mask), (Q, K, V))
    torch.testing.assert_close(dense(2 * Q, K, V), seal_ops.attention(2 * Q, K, V, mask=mask))

    def packed(q, k, v, cu):
        return seal_ops.rope_attention(q, k, v, *TABLE, cu_seqlens=cu)

    lengths = lambda *of: torch.tensor(of, dtype=torch.int32)
    traced = torch.jit.trace(packed, (Q[0], K[0], V[0], lengths(0, 2, 6)))
    for tokens, cu in ((6, lengths(0, 3, 6)), (4, lengths(0, 1, 4))):
        given = Q[1, :tokens], K[1, :tokens], V[1, :tokens], cu
        torch.testing.assert_close(traced(*given), packed(*given))


# ---- what is no number


@pytest.mark.parametrize("more", [dict(softmax_scale=0.0), dict()], ids=["scale 0", "query 0"])
def test_zero_times_an_infinite_key_is_no_number(more):
    """ATen takes a row of scores without a number for one that sees no key, and answers 0."""
    q, k = (Q if more else torch.zeros_like(Q)), K.clone()
    k[:, 0] = torch.inf
    for backend in ("cpu", "reference"):  # the first query sees the infinite key alone
        out, lse = seal_ops.attention(q, k, V, backend=backend, return_lse=True, **more)
        assert out[:, 0].isnan().all() and lse[..., 0].isnan().all(), backend
