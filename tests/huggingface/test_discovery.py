"""Discovery: the output projection by value, gates, layer numbers, sizes that the ops do not take, quantised bases."""

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens, untouched
from torch import nn
from transformers.models.llama import modeling_llama

import seal_ops
from seal_ops.huggingface.discovery import find_attention_layers

LLAMA = FAMILIES["llama"]
SMALL = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)


def build(config: str, **overrides):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SMALL, **overrides})).eval()


# -- the output projection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, overrides, name",
    [
        ("LlamaConfig", {}, "o_proj"),
        ("GPTNeoXConfig", {}, "dense"),
        ("PhiConfig", {}, "dense"),
        ("OPTConfig", dict(ffn_dim=96, word_embed_proj_dim=64), "out_proj"),
        ("PersimmonConfig", {}, "dense"),
        ("Lfm2Config", dict(num_key_value_heads=2, layer_types=["full_attention"] * 2), "out_proj"),
        ("GPT2Config", dict(n_embd=64, n_layer=2, n_head=4, n_inner=96), "c_proj"),
        ("BertConfig", dict(is_decoder=True), "dense"),  # outside the attention module
    ],
)
def test_the_output_projection_is_found_by_value(config, overrides, name):
    model = build(config, **overrides)
    for layer in find_attention_layers(model):
        assert layer.projection_name.split(".")[-1] == name
        assert model.get_submodule(layer.projection_name) is layer.output_projection is layer.o_proj
        assert layer.commutes == ("head", "channel") and layer.direct


def rewritten(monkeypatch, between):
    """Llama with a step between attention and its projection: ``between(module, output [B, S, Hq * D], hidden)``."""
    forward = modeling_llama.LlamaAttention.forward

    def changed(self, hidden_states, *args, **kwargs):
        handle = self.o_proj.register_forward_pre_hook(lambda m, a: (between(self, a[0], hidden_states),))
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", changed)
    return LLAMA.build()


def per_head(x):
    return x.unflatten(-1, (4, 16))


@pytest.mark.parametrize(
    "between, commutes",
    [
        (
            lambda m, x, h: x * torch.sigmoid(h @ m.k_proj.weight.T).repeat(1, 1, 2),
            ("head", "channel"),
        ),  # Qwen3-Next's gate
        (
            lambda m, x, h: (per_head(x) * torch.sigmoid(h[..., :4, None])).flatten(-2),
            ("head", "channel"),
        ),  # one a head
        (lambda m, x, h: (per_head(x).roll(1, -1)).flatten(-2), ("head",)),  # channels of a head change places
        (lambda m, x, h: (per_head(x) @ m.k_proj.weight[:16, :16]).flatten(-2), ("head",)),  # a matrix in each head
        (lambda m, x, h: x / (1e-6 + x.norm(dim=-1, keepdim=True)), ()),  # BitNet's norm
        (lambda m, x, h: nn.functional.normalize(per_head(x), dim=-1).flatten(-2), ()),
        (lambda m, x, h: per_head(x).flip(-2).flatten(-2), ()),  # heads change places
        (lambda m, x, h: x + 1, ()),
        (lambda m, x, h: x.relu(), ()),
    ],
    ids=["gate", "head-gate", "roll", "matrix", "norm", "head-norm", "flip", "bias", "relu"],
)
def test_what_may_stand_between_attention_and_its_projection(monkeypatch, between, commutes):
    calls = []

    def watched(module, x, hidden):
        calls.append(1)
        return between(module, x, hidden)

    # The hook that changes the input must come before the one that observes it.
    model = rewritten(monkeypatch, watched)
    original = nn.Linear.register_forward_pre_hook
    monkeypatch.setattr(
        nn.Linear,
        "register_forward_pre_hook",
        lambda self, hook, **kw: original(self, hook, **{**kw, "prepend": "with_kwargs" not in kw}),
    )
    layers = find_attention_layers(model)
    assert calls and [layer.commutes for layer in layers] == [commutes] * 2


def test_a_second_reader_of_the_output_forbids_merging(monkeypatch):
    """Scaling the weights of one would leave the other out."""
    forward = modeling_llama.LlamaAttention.forward

    def both(self, *args, **kwargs):
        kept = []
        handle = self.o_proj.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
        out = forward(self, *args, **kwargs)
        handle.remove()
        return out[0] + self.second(kept[0]), *out[1:]

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", both)
    model = LLAMA.build()
    for layer in model.model.layers:
        layer.self_attn.second = nn.Linear(64, 64)
    assert all(layer.commutes == () for layer in find_attention_layers(model))


@pytest.mark.parametrize(
    "config, overrides",
    [
        (
            "Qwen3NextConfig",
            dict(
                num_key_value_heads=2,
                head_dim=16,
                num_hidden_layers=4,
                num_experts=2,
                num_experts_per_tok=1,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
            ),
        ),
        (
            "Qwen3_5TextConfig",
            dict(
                num_key_value_heads=2,
                head_dim=16,
                num_hidden_layers=4,
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
            ),
        ),
        (
            "AfmoeConfig",
            dict(
                num_key_value_heads=2,
                head_dim=16,
                num_experts=2,
                num_experts_per_tok=1,
                sliding_window=8,
                moe_intermediate_size=32,
                num_dense_layers=1,
            ),
        ),
    ],
)
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_gated_models_merge(config, overrides, granularity):
    model = build(config, **overrides)
    base = logits(model, tokens())
    randomise(seal_ops.attach(model, granularity))
    expected = logits(model, tokens())
    assert not close(base, expected)
    assert close(logits(seal_ops.merge(model), tokens()), expected)


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_layers_of_a_hybrid_have_the_models_numbers():
    model = build(
        "JambaConfig",
        num_hidden_layers=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    )
    layers = find_attention_layers(model)
    assert [layer.index for layer in layers] == [layer.module.layer_idx for layer in layers] == [1, 3]


def test_layers_without_numbers_of_their_own_are_counted():
    model = LLAMA.build()
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 5
    assert [layer.index for layer in find_attention_layers(model)] == [0, 1]


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_a_head_dim_above_the_ops_runs_composed(family, called):
    model = FAMILIES[family].build(head_dim=320)
    base = untouched(model)
    with pytest.warns(
        UserWarning,
        match=r"\(2 of 2 layers\) runs attention composed from PyTorch's parts: head_dim 320 "
        r"above 256",
    ):
        scales = seal_ops.attach(model, "channel")
    assert scales.attachment.patch.summary() == (
        "rotation fused in 0 of 2 layers, attention composed in 2 (head_dim 320 above 256)"
    )
    assert close(logits(model, tokens()), logits(base, tokens()))
    randomise(scales)
    expected = logits(model, tokens())
    called.clear()
    with torch.no_grad():
        assert close(model(tokens(), use_cache=True).logits, expected)
    assert called == ["_composed"] * 2
    assert close(logits(seal_ops.merge(model), tokens()), expected)


# -- bases without parameters ------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """As GPTQ's and AWQ's: buffers only, in another layout, and no ``in_features``."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scales = nn.Buffer(linear.weight.detach().abs().amax(1) / 127)
        self.qweight = nn.Buffer((linear.weight.detach() / self.scales[:, None]).round().to(torch.int8).T.contiguous())

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scales)


def test_projections_of_buffers_are_served_and_not_merged():
    model = LLAMA.build()
    for layer in model.model.layers:
        layer.self_attn.o_proj = Packed(layer.self_attn.o_proj)
    base = logits(model, tokens())
    layers = find_attention_layers(model)
    assert [type(layer.output_projection) for layer in layers] == [Packed] * 2
    assert [layer.device.type for layer in layers] == ["cpu"] * 2
    scales = seal_ops.attach(model, "channel")
    assert close(logits(model, tokens()), base)
    randomise(scales)
    assert not close(logits(model, tokens()), base)
    with pytest.raises(ValueError, match="got Packed"):
        seal_ops.merge(model)


def test_torch_ao_int8_is_served():
    model = torch.ao.quantization.quantize_dynamic(LLAMA.build(), {nn.Linear}, dtype=torch.qint8)
    base = logits(model, tokens())
    scales = seal_ops.attach(model, "head")
    assert close(logits(model, tokens()), base)
    assert all(layer.projection_name.endswith("o_proj") for layer in scales.attachment.patch.layers)


def test_the_scales_say_what_runs_fused():
    assert "rotation fused in 2 of 2 layers" in repr(seal_ops.attach(LLAMA.build()))
    assert "rotation fused in 0 of 2 layers" in repr(seal_ops.attach(FAMILIES["cohere"].build()))


def test_weights_that_zero_3_has_divided_are_refused():
    """DeepSpeed marks them so; what is left in a process is no matrix."""
    model = LLAMA.build()
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="must get its scales before DeepSpeed's ZeRO-3 divides its weights"):
        seal_ops.attach(model)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TWO_STREAMS = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 60,
}  # fmt: skip
NO_DECODERS = {
    "ViTModel": (
        lambda t: t.ViTModel(t.ViTConfig(**SMALL, image_size=16, patch_size=8)),
        "a language model, which runs on tokens (input_ids) alone, ViTModel reads pixel_values",
    ),
    "WhisperForConditionalGeneration": (
        lambda t: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                **TWO_STREAMS,
                max_source_positions=50,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                begin_suppress_tokens=None,
            )  # fmt: skip
        ),
        "one stream of tokens, got WhisperForConditionalGeneration, an encoder and a decoder",
    ),
    "CLIPModel": (
        lambda t: t.CLIPModel(
            t.CLIPConfig(
                text_config={**SMALL, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2},
                vision_config={**SMALL, "image_size": 16, "patch_size": 8},
            )
        ),
        "CLIPModel failed on two tokens, without any other input (",
    ),
    "T5ForConditionalGeneration": (
        lambda t: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=60)
        ),
        "one stream of tokens, got T5ForConditionalGeneration, an encoder and a decoder",
    ),
    "BartForConditionalGeneration": (  # which runs on two tokens alone
        lambda t: t.BartForConditionalGeneration(
            t.BartConfig(
                **TWO_STREAMS,
            )  # fmt: skip
        ),
        "one stream of tokens, got BartForConditionalGeneration, an encoder and a decoder",
    ),
    "MambaForCausalLM": (
        lambda t: t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=60, state_size=8)),
        "call attention through transformers' attention registry, MambaForCausalLM has no module that takes part in it",
    ),
}


@pytest.mark.parametrize("name", NO_DECODERS)
def test_what_is_no_decoder_of_ours_is_told_why(name):
    make, reason = NO_DECODERS[name]
    model = make(transformers)
    with pytest.raises(ValueError) as caught:
        seal_ops.attach(model)
    assert str(caught.value).startswith("seal_ops.attach: model must ") and reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and not hasattr(model, "seal_scales")
