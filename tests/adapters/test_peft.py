"""Scales and PEFT's adapters on one model, in either order."""
import pytest
import torch
from families import FAMILIES, close, logits, randomise, tokens

import seal_ops

LLAMA = FAMILIES["llama"]


def test_together_with_lora(peft):
    """Scales on a model with LoRA: served together, merged only after LoRA is."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(LLAMA.build(), config).eval()
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    own = logits(adapted, tokens())
    scales = seal_ops.attach(adapted, "channel")
    assert close(logits(adapted, tokens()), own)
    randomise(scales)
    with pytest.raises(ValueError, match="o_proj must be a plain torch.nn.Linear"):
        seal_ops.merge(adapted)
    seal_ops.detach(adapted)
    assert torch.equal(logits(adapted, tokens()), own)
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == trainable
