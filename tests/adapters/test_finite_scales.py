"""Scales that are no numbers are told of, and neither scored, saved, merged nor exported."""

import math
import os

import pytest
import torch
from families import FAMILIES
from retrieval_fixtures import model, tokenizer

import seal_ops


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_verb_takes_scales_that_are_not_finite(value, tmp_path):
    lm = model().eval()
    scales = seal_ops.attach(lm, "channel")
    scales.save_pretrained(tmp_path / "good")
    good = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        scales.layers["1"].scale[0, 0] = value
    weights = [p.clone() for p in lm.parameters()]
    for call, verb in {
        "evaluate": lambda: seal_ops.evaluate(lm, tokenizer(), "lines", 190, 1, output=tmp_path / "a.json"),
        "Scales.save_pretrained": lambda: scales.save_pretrained(tmp_path / "good"),
        "merge": lambda: seal_ops.merge(lm),
        "ia3.export_ia3": lambda: seal_ops.ia3.export_ia3(lm, tmp_path / "ia3"),
    }.items():
        with pytest.raises(ValueError) as caught:
            verb()
        assert str(caught.value) == f"seal_ops.{call}: every scale must be finite, got NaN or infinity in layer 1"
    assert os.listdir(tmp_path) == ["good"]
    assert (tmp_path / "good" / "adapter_model.safetensors").read_bytes() == good
    assert all(torch.equal(p, w) for p, w in zip(lm.parameters(), weights) if torch.isfinite(p).all())


def test_an_inactive_adapter_that_is_not_finite_is_not_saved_either(tmp_path):
    lm = FAMILIES["llama"].build()
    scales = seal_ops.attach(lm, "head")
    scales.add_adapter("other", "head")
    scales.inactive["other"][1][0].fill_(math.nan)
    with pytest.raises(ValueError, match="save_pretrained: every scale must be finite, got NaN or infinity in layer 0"):
        scales.save_pretrained(tmp_path / "x", selected_adapters=["other"])
