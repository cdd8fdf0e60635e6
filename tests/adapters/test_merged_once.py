"""Scales that are part of a model's weights already are not applied a second time, by whatever way they come."""

import json

import pytest
import torch
import transformers
from command_line import seal
from families import FAMILIES, logits, randomise, tokens

import seal_ops
from seal_ops.adapters.ia3 import export_ia3, import_ia3
from seal_ops.huggingface.identity import fingerprint

LLAMA, TWICE = FAMILIES["llama"], "must not be part of the model's weights already, .* would be applied twice"


def scales_for(model, folder, granularity="channel", seed=0):
    """Random scales on a model, saved."""
    scales = seal_ops.attach(model, granularity)
    randomise(scales, seed)
    scales.save_pretrained(folder)
    return scales


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def in_memory(base, scales, output):
    model = load(base)
    seal_ops.load(model, scales)
    seal_ops.merge(model).save_pretrained(output)


def saved_again(base, scales, output):
    """Merged, loaded, and saved by transformers alone."""
    in_memory(base, scales, output.with_name("first"))
    load(output.with_name("first")).save_pretrained(output)


@pytest.mark.parametrize("merge", [seal_ops.merge_checkpoint, in_memory, saved_again])
def test_a_merged_checkpoint_knows_its_scales(merge, tmp_path):
    base, scales, merged = tmp_path / "base", tmp_path / "scales", tmp_path / "merged"
    model = LLAMA.build(torch.bfloat16)
    model.save_pretrained(base)
    scales_for(model, scales)
    merge(base, scales, merged)
    again = load(merged)
    before = logits(again, tokens())
    with pytest.raises(ValueError, match=f"seal_ops.load: .*scales' {TWICE}"):
        seal_ops.load(again, scales)
    assert not hasattr(again, "seal_scales") and torch.equal(logits(again, tokens()), before)
    with pytest.raises(ValueError, match=f"seal_ops.merge: .*scales' {TWICE}"):
        seal_ops.merge_checkpoint(merged, scales, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    seal_ops.load(load(base), scales)  # the base still takes them


def test_the_same_model_after_its_merge(tmp_path):
    model = LLAMA.build()
    scales = scales_for(model, tmp_path, "head")
    seal_ops.merge(model)
    with pytest.raises(ValueError, match=TWICE):
        seal_ops.load(model, tmp_path)
    second = seal_ops.attach(model, "head")
    with pytest.raises(ValueError, match=TWICE):
        second.load_adapter(tmp_path, "again")
    with torch.no_grad():  # by hand
        for layer, value in scales.items():
            second.layers[str(layer)].scale.copy_(value)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"seal_ops.merge: the scales {TWICE}"):
        seal_ops.merge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    seal_ops.detach(model)
    del model.config.seal_ops_merged  # the way out that the message names
    seal_ops.load(model, tmp_path)


def test_a_second_adapter_of_a_merged_base(tmp_path):
    """Other scales train, load and merge on a merged model as on any; both are known afterwards."""
    model = LLAMA.build()
    scales_for(model, tmp_path / "first")
    seal_ops.merge(model)
    scales_for(model, tmp_path / "second", seed=1)
    seal_ops.merge(model).save_pretrained(tmp_path / "merged")
    assert len(json.loads((tmp_path / "merged" / "config.json").read_text())["seal_ops_merged"]) == 2
    for name in ("first", "second"):
        with pytest.raises(ValueError, match=TWICE):
            seal_ops.load(load(tmp_path / "merged"), tmp_path / name)
    scales_for(load(tmp_path / "merged"), tmp_path / "third", seed=2)
    seal_ops.load(load(tmp_path / "merged"), tmp_path / "third")


def test_an_interrupted_merge_counts(tmp_path, monkeypatch):
    """What is loaded on top of a half merged model would be applied twice in the merged half."""
    from seal_ops.adapters import merging

    model, calls = LLAMA.build(), []
    scales_for(model, tmp_path)
    expected, multiply = logits(model, tokens()), merging.merged

    def interrupted(weight, *args):
        calls.append(weight.shape[0] > 1)
        if sum(calls) == 2:  # not the checks, which look at one row
            raise KeyboardInterrupt
        return multiply(weight, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merging, "merged", interrupted)
        seal_ops.merge(model)
    assert torch.allclose(logits(model, tokens()), expected, atol=1e-5)
    with pytest.raises(ValueError, match=TWICE):
        seal_ops.load(model, tmp_path)
    seal_ops.merge(model)  # goes on
    assert torch.allclose(logits(model, tokens()), expected, atol=1e-5)


def test_heads_that_come_back_as_channels(peft, tmp_path):
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "head"))
    export_ia3(model, tmp_path)
    seal_ops.merge(model)
    with pytest.raises(ValueError, match=f"seal_ops.ia3.import_ia3: .* {TWICE}"):
        import_ia3(model, tmp_path)


def test_scales_of_one_leave_no_trace(tmp_path):
    model = LLAMA.build()
    model.save_pretrained(tmp_path / "base")
    scales = seal_ops.attach(model, "head")
    scales.save_pretrained(tmp_path / "ones")
    seal_ops.merge_checkpoint(tmp_path / "base", tmp_path / "ones", tmp_path / "merged")
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("base", "merged")]
    assert configs[0] == configs[1]
    seal_ops.load(seal_ops.merge(model), tmp_path / "ones")


def test_the_record_is_no_part_of_what_a_model_computes():
    model, other = LLAMA.build(), LLAMA.build()
    other.config.seal_ops_merged = ["0" * 32]
    assert fingerprint(model) == fingerprint(other)


def test_the_language_model_of_a_model_with_pictures(tmp_path):
    """A config that is read as its text part alone keeps the record."""
    from seal_ops.adapters import merge_record

    model = LLAMA.build()
    scales = scales_for(model, tmp_path)
    content = {"model_type": "pictures", "text_config": {"model_type": "llama"}}
    assert merge_record.record(content, scales.config, scales.values())
    part = transformers.LlamaConfig(**content["text_config"])
    assert merge_record.merged_into(part) == merge_record.merged_into(content) != []


@pytest.mark.parametrize("wrong", ["yes", [1], {"a": "b"}])
def test_a_record_that_is_none(wrong, tmp_path):
    model = LLAMA.build()
    scales_for(model, tmp_path)
    seal_ops.detach(model).config.seal_ops_merged = wrong
    with pytest.raises(ValueError, match="seal_ops_merged of the model's config must be a list of texts, got"):
        seal_ops.load(model, tmp_path)


def test_the_command_refuses_in_both_ways(capsys, tmp_path):
    model = load("models/seal-tiny")
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained("models/seal-tiny").save_pretrained(tmp_path / "base")
    scales_for(model, tmp_path / "scales")
    merge = ["merge", "--scales", tmp_path / "scales", "--model"]
    assert seal(capsys, *merge, tmp_path / "base", "--output", tmp_path / "merged")[0] == 0
    for more in ([], ["--in-memory"]):
        code, _, err = seal(capsys, *merge, tmp_path / "merged", "--output", tmp_path / "twice", *more)
        assert code == 1 and "would be applied twice" in err and not (tmp_path / "twice").exists()
