"""Every kind of adapter that PEFT has for a decoder, beside scales, put on before them and after them."""

import copy

import pytest
import torch
from families import FAMILIES, close, logits, randomise, scale_by_hooks, tokens

import seal_ops
from seal_ops.training.loop import train

LLAMA = FAMILIES["llama"]
LINEAR = {"target_modules": ["q_proj", "o_proj"]}
PROMPT = {"num_virtual_tokens": 3}
NEW = {"init_weights": False, **LINEAR}
KINDS = {
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True, **LINEAR}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2, **LINEAR}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "o_proj"], "feedforward_modules": ["o_proj"]}),
    "prompt tuning": ("PromptTuningConfig", PROMPT),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8, **PROMPT}),
    "prefix tuning": ("PrefixTuningConfig", PROMPT),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8, **NEW}),
    "VeRA": ("VeraConfig", {"r": 4, **NEW}),
    "LoHa": ("LoHaConfig", {"r": 2, **NEW}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [1, 2, 3]}),
    "LLaMA-Adapter": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2}),
}
ORDERS = ["attach first", "PEFT first"]


def adapted(peft, kind, model, values=None):
    """A PEFT model whose adapter does something, or has the given values."""
    name, options = KINDS[kind]
    torch.manual_seed(0)
    both = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **copy.deepcopy(options))).eval()
    if values is not None:
        assert not both.load_state_dict(values, strict=False).unexpected_keys
        return both
    with torch.no_grad():
        for p in both.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.05)
    return both


def pair(peft, kind, order):
    """The adapter alone, and the same beside new scales on another copy of the model."""
    alone = adapted(peft, kind, LLAMA.build())
    values, model = {name: value.clone() for name, value in alone.state_dict().items()}, LLAMA.build()
    if order == "attach first":
        scales = seal_ops.attach(model, "channel")
        both = adapted(peft, kind, model, values)
        scales.requires_grad_(True)
    else:
        both = adapted(peft, kind, model, values)
        scales = seal_ops.attach(both, "channel")
    return alone, both, scales


def hooked(model, scales):
    """The model, its attention output multiplied by plain hooks."""
    scale_by_hooks(model, {layer: value.detach() for layer, value in scales.items()}, LLAMA.head_dim)
    return model


def real(model):
    """Logits of the tokens themselves, behind those of a learned prompt."""
    return logits(model, tokens())[:, -tokens().shape[1] :]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_beside_an_adapter_compute_what_both_are(peft, kind, order):
    alone, both, scales = pair(peft, kind, order)
    own, base = real(alone), real(LLAMA.build())
    assert not close(own, base), "the adapter does something"
    assert close(real(both), own)
    randomise(scales)
    with seal_ops.disabled(both):
        assert close(real(both), own)
    with both.disable_adapter():
        scaled = real(both)
    assert close(scaled, real(hooked(LLAMA.build(), scales))) and not close(scaled, base)
    if kind != "LLaMA-Adapter":  # its own attention goes through the projection too, unscaled; hooks cannot tell
        hooked(alone.get_base_model(), scales)
        assert close(real(both), real(alone))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "AdaLoRA"])
def test_both_are_trained_saved_and_loaded(peft, kind, order, tmp_path):
    _, both, scales = pair(peft, kind, order)
    before = {name: p.detach().clone() for name, p in both.named_parameters() if p.requires_grad}
    assert len(before) > len(list(scales.parameters())), "what PEFT trains goes on training"
    samples = [{"input_ids": row.tolist(), "labels": [-100] * 15 + row[15:].tolist()} for row in tokens()]
    train(both, samples, lr=1e-2, output_dir=tmp_path, progress=False)
    assert [name for name, p in both.named_parameters() if name in before and torch.equal(p, before[name])] == []
    expected = logits(both.eval(), tokens())
    again = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    seal_ops.load(again, tmp_path)
    assert close(logits(again, tokens()), expected)


def test_adalora_is_not_trained_by_a_loop_that_does_not_choose_its_ranks(peft):
    _, both, scales = pair(peft, "AdaLoRA", "PEFT first")
    samples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    with pytest.raises(ValueError, match=r"^seal_ops.train: model must have an adapter of fixed rank to train, got"):
        train(both, samples, lr=1e-2, progress=False)
    both.requires_grad_(False)
    scales.requires_grad_(True)
    train(both, samples, lr=1e-2, progress=False)


@pytest.mark.parametrize("order", ORDERS)
def test_what_reads_a_projection_beside_attention_keeps_scales_from_merging(peft, order):
    _, both, scales = pair(peft, "LLaMA-Adapter", order)
    randomise(scales)
    expected = logits(both, tokens())
    with pytest.raises(ValueError, match=r"^seal_ops.merge: model must have projections that attention alone reads"):
        seal_ops.merge(both)
    assert torch.equal(logits(both, tokens()), expected)
