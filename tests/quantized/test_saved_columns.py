"""Weak columns in files and back, merged into 16 bits, and as a LoRA of PEFT's; scales folded into 4 bits."""

import copy
import json

import pytest
import torch
from exported_lora import read_by_peft
from families import FAMILIES, close, logits, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from toy_quantizer import ToyLinear, quantize

import seal_ops
from seal_ops.quantized import bases
from seal_ops.quantized.saving import CONFIG_FILE, WEIGHTS_FILE

LLAMA = FAMILIES["llama"]
MULTI_HEAD = {"num_key_value_heads": 4}


def trained(token_ids, scales=None, columns=4, **overrides):
    """A toy-quantised model, its 4-bit base, and its columns somewhere else than at their start."""
    model = LLAMA.build(**overrides)
    weights = quantize(model)
    base = copy.deepcopy(model)
    if scales:
        seal_ops.attach(model, scales)
    found = seal_ops.attach_weak_columns(model, columns, calibration=token_ids, original=weights)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model, base, found


def test_round_trip(token_ids, tmp_path):
    model, base, found = trained(token_ids)
    found.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    again = seal_ops.load_weak_columns(base, tmp_path)
    assert again.config == found.config and base.seal_weak_columns is again
    assert torch.equal(logits(base, tokens()), logits(model, tokens()))
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {f"{n}.column_delta" for n in found.layers}
    parameters = list(again.parameters())
    with torch.no_grad():
        for p in parameters:
            p.zero_()
    seal_ops.load_weak_columns(base, tmp_path)
    assert torch.equal(logits(base, tokens()), logits(model, tokens()))
    assert all(a is b for a, b in zip(parameters, again.parameters())), "an optimiser keeps them"
    seal_ops.detach_weak_columns(model)
    found.save_pretrained(tmp_path / "off")
    assert (tmp_path / "off" / WEIGHTS_FILE).read_bytes() == (tmp_path / WEIGHTS_FILE).read_bytes()


def test_another_base_is_refused(token_ids, tmp_path):
    _, base, found = trained(token_ids)
    found.save_pretrained(tmp_path)
    other = LLAMA.build()
    quantize(other, lambda linear: ToyLinear(linear, group=16))
    for model in (other, LLAMA.build()):
        with pytest.raises(ValueError, match="must be the base, in the same bits, .* another weight in model.layers.0"):
            seal_ops.load_weak_columns(model, tmp_path)
        assert not hasattr(model, "seal_weak_columns") and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="must be for model type 'mistral', got 'llama'"):
        seal_ops.load_weak_columns(FAMILIES["mistral"].build(), tmp_path)
    with pytest.raises(ValueError, match="must have 32 outputs and 64 inputs"):
        _resized(tmp_path)


def _resized(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.delta"] = tensors[f"{name}.delta"][:20].clone()
    save_file(tensors, folder / WEIGHTS_FILE)
    seal_ops.load_weak_columns(LLAMA.build(), folder)


UP = "model.layers.1.mlp.up_proj"
DAMAGED = {
    "no file": (lambda t, c: c.clear(), "must be weak columns of format 1"),
    "method": (lambda t, c: c.update(quantize="int2"), "must have quantize among"),
    "missing": (lambda t, c: t.pop(f"{UP}.delta"), rf"missing \['{UP}.delta'\]"),
    "unsorted": (lambda t, c: t.update({f"{UP}.index": torch.tensor([3, 1, 2, 9])}), "must be sorted"),
    "double": (lambda t, c: t.update({f"{UP}.index": torch.tensor([1, 1, 2, 9])}), "got 1 twice"),
    "number": (lambda t, c: c["number"].update({UP: 3}), "must have 3 columns, got"),
    "infinite": (lambda t, c: t[f"{UP}.delta"].fill_(float("nan")), "must be finite"),
    "beyond": (lambda t, c: t[f"{UP}.index"].copy_(torch.tensor([1, 2, 3, 64])), "columns up to 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(token_ids, tmp_path, case):
    _, base, found = trained(token_ids)
    found.save_pretrained(tmp_path)
    change, sentence = DAMAGED[case]
    tensors, content = load_file(tmp_path / WEIGHTS_FILE), json.loads((tmp_path / CONFIG_FILE).read_text())
    change(tensors, content)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^seal_ops.load_weak_columns: .*{sentence}"):
        seal_ops.load_weak_columns(base, tmp_path)
    assert not hasattr(base, "seal_weak_columns")
    with pytest.raises(FileNotFoundError, match="must hold weak_columns.json"):
        seal_ops.load_weak_columns(base, tmp_path / "elsewhere")


def test_loading_quantises_a_16_bit_model_likewise(bitsandbytes, token_ids, tmp_path):
    model = LLAMA.build()
    found = seal_ops.attach_weak_columns(model, 4, calibration=token_ids, quantize="nf4")
    with torch.no_grad():
        for p in found.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    found.save_pretrained(tmp_path)
    other = LLAMA.build()
    seal_ops.load_weak_columns(other, tmp_path)
    assert torch.equal(logits(other, tokens()), logits(model, tokens()))


def test_merged_into_16_bits(token_ids):
    model, _, found = trained(token_ids)
    expected = logits(model, tokens())
    seal_ops.merge_weak_columns(model)
    layers = [model.get_submodule(name) for name in found.layers]
    assert all(type(m) is nn.Linear for m in layers) and not hasattr(model, "seal_weak_columns")
    assert close(logits(model, tokens()), expected)


def test_a_merged_nf4_model_is_an_ordinary_checkpoint(bitsandbytes, token_ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = LLAMA.build()
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids, quantize="nf4-double", target_modules=["o_proj"])
    weights = {n: p.clone() for n, p in LLAMA.build().named_parameters()}
    expected = logits(model, tokens())
    seal_ops.merge_weak_columns(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert close(logits(loaded, tokens()), expected)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj.weight"])


def test_merging_on_a_16_bit_base_keeps_its_parameters(token_ids):
    model = LLAMA.build()
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    with torch.no_grad():
        for p in model.seal_weak_columns.parameters():
            p.normal_()
    weight, expected = model.model.layers[0].mlp.up_proj.weight, logits(model, tokens())
    seal_ops.merge_weak_columns(model)
    assert model.model.layers[0].mlp.up_proj.weight is weight and weight.requires_grad
    assert close(logits(model, tokens()), expected)


@pytest.mark.parametrize("share", ["layer", "mixed"])
def test_peft_reads_them_as_a_lora(token_ids, tmp_path, share):
    """The same logits on the same 4-bit base (NF4 where it is installed: PEFT knows no toy)."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    model = LLAMA.build()
    name = "model.layers.1.mlp.down_proj"
    columns = 4 if share == "layer" else {n: [1, 5] if n != name else [0, 2, 95] for n in _linear_names(model)}
    found = seal_ops.attach_weak_columns(model, columns, calibration=token_ids, quantize="nf4")
    read_by_peft(model, found, tmp_path)


def _linear_names(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


# ------------------------------------------------------------------------------------------------------------ folding


def nf4(token_ids, granularity, method="nf4", columns=False, **overrides):
    """A model in NF4 with scales somewhere."""
    model = LLAMA.build(hidden_size=128, head_dim=64, num_attention_heads=2, **overrides)
    if columns:
        seal_ops.attach_weak_columns(model, 4, calibration=token_ids, quantize=method)
    else:
        from seal_ops.quantized.attachment import find_targets
        from seal_ops.quantized.quantizers import quantize_layers

        quantize_layers(model, find_targets(model, None, "test"), method)
    scales = seal_ops.attach(model, granularity)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in scales.parameters():
            p.add_(torch.randn_like(p), alpha=0.4)
    return model, scales


@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("granularity, kv_heads", [("head", 1), ("head", 2), ("channel", 2)])
def test_scales_fold_into_group_scales(bitsandbytes, token_ids, method, columns, granularity, kv_heads, tmp_path):
    model, scales = nf4(token_ids, granularity, method, columns, num_key_value_heads=kv_heads)
    values, expected = scales.values(), logits(model, tokens())
    with seal_ops.disabled(model):
        without = logits(model, tokens())
    kinds = [type(m) for m in model.modules() if bases.is_nf4(m)]
    seal_ops.fold_scales(model)
    assert [type(m) for m in model.modules() if bases.is_nf4(m)] == kinds, "still in 4 bits"
    assert not hasattr(model, "seal_scales")
    assert close(logits(model, tokens()), expected) and not close(without, expected)
    assert all(torch.equal(v, values[n]) for n, v in scales.values().items()), "can still be saved"
    scales.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would be applied twice"):
        seal_ops.load(model, tmp_path)


def test_scales_that_do_not_fold(bitsandbytes, token_ids):
    model, scales = nf4(token_ids, "channel", num_key_value_heads=1)
    with pytest.raises(ValueError, match="2 query heads for 1 value heads, which share rows; dequantize=True writes"):
        seal_ops.fold_scales(model)
    assert model.seal_scales is scales
    expected = logits(model, tokens())
    seal_ops.fold_scales(model, dequantize=True)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear and close(logits(model, tokens()), expected)
    assert bases.is_nf4(model.model.layers[0].self_attn.v_proj)

    narrow = LLAMA.build(hidden_size=128, head_dim=32, num_attention_heads=4)
    seal_ops.attach_weak_columns(narrow, 4, calibration=token_ids, quantize="nf4")
    with torch.no_grad():
        for p in seal_ops.attach(narrow, "head").parameters():
            p.add_(torch.randn_like(p), alpha=0.4)
    with pytest.raises(ValueError, match="groups of 64 weights, which do not divide head_dim 32"):
        seal_ops.fold_scales(narrow)
    expected = logits(narrow, tokens())
    seal_ops.fold_scales(narrow, dequantize=True)
    assert close(logits(narrow, tokens()), expected) and "o_proj" in str(list(narrow.seal_weak_columns.layers))


def test_other_bases_are_refused(token_ids):
    model, _, _ = trained(token_ids, "head")
    with pytest.raises(ValueError, match="got .*ToyLinear, whose group scales are not known here"):
        seal_ops.fold_scales(model)
    seal_ops.detach(model)
    with pytest.raises(ValueError, match="must have scales attached"):
        seal_ops.fold_scales(model)
    behind_a_norm = FAMILIES["bitnet"].build()
    seal_ops.attach(behind_a_norm, "head")
    with pytest.raises(ValueError, match="must read the attention output directly"):
        seal_ops.fold_scales(behind_a_norm, dequantize=True)


def test_a_norm_between_v_proj_and_attention_is_noticed(bitsandbytes, token_ids):
    model, _ = nf4(token_ids, "channel", num_key_value_heads=2)
    plain = model.model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda m, a, out: out / out.norm(dim=-1, keepdim=True)
    )
    with pytest.raises(ValueError, match="where v_proj's channels are not those of the attention output"):
        seal_ops.fold_scales(model)
    plain.remove()


def test_hqq_folds(token_ids):
    pytest.importorskip("hqq")
    model, _ = nf4(token_ids, "head", "hqq", True, num_key_value_heads=1)
    expected = logits(model, tokens())
    seal_ops.fold_scales(model)
    assert close(logits(model, tokens()), expected)
