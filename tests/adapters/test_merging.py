"""Merging: what becomes of the weights, what is refused, and that nothing is half written."""

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens
from torch import nn

import seal_ops

LLAMA = FAMILIES["llama"]


def test_saving_after_merging(tmp_path):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    expected = logits(model, tokens())
    seal_ops.merge(model)
    scales.save_pretrained(tmp_path)
    fresh = LLAMA.build()
    seal_ops.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, tokens()), expected)


def test_merging_leaves_biases_and_rounds_once():
    model = LLAMA.build(torch.bfloat16, attention_bias=True)
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("seal_scales")}
    factors = [s.detach().clone() for s in scales.parameters()]
    after = seal_ops.merge(model).state_dict()
    assert set(after) == set(before)
    for name, tensor in after.items():
        if name.endswith("o_proj.weight"):
            layer = int(name.split(".")[2])
            assert torch.equal(tensor, (before[name].float() * factors[layer].reshape(1, -1)).bfloat16())
        else:
            assert torch.equal(tensor, before[name])


class Quantised(nn.Linear):
    """Stands for the linear layers of a quantisation library: a subclass whose weight means something else."""


def quantise(model):
    model.model.layers[1].self_attn.o_proj.__class__ = Quantised


def share(model):
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight


def overflow(model):
    model.half()
    model.seal_scales.layers["1"].scale.data.fill_(1e6)


@pytest.mark.parametrize(
    "change, message",
    [
        (quantise, "layers.1.self_attn.o_proj must be a plain torch.nn.Linear in 16 or more bits, got Quantised"),
        (share, "layers.1.self_attn.o_proj must have a weight of its own, got a weight that two layers share"),
        (overflow, "layers.1.self_attn.o_proj must stay finite in torch.float16, got scales that overflow it"),
    ],
)
def test_refused_merges_change_nothing(change, message):
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "head"))
    change(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        seal_ops.merge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.config._attn_implementation == "seal"


def projections(model):
    return [layer.self_attn.o_proj for layer in model.model.layers]


def prune(model):
    from torch.nn.utils import prune

    for projection in projections(model):
        prune.l1_unstructured(projection, "weight", 0.3)


def weight_norm(model):
    for projection in projections(model):
        torch.nn.utils.weight_norm(projection)


def spectral_norm(model):
    for projection in projections(model):
        torch.nn.utils.spectral_norm(projection)


def parametrized(model):
    for projection in projections(model):
        torch.nn.utils.parametrizations.weight_norm(projection)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize(
    "change, message",
    [
        (prune, "o_proj must have its weight as a parameter, got one that is computed anew"),
        (weight_norm, "o_proj must have its weight as a parameter, got one that is computed anew"),
        (spectral_norm, "o_proj must have its weight as a parameter, got one that is computed anew"),
        (parametrized, "o_proj must be a plain torch.nn.Linear .*got ParametrizedLinear"),
    ],
)
def test_a_weight_that_is_computed_is_refused(change, message, when):
    model = LLAMA.build()
    if when == "before attach":
        change(model)
    randomise(seal_ops.attach(model, "head"))
    if when == "after attach":
        change(model)
    expected = logits(model, tokens())
    with pytest.raises(ValueError, match="seal_ops.merge: .*" + message):
        seal_ops.merge(model)
    assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_an_interrupted_merge_can_go_on(interrupted, monkeypatch):
    """Killed by the user in any layer, the model computes what it did, and a second merge finishes."""
    from seal_ops.adapters import merging

    model = LLAMA.build(num_hidden_layers=3)
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    with torch.no_grad():
        for _, scale in scales.items():
            scale.abs_().add_(0.1)
    values, expected, real, calls = scales.values(), logits(model, tokens()), merging.merged, []

    def stop(weight, *rest):
        calls.append(weight.shape[0])
        if calls.count(64) == interrupted:  # whole weights; the checks take one row
            raise KeyboardInterrupt
        return real(weight, *rest)

    monkeypatch.setattr(merging, "merged", stop)
    with pytest.raises(KeyboardInterrupt):
        seal_ops.merge(model)
    monkeypatch.undo()
    assert close(logits(model, tokens()), expected)
    assert close(logits(seal_ops.merge(model), tokens()), expected)
    if interrupted == 1:
        assert all(torch.equal(scales.values()[n], values[n]) for n in values), "the scales keep their values"


class BuffersOnly(nn.Module):
    """As the linear layers of GPTQ and AWQ: no parameter at all."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).T


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_a_projection_without_parameters_is_served(granularity):
    model, plain = LLAMA.build(), LLAMA.build()
    for layer in model.model.layers:
        layer.self_attn.o_proj = BuffersOnly(layer.self_attn.o_proj)
    for m in (model, plain):
        randomise(seal_ops.attach(m, granularity))
    assert close(logits(model, tokens(3)), logits(plain, tokens(3)))
    with pytest.raises(ValueError, match="o_proj must be a plain torch.nn.Linear .*got BuffersOnly"):
        seal_ops.merge(model)


def gpt2():
    return transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)


def neox():
    return transformers.GPTNeoXConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )


def opt():
    return transformers.OPTConfig(
        vocab_size=97,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        init_std=0.2,
    )


def gated():
    return transformers.Qwen3NextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        initializer_range=0.2,
        pad_token_id=0,
    )


@pytest.mark.filterwarnings("ignore:seal_ops.attach")
@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("config", [gpt2, neox, opt, gated])
def test_projections_of_any_name_and_behind_gates(config, granularity, tmp_path):
    def build():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config()).eval()

    model = build()
    own = logits(model, tokens(3))
    scales = seal_ops.attach(model, granularity)
    if config is gated:
        assert scales.config.layers == (3,)
    randomise(scales)
    scales.save_pretrained(tmp_path)
    padding = torch.ones(3, 21, dtype=torch.long)
    padding[1, :6] = 0
    expected = logits(model, tokens(3)), logits(model, tokens(3), attention_mask=padding)
    assert not close(expected[0], own)
    seal_ops.merge(model)
    assert close(logits(model, tokens(3)), expected[0])
    assert close(logits(model, tokens(3), attention_mask=padding)[padding.bool()], expected[1][padding.bool()])
    again = build()
    seal_ops.load(again, tmp_path)
    assert close(logits(again, tokens(3)), expected[0])
