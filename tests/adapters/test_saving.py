"""What is saved and loaded of a model with scales through the model's own verbs, on one process and on several."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens

import seal_ops
from seal_ops.adapters.files import CARD_FILE, CONFIG_FILE

LLAMA = FAMILIES["llama"]


def build(granularity="channel", **overrides):
    model = LLAMA.build(**overrides)
    own = logits(model, tokens())
    randomise(seal_ops.attach(model, granularity))
    return model, own


def test_the_scales_lie_beside_plain_weights(tmp_path):
    model, own = build()
    ignored = model._keys_to_ignore_on_save
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config._attn_implementation != "seal"
    assert torch.equal(logits(loaded.eval(), tokens()), own)
    seal_ops.load(loaded, tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert model._keys_to_ignore_on_save is ignored
    seal_ops.detach(model).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "seal_scales").exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_saves_its_own_scales(copied, tmp_path):
    model, _ = build()
    twin = copied(model)
    randomise(twin.seal_scales, seed=7)
    expected = logits(twin, tokens())
    twin.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    seal_ops.load(again, tmp_path)
    assert torch.equal(logits(again, tokens()), expected) and not close(logits(model, tokens()), expected)


def test_a_given_state_dict_also_gives_the_scales(tmp_path):
    """What accelerate gathers on the first process: the modules themselves may hold shards."""
    model, _ = build()
    expected, gathered = logits(model, tokens()), {n: t.clone() for n, t in model.state_dict().items()}
    randomise(model.seal_scales, seed=9)
    model.save_pretrained(tmp_path, state_dict=gathered)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    seal_ops.load(again, tmp_path)
    assert torch.equal(logits(again, tokens()), expected)


def test_not_the_main_process(tmp_path):
    model, _ = build()
    model.save_pretrained(tmp_path, is_main_process=False)
    model.seal_scales.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "seal_scales").exists() and not (tmp_path / CONFIG_FILE).exists()


def test_pushing_the_model_pushes_the_scales(tmp_path, monkeypatch):
    """``push_to_hub=True`` uploads from a folder in which the scales are."""
    pushed = []

    def push(
        self, repo_id, *, commit_message=None, private=None, token=None, revision=None, create_pr=False, **options
    ):
        folder = tmp_path / f"pushed-{len(pushed)}"
        self.save_pretrained(folder)
        pushed.append((repo_id, private, (folder / "seal_scales" / "default" / CONFIG_FILE).exists()))

    monkeypatch.setattr(transformers.PreTrainedModel, "push_to_hub", push)
    model, _ = build()
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/it", private=True)
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    model.push_to_hub("me/other")
    assert pushed == [("me/it", True, True), ("named", None, True), ("me/other", None, True)]


def test_the_base_models_state_dict_loads_strictly():
    model, own = build()
    base = {n: t for n, t in LLAMA.build(seed=4).state_dict().items()}
    before = [p.detach().clone() for p in model.seal_scales.parameters()]
    with pytest.warns(UserWarning, match="holds no scales, so they keep their present values"):
        result = model.load_state_dict(base)
    assert not result.missing_keys and all(torch.equal(p, b) for p, b in zip(model.seal_scales.parameters(), before))
    assert torch.equal(model.lm_head.weight, base["lm_head.weight"])
    some = {n: t for n, t in model.state_dict().items() if n != "seal_scales.layers.0.scale"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"seal_scales.layers.0.scale\""):
        model.load_state_dict(some)


def test_a_card_is_written_and_ones_own_is_kept(tmp_path):
    model, _ = build()
    scales = model.seal_scales
    scales.card.trained({"lr": 0.01, "samples": 50})
    scales.save_pretrained(tmp_path)
    card = (tmp_path / CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: seal_ops\n") and "SEAL-C" in card and "| model type | llama |" in card
    assert "| learned numbers | 128 |" in card and "| lr | 0.01 |" in card
    (tmp_path / CARD_FILE).write_text("mine")
    scales.save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == "mine"


@pytest.mark.parametrize("name, expected", [("org/model-7b", "base_model: org/model-7b\n"), ("/data/model", None)])
def test_only_a_name_on_the_hub_is_a_cards_base_model(tmp_path, name, expected):
    model = LLAMA.build()
    model.config._name_or_path = name
    seal_ops.attach(model).save_pretrained(tmp_path)
    header = (tmp_path / CARD_FILE).read_text().split("---")[1]
    assert expected in header if expected else "base_model" not in header


def test_fsdp2_saves_and_loads_whole_scales(tmp_path):
    """One process of FSDP2: parameters are DTensors."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, _ = build("head")
    expected = [p.detach().clone() for p in model.seal_scales.parameters()]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
        model(tokens(), labels=tokens()).loss.backward()
        assert all(hasattr(p, "full_tensor") and p.grad is not None for p in model.seal_scales.parameters())
        model.seal_scales.save_pretrained(tmp_path)
        assert set(model.seal_scales.state_dict()) == {"layers.0.scale", "layers.1.scale"}
        with pytest.raises(ValueError, match="seal_ops.merge: .* must hold its whole weight"):
            seal_ops.merge(model)
        with torch.no_grad():
            for p in model.seal_scales.parameters():
                p.fill_(3)
        seal_ops.load(model, tmp_path)
        assert all(torch.equal(p.full_tensor(), e) for p, e in zip(model.seal_scales.parameters(), expected))
        seal_ops.detach(model)
        with pytest.raises(ValueError, match="seal_ops.attach: model must be given before it is wrapped or sharded"):
            seal_ops.attach(model)
    finally:
        dist.destroy_process_group()
    loaded = seal_ops.load(LLAMA.build(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected))


def test_deepspeeds_partitions_are_gathered(tmp_path, monkeypatch):
    """A stand-in for DeepSpeed's ZeRO-3: parameters are empty but inside its context."""
    import sys
    import types

    model, _ = build("head")
    whole = {id(p): p.data for p in model.seal_scales.parameters()}

    class GatheredParameters:
        def __init__(self, parameters):
            self.parameters = parameters

        def __enter__(self):
            for p in self.parameters:
                p.data = whole[id(p)]

        def __exit__(self, *exception):
            for p in self.parameters:
                p.data = torch.empty(0)

    for n, p in enumerate(model.seal_scales.parameters()):
        p.ds_id, p.data = n, torch.empty(0)
    module = types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=GatheredParameters))
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    model.seal_scales.save_pretrained(tmp_path)
    loaded = seal_ops.load(LLAMA.build(), tmp_path)
    assert all(torch.equal(p, w) for p, w in zip(loaded.parameters(), whole.values()))


@pytest.mark.parametrize("order", ["attach first", "offload first"])
def test_accelerates_cpu_offload(order, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, own = build()
    values = {n: p.detach().clone() for n, p in model.seal_scales.items()}
    expected = logits(model, tokens())
    if order == "attach first":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        seal_ops.detach(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        scales = seal_ops.attach(model, "channel")
        scales.set_values(scales.config, values)
    assert torch.equal(logits(model, tokens()), expected) and not close(own, expected)
    model.seal_scales.save_pretrained(tmp_path)
    loaded = seal_ops.load(LLAMA.build(), tmp_path)
    assert all(torch.equal(p, values[n]) for n, p in loaded.items())
    with pytest.raises(ValueError, match="seal_ops.merge: .* must hold its whole weight"):
        seal_ops.merge(model)


def test_layers_are_named_as_in_the_model(tmp_path):
    """A hybrid: attention in layers 1 and 3 only."""
    model = transformers.AutoModelForCausalLM.from_config(hybrid()).eval()
    scales = seal_ops.attach(model, "head", layers=[3])
    assert list(dict(scales.named_parameters())) == ["layers.3.scale"] and scales.config.layers == (3,)
    seal_ops.detach(model)
    with pytest.raises(ValueError, match=r"layers must be indices among \[1, 3\], got \[0\]"):
        seal_ops.attach(model, layers=[0])
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    scales.save_pretrained(tmp_path)
    expected = {n: s.detach().clone() for n, s in scales.items()}
    seal_ops.detach(model)
    # Version 1 counted attention layers.
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    old = tmp_path / "old"
    old.mkdir()
    (old / CONFIG_FILE).write_text(json.dumps({**content, "format_version": 1, "layers": [0, 1]}))
    import safetensors.torch

    safetensors.torch.save_file(
        {f"layers.{rank}.scale": expected[n] for rank, n in enumerate((1, 3))}, old / "adapter_model.safetensors"
    )
    for folder in (tmp_path, old):
        loaded = seal_ops.load(model, folder)
        assert {n: s.tolist() for n, s in loaded.items()} == {n: s.tolist() for n, s in expected.items()}
        seal_ops.detach(model)


def hybrid():
    return transformers.JambaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        pad_token_id=0,
    )


# -- scales on a part of the model that is saved ---------------------------------------------------------------------


def test_the_whole_saves_the_scales_of_its_part_beside(tmp_path):
    """Attached to a base model; the model with a head does not know of them."""
    whole = LLAMA.build()
    own = logits(whole, tokens())
    scales = seal_ops.attach(whole.model, "channel")
    randomise(scales)
    whole.save_pretrained(tmp_path, max_shard_size="50KB")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), tokens()), own)
    seal_ops.load(loaded, tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(whole, tokens()))
    assert [name for name in whole.state_dict() if "seal_scales" in name], "a training framework sees them"
    whole.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "seal_scales").exists()
