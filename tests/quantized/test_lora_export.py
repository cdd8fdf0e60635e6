"""Weak columns as a LoRA that PEFT loads: the same logits on models of every build that a layer may have."""

import pytest
from exported_lora import read_by_peft
from families import FAMILIES
from transformers import GPT2Config, GPT2LMHeadModel

import seal_ops
from seal_ops.quantized.attachment import find_targets

peft = pytest.importorskip("peft")


BUILDS = {
    "grouped queries": lambda: FAMILIES["llama"].build(),
    "one value head": lambda: FAMILIES["llama-mqa-head_dim-32"].build(),
    "fused qkv": lambda: FAMILIES["phi3"].build(),
    "biases": lambda: FAMILIES["qwen2"].build(),
    "tied embeddings": lambda: FAMILIES["llama"].build(tie_word_embeddings=True),
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("method", ["nf4", "16 bits"])
def test_the_same_logits(token_ids, tmp_path, build, method):
    model = BUILDS[build]()
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    found = seal_ops.attach_weak_columns(
        model, 4, calibration=token_ids, quantize="nf4" if method == "nf4" else None
    )  # fmt: skip
    loaded = read_by_peft(model, found, tmp_path)
    assert len([n for n, _ in loaded.named_parameters() if "lora_A" in n]) == len(found.layers)
    if build == "tied embeddings":
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_every_linear_layer_of_a_fused_model_is_found():
    names = {name.rpartition(".")[2] for name in find_targets(FAMILIES["phi3"].build(), None, "test")}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_transposed_weights_are_refused(token_ids):
    """GPT-2 keeps its weights [in, out], in a class of transformers' own."""
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=97, n_positions=128)
    with pytest.raises(ValueError, match="must have linear layers .* got GPT2LMHeadModel without"):
        seal_ops.attach_weak_columns(GPT2LMHeadModel(config), 4, calibration=token_ids)
