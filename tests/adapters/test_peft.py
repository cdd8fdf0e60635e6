"""Scales and PEFT's adapters on one model, in either order."""

import copy
import warnings

import pytest
import torch
from families import FAMILIES, close, logits, randomise, tokens

import seal_ops

LLAMA = FAMILIES["llama"]


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


def lora(peft, model, *modules, **options):
    config = peft.LoraConfig(
        r=2, target_modules=list(modules), task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("order", ["attach first", "LoRA first"])
def test_merging_through_the_wrapper(peft, order, granularity):
    model = LLAMA.build()
    if order == "attach first":
        randomise(seal_ops.attach(model, granularity))
        both = lora(peft, model, "q_proj")
    else:
        both = lora(peft, model, "q_proj")
        randomise(seal_ops.attach(both, granularity))
    padding = torch.ones(3, 21, dtype=torch.long)
    padding[0, :5] = 0
    expected = [logits(both, tokens(3)), logits(both, tokens(3), attention_mask=padding)]
    assert seal_ops.merge(both) is both and not hasattr(model, "seal_scales")
    assert close(logits(both, tokens(3)), expected[0])
    assert close(logits(both, tokens(3), attention_mask=padding)[padding.bool()], expected[1][padding.bool()])
    with pytest.raises(ValueError, match="must have scales attached"):
        seal_ops.merge(both)


@pytest.mark.parametrize("order", ["attach first", "LoRA first"])
@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_what_peft_gives_back_keeps_its_scales(peft, order, unload, tmp_path):
    """PEFT takes its own adapter off; the scales stay on, are saved, and merge."""
    model = LLAMA.build()
    if order == "attach first":
        randomise(seal_ops.attach(model, "head"))
        both = lora(peft, model, "q_proj", "o_proj")
    else:
        both = lora(peft, model, "q_proj", "o_proj")
        randomise(seal_ops.attach(both, "head"))
    expected = logits(both, tokens())
    with pytest.raises(ValueError, match="o_proj must be a plain torch.nn.Linear .* of an adapter; merge that first"):
        seal_ops.merge(both)
    plain = getattr(both, unload)()
    assert plain is model
    if unload == "merge_and_unload":
        assert close(logits(plain, tokens()), expected)
    expected = logits(plain, tokens())
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    seal_ops.load(again, tmp_path)
    assert torch.equal(logits(again, tokens()), expected)
    assert close(logits(seal_ops.merge(plain), tokens()), expected)


def test_detaching_through_the_wrapper(peft):
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "head"))
    both = lora(peft, model, "q_proj")
    flags = {n: p.requires_grad for n, p in both.named_parameters() if "seal_scales" not in n}
    seal_ops.detach(both)
    assert not hasattr(model, "seal_scales") and model.config._attn_implementation != "seal"
    assert {n: p.requires_grad for n, p in both.named_parameters()} == flags, "PEFT's flags stay"


def test_parameters_that_came_later_keep_their_flags():
    model = LLAMA.build()
    model.lm_head.weight.requires_grad_(False)
    seal_ops.attach(model)
    model.extra = torch.nn.Linear(2, 2)
    model.extra.bias.requires_grad_(False)
    seal_ops.detach(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert flags.pop("extra.weight") and not flags.pop("extra.bias") and not flags.pop("lm_head.weight")
    assert all(flags.values())


def test_attach_leaves_what_peft_trains(peft):
    both = lora(peft, LLAMA.build(), "q_proj", modules_to_save=["lm_head"])
    trains = {n for n, p in both.named_parameters() if p.requires_grad}
    scales = seal_ops.attach(both, "head")
    now = {n for n, p in both.named_parameters() if p.requires_grad}
    assert now - trains == {f"base_model.model.seal_scales.{n}" for n, _ in scales.named_parameters()} and trains <= now
    both.train()
    both(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in both.named_parameters() if p.requires_grad and "lora_B" not in n)


def test_scales_that_peft_froze_are_told_of(peft):
    model = LLAMA.build()
    scales = seal_ops.attach(model)
    both = lora(peft, model, "q_proj")
    assert not any(p.requires_grad for p in scales.parameters())

    def step(caught):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            both.train()(tokens(), labels=tokens(), use_cache=False).loss.backward()
        assert any("trained while its scales are frozen" in str(w.message) for w in found) == caught

    step(True)
    scales.requires_grad_(False)  # meant so
    step(False)
    scales.requires_grad_(True)
    step(False)
    assert all(p.grad.abs().max() > 0 for p in scales.parameters())
    both.eval()
    with torch.no_grad():
        both(tokens())


def test_peft_saves_scales_too_where_it_was_there_first(peft, tmp_path):
    both = lora(peft, LLAMA.build(), "q_proj")
    randomise(seal_ops.attach(both, "channel"))
    both.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    assert not close(logits(again, tokens()), logits(both, tokens()))
    seal_ops.load(again, tmp_path)
    assert close(logits(again, tokens()), logits(both, tokens()))


def test_peft_saving_without_scales_is_told_of(peft, tmp_path):
    model = LLAMA.build()
    seal_ops.attach(model)
    both = lora(peft, model, "q_proj")
    with pytest.warns(UserWarning, match="PEFT saves only its own adapter; .*scales.save_pretrained"):
        both.save_pretrained(tmp_path)


def test_peft_says_how_to_load_our_folder(peft, saved):
    with pytest.raises(ValueError, match=r"got the scales of seal_ops; seal_ops.load\(model, .*adapter'\) loads them"):
        peft.PeftModel.from_pretrained(LLAMA.build(), str(saved))
    # transformers' load_adapter takes this way
    with pytest.raises(ValueError, match="the folder must hold an adapter of PEFT, got the scales of seal_ops"):
        peft.PeftConfig.from_pretrained(str(saved))


def test_loading_an_adapter_of_peft_warns_of_no_scales(peft, tmp_path):
    peft.get_peft_model(LLAMA.build(), peft.LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path)
    model = LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    before = scales.values()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds no scales")
        both = peft.PeftModel.from_pretrained(model, tmp_path)
        both.load_adapter(tmp_path, "second")
    assert all(torch.equal(value, before[layer]) for layer, value in scales.values().items())


@pytest.mark.parametrize(
    "options",
    [{"layer_replication": [(0, 2), (1, 2)]}, {"modules_to_save": ["self_attn"], "target_modules": ["gate_proj"]}],
    ids=["layer_replication", "modules_to_save"],
)
def test_layers_that_peft_copies_get_their_scales_afterwards(peft, options):
    """A copy by itself would have scales of its own, which nothing trains or merges."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options)
    model = LLAMA.build()
    seal_ops.attach(model, "channel")
    with pytest.raises(RuntimeError, match="a module with scales must be copied with its whole model, got LlamaAtt"):
        logits(peft.get_peft_model(model, copy.deepcopy(config)), tokens())
    if "layer_replication" in options:
        both = peft.get_peft_model(LLAMA.build(), config).eval()
        scales = seal_ops.attach(both, "channel")
        randomise(scales)
        assert [layer for layer, _ in scales.items()] == [0, 1, 2]
        with pytest.raises(
            ValueError, match="o_proj must have a weight of its own, got a weight that two layers share"
        ):
            seal_ops.merge(both.merge_and_unload())


def test_prompt_tuning(peft):
    model = LLAMA.build()
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    randomise(seal_ops.attach(prompted, "head"))
    expected = logits(prompted, tokens())
    assert prompted.prompt_encoder.default.embedding.weight.requires_grad
    assert close(logits(seal_ops.merge(prompted), tokens()), expected)


@pytest.mark.parametrize("order", ["attach first", "LoRA first"])
def test_a_run_that_trains_both_saves_both(peft, order, tmp_path):
    from seal_ops.tasks.sample import Sample

    model = LLAMA.build()
    if order == "attach first":
        scales = seal_ops.attach(model, "channel")
        both = lora(peft, model, "q_proj")
        scales.requires_grad_(True)
    else:
        both = lora(peft, model, "q_proj")
        scales = seal_ops.attach(both, "channel")
    samples = [Sample(row[:15].tolist(), row[15:].tolist()) for row in tokens(3)]
    seal_ops.train(both, samples, lr=0.05, output_dir=tmp_path, progress=False)
    assert all((p - 1).abs().max() > 0.01 for p in scales.parameters())
    again = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    seal_ops.load(again, tmp_path)
    assert close(logits(again, tokens()), logits(both.eval(), tokens()))
    assert "| lr | 0.05 |" in (tmp_path / "seal_scales" / "default" / "README.md").read_text()


def test_peft_is_told_not_to_copy_the_scales(peft):
    """It would train the copy, which attention does not read."""
    model = LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["seal_scales"])
    with pytest.raises(ValueError, match="modules_to_save must name modules of the base model, got the scales"):
        peft.get_peft_model(model, config)
    copy.deepcopy(scales)  # by anybody else
    fresh = LLAMA.build()
    scales = seal_ops.attach(fresh, "channel")
    config.modules_to_save = ["lm_head"]
    adapted = peft.get_peft_model(fresh, config).train()
    scales.requires_grad_(True)
    adapted(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
