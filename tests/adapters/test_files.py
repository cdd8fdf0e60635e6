"""The files of an adapter: damaged ones, those of other models, and saves that fail or are killed."""

import json
import os
import shutil

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


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, "save_directory must hold adapter_config.json"),
        (
            lambda f: (f / WEIGHTS_FILE).unlink(),
            FileNotFoundError,
            "save_directory must hold adapter_model.safetensors",
        ),
        (lambda f: (f / CONFIG_FILE).write_text("{"), ValueError, "must be JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), ValueError, "must be a JSON object, got list"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\x80\x04pickle"), ValueError, "must be a safetensors file"),
        (lambda f: os.truncate(f / WEIGHTS_FILE, 200), ValueError, "must be a safetensors file"),
        (lambda f: edit(f, peft_type="LORA"), ValueError, "must have peft_type 'SEAL', got 'LORA'"),
        (lambda f: edit(f, format_version=3), ValueError, "must have format_version 1 to 2, got 3"),
        (lambda f: edit(f, granularity="layer"), ValueError, "must have granularity 'head' or 'channel', got 'layer'"),
        (lambda f: edit(f, layers=[0]), ValueError, "layers, num_heads and head_dim of one length, got 1, 2, 2"),
        (lambda f: edit(f, layers=[0, -1]), ValueError, r"layers as a list of integers of at least 0, got \[0, -1\]"),
        (
            lambda f: edit(f, layers=[False, True]),
            ValueError,
            r"layers as a list of integers of at least 0, got \[False, True\]",
        ),
        (lambda f: edit(f, layers=[0, 0]), ValueError, r"every layer once in layers, got \[0, 0\]"),
        (lambda f: edit(f, head_dim=[16, "16"]), ValueError, "head_dim as a list of integers of at least 1, got"),
        (
            lambda f: edit(f, granularity="head"),
            ValueError,
            r"layers.0.scale must be float32 of shape \[4\], got .*\[4, 16\]",
        ),
        (lambda f: edit(f, model_type="mistral"), ValueError, "adapter for model type 'llama', got one for 'mistral'"),
        (
            lambda f: tamper(f, lambda t: t.pop(FIRST)),
            ValueError,
            r"got missing \['layers.0.scale'\] and unexpected \[\]",
        ),
        (lambda f: tamper(f, lambda t: t.update(x=torch.ones(1))), ValueError, r"unexpected \['x'\]"),
        (
            lambda f: tamper(f, lambda t: t.update({FIRST: torch.ones(4, 15)})),
            ValueError,
            r"of shape \[4, 16\], got .*\[4, 15\]",
        ),
        (
            lambda f: tamper(f, lambda t: t.update({FIRST: torch.ones(4, 16).bfloat16()})),
            ValueError,
            "float32 .*, got torch.bfloat16",
        ),
        (
            lambda f: tamper(f, lambda t: t[FIRST].fill_(float("nan"))),
            ValueError,
            "must be finite, got NaN or infinity",
        ),
    ],
)
def test_damaged_adapters(saved, damage, error, message):
    damage(saved)
    model = LLAMA.build()
    with pytest.raises(error, match=message) as caught:
        seal_ops.load(model, saved)
    assert str(caught.value).startswith("seal_ops.load: ") and "\n" not in str(caught.value)
    assert_untouched(model)


@pytest.mark.parametrize(
    "family, overrides, message",
    [
        (
            "llama",
            dict(num_hidden_layers=1),
            r"must be an adapter for the 1 attention layers \[0\], got one with layer 1",
        ),
        (
            "llama",
            dict(num_attention_heads=8, head_dim=16),
            "8 heads of 16 channels in layer 0, got one for 4 heads of 16",
        ),
        ("llama", dict(head_dim=8), "4 heads of 8 channels in layer 0, got one for 4 heads of 16"),
        ("mistral", {}, "must be an adapter for model type 'mistral', got one for 'llama'"),
    ],
)
def test_adapter_for_another_model(saved, family, overrides, message):
    model = FAMILIES[family].build(**overrides)
    with pytest.raises(ValueError, match=message):
        seal_ops.load(model, saved)
    assert_untouched(model)


def test_unwritable_path(tmp_path):
    scales = seal_ops.attach(LLAMA.build())
    (tmp_path / "file").write_text("in the way")
    message = "seal_ops.Scales.save_pretrained: save_directory must be a writable folder, got .*file/adapter"
    with pytest.raises(OSError, match=message):
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


# -- every field, every kind of wrong value --------------------------------------------------------------------------

FIELDS = (
    "peft_type",
    "format_version",
    "seal_ops_version",
    "granularity",
    "layers",
    "num_heads",
    "head_dim",
    "model_type",
    "base_model_name_or_path",
)
MISSING = object()
NESTED = "[" * 100_000
VALUES = {
    "missing": MISSING,
    "null": None,
    "true": True,
    "false": False,
    "text": "x",
    "empty text": "",
    "number": 1.5,
    "integer": 7,
    "nan": float("nan"),
    "infinity": float("inf"),
    "huge": 10**30,
    "negative": -1,
    "list": [],
    "object": {},
    "list of one": [0],
    "of text": ["0", "1"],
    "of bools": [False, True],
    "of floats": [0.0, 1.0],
    "of nan": [float("nan")] * 2,
    "of null": [None] * 2,
    "negatives": [-1, 0],
    "twice": [0, 0],
    "huge layer": [0, 10**30],
    "huge numbers": [10**30] * 2,
    "zeros": [0, 0],
    "lists": [[0], [1]],
    "long": list(range(5000)),
    "long text": "y" * 100_000,
}
# What a field may well hold; the rest is refused.
ALLOWED = {
    ("seal_ops_version", "text"),
    ("seal_ops_version", "empty text"),
    ("seal_ops_version", "long text"),
    ("base_model_name_or_path", "null"),
    ("base_model_name_or_path", "text"),
    ("base_model_name_or_path", "empty text"),
    ("base_model_name_or_path", "long text"),
    ("model_type", "null"),
    ("model_type", "empty text"),
}


def refused(model, folder):
    """Whether `load` refuses in one short sentence, with the model left as it was."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        seal_ops.load(model, folder)
    text = str(caught.value)
    assert text.startswith("seal_ops.load: ") and "\n" not in text and len(text) < 700, text
    assert_untouched(model)


@pytest.fixture(scope="module")
def untouched_model():
    return LLAMA.build()


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_with_a_wrong_value(saved, untouched_model, field, kind):
    content = json.loads((saved / CONFIG_FILE).read_text())
    if VALUES[kind] is MISSING:
        del content[field]
    else:
        content[field] = VALUES[kind]
    (saved / CONFIG_FILE).write_text(json.dumps(content))
    if (field, kind) in ALLOWED:
        seal_ops.load(untouched_model, saved)
        seal_ops.detach(untouched_model)
    else:
        refused(untouched_model, saved)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "text",
    [
        NESTED,
        '{"a": ' * 100_000,
        "9" * 5000,
        "1e999999",
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\xff\xfe",
        "'x'",
        "//",
        "",
    ],
    ids=lambda text: repr(text)[:12],
)
def test_every_field_with_what_is_no_json(saved, untouched_model, field, text):
    content = json.loads((saved / CONFIG_FILE).read_text())
    content[field] = "HERE"
    raw = json.dumps(content).encode().replace(b'"HERE"', text if isinstance(text, bytes) else text.encode())
    (saved / CONFIG_FILE).write_bytes(raw)
    refused(untouched_model, saved)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_twice(saved, untouched_model, field):
    text = (saved / CONFIG_FILE).read_text()
    value = json.dumps(json.loads(text)[field])
    (saved / CONFIG_FILE).write_text(text.replace("{", "{" + f'"{field}": {value}, ', 1))
    refused(untouched_model, saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, n: t.pop(n),
        lambda t, n: t.update({n: t[n].half()}),
        lambda t, n: t.update({n: t[n].double()}),
        lambda t, n: t.update({n: t[n].int()}),
        lambda t, n: t.update({n: t[n] > 0}),
        lambda t, n: t.update({n: t[n].T.contiguous()}),
        lambda t, n: t.update({n: t[n][:, 0].contiguous()}),
        lambda t, n: t.update({n: t[n][None]}),
        lambda t, n: t.update({n: torch.zeros(0)}),
        lambda t, n: t.update({n: torch.tensor(1.0)}),
        lambda t, n: t[n].view(-1)[-1:].fill_(float("inf")),
        lambda t, n: t[n].view(-1)[3:4].fill_(float("nan")),
        lambda t, n: t.update({n + "x": t.pop(n)}),
        lambda t, n: t.update({"layers.7.scale": t[n].clone()}),
    ],
)
@pytest.mark.parametrize("name", ["layers.0.scale", "layers.1.scale"])
def test_every_tensor_with_a_wrong_value(saved, untouched_model, name, change):
    tamper(saved, lambda tensors: change(tensors, name))
    refused(untouched_model, saved)


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 50, 200, -1])
def test_every_cut_of_the_weights(saved, untouched_model, part):
    path = saved / WEIGHTS_FILE
    os.truncate(path, part % path.stat().st_size)
    refused(untouched_model, saved)


def test_a_folder_in_the_place_of_a_file(saved, untouched_model):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (saved / name).rename(saved / "kept")
        (saved / name).mkdir()
        refused(untouched_model, saved)
        (saved / name).rmdir()
        (saved / "kept").rename(saved / name)
    seal_ops.load(untouched_model, saved)
    seal_ops.detach(untouched_model)


# -- saves that are killed -------------------------------------------------------------------------------------------


def killed_after(number, function):
    """Runs ``function`` in a child that dies, without clean-up, at its ``number``-th step on disk; False if it ends."""
    child = os.fork()
    if child == 0:
        import builtins
        import tempfile

        left = [number]

        def dying(real):
            def step(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return real(*args, **kwargs)

            return step

        builtins.open, tempfile.mkdtemp = dying(open), dying(tempfile.mkdtemp)
        os.replace, os.chmod, os.unlink, os.makedirs = map(dying, (os.replace, os.chmod, os.unlink, os.makedirs))
        real_save = safetensors.torch.save_file

        def half(tensors, path, **options):  # dies with half a file on disk, too
            real_save(tensors, path, **options)
            left[0] -= 1
            if left[0] == 0:
                os.truncate(path, 40)
                os._exit(9)

        safetensors.torch.save_file = half
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_a_killed_save_leaves_the_old_adapter_or_the_new(saved, granularity):
    """At each step on disk, onto an adapter of the same and of another granularity."""
    scales = seal_ops.attach(LLAMA.build(), granularity)
    old = seal_ops.load(LLAMA.build(), saved).values()
    kept = {p.name: p.read_bytes() for p in saved.iterdir()}
    seen, number = set(), 1
    while killed_after(number, lambda: scales.save_pretrained(saved)):
        found = seal_ops.load(LLAMA.build(), saved).values()
        which = [all(torch.equal(found[n], v[n]) for n in found) for v in (old, scales.values())]
        assert which.count(True) == 1, f"neither old nor new after step {number}"
        seen.add("new" if which[1] else "old")
        for p in saved.iterdir():
            shutil.rmtree(p) if p.is_dir() else p.unlink()
        for name, data in kept.items():
            (saved / name).write_bytes(data)
        number += 1
    assert seen == {"old", "new"} and number > 10
    assert all(
        torch.equal(a, b)
        for a, b in zip(seal_ops.load(LLAMA.build(), saved).values().values(), scales.values().values())
    )
