"""torch.compile of whole attached models: one graph that keeps the fused op, for every length, with padding and
packing, forward and backward."""

import pytest
import torch
import transformers
from families import FAMILIES, close, largest, randomise, tokens

import seal_ops

ONE = {"num_hidden_layers": 1}  # what is traced is a layer; a second one costs time
FUSED = {"seal.rope_attention.default": "rope_attention", "seal.attention.default": "attention"}


class Graphs:
    """A backend that counts graphs and the attentions in each."""

    def __init__(self):
        self.attentions = []

    def __call__(self, graph, inputs):
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        self.attentions.append(
            [FUSED.get(name, "composed") for name in names if name in FUSED or "scaled_dot_product" in name]
        )
        return graph


def built(family, training=False, **overrides):
    model = FAMILIES[family].build(**overrides)
    randomise(seal_ops.attach(model, "channel"))
    return model.train(training)


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def padding_of(ids, holes=False):
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    padding[1, 17:] = 0
    if holes:
        padding[0, 9:11] = 0
    return padding


def test_one_graph_with_the_fused_op_for_every_length():
    """Another length compiles once more, with a symbol for the length; the next ones do not."""
    model = built("llama", **ONE)
    graphs = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for length in (21, 30, 37):
        ids = tokens(length=length)
        assert close(run(compiled, ids), run(model, ids))
    assert graphs.attentions == [["rope_attention"]] * 2


def test_windows_of_a_padded_batch_stay_masks():
    model = built("gemma3")
    graphs = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    ids = tokens()
    padding = padding_of(ids)
    real = padding.bool()
    got, expected = (run(m, ids, attention_mask=padding)[real] for m in (compiled, model))
    assert close(got, expected)
    assert graphs.attentions == [["composed", "attention"]]


def test_padding_with_holes_and_other_lengths_in_one_graph():
    model = built("llama", **ONE)
    graphs = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    for length in (21, 29, 40):
        ids = tokens(length=length)
        padding = padding_of(ids, holes=True)
        real = padding.bool()
        positions = torch.arange(length)[None]
        got, expected = (run(m, ids, attention_mask=padding, position_ids=positions)[real] for m in (compiled, model))
        assert close(got, expected)
    assert graphs.attentions == [["attention"]]


def test_packed_rows_with_flash_attentions_arguments():
    model = built("llama", **ONE)
    graphs = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    for lengths in ((9, 12), (7, 3, 8), (4, 4, 5, 11)):
        batch = collate([{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in lengths])
        batch.pop("labels")
        ids = batch.pop("input_ids")
        assert close(run(compiled, ids, **batch), run(model, ids, **batch))
    assert len(graphs.attentions) <= 2 and all(found == ["attention"] for found in graphs.attentions)


@pytest.mark.parametrize("family, padded", [("qwen3", False), ("llama", True)])
def test_gradients_through_aot_autograd(family, padded):
    model = built(family, training=True, **ONE)
    ids = tokens()
    extra = {"attention_mask": padding_of(ids)} if padded else {}
    labels = ids.masked_fill(extra["attention_mask"] == 0, -100) if padded else ids
    expected = torch.autograd.grad(
        model(ids, labels=labels, use_cache=False, **extra).loss, list(model.seal_scales.parameters())
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(ids, labels=labels, use_cache=False, **extra).loss
    for a, b in zip(torch.autograd.grad(loss, list(model.seal_scales.parameters())), expected):
        assert largest(a, b) <= 1e-4 * b.abs().max().item()


def test_restarting_positions_with_a_cache_do_not_leak():
    model = built("llama", **ONE)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    ids = tokens(1)
    expected = run(model, ids, position_ids=positions)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(ids, position_ids=positions, use_cache=True).logits, expected)


def test_attach_compiles_nothing():
    """Its two tokens would be traced through all that watches them, for the better part of a minute."""
    graphs, model = Graphs(), FAMILIES["llama"].build(**ONE)
    model.forward = torch.compile(model.forward, backend=graphs)
    seal_ops.attach(model)
    assert not graphs.attentions
    model(tokens(), use_cache=False)
    assert graphs.attentions == [["rope_attention"]]
