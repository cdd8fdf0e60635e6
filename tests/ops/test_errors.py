"""Bad input gets one sentence: op, argument, what was expected, what came. The calls: fixtures/wrong_calls.py."""

import json
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
from installed import FIXTURES, environment
from wrong_calls import (
    SECOND_DERIVATIVE,
    WRONG_CALLS,
    WrongCall,
    lengths,
    provoke,
    right_call,
    sentences_in_sources,
    unprovoked,
)

import seal_ops
from seal_ops.ops import autograd, checks
from seal_ops.ops.dispatch import choose, extension, why_not

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = [wrong for wrong in WRONG_CALLS if wrong.on != "cuda"]


@pytest.mark.parametrize("wrong", HERE, ids=lambda wrong: wrong.name)
def test_the_op_says_the_sentence(wrong):
    """Whatever checks here: C++ where the extension is built, else Python. (A meta tensor always goes to Python.)"""
    assert provoke(wrong, "cpu") == (wrong.error, wrong.expected("cpu"))


@pytest.mark.parametrize("wrong", [wrong for wrong in HERE if wrong.on != "autograd"], ids=lambda wrong: wrong.name)
def test_python_checks_say_the_sentence(wrong):
    op = wrong.torch_op._schema.name.removeprefix("seal::")
    with pytest.raises(ValueError) as e:
        checks.check(op, autograd.bind(op, (), wrong.arguments("cpu")))
    assert str(e.value) == wrong.expected("cpu")


@pytest.mark.parametrize("wrong", [wrong for wrong in HERE if wrong.on == "autograd"], ids=lambda wrong: wrong.name)
def test_python_autograd_says_the_sentence(wrong):
    op = wrong.torch_op._schema.name.removeprefix("seal::")
    with pytest.raises(wrong.error) as e, torch.autograd.forward_ad.dual_level():
        checks.differentiable(op, autograd.bind(op, (), wrong.arguments("cpu")))
    assert str(e.value) == wrong.expected("cpu")


@pytest.mark.parametrize(
    "op",
    [
        "attention",
        "attention packed",
        "attention_backward",
        "rope",
        "rope packed",
        "rope_attention",
        "rope_attention packed",
    ],
)
def test_right_calls_are_right(op):
    """What the table spoils is inside the contract before."""
    WrongCall("", op, lambda a, other: None, "").torch_op(
        **right_call(op.removesuffix(" packed"), "cpu", op.endswith(" packed"))
    )


def test_every_python_check_is_provoked():
    """By the line of its `fail(`: a check without a call in the table is a failure here."""
    lines = (ROOT / "seal_ops/ops/checks.py").read_text().splitlines()
    written = {n for n, line in enumerate(lines, 1) if "fail(" in line and not line.startswith("def ")}
    written |= {n for n, line in enumerate(lines, 1) if line.strip().startswith("raise NotImplementedError")}
    spoke = set()
    for wrong in HERE:
        op = wrong.torch_op._schema.name.removeprefix("seal::")
        check = checks.differentiable if wrong.on == "autograd" else checks.check
        try:
            with torch.autograd.forward_ad.dual_level():
                check(op, autograd.bind(op, (), wrong.arguments("cpu")))
        except (ValueError, NotImplementedError) as error:
            trace, own = error.__traceback__, []
            while trace:
                if trace.tb_frame.f_code.co_filename.endswith("checks.py") and trace.tb_frame.f_code.co_name != "fail":
                    own.append(trace.tb_lineno)
                trace = trace.tb_next
            spoke.add(own[-1])
    assert written <= spoke, f"never provoked: {[lines[n - 1].strip() for n in sorted(written - spoke)]}"


@pytest.mark.skipif(isinstance(extension(), str), reason="the C++ extension is not built")
def test_every_sentence_of_the_extension_is_provoked(tmp_path):
    """By file and line, in a process whose messages hold them. What only CUDA tensors can provoke, tests/gpu does."""
    code = (
        "import json, sys; from wrong_calls import WRONG_CALLS, origin, provoke;"
        "print(json.dumps([origin(provoke(w, 'cpu')[1]) for w in (*WRONG_CALLS, None) if w is None or w.on != 'cuda']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # Python looks there first, and the checkout has no extension
        env=environment(FIXTURES, TORCH_SHOW_CPP_STACKTRACES="1"),
    )
    assert done.returncode == 0, done.stderr
    origins = {tuple(found) for found in json.loads(done.stdout.splitlines()[-1]) if found}
    silent = unprovoked(ROOT / "csrc/ops", origins)
    assert len(sentences_in_sources(ROOT / "csrc/ops")) > 40
    assert all(
        "be on q's device" in text or 'SEAL_HERE, join("seal::", name_, ": ", reason)' in text for text in silent
    ), silent


@pytest.mark.parametrize("wrong", [wrong for wrong in HERE if wrong.on != "autograd"], ids=lambda wrong: wrong.name)
def test_nothing_is_written_by_a_call_that_fails(wrong):
    a = wrong.arguments("cpu")
    tensors = {
        n: t
        for n, t in a.items()
        if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.layout == torch.strided and t.numel() < 10_000
    }
    before = {n: t.detach().clone() for n, t in tensors.items()}
    provoke(wrong, "cpu")
    assert all(torch.equal(before[n], t.detach()) for n, t in tensors.items())


def test_second_derivatives():
    assert provoke(None, "cpu") == (NotImplementedError, SECOND_DERIVATIVE)


@pytest.mark.parametrize("op", ["attention", "rope", "rope_attention"])
def test_jvp_is_refused_in_torch_func_too(op):
    a = right_call(op, "cpu")
    q = a.pop("q")
    with pytest.raises(
        NotImplementedError, match=f"seal::{op}: forward-mode differentiation is not implemented, and q has"
    ):
        torch.func.jvp(lambda q: getattr(seal_ops, op)(q, **a), (q,), (torch.ones_like(q),))


def test_a_wrong_call_fails_while_it_is_traced():
    compiled = torch.compile(lambda **a: seal_ops.attention(**a), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"multiple of k\\*'s 2, got 3"):  # torch 2.15 prints the sentence as a repr
        compiled(**right_call("attention", "cpu") | dict(q=torch.randn(2, 6, 3, 16)))


def test_meta_tensors_give_shapes_and_sentences():
    a = right_call("attention", "meta")
    out, lse = torch.ops.seal.attention(**a)
    assert out.is_meta and out.shape == a["q"].shape and lse.shape == (2, 4, 6)
    with pytest.raises(ValueError, match="seal::attention: window must be at least 1"):
        torch.ops.seal.attention(**a, window=0)


@pytest.mark.parametrize("shape", [(0, 6, 4, 16), (2, 0, 4, 16), (2, 6, 0, 16)])
def test_tensors_without_an_element(backend, device, shape):
    dtype = torch.float16 if backend == "cuda" else torch.float32
    q = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, shape[0], 6, 2, 16, device=device, dtype=dtype).requires_grad_().unbind()
    k.retain_grad(), v.retain_grad()
    out = seal_ops.attention(q, k, v, backend=backend)
    out.sum().backward()
    assert out.shape == shape and all(t.grad.shape == t.shape and not t.grad.any() for t in (q, k, v))


def test_rope_of_nothing(backend, device):
    """Zero heads, on either side, are rotated to zero heads; with positions of their own, too."""
    cos, sin = torch.ones(6, 8, device=device), torch.zeros(6, 8, device=device)
    q, k = torch.randn(2, 6, 4, 16, device=device), torch.randn(2, 6, 2, 16, device=device)
    none, at = torch.randn(2, 6, 0, 16, device=device), torch.arange(6, device=device)
    for a, b in ((none, k), (q, none), (none, none)):
        for positions in ((), (at,), (at, at)):
            x, y = seal_ops.rope(a, b, cos, sin, *positions, backend=backend)
            assert torch.equal(x, a) and torch.equal(y, b)


def test_packed_positions():
    cu, cu_k = lengths(0, 2, 2, 5), lengths(0, 4, 5, 6)
    assert seal_ops.packed_positions(cu, 7).tolist() == [0, 1, 0, 1, 2, 0, 1]  # two tokens of padding
    assert seal_ops.packed_positions(cu, 7, cu_k).tolist() == [2, 3, 0, 0, 0, 0, 1]
    assert seal_ops.packed_positions(lengths(0), 2, lengths(0)).tolist() == [0, 1]
    with pytest.raises(
        ValueError, match=r"seal::packed_positions: cu_seqlens must be int32 or int64 .* got torch.float32 \[2\]"
    ):
        seal_ops.packed_positions(torch.ones(2), 3)
    with pytest.raises(ValueError, match=r"seal::packed_positions: cu_seqlens_k must have cu_seqlens' shape \[4\]"):
        seal_ops.packed_positions(cu, 5, lengths(0, 5))


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_none_is_refused_where_others_ask_for_gradients(missing):
    a = {n: t if n == missing else t.requires_grad_() for n, t in right_call("attention", "cpu").items()}
    with pytest.raises(ValueError, match=f"seal::attention: {missing} must be a tensor, got None"):
        seal_ops.attention(**a | {missing: None})


Q, K = torch.zeros(1, 3, 2, 16), torch.zeros(1, 3, 1, 16)
LSE = torch.zeros(1, 2, 3)
BLOCKS = torch.ones(1, 1, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: seal_ops.attention(Q, K, K, causal=None), "causal must be True or False, got None"),
        (lambda: seal_ops.attention(Q, K, K, sink=1.0), "sink must be a tensor, got float"),
        (lambda: seal_ops.attention(Q, K, K, gate="x"), "gate must be a tensor, got str"),
        (
            lambda: seal_ops.rope_attention(None, K[0], K[0], LSE, LSE, cu_seqlens=lengths(0, 3)),
            "q must be a tensor, got None",
        ),
        (lambda: seal_ops.merge_attention(Q, LSE), "outs must be a list of tensors, got Tensor"),
        (lambda: seal_ops.merge_attention([Q], None), "lses must be a list of tensors, got NoneType"),
        (lambda: seal_ops.merge_attention([Q, None], [LSE] * 2), r"outs\[1\] must be a tensor, got None"),
        (
            lambda: torch.ops.seal.merge_attention_backward(None, None, [Q], [LSE]),
            "grad_out must be a tensor, got None",
        ),
        (lambda: seal_ops.packed_positions([0, 3], 3), "cu_seqlens must be a tensor, got list"),
        (lambda: seal_ops.packed_positions(lengths(0, 3), -1), "tokens must be a number of tokens, got -1"),
        (lambda: seal_ops.backends("gpu"), "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (lambda: seal_ops.backends("cuda:99"), "device must be available, got cuda:99 where torch sees"),
        (lambda: seal_ops.backends("cpu", "float32"), "dtype must be a torch.dtype, got 'float32'"),
        (lambda: seal_ops.backends("cpu", head_dim=0), "head_dim must be at least 1, got 0"),
        (lambda: seal_ops.rope_tables(-1, LSE[0, 0]), "length must be at least 0, got -1"),
        (lambda: seal_ops.rope_tables(8, 64), "frequencies must be a tensor"),
        (lambda: seal_ops.rope_tables(8, LSE), r"frequencies must be a tensor of one dimension, got \[1, 2, 3\]"),
        (lambda: seal_ops.rope_frequencies("64"), "head_dim must be an integer, got '64'"),
        (lambda: seal_ops.rope_frequencies(64, base=0), "base must be above 0, got 0"),
        (lambda: seal_ops.rope_frequencies(2, "ntk", factor=2), "at least 4 rotary channels and a factor above 0"),
        (lambda: seal_ops.masks.shifted_groups(4, "all"), "shifted_heads must be a share from 0 to 1, got all"),
        (lambda: seal_ops.masks.blocks([[True]]), "visited must be a bool tensor .* got list"),
        (lambda: seal_ops.masks.blocks(BLOCKS, mask="causal"), "mask must be made by seal_ops.masks, got str"),
    ],
)
def test_what_is_no_tensor_number_or_device(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_positions_k_is_never_dropped():
    a = right_call("rope_attention", "cpu", packed=True) | dict(positions=None, positions_k=torch.arange(6) % 4)
    with pytest.raises(
        ValueError, match="seal::rope_attention: positions must be given where positions_k is, got None"
    ):
        seal_ops.rope_attention(**a)


def test_an_absent_factor_asked_for_is_empty(backend, device):
    """`needs` may ask for what is not there (its default asks for everything)."""
    a = right_call("attention_backward", str(device))
    a["grad_lse"] = None
    a = {n: t.half() if n in ("q", "k", "v", "out", "grad_out") else t for n, t in a.items()}
    grads = torch.ops.seal.attention_backward(**a, backend=backend)
    assert [g.shape[0] for g in grads] == [2, 2, 2, 0, 0, 0, 0]


def test_forced_backend_raises_the_sentence_that_backends_prints():
    table = seal_ops.backends("cpu")
    reason = why_not("cuda", "attention", torch.device("cpu"), torch.bfloat16, 128)
    assert table["attention"]["cuda"] == reason and table["attention"]["chosen"] == "cpu"
    with pytest.raises(ValueError) as e:
        choose("cuda", "attention", torch.device("cpu"), torch.bfloat16, 128)
    assert str(e.value) == f"seal::attention: {reason}"
    with pytest.raises(
        ValueError, match="seal::attention: backend must be one of auto, cuda, triton, cpu, reference, got 'cudnn'"
    ):
        seal_ops.attention(*torch.randn(3, 1, 2, 1, 16), backend="cudnn")


@pytest.mark.skipif(isinstance(extension(), str), reason="the C++ extension is not built")
def test_why_not_cuda():
    ask = extension().why_not_cuda
    assert ask("attention", torch.bfloat16, 128, 90) == "" == ask("rope", torch.float32, 100, 90)
    assert (
        ask("attention", torch.float16, 64, 80) == "backend cuda needs a Hopper GPU (compute capability 9.0), got 8.0"
    )
    assert ask("attention", torch.float32, 64, 90) == "backend cuda takes bfloat16 and float16, got torch.float32"
    assert ask("rope", torch.float64, 64, 90) == "backend cuda rotates bfloat16, float16 and float32, got torch.float64"
    for head_dim in (4, 100, 264):
        assert (
            ask("attention", torch.float16, head_dim, 90)
            == f"backend cuda takes a head_dim that is a multiple of 8 up to 256, got {head_dim}"
        )


def test_the_oracle_is_never_silent(monkeypatch):
    """Where no other backend runs a call of "auto", one warning for each kind of call says so."""
    from seal_ops.ops import dispatch

    monkeypatch.setattr(dispatch, "candidates", lambda device: ("triton", "reference"))
    dispatch._warn_of_the_oracle.cache_clear()
    q = torch.randn(1, 3, 1, 16, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match="seal::attention: the slow reference runs this call, in fp64 .*backend triton"
    ):
        seal_ops.attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seal_ops.attention(q, q, q)
        seal_ops.backends("cpu", torch.float64)  # asking is no call


@pytest.mark.parametrize(
    "given, sentence",
    [
        (dict(scale=2.0), "scale must be a tensor or None, got float"),
        (dict(window=(3, 0)), "window must be an integer or None, got tuple"),
        (dict(softmax_scale="a"), "softmax_scale must be a number or None, got str"),
        (dict(causal="yes"), "causal must be True or False, got str"),
        (dict(backend=3), "backend must be a text, got int"),
        (dict(max_seqlen="5"), "max_seqlen must be an integer or None, got str"),
    ],
)
def test_arguments_of_another_type_are_one_sentence(given, sentence):
    """As a user of flash-attn may give them; the dispatcher alone recites its declaration."""
    q, table = torch.randn(1, 5, 2, 16), torch.randn(5, 8)
    calls = {"attention": (q, q, q), "rope_attention": (q, q, q, table, table)}
    for op, tensors in calls.items():
        with pytest.raises(ValueError) as caught:
            getattr(seal_ops, op)(*tensors, **given)
        assert str(caught.value) == f"seal::{op}: {sentence}"
    with pytest.raises(ValueError, match="^seal::rope: positions must be a tensor or None, got list$"):
        seal_ops.rope(q, q, table, table, positions=[0, 1])
    with pytest.raises(RuntimeError, match="as it was"):
        checks.raise_mistyped("rope", RuntimeError("as it was"))
