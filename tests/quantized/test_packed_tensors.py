"""Weights that are tensors of a quantiser's own class in plain ``nn.Linear`` layers, as torchao makes them."""

import pytest
import torch
from families import FAMILIES, close, logits, randomise, tokens
from torch import nn
from toy_quantizer import PackedTensor, pack

import seal_ops


def packed_model(dtype=torch.float32):
    model = FAMILIES["llama"].build(dtype)
    pack(model)
    return model


def o_proj(model):
    return model.model.layers[0].self_attn.o_proj


def test_scales_do_not_merge_and_are_written_out_on_demand():
    model = packed_model()
    randomise(seal_ops.attach(model, "channel"))
    expected = logits(model, tokens())
    reason = "o_proj must be a plain torch.nn.Linear in 16 or more bits, got Linear with PackedTensor weight"
    with pytest.raises(ValueError, match=reason):
        seal_ops.merge(model)
    assert torch.equal(logits(model, tokens()), expected)
    seal_ops.fold_scales(model, dequantize=True)
    assert type(o_proj(model).weight.data) is torch.Tensor and close(logits(model, tokens()), expected)


def test_weak_columns_read_the_product(token_ids):
    model = packed_model()
    before = logits(model, tokens())
    columns = seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    assert torch.equal(logits(model, tokens()), before)
    with torch.no_grad():
        for delta in columns.parameters():
            delta.normal_(std=0.1)
    expected = logits(model, tokens())
    assert isinstance(o_proj(model).weight, PackedTensor) and not close(expected, before)
    seal_ops.merge_weak_columns(model)
    assert type(o_proj(model)) is nn.Linear and type(o_proj(model).weight.data) is torch.Tensor
    assert close(logits(model, tokens()), expected)


def test_weak_columns_do_not_quantise_them_again(token_ids):
    with pytest.raises(ValueError, match="needs layers in 16 or more bits, got Linear with PackedTensor weight"):
        seal_ops.attach_weak_columns(packed_model(), 4, calibration=token_ids, quantize="nf4")


def test_fp8_is_refused():
    model = packed_model(torch.bfloat16)
    seal_ops.attach(model, "head")
    samples = [{"input_ids": tokens()[0].tolist(), "labels": tokens()[0].tolist()}]
    with pytest.raises(ValueError, match="frozen_linears='fp8' needs 16-bit weights, got PackedTensor in Linear"):
        seal_ops.train(model, samples, frozen_linears="fp8", lr=1e-3)
