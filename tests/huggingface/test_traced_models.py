"""torch.jit.trace, torch.export and CUDA graphs of attached models: what holds for the traced call holds for others."""

import pytest
import torch
from families import FAMILIES, WINDOW, close, randomise, tokens
from no_wait import NoWait
from torch import nn

import seal_ops

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")


class Logits(nn.Module):
    """A model as a function of tensors alone; ``name``: what the second one is."""

    def __init__(self, model, name="attention_mask", **options):
        super().__init__()
        self.model, self.name, self.options = model, name, options

    def forward(self, ids, second=None):
        return self.model(ids, **{self.name: second}, return_dict=True, **self.options).logits


def built(family, **overrides):
    model = FAMILIES[family].build(**overrides)
    randomise(seal_ops.attach(model, "channel"))
    return model


def padding_of(ids):
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    padding[1, -4:] = 0
    return padding


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_jit_trace_reads_the_padding_and_length_of_later_calls(family):
    function = Logits(built(family), use_cache=False)
    ids = tokens(length=17)
    traced = torch.jit.trace(function, (ids, torch.ones_like(ids)), check_trace=False)
    unmasked = torch.jit.trace(function, (ids,), check_trace=False)
    for length in (17, 30, WINDOW - 3):
        ids = tokens(length=length)
        padding = padding_of(ids) if length > WINDOW else torch.ones_like(ids)
        real = padding.bool()
        assert close(traced(ids, padding)[real], function(ids, padding)[real])
        assert close(unmasked(ids), function(ids))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_jit_trace_finds_the_documents_of_later_calls(use_cache):
    function = Logits(built("llama"), "position_ids", use_cache=use_cache)
    ids = tokens(length=17)
    traced = torch.jit.trace(function, (ids, torch.arange(17).expand_as(ids)), check_trace=False)
    packed = torch.cat([torch.arange(9), torch.arange(8)]).expand_as(ids)
    assert close(traced(ids, packed), function(ids, packed))
    assert not close(function(ids, packed), function(ids, torch.arange(17).expand_as(ids)))


def test_a_jit_trace_of_an_extended_model_is_refused():
    model = FAMILIES["llama"].build()
    seal_ops.extend(model, "self_extend", trained=32, window=8, group=4)
    with pytest.raises(ValueError, match="must not be traced by torch.jit.trace"):
        torch.jit.trace(Logits(model, use_cache=False), (tokens(length=17),), check_trace=False)


@torch.no_grad()
def test_an_export_of_a_model_with_a_window_takes_shorter_and_longer_prompts():
    model = built("mistral", num_hidden_layers=1)
    length = torch.export.Dim("length", min=2, max=100)
    ids = tokens(length=17)
    exported = torch.export.export(
        Logits(model, use_cache=False), (ids,), dynamic_shapes={"ids": {1: length}}, strict=False
    ).module()
    for length in (17, 30, WINDOW - 3):
        ids = tokens(length=length)
        assert close(exported(ids), model(ids, use_cache=False).logits)


@torch.library.custom_op("seal_ops_tests::shifted", mutates_args=())
def shifted(x: torch.Tensor, by: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    return x * scale if by is None else x * scale + by


@shifted.register_fake
def _(x, by, scale):
    return torch.empty_like(x)


class Shifted(nn.Module):
    def forward(self, x):
        return shifted(x, None, x)


@torch.no_grad()
def test_a_draft_export_works_or_fails_as_for_any_op_without_an_optional_tensor():
    """docs/models.md says that the fault is PyTorch's; under a PyTorch without it the draft has to be right."""
    function, ids = Logits(built("llama", num_hidden_layers=1), use_cache=False), tokens(length=17)
    wrong, failed = "does not mutate the argument, but this seems to be empirically wrong", []
    for module, given in ((function, ids), (Shifted(), torch.ones(3))):
        try:
            exported = torch.export.draft_export(module, (given,)).module()
            assert close(exported(given), module(given))
        except RuntimeError as error:
            assert wrong in str(error), error
            failed.append(module)
    assert len(failed) in (0, 2), "attached models fail, or work, alone"


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
def test_an_export_holds_the_op(strict):
    function, ids = Logits(built("llama", num_hidden_layers=1), use_cache=False), tokens(length=17)
    exported = torch.export.export(function, (ids,), strict=strict)
    assert [str(n.target) for n in exported.graph.nodes].count("seal.rope_attention.default") == 1
    assert close(exported.module()(ids), function(ids))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_forward_pass_that_a_cuda_graph_records_asks_for_no_value(family, monkeypatch):
    model, ids = built(family), tokens(length=17)
    padding = padding_of(ids)
    real = padding.bool()
    expected = [model(ids, use_cache=False).logits, model(ids, attention_mask=padding, use_cache=False).logits]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with NoWait():
        plain = model(ids, use_cache=False).logits
        padded = model(ids, attention_mask=padding, use_cache=False).logits
    monkeypatch.undo()
    assert close(plain, expected[0])
    assert close(padded[real], expected[1][real])
