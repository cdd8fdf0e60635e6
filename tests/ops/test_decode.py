"""Attention of few queries over many keys, on every backend."""

import pytest
import torch
from cases import Case
from decode_cases import CASES, assert_every_row, exact, in_cache, inputs_of

import seal_ops


def half(backend: str, device: torch.device) -> torch.dtype:
    return torch.float16 if backend in ("cuda", "triton") else torch.float32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_of_every_head(backend, device, case):
    inputs = inputs_of(case, half(backend, device), device)
    assert_every_row(*seal_ops.attention(**inputs, backend=backend, return_lse=True), inputs)


@pytest.mark.parametrize("heads_first", [False, True])
def test_a_view_of_a_longer_cache(backend, device, heads_first):
    """Around the keys in use there is NaN, as in a cache of a fixed length."""
    inputs = inputs_of(Case(1, 77, heads=(4, 2), head_dim=128, batch=2), half(backend, device), device)
    expected = exact(inputs)
    views = {n: in_cache(inputs[n], 9, heads_first) for n in ("k", "v")}
    assert_every_row(*seal_ops.attention(**{**inputs, **views}, backend=backend, return_lse=True), inputs, expected)


def test_packed_sequences_of_one_query(backend, device):
    """max_seqlen tells the kernels that queries are few; among them are sequences without queries and without keys."""
    lengths = (40, 3, 0, 66)
    case = Case((1, 1, 1, 0), lengths, heads=(4, 2), scale="row-channel", offset=True)
    inputs = inputs_of(case, half(backend, device), device)
    expected = exact(inputs)
    for bound in (None, 1, 4):
        assert_every_row(
            *seal_ops.attention(**inputs, max_seqlen=bound, backend=backend, return_lse=True), inputs, expected
        )


def test_gradients_flow_as_ever(backend, device):
    case = Case(2, 50, heads=(4, 2))
    inputs = inputs_of(case, half(backend, device), device)
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("q", "k", "v", "scale")}
    seal_ops.attention(**{**inputs, **leaves}, backend=backend).float().square().sum().backward()
    double = {n: inputs[n].double().requires_grad_() for n in leaves}
    seal_ops.attention(**{**inputs, **double}, backend="reference").square().sum().backward()
    tolerance = 1e-4 if inputs["q"].dtype == torch.float32 else 5e-3
    for name, leaf in leaves.items():
        want = double[name].grad
        assert (leaf.grad.double() - want).norm() <= tolerance * want.norm(), name
