"""A reference on the same weights: what it computes, what it shares, and that the model trains on as if alone."""

import pytest
import torch
from families import FAMILIES, logits, randomise, tokens

import seal_ops

LLAMA = FAMILIES["llama"]


def attached(granularity="channel"):
    model = LLAMA.build()
    base = logits(model, tokens())
    randomise(seal_ops.attach(model, granularity))
    return model, base


def test_scales_off_is_the_base_on_the_same_weights():
    model, base = attached()
    implementation = LLAMA.build().config._attn_implementation
    own = logits(model, tokens())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    reference = seal_ops.reference_model(model)
    assert torch.equal(logits(reference, tokens()), base) and not torch.equal(own, base)
    assert torch.equal(logits(model, tokens()), own)
    assert type(reference) is type(model) and not reference.training
    assert reference.config._attn_implementation == implementation and model.config._attn_implementation == "seal"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    mine = dict(model.named_parameters())
    assert all(p is mine[name] and not p.requires_grad for name, p in reference.named_parameters())
    model(tokens(), labels=tokens()).loss.backward()
    assert all(scale.grad.abs().sum() > 0 for scale in model.seal_scales.parameters())


def test_frozen_scales_stay_while_the_model_learns():
    model, base = attached()
    own = logits(model, tokens())
    reference = seal_ops.reference_model(model, scales="frozen")
    randomise(model.seal_scales, seed=7)
    assert torch.equal(logits(reference, tokens()), own)
    assert not torch.equal(logits(model, tokens()), own)
    assert reference.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(scale.requires_grad for scale in model.seal_scales.parameters())


@pytest.mark.parametrize("order", ["attach first", "LoRA first"])
def test_lora_is_off_too(peft, order):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = LLAMA.build()
    base = logits(model, tokens())
    if order == "attach first":
        scales = seal_ops.attach(model)
        model = peft.get_peft_model(model, config)
        scales.requires_grad_(True)
    else:
        model = peft.get_peft_model(model, config)
        scales = seal_ops.attach(model)
    randomise(scales)
    own = logits(model, tokens())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    off, frozen = seal_ops.reference_model(model), seal_ops.reference_model(model, scales="frozen")
    assert torch.equal(logits(off, tokens()), base)
    assert torch.equal(logits(frozen, tokens()), own) and torch.equal(logits(model, tokens()), own)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(1)
    assert torch.equal(logits(frozen, tokens()), own) and not torch.equal(logits(model, tokens()), own)


def test_detach_afterwards_gives_the_flags_back():
    model = LLAMA.build()
    seal_ops.attach(model)
    reference = seal_ops.reference_model(model)
    seal_ops.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(reference, tokens()), logits(model, tokens()))


def test_what_cannot_be_a_reference_is_refused():
    model = LLAMA.build()
    with pytest.raises(ValueError, match="seal_ops.reference_model: model must have scales attached"):
        seal_ops.reference_model(model)
    seal_ops.attach(model)
    with pytest.raises(ValueError, match="scales must be 'off' or 'frozen', got 'on'"):
        seal_ops.reference_model(model, scales="on")
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="must have its weights in place"):
        seal_ops.reference_model(model)
