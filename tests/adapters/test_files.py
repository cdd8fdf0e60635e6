"""The files of an adapter: damaged ones, those of other models, and saves that fail or are killed."""
import json
import os

import pytest
import safetensors.torch
import torch
from attached import assert_untouched
from families import FAMILIES

import seal_ops
from seal_ops.adapters.files import CONFIG_FILE, WEIGHTS_FILE

LLAMA = FAMILIES["llama"]


def test_config_file(saved):
    content = json.loads((saved / CONFIG_FILE).read_text())
    assert content["peft_type"] == "SEAL" and content["granularity"] == "channel" and content["model_type"] == "llama"
    assert (content["layers"], content["num_heads"], content["head_dim"]) == ([0, 1], [4, 4], [16, 16])


def edit(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tamper(folder, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)


FIRST = "layers.0.scale"


@pytest.mark.parametrize("damage, error, message", [
    (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, "save_directory must hold adapter_config.json"),
    (lambda f: (f / WEIGHTS_FILE).unlink(), FileNotFoundError, "save_directory must hold adapter_model.safetensors"),
    (lambda f: (f / CONFIG_FILE).write_text("{"), ValueError, "must be JSON"),
    (lambda f: (f / CONFIG_FILE).write_text("[]"), ValueError, "must be a JSON object, got list"),
    (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\x80\x04pickle"), ValueError, "must be a safetensors file"),
    (lambda f: os.truncate(f / WEIGHTS_FILE, 200), ValueError, "must be a safetensors file"),
    (lambda f: edit(f, peft_type="LORA"), ValueError, "must have peft_type 'SEAL', got 'LORA'"),
    (lambda f: edit(f, format_version=3), ValueError, "must have format_version 1 to 2, got 3"),
    (lambda f: edit(f, granularity="layer"), ValueError, "must have granularity 'head' or 'channel', got 'layer'"),
    (lambda f: edit(f, layers=[0]), ValueError, "layers, num_heads and head_dim of one length, got 1, 2, 2"),
    (lambda f: edit(f, layers=[0, -1]), ValueError, r"layers as a list of integers of at least 0, got \[0, -1\]"),
    (lambda f: edit(f, layers=[0, 0]), ValueError, r"every layer once in layers, got \[0, 0\]"),
    (lambda f: edit(f, head_dim=[16, "16"]), ValueError, "head_dim as a list of integers of at least 1, got"),
    (lambda f: edit(f, granularity="head"), ValueError, r"layers.0.scale must be float32 of shape \[4\], got .*\[4, 16\]"),
    (lambda f: edit(f, model_type="mistral"), ValueError, "adapter for model type 'llama', got one for 'mistral'"),
    (lambda f: tamper(f, lambda t: t.pop(FIRST)), ValueError, r"got missing \['layers.0.scale'\] and unexpected \[\]"),
    (lambda f: tamper(f, lambda t: t.update(x=torch.ones(1))), ValueError, r"unexpected \['x'\]"),
    (lambda f: tamper(f, lambda t: t.update({FIRST: torch.ones(4, 15)})), ValueError, r"of shape \[4, 16\], got .*\[4, 15\]"),
    (lambda f: tamper(f, lambda t: t.update({FIRST: torch.ones(4, 16).bfloat16()})), ValueError, "float32 .*, got torch.bfloat16"),
    (lambda f: tamper(f, lambda t: t[FIRST].fill_(float("nan"))), ValueError, "must be finite, got NaN or infinity"),
])
def test_damaged_adapters(saved, damage, error, message):
    damage(saved)
    model = LLAMA.build()
    with pytest.raises(error, match=message) as caught:
        seal_ops.load(model, saved)
    assert str(caught.value).startswith("seal_ops.load: ") and "\n" not in str(caught.value)
    assert_untouched(model)


@pytest.mark.parametrize("family, overrides, message", [
    ("llama", dict(num_hidden_layers=1), r"must be an adapter for the 1 attention layers \[0\], got one with layer 1"),
    ("llama", dict(num_attention_heads=8, head_dim=16), "8 heads of 16 channels in layer 0, got one for 4 heads of 16"),
    ("llama", dict(head_dim=8), "4 heads of 8 channels in layer 0, got one for 4 heads of 16"),
    ("mistral", {}, "must be an adapter for model type 'mistral', got one for 'llama'"),
])
def test_adapter_for_another_model(saved, family, overrides, message):
    model = FAMILIES[family].build(**overrides)
    with pytest.raises(ValueError, match=message):
        seal_ops.load(model, saved)
    assert_untouched(model)


def test_unwritable_path(tmp_path):
    scales = seal_ops.attach(LLAMA.build())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="seal_ops.Scales.save_pretrained: save_directory must be a writable folder, got .*file/adapter"):
        scales.save_pretrained(tmp_path / "file" / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failing_save_keeps_the_old_files(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    scales = seal_ops.attach(LLAMA.build(), "channel")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left on device"):
        scales.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
