"""Merging in the files of a checkpoint: the same weights as in memory, every other byte as it was, or nothing."""

import contextlib
import json
import os
import struct

import pytest
import safetensors.torch
import torch
import transformers
from command_line import seal
from families import FAMILIES, logits, randomise, tokens

import seal_ops
from seal_ops.adapters import checkpoint_merging
from seal_ops.huggingface.loading import shipped

GPT2 = dict(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
CASES = {  # name -> (model, largest shard)
    "llama": (lambda: FAMILIES["llama"].build(torch.bfloat16), "40KB"),
    "llama-tied-fp32": (lambda: FAMILIES["llama"].build(tie_word_embeddings=True), "50GB"),
    "phi3": (lambda: FAMILIES["phi3"].build(torch.float16), "60KB"),
    "gemma3": (lambda: FAMILIES["gemma3"].build(torch.bfloat16), "50GB"),
    "mixtral": (lambda: FAMILIES["mixtral"].build(torch.bfloat16), "50GB"),
    "qwen3_next": (lambda: FAMILIES["qwen3_next"].build(torch.bfloat16), "50GB"),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval(), "100KB"),
}


def saved(tmp_path, build, granularity="channel", shard="50GB"):
    """The folders of a checkpoint and of scales for it."""
    model = build()
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    scales = seal_ops.attach(model, granularity)
    randomise(scales)
    scales.save_pretrained(tmp_path / "scales")
    return tmp_path / "model", tmp_path / "scales"


def read(folder):
    """Every tensor in the files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def in_memory(folder, scales):
    model = load(folder)
    seal_ops.load(model, scales)
    return seal_ops.merge(model)


@pytest.mark.filterwarnings("ignore:seal_ops.attach")
@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_in_memory(name, granularity, tmp_path):
    build, shard = CASES[name]
    folder, scales = saved(tmp_path, build, granularity, shard)
    found = seal_ops.merge_checkpoint(folder, scales, tmp_path / "merged")
    assert len(found.shards) == len(list(folder.glob("*.safetensors"))) and (len(found.shards) > 1) == (shard != "50GB")
    expected, got = in_memory(folder, scales), load(tmp_path / "merged")
    for (name, a), (other, b) in zip(expected.state_dict().items(), got.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(logits(got, tokens()), logits(expected, tokens()))
    before, after = read(folder), read(tmp_path / "merged")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == set(found.merged) and len(changed) == len(json.loads((scales / "adapter_config.json").read_text())["layers"])  # noqa: E501  # fmt: skip


def config_without_record(folder):
    """The content of a merged model's config without the field that says so."""
    content = json.loads((folder / "config.json").read_text())
    assert len(content.pop("seal_ops_merged")) == 1
    return content


def header(path):
    """The bytes before the tensors, and the header in them."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return file.read(length)


def test_the_layout_of_the_files_is_the_original_ones(tmp_path):
    """What vLLM's loader and llama.cpp's converter read: names, order, shapes, dtypes, config and tokenizer."""
    folder = tmp_path / "model"
    model = load(shipped("models/seal-tiny"))
    model.save_pretrained(folder, max_shard_size="2MB")
    for name in os.listdir(shipped("models/seal-tiny")):
        if not name.endswith(".safetensors"):
            with open(os.path.join(shipped("models/seal-tiny"), name), "rb") as file:
                (folder / name).write_bytes(file.read())
    (folder / "assets").mkdir()
    (folder / "assets" / "picture.txt").write_text("a file in a folder")
    (folder / "pytorch_model.bin").write_bytes(b"unmerged weights in another format")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"unmerged weights")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hub").write_text("a client's")
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    model.save_pretrained(tmp_path / "both")  # with seal_scales in it
    os.rename(tmp_path / "both" / "seal_scales", folder / "seal_scales")

    found = seal_ops.merge_checkpoint(folder, folder, tmp_path / "merged")
    merged = tmp_path / "merged"
    assert set(found.left_behind) == {"pytorch_model.bin", os.path.join("original", "consolidated.00.pth")}
    names = {str(p.relative_to(merged)) for p in merged.rglob("*") if p.is_file()}
    before = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    gone = {n for n in before if n.startswith(("seal_scales", ".cache"))} | set(found.left_behind)
    assert names == before - gone and len(gone) == 6
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} < names
    for name in names:
        if name.endswith(".safetensors"):
            assert header(merged / name) == header(folder / name)
            assert os.path.getsize(merged / name) == os.path.getsize(folder / name)
        else:
            assert name == "config.json" or (merged / name).read_bytes() == (folder / name).read_bytes()
    assert config_without_record(merged) == json.loads((folder / "config.json").read_text())
    assert len(found.merged) == len(list(scales.items())) and all(n.endswith("self_attn.o_proj.weight") for n in found.merged)  # noqa: E501  # fmt: skip


def test_saving_in_memory_keeps_names_shapes_and_dtypes(tmp_path):
    folder, scales = saved(tmp_path, lambda: FAMILIES["llama"].build(torch.bfloat16))
    in_memory(folder, scales).save_pretrained(tmp_path / "merged")
    before, after = read(folder), read(tmp_path / "merged")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert config_without_record(tmp_path / "merged") == json.loads((folder / "config.json").read_text())


@contextlib.contextmanager
def growth():
    """A list that gets by how many bytes the process's memory grew at most inside."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system tells no peak of resident memory")

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    found = []
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    yield found
    found.append(status("VmHWM") - before)


def test_no_more_than_a_shard_is_in_memory(tmp_path):
    """48 layers of 2 MB in twelve shards; by `seal_ops.merge` the whole of them would be."""
    sizes = dict(num_hidden_layers=48, hidden_size=256, intermediate_size=1024, head_dim=64, vocab_size=997)
    folder, scales = saved(tmp_path, lambda: FAMILIES["llama"].build(torch.bfloat16, **sizes), shard="8MB")
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    seal_ops.merge_checkpoint(folder, scales, tmp_path / "first")  # imports, and pools of the allocator
    with growth() as small:
        seal_ops.merge_checkpoint(folder, scales, tmp_path / "merged")
    assert len(shards) >= 10 and small[0] <= max(shards), (small, shards)
    with growth() as whole:
        in_memory(folder, scales)
    assert whole[0] > 0.5 * sum(shards), "the measure would see a model in memory"


def test_nothing_has_the_outputs_name_before_all_is_written(tmp_path, monkeypatch):
    folder, scales = saved(tmp_path, lambda: FAMILIES["llama"].build(num_hidden_layers=3), shard="100KB")
    output, real, calls = tmp_path / "merged", checkpoint_merging._multiply, []

    def interrupted(*arguments):
        assert not output.exists()
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(checkpoint_merging, "_multiply", interrupted)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        seal_ops.merge_checkpoint(folder, scales, output)
    assert sorted(os.listdir(tmp_path)) == ["model", "scales"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    seal_ops.merge_checkpoint(folder, scales, output)
    with pytest.raises(FileExistsError, match="output folder must be new or empty"):
        seal_ops.merge_checkpoint(folder, scales, output)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def quantised(folder, scales):
    edit(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}))


def fp8(folder, scales):
    values = read(folder)
    name = "model.layers.0.self_attn.o_proj.weight"
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    values[name] = values[name].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(folder, scales):
    values = {n.replace("o_proj", "out"): t for n, t in read(folder).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    safetensors.torch.save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def shard_missing(folder, scales):
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def index_wrong(folder, scales):
    def swap(content):
        content["weight_map"]["lm_head.weight"] = "model-00001-of-" + content["weight_map"]["lm_head.weight"][-17:]

    edit(folder / "model.safetensors.index.json", swap)


def index_outside(folder, scales):
    edit(folder / "model.safetensors.index.json", lambda c: c["weight_map"].update({"lm_head.weight": "../a.safetensors"}))  # noqa: E501  # fmt: skip


def damaged(folder, scales):
    path = next(folder.glob("model-00002-of-*.safetensors"))
    os.truncate(path, path.stat().st_size // 2)


def other_model(folder, scales):
    edit(scales / "adapter_config.json", lambda c: c.update(model_type="qwen2"))


def no_weights(folder, scales):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def overflow(folder, scales):
    values = safetensors.torch.load_file(scales / "adapter_model.safetensors")
    values["layers.1.scale"].fill_(1e6)
    safetensors.torch.save_file(values, scales / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (quantised, "model must be in 16 or more bits, got the quantised .* \\('awq'\\)"),
        (fp8, "layers.0.self_attn.o_proj.weight must be in 16 or more bits of shape \\[64, 64\\], got F8_E4M3"),
        (renamed, "files with the names of its parameters, got none called model.layers.0.self_attn.o_proj.weight"),
        (shard_missing, "model must hold model-00002-of-.*, which its index names"),
        (index_wrong, "must name the shard of every tensor, got it wrong for \\['lm_head.weight'\\]"),
        (index_outside, "must have a weight_map of file names"),
        (damaged, "must be a safetensors file"),
        (other_model, "must be an adapter for model type 'llama', got one for 'qwen2'"),
        (no_weights, "model must be a folder with config.json and model.safetensors"),
        (overflow, "layers.1.self_attn.o_proj.weight must stay finite in torch.float16, got scales that overflow it"),
    ],
)
def test_what_is_refused_writes_nothing(change, message, tmp_path):
    folder, scales = saved(tmp_path, lambda: FAMILIES["llama"].build(torch.float16), shard="30KB")
    change(folder, scales)
    with pytest.raises((ValueError, FileNotFoundError), match="seal_ops.merge: .*" + message):
        seal_ops.merge_checkpoint(folder, scales, tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == ["model", "scales"]


def test_a_step_before_the_projection_is_refused(tmp_path):
    folder, scales = saved(tmp_path, FAMILIES["bitnet"].build)
    with pytest.raises(ValueError, match="must read the attention output directly"):
        seal_ops.merge_checkpoint(folder, scales, tmp_path / "merged")


def test_an_output_inside_the_model_is_refused(tmp_path):
    folder, scales = saved(tmp_path, FAMILIES["llama"].build)
    with pytest.raises(ValueError, match="output must lie outside the model's folder"):
        seal_ops.merge_checkpoint(folder, scales, folder / "merged")


def test_the_command_merges_files_unless_it_is_told_otherwise(capsys, tmp_path):
    folder, scales = saved(tmp_path, lambda: FAMILIES["llama"].build(torch.bfloat16))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which the model in memory is saved with
        with open(os.path.join(shipped("models/seal-tiny"), name), "rb") as file:
            (folder / name).write_bytes(file.read())
    merge = ["merge", "--model", folder, "--scales", scales, "--output"]
    code, out, err = seal(capsys, *merge, tmp_path / "files")
    assert code == 0 and out == f"merged checkpoint in {tmp_path / 'files'}: 2 weights, shards: 1\n", err
    code, out, err = seal(capsys, *merge, tmp_path / "memory", "--in-memory")
    assert code == 0 and "bfloat16" in out, err
    code, out, err = seal(capsys, *merge, tmp_path / "wide", "--dtype", "float32")
    assert code == 0 and "float32" in out, err
    files, memory = read(tmp_path / "files"), read(tmp_path / "memory")
    assert files.keys() == memory.keys() and all(torch.equal(files[n], memory[n]) for n in files)
    code, _, err = seal(capsys, *merge, tmp_path / "files")
    assert code == 1 and "output folder must be new or empty" in err
