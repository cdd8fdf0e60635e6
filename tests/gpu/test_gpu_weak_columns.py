"""Weak columns on a GPU: NF4 in bf16 and fp16 against a dense layer, whole models, calibration, decoding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, tokens
from torch import nn

import seal_ops
from seal_ops.quantized import bases, calibration
from seal_ops.quantized.attachment import find_targets
from seal_ops.quantized.columns import put_on
from seal_ops.quantized.quantizers import quantized

pytest.importorskip("bitsandbytes")
LLAMA = FAMILIES["llama"]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def on_gpu(dtype=torch.bfloat16, **sizes):
    return LLAMA.build(hidden_size=256, head_dim=64, intermediate_size=512, **sizes).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
@pytest.mark.parametrize("columns, rows, count", [(512, 256, 1500), (256, 512, 3), (384, 384, 1)])
def test_nf4(dtype, method, columns, rows, count):
    """Product and gradients are those of a dense layer with the same 4-bit weight; decode and prefill agree."""
    linear = nn.Linear(columns, rows, device="cuda", dtype=dtype)
    module = quantized(linear, method, "layer", "test")
    index = torch.randperm(columns, device="cuda")[:64].sort().values
    full = bases.weight_of(module).double()
    assert torch.equal(bases.columns_of(module, index).double(), full[:, index])
    delta = torch.randn(rows, 64, device="cuda") * 0.05
    full[:, index] += delta.double()
    put_on(module, index, delta)
    x = torch.randn(2, count, columns, device="cuda", dtype=dtype, requires_grad=True)
    y = module(x)
    g = torch.randn_like(y)
    dx, dd = torch.autograd.grad(y, (x, module.column_delta), g)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(y, F.linear(x.double(), full, linear.bias.double())) < tolerance
    assert relative(dx, g.double() @ full) < tolerance
    picked = x.double().flatten(0, 1)[:, index]
    assert relative(dd, g.double().flatten(0, 1).t() @ picked) < tolerance and dd.dtype == torch.float32
    with torch.no_grad():
        assert relative(module(x), y) < tolerance
        one_by_one = torch.cat([module(x[:, i : i + 1]) for i in range(min(3, count))], 1)
        assert relative(one_by_one, y[:, :3]) < tolerance


@pytest.mark.parametrize("start", ["residual", "least_squares"])
def test_a_model(start):
    reference = on_gpu(torch.float32)
    model = copy.deepcopy(reference)
    ids = [torch.randint(0, 97, (64,)).tolist() for _ in range(8)]
    found = seal_ops.attach_weak_columns(model, 16, calibration=ids, quantize="nf4", start=start)
    scales = seal_ops.attach(model, "channel")
    errors = {}
    x = tokens().cuda()
    with torch.no_grad():
        expected = reference(x).logits
        errors["weak columns"] = relative(model(x).logits, expected)
        with seal_ops.weak_columns_disabled(model):
            errors["none"] = relative(model(x).logits, expected)
    assert 1e-3 < errors["weak columns"] < errors["none"]
    before = found.values()
    losses = seal_ops.train(
        model, [{"input_ids": i} for i in ids], lr=1e-2, column_lr=1e-3, gradient_checkpointing=True, progress=False
    ).losses
    assert all(torch.isfinite(torch.tensor(losses))) and scales.attachment is not None
    assert all(not torch.equal(v, before[n]) for n, v in found.values().items())


def test_calibration_sums_in_fp32():
    """Sums over 16-bit inputs, beside fp64 sums over the very same inputs."""
    model = on_gpu()
    ids = [torch.randint(0, 97, (128,)).tolist() for _ in range(4)]
    targets, inputs = find_targets(model, None, "test"), {}
    index = {name: torch.tensor([1, 7, 100], device="cuda") for name in targets}
    handles = [
        m.register_forward_pre_hook(lambda m, a, n=n: inputs.__setitem__(n, a[0].double().flatten(0, 1)))
        for n, m in targets.items()
    ]
    squares = calibration.read(model, targets, ids).squares
    cross = calibration.read(model, targets, ids, index=index).cross
    for handle in handles:
        handle.remove()
    for name, x in inputs.items():
        assert squares[name].dtype == cross[name].dtype == torch.float32 and len(x) == 512
        assert relative(squares[name], x.square().mean(0)) < 1e-5, name
        assert relative(cross[name], x.t() @ x[:, index[name]] / 512) < 1e-5, name


def test_decoding_in_a_graph():
    """`evaluate` records a step of a 4-bit model with weak columns and scales; its tokens are `generate`'s."""
    from seal_ops.evaluation import static_decoding

    model = on_gpu(torch.float32)
    ids = [torch.randint(3, 97, (48,)).tolist() for _ in range(4)]
    seal_ops.attach_weak_columns(model, 16, calibration=ids, quantize="nf4")
    seal_ops.attach(model, "head")
    assert static_decoding.supports(model)
    outputs: list[list[int]] = []

    def ended(step):
        outputs.append(list(step))
        return False

    static_decoding.decode(model, ids, 12, ended)
    found = torch.tensor(outputs).t()
    for row, prompt in enumerate(ids):
        expected = model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=12, do_sample=False)
        expected = expected[0, len(prompt) :].tolist()
        assert found[row, : len(expected)].tolist() == expected


def test_scales_fold():
    for granularity, heads in (("head", 2), ("channel", 4)):
        model = on_gpu(num_key_value_heads=heads)
        seal_ops.attach_weak_columns(model, 8, calibration=[[1, 2, 3, 4]], quantize="nf4-double")
        with torch.no_grad():
            for p in seal_ops.attach(model, granularity).parameters():
                p.add_(torch.randn_like(p), alpha=0.4)
            expected = model(tokens().cuda()).logits
            seal_ops.fold_scales(model)
            assert relative(model(tokens().cuda()).logits, expected) < 3e-2
