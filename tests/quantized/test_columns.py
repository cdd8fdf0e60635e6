"""One layer: its gradients are a dense layer's, its product is that of replaced columns, and it keeps little."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from toy_quantizer import ToyLinear

from seal_ops.quantized import bases
from seal_ops.quantized.columns import put_on, take_off
from seal_ops.quantized.product import with_columns, written_out_with_columns

SHAPES = [(24, 40), (40, 24), (32, 32), (48, 16)]  # wide, tall, square, a grouped-query projection


def toy(columns, rows, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    return linear, ToyLinear(linear)


def weak(module, index, seed=1):
    torch.manual_seed(seed)
    delta = torch.randn(module.out_features, len(index), dtype=module.scales.dtype)
    put_on(module, torch.tensor(index), delta)
    return module


def columns_by_units(base):
    return (base.codes.to(base.scales.dtype) * base.scales).reshape(base.out_features, base.in_features)


@pytest.mark.parametrize("columns, rows", SHAPES)
@pytest.mark.parametrize("owned", [False, True])
def test_gradients(columns, rows, owned):
    """fp64, in the input and in the columns; of the second order too."""
    linear, base = toy(columns, rows)
    index = torch.tensor([0, 3, 5, columns - 1])
    x = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    function = lambda x, delta: with_columns(base, x, index, delta, owned)
    assert torch.autograd.gradcheck(function, (x, delta))
    assert torch.autograd.gradgradcheck(function, (x, delta))
    weight = bases.weight_of(base)
    assert torch.equal(weight, columns_by_units(base)), "read or asked for by unit vectors"
    written_out = lambda x, delta: written_out_with_columns(lambda: weight, x, index, delta, base.bias)
    assert torch.autograd.gradcheck(written_out, (x, delta))
    assert torch.allclose(written_out(x, delta), function(x, delta), atol=1e-12)


@pytest.mark.parametrize("columns, rows", SHAPES)
def test_the_gradient_is_that_of_a_dense_layer(columns, rows):
    """Of the whole weight the dense layer's gradient has, in the weak columns, exactly these."""
    _, base = toy(columns, rows)
    index = [1, 2, 7, columns - 2]
    plain = bases.weight_of(base)
    module = weak(copy.deepcopy(base), index)
    dense = plain.clone()
    dense[:, index] += module.column_delta.detach()
    dense.requires_grad_()
    x = torch.randn(5, columns, dtype=torch.float64, requires_grad=True)
    y, z = module(x), torch.nn.functional.linear(x, dense, base.bias)
    assert torch.allclose(y, z, atol=1e-13)
    g = torch.randn_like(y)
    dx, d_delta = torch.autograd.grad(y, (x, module.column_delta), g)
    dx_dense, d_dense = torch.autograd.grad(z, (x, dense), g)
    assert torch.allclose(dx, dx_dense, atol=1e-12) and torch.allclose(d_delta, d_dense[:, index], atol=1e-12)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)))
def test_only_what_is_asked_for(needs):
    _, base = toy(24, 40)
    module = weak(base, [3, 4])
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=needs[0])
    module.columns_may_be_frozen = True
    module.column_delta.requires_grad_(needs[1])
    y = module(x)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert (x.grad is not None) == needs[0] and (module.column_delta.grad is not None) == needs[1]


def test_untrained_residual_is_the_layer_with_those_columns():
    """fp64: the base's other columns, and these as they were."""
    linear, base = toy(48, 32)
    index = torch.tensor([0, 9, 30])
    from seal_ops.quantized.start import residual

    delta = residual(linear.weight.detach(), bases.columns_of(base, index), index)
    expected = bases.weight_of(base)
    expected[:, index] = linear.weight.detach()[:, index]
    put_on(base, index, delta)
    x = torch.randn(7, 48, dtype=torch.float64)
    assert torch.allclose(base(x), torch.nn.functional.linear(x, expected, linear.bias), atol=1e-13)
    assert (base(x) - linear(x)).abs().max() > 1e-3, "the other columns are quantised"


def test_delta_form_equals_replace_form():
    """Columns that are anything at all: adding the difference or putting them in is one product (fp64)."""
    linear, base = toy(40, 24, bias=False)
    index, new = [2, 3, 39], torch.randn(24, 3, dtype=torch.float64)
    before = bases.weight_of(base)
    replaced = before.clone()
    replaced[:, index] = new
    x = torch.randn(9, 40, dtype=torch.float64)
    y = with_columns(base, x, torch.tensor(index), new - before[:, index])
    assert float((y - x @ replaced.t()).abs().max()) < 1e-13


@pytest.mark.parametrize("toy_base", [False, True])
def test_keeps_only_the_picked_columns(toy_base):
    """Of a frozen base's input nothing is kept for the backward pass but x[..., index]."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    linear = ToyLinear(linear) if toy_base else linear
    put_on(linear, torch.tensor([1, 5, 6]), torch.randn(32, 3))
    x = torch.randn(10, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x * 2)
    shapes = [tuple(t.shape) for t in kept]
    assert (10, 64) not in shapes and (10, 3) in shapes, shapes


def test_the_base_is_bit_for_bit_what_it_was():
    _, base = toy(32, 32, dtype=torch.float32)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    kind, attributes = type(base), set(vars(base))
    x = torch.randn(4, 32)
    y = base(x)
    weak(base, [0, 1])
    assert not torch.equal(base(x), y)
    take_off(base)
    assert type(base) is kind and set(vars(base)) == attributes and torch.equal(base(x), y)
    assert before.keys() == base.state_dict().keys() and all(
        torch.equal(before[n], t) for n, t in base.state_dict().items()
    )


def test_copies_and_pickles_keep_their_columns():
    _, base = toy(32, 24, dtype=torch.float32)
    x = torch.randn(4, 32)
    y = weak(base, [3, 20])(x)
    for again in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(again(x), y) and again.column_delta is not base.column_delta
        again.column_delta.data.zero_()
        assert not torch.equal(again(x), y) and torch.equal(base(x), y)


def test_the_trained_values_keep_their_precision():
    _, base = toy(32, 24, dtype=torch.float32)
    weak(base, [3, 20])
    exact = base.column_delta.detach().clone()
    base.to(torch.bfloat16)
    assert base.scales.dtype == torch.bfloat16 and base.column_delta.dtype == torch.float32
    assert torch.equal(base.column_delta, exact)
    assert base(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_nf4(bitsandbytes, dtype):
    """The real base in its dtype: product and gradients of a dense layer with the same 4-bit weight."""
    from seal_ops.quantized.quantizers import quantized

    torch.manual_seed(0)
    linear = nn.Linear(128, 64, dtype=dtype)
    for method in ("nf4", "nf4-double"):
        module = quantized(linear, method, "layer", "test")
        dense = bases.weight_of(module)
        assert torch.equal(bases.columns_of(module, torch.tensor([5, 9])), dense[:, [5, 9]].float())
        index, delta = torch.tensor([5, 9, 77]), torch.randn(64, 3)
        full = dense.double()
        full[:, index] += delta.double()
        put_on(module, index, delta)
        x = torch.randn(2, 6, 128, dtype=dtype, requires_grad=True)
        y, z = module(x), torch.nn.functional.linear(x.double(), full, linear.bias.double())
        g = torch.randn_like(y)
        dx, dd = torch.autograd.grad(y, (x, module.column_delta), g)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for found, expected in [
            (y, z), (dx, g.double() @ full), (dd, g.double().flatten(0, 1).t() @ x.double().flatten(0, 1)[:, index])
        ]:  # fmt: skip
            assert float((found.double() - expected).norm() / expected.norm()) < tolerance


def test_hqq():
    pytest.importorskip("hqq")
    from seal_ops.quantized.quantizers import quantized

    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    module = quantized(linear, "hqq", "layer", "test")
    dense = bases.weight_of(module)
    assert bases.sizes(module) == (128, 64) and 0 < float((dense - linear.weight).norm() / linear.weight.norm()) < 0.2
    index, delta = torch.tensor([5, 9, 77]), torch.randn(64, 3)
    put_on(module, index, delta)
    full = dense.clone()
    full[:, index] += delta
    x = torch.randn(6, 128, requires_grad=True)
    y = module(x)
    dx, dd = torch.autograd.grad(y, (x, module.column_delta), torch.ones_like(y))
    assert torch.allclose(y, torch.nn.functional.linear(x, full, linear.bias), atol=1e-4)
    assert torch.allclose(dx, torch.ones(6, 64) @ full, atol=1e-4)
    assert torch.allclose(dd, torch.ones(64, 6) @ x[:, index], atol=1e-4)
