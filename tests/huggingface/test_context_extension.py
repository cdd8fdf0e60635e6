"""Longer contexts by rotary frequencies: what changes inside, and that nothing has changed afterwards."""

import pytest
import torch
from retrieval_fixtures import model

from seal_ops.huggingface.context_extension import extended
from seal_ops.ops.rotary_tables import rope_frequencies


@pytest.mark.parametrize("kind", ["ntk", "yarn"])
def test_frequencies_inside_and_after(kind):
    lm = model().eval()
    ids = torch.arange(5, 25)[None]
    before, own = lm(ids).logits, lm.model.rotary_emb.inv_freq.clone()
    with extended(lm, kind, 4) as changed:
        expected, factor = rope_frequencies(8, kind, base=10_000.0, max_position_embeddings=1024, factor=4)
        assert torch.allclose(changed.model.rotary_emb.inv_freq, expected)
        assert changed.model.rotary_emb.attention_scaling == factor and changed.config.max_position_embeddings == 4096
        assert not torch.allclose(lm(ids).logits, before)
    assert torch.equal(lm(ids).logits, before) and torch.equal(lm.model.rotary_emb.inv_freq, own)
    assert lm.config.max_position_embeddings == 1024


def test_refusals():
    lm = model()
    with pytest.raises(ValueError, match="kind must be one of ntk, yarn, got 'linear'"), extended(lm, "linear", 2):
        pass
    lm.config.rope_parameters = {**lm.config.rope_parameters, "rope_type": "llama3"}
    with (
        pytest.raises(ValueError, match="must have one rotary embedding of default frequencies"),
        extended(lm, "ntk", 2),
    ):
        pass
