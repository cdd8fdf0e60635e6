"""Models by folder, hub name and GGUF file: precision, quantisation, and one sentence where there is nothing."""

import types

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens
from retrieval_fixtures import tokenizer

import seal_ops
from seal_ops.huggingface.loading import load_model, load_tokenizer

LLAMA = FAMILIES["llama"]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in fp16."""
    LLAMA.build(torch.float16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "dtype, expected", [("auto", torch.float16), ("default", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_precision(folder, dtype, expected):
    model, _ = load_model(str(folder), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {expected} and not model.training


def test_merging_keeps_the_checkpoints_precision(folder, tmp_path):
    from seal_ops.cli.main import main

    model, _ = load_model(str(folder), dtype="auto", device="cpu")
    randomise(seal_ops.attach(model, "channel"))
    model.seal_scales.save_pretrained(tmp_path / "scales")
    expected = logits(model, tokens())
    assert not main(
        [
            "merge",
            "--model",
            str(folder),
            "--scales",
            str(tmp_path / "scales"),
            "--output",
            str(tmp_path / "merged"),
            "--device",
            "cpu",
        ]
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert merged.dtype == torch.float16
    assert (logits(merged, tokens()) - expected).abs().max() < 0.02 * expected.abs().max()
    size = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (folder, tmp_path / "merged")]
    assert abs(size[0] - size[1]) < 1000


def test_a_device_map(folder):
    pytest.importorskip("accelerate")
    model, _ = load_model(str(folder), device_map="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    seal_ops.attach(model)
    logits(model, tokens())
    with pytest.raises(OSError, match="^seal_ops.load_model: .* could not be loaded: .*nowhere"):
        load_model(str(folder), device_map="nowhere")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised(folder, quantization):
    """Scales serve and learn on a quantised base; they are not merged into it."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    try:
        model, _ = load_model(str(folder), device="cpu", quantization=quantization)
        own = logits(model, tokens())
    except (NotImplementedError, RuntimeError, OSError) as error:
        pytest.skip(f"this bitsandbytes does not compute on the CPU: {error}")
    scales = seal_ops.attach(model, "channel")
    assert close(logits(model, tokens()), own)
    randomise(scales)
    assert not close(logits(model, tokens()), own)
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in scales.parameters())
    with pytest.raises(ValueError, match="seal_ops.merge: .*o_proj must be a plain torch.nn.Linear"):
        seal_ops.merge(model)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            dict(dtype="float8"),
            ValueError,
            "dtype must be one of default, auto, float32, bfloat16, float16, got 'float8'",
        ),
        (dict(device="gpu"), ValueError, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (dict(device="cpu", device_map="auto"), ValueError, "device must be left out where device_map is given"),
        (dict(quantization="2bit"), ValueError, "quantization must be one of 4bit, 8bit, got '2bit'"),
    ],
)
def test_bad_arguments(folder, options, error, message):
    with pytest.raises(error, match="^seal_ops.load_model: " + message):
        load_model(str(folder), **options)


@pytest.mark.parametrize(
    "name, error, message",
    [
        (
            "/no/such/folder",
            FileNotFoundError,
            "must be a folder, a name on the hub or a .gguf file, got /no/such/folder",
        ),
        ("./nothing.gguf", FileNotFoundError, "got ./nothing.gguf, which does not exist"),
        (
            "nobody/nothing",
            OSError,
            "nobody/nothing could not be loaded: there is no such folder, it is not in the cache, "
            "and the Hugging Face hub could not be reached",
        ),
        ("{tmp}", OSError, "could not be loaded: "),
    ],
)
def test_nothing_there(tmp_path, name, error, message):
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    with pytest.raises(error, match="^seal_ops.load_model: .*" + message) as caught:
        load_model(name.replace("{tmp}", str(tmp_path)), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(folder, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="quantization needs the package bitsandbytes, which is not installed"):
        load_model(str(folder), device="cpu", quantization="4bit")


# -- GGUF ------------------------------------------------------------------------------------------------------------

_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def whole(tmp_path):
    """A Llama as GGUF in one file, the model it is of, and its parts."""
    gguf = pytest.importorskip("gguf")
    model = LLAMA.build(tie_word_embeddings=False, num_key_value_heads=4)
    config = model.config
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output.weight": model.lm_head.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for n, layer in enumerate(model.model.layers):
        for ours, theirs in _GGUF.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):  # the format keeps rotary pairs beside each other
                weight = weight.reshape(4, 2, 8, -1).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{n}.{theirs}.weight"] = weight

    def write(path, chosen, metadata, part=None):
        writer = gguf.GGUFWriter(path, "llama")
        if metadata:
            writer.add_block_count(2)
            writer.add_context_length(config.max_position_embeddings)
            writer.add_embedding_length(64)
            writer.add_feed_forward_length(96)
            writer.add_head_count(4)
            writer.add_head_count_kv(4)
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
            writer.add_rope_freq_base(10000.0)
            writer.add_vocab_size(97)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["t", "1", "t1", "t1t", *(f"word{n}" for n in range(93))])
            writer.add_token_types([1] * 97)
            writer.add_token_merges(["t 1", "t1 t"])  # transformers 5.17 reads a list of one as text
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
        if part is not None:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", len(tensors))
        for name in chosen:
            writer.add_tensor(name, tensors[name].detach().float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    names = list(tensors)
    write(tmp_path / "it.gguf", names, True)
    write(tmp_path / "it-00001-of-00002.gguf", names[:9], True, 0)
    write(tmp_path / "it-00002-of-00002.gguf", names[9:], False, 1)
    return types.SimpleNamespace(folder=tmp_path, model=model)


@pytest.mark.parametrize("name", ["it.gguf", "it-00001-of-00002.gguf", "it-00002-of-00002.gguf"])
def test_a_gguf_file_and_any_part_of_one(whole, name):
    model, words = load_model(str(whole.folder / name), device="cpu")
    assert model.dtype == torch.float32 and len(words) >= 97
    assert close(logits(model, tokens()), logits(whole.model, tokens()))
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    scaled = logits(model, tokens())
    assert close(logits(seal_ops.merge(model), tokens()), scaled)


def test_a_missing_part(whole):
    (whole.folder / "it-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="must have all of its 2 parts .* got none of it-00002-of-00002.gguf"):
        load_model(str(whole.folder / "it-00001-of-00002.gguf"), device="cpu")


def test_a_damaged_file(whole):
    for name in ("it.gguf", "it-00001-of-00002.gguf"):
        (whole.folder / name).write_bytes(b"not a model" * 20)
        with pytest.raises(OSError if name == "it.gguf" else (OSError, ValueError), match="^seal_ops.load_model: "):
            load_model(str(whole.folder / name), device="cpu")


def test_a_tokenizer_by_itself(folder):
    assert load_tokenizer(str(folder), "seal data").eos_token == "</s>"


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_file_asks_for_both_packages(tmp_path, monkeypatch, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    (tmp_path / "it.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=f"a .gguf model needs the package {package}, which is not installed"):
        load_model(str(tmp_path / "it.gguf"), device="cpu")
