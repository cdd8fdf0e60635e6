"""The scales as an object: parameters, files, errors, merging, training frameworks, and PEFT's (IA)^3 files."""
import copy
import json
import os

import pytest
import safetensors.torch
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens
from torch import nn

import seal_ops
from seal_ops.adapters.ia3 import export_ia3, import_ia3
from seal_ops.adapters.files import CONFIG_FILE, WEIGHTS_FILE

LLAMA = FAMILIES["llama"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_untouched(model: nn.Module) -> None:
    assert not hasattr(model, "seal_scales")
    assert model.config._attn_implementation != "seal"
    assert all("_seal_site" not in m.__dict__ and "forward" not in m.__dict__ for m in model.modules())
    assert all(not m._forward_pre_hooks for m in model.modules())


# -- parameters ------------------------------------------------------------------------------------------------------

def test_only_trainable_parameters():
    model = LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    assert scales is model.seal_scales
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(trainable) == ["seal_scales.layers.0.scale", "seal_scales.layers.1.scale"]
    assert [id(p) for p in trainable.values()] == [id(p) for p in scales.parameters()]
    assert all(torch.equal(p, torch.ones(4, 16)) for p in scales.parameters())
    assert set(trainable) < set(model.state_dict())


def test_layers_that_are_not_named_have_no_scale():
    model = LLAMA.build(num_hidden_layers=3)
    scales = seal_ops.attach(model, "head", layers=[2, 0])
    assert scales.config.layers == (0, 2) and list(dict(scales.items())) == [0, 2]
    base = logits(model, tokens())
    randomise(scales)
    with_both = logits(model, tokens())
    seal_ops.detach(model)
    everywhere = seal_ops.attach(model, "head")
    with torch.no_grad():
        for layer, scale in scales.items():
            everywhere.layers[str(layer)].scale.copy_(scale)
    assert torch.equal(logits(model, tokens()), with_both) and not close(with_both, base)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float64)],
                         ids=["bfloat16", "half", "float64"])
def test_casting_the_model_keeps_the_scales_in_fp32(cast):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    before = [p.detach().clone() for p in scales.parameters()]
    cast(model)
    assert model.lm_head.weight.dtype != torch.float32
    assert all(p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(scales.parameters(), before))
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in scales.parameters())


def test_two_models_at_once():
    models = [LLAMA.build(), LLAMA.build()]
    expected = []
    for seed, model in enumerate(models):
        randomise(seal_ops.attach(model, "channel"), seed)
        expected.append(logits(model, tokens()))
    assert not close(*expected)
    seal_ops.detach(models[0])
    assert torch.equal(logits(models[1], tokens()), expected[1])


def test_autocast():
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "channel"))
    expected = logits(model, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, tokens())
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


# -- frameworks ------------------------------------------------------------------------------------------------------

def test_model_save_pretrained_stays_plain(tmp_path):
    model = LLAMA.build()
    own = logits(model, tokens())
    randomise(seal_ops.attach(model, "channel"))
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config._attn_implementation != "seal"
    assert torch.equal(logits(loaded.eval(), tokens()), own)


def test_inside_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    base = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("seal_scales")}
    samples = [dict(input_ids=row, labels=row) for row in tokens(4, 16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
        weight_decay=0.0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs=dict(use_reentrant=False))
    trainer = transformers.Trainer(model, arguments, train_dataset=samples)
    trainer.train()
    assert trainer.get_num_trainable_parameters() == 2 * 4 * 16
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert all((p - 1).abs().max() > 5e-3 for p in scales.parameters())


# -- rows ------------------------------------------------------------------------------------------------------------

def test_rows_take_mappings_restore_and_carry_gradients():
    model = LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    expected = logits(model, tokens())
    rows = torch.zeros(2, 4, requires_grad=True)
    with scales.rows({1: rows}):
        assert not close(logits(model, tokens()), expected)
        model(tokens(), use_cache=False).logits.sum().backward()
    assert rows.grad.abs().max() > 0 and scales.layers["1"].scale.grad is None
    assert torch.equal(logits(model, tokens()), expected)
    per_row = [s.detach()[None].repeat(2, 1, 1) for _, s in scales.items()]
    with scales.rows(per_row):
        assert close(logits(model, tokens()), expected)


@pytest.mark.parametrize("rows, message", [
    (torch.ones(3, 2, 4), r"Scales.rows: rows must have 2 entries, one a layer, got 3"),
    ({5: torch.ones(2, 4)}, r"Scales.rows: layers must be among \[0, 1\], got 5"),
    ({0: torch.ones(2, 3)}, r"Scales.rows: rows of layer 0 must have shape \[B, 4\] or \[B, 4, 16\], got \[2, 3, 1\]"),
])
def test_bad_rows(rows, message):
    scales = seal_ops.attach(LLAMA.build(), "head")
    with pytest.raises(ValueError, match=message), scales.rows(rows):
        pass


# -- refusals of attach ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    (dict(granularity="layer"), "granularity must be 'head' or 'channel', got 'layer'"),
    (dict(layers=[0, 2]), r"layers must be indices from 0 to 1, got \[0, 2\]"),
    (dict(layers=[]), r"layers must be indices from 0 to 1, got \[\]"),
    (dict(backend="cuda"), "cuda"),
    (dict(backend="tpu"), "tpu"),
])
def test_bad_arguments(arguments, message):
    model = LLAMA.build()
    with pytest.raises(ValueError, match=message):
        seal_ops.attach(model, **arguments)
    assert_untouched(model)
    assert all(p.requires_grad for p in model.parameters())


def test_attached_twice_and_not_at_all(tmp_path):
    model = LLAMA.build()
    for call in (seal_ops.detach, seal_ops.merge, lambda m: seal_ops.disabled(m).__enter__(),
                 lambda m: export_ia3(m, tmp_path)):
        with pytest.raises(ValueError, match="model must have scales attached, this LlamaForCausalLM has none"):
            call(model)
    scales = seal_ops.attach(model)
    scales.save_pretrained(tmp_path)
    for call in (seal_ops.attach, lambda m: seal_ops.load(m, tmp_path), lambda m: import_ia3(m, tmp_path)):
        with pytest.raises(ValueError, match="model already has scales attached"):
            call(model)


def test_a_shared_config_object_is_refused():
    first = LLAMA.build()
    second = transformers.LlamaForCausalLM(first.config)
    seal_ops.attach(first)
    with pytest.raises(ValueError, match="shares its config object"):
        seal_ops.attach(second)


def gpt_oss():
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1))


def bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4))


def weightless():
    with torch.device("meta"):
        return LLAMA.build()


class Homemade(nn.Module):
    """An attention of its own, past the registry."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        self.attention.o_proj = nn.Linear(8, 8)
        self.attention.config = transformers.LlamaConfig(attn_implementation="sdpa")

    def forward(self, input_ids, use_cache=False):
        return self.attention.o_proj(torch.zeros(*input_ids.shape, 8))


@pytest.mark.parametrize("build, message", [
    (gpt_oss, "seal_ops.attach: model must have attention without attention sinks, GptOssAttention passes s_aux"),
    (bloom, "transformers' attention registry, BloomForCausalLM has no module that takes part in it"),
    (lambda: nn.Linear(3, 3), "transformers' attention registry, Linear has no module that takes part in it"),
    (Homemade, "transformers' attention registry, Homemade has no module that takes part in it"),
    (weightless, "model must have its weights loaded, found parameters on the meta device"),
])
def test_models_without_a_known_seam(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        seal_ops.attach(model)
    assert not hasattr(model, "seal_scales") and all("_seal_site" not in m.__dict__ for m in model.modules())


# -- files -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter for `LLAMA`."""
    scales = seal_ops.attach(LLAMA.build(), "channel")
    randomise(scales)
    scales.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


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
    (lambda f: edit(f, format_version=2), ValueError, "must have format_version 1, got 2"),
    (lambda f: edit(f, granularity="layer"), ValueError, "must have granularity 'head' or 'channel', got 'layer'"),
    (lambda f: edit(f, layers=[0]), ValueError, "lists of integers of one length"),
    (lambda f: edit(f, layers=[0, -1]), ValueError, "lists of integers of one length"),
    (lambda f: edit(f, layers=[0, 0]), ValueError, "lists of integers of one length"),
    (lambda f: edit(f, head_dim=[16, "16"]), ValueError, "lists of integers of one length"),
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
    ("llama", dict(num_hidden_layers=1), "must be an adapter for 1 layers, got one with layer 1"),
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
    with pytest.raises(OSError, match="Scales.save_pretrained: save_directory must be a writable folder, got .*file/adapter"):
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


def test_saving_after_merging(tmp_path):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    expected = logits(model, tokens())
    seal_ops.merge(model)
    scales.save_pretrained(tmp_path)
    fresh = LLAMA.build()
    seal_ops.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, tokens()), expected)


# -- merging ---------------------------------------------------------------------------------------------------------

def test_merging_leaves_biases_and_rounds_once():
    model = LLAMA.build(torch.bfloat16, attention_bias=True)
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("seal_scales")}
    factors = [s.detach().clone() for s in scales.parameters()]
    after = seal_ops.merge(model).state_dict()
    assert set(after) == set(before)
    for name, tensor in after.items():
        if name.endswith("o_proj.weight"):
            layer = int(name.split(".")[2])
            assert torch.equal(tensor, (before[name].float() * factors[layer].reshape(1, -1)).bfloat16())
        else:
            assert torch.equal(tensor, before[name])


class Quantised(nn.Linear):
    """Stands for the linear layers of a quantisation library: a subclass whose weight means something else."""


def quantise(model):
    model.model.layers[1].self_attn.o_proj.__class__ = Quantised


def share(model):
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight


def overflow(model):
    model.half()
    model.seal_scales.layers["1"].scale.data.fill_(1e6)


@pytest.mark.parametrize("change, message", [
    (quantise, "layers.1.self_attn.o_proj must be a plain torch.nn.Linear in 16 or more bits, got Quantised"),
    (share, "layers.1.self_attn.o_proj must have a weight of its own, got a weight that two layers share"),
    (overflow, "layers.1.self_attn.o_proj must stay finite in torch.float16, got scales that overflow it"),
])
def test_refused_merges_change_nothing(change, message):
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "head"))
    change(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        seal_ops.merge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.config._attn_implementation == "seal"


# -- PEFT ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def ia3(peft, model, **targets):
    targets = targets or dict(target_modules=["o_proj"], feedforward_modules=["o_proj"])
    adapted = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", **targets)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "ia3_l" in name:
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_ia3_in(peft, family, tmp_path):
    adapted = ia3(peft, FAMILIES[family].build())
    adapted.save_pretrained(tmp_path)
    model = FAMILIES[family].build()
    scales = import_ia3(model, tmp_path)
    assert scales.config.granularity == "channel"
    assert close(logits(model, tokens()), logits(adapted, tokens()))


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_ia3_out(peft, family, granularity, tmp_path):
    model = FAMILIES[family].build()
    randomise(seal_ops.attach(model, granularity))
    export_ia3(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path).eval()
    assert close(logits(adapted, tokens()), logits(model, tokens()))
    if granularity == "channel":  # and in again, exactly
        again = FAMILIES[family].build()
        scales = import_ia3(again, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(scales.parameters(), model.seal_scales.parameters()))


def test_ia3_out_of_some_layers(peft, tmp_path):
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "channel", layers=[1]))
    model.model.layers[0].mlp.o_proj = nn.Linear(2, 2)  # another module that a bare "o_proj" would hit
    export_ia3(model, tmp_path)
    base = LLAMA.build()
    base.model.layers[0].mlp.o_proj = nn.Linear(2, 2)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert not isinstance(base.model.layers[0].mlp.o_proj, peft.tuners.ia3.IA3Layer)
    assert close(logits(adapted, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("targets, message", [
    (dict(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]), "must scale only the o_proj .*k_proj.ia3_l"),
    (dict(target_modules=["o_proj"], feedforward_modules=[]), r"of shape \[1, 64\] .*, got torch.float32 of shape \[64, 1\]"),
])
def test_other_ia3_adapters_are_refused(peft, targets, message, tmp_path):
    ia3(peft, LLAMA.build(), **targets).save_pretrained(tmp_path)
    model = LLAMA.build()
    with pytest.raises(ValueError, match="seal_ops.ia3.import_ia3: .*" + message):
        import_ia3(model, tmp_path)
    assert_untouched(model)


def test_ia3_before_a_norm_is_another_function(peft, tmp_path):
    ia3(peft, FAMILIES["bitnet"].build()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="o_proj must read the attention output directly"):
        import_ia3(FAMILIES["bitnet"].build(), tmp_path)
    model = FAMILIES["bitnet"].build()
    seal_ops.attach(model)
    with pytest.raises(ValueError, match="o_proj must read the attention output directly"):
        export_ia3(model, tmp_path)


def test_load_points_to_the_importer(peft, tmp_path):
    ia3(peft, LLAMA.build()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'IA3' .*seal_ops.ia3.import_ia3 reads those"):
        seal_ops.load(LLAMA.build(), tmp_path)


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


def test_deepcopied_scales_of_a_detached_model():
    model = LLAMA.build()
    scales = seal_ops.attach(model)
    seal_ops.detach(model)
    twin = copy.deepcopy(scales)
    assert twin.config == scales.config and twin.attachment is None
