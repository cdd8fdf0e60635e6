"""The scales as an object: parameters, casting, frameworks, rows, and the refusals of attach."""

import copy

import causal_lms
import numpy as np
import pytest
import torch
import transformers
from attached import assert_untouched
from families import FAMILIES, close, logits, randomise, tokens
from torch import nn

import seal_ops
from seal_ops.adapters.ia3 import export_ia3, import_ia3
from seal_ops.huggingface.context_extension.extending import extended

LLAMA = FAMILIES["llama"]


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


def test_scales_made_in_inference_mode_learn(tmp_path):
    model = LLAMA.build()
    with torch.inference_mode():
        seal_ops.attach(model, "channel").save_pretrained(tmp_path)
        seal_ops.load(seal_ops.detach(model), tmp_path)
        model.seal_scales.add_adapter("heads", "head")
        model.seal_scales.set_adapter("heads")
    model(tokens(), labels=tokens()).loss.backward()
    assert all(scale.grad.abs().sum() > 0 for _, scale in model.seal_scales.items())


def test_a_copy_of_the_scales_alone_leaves_the_model_where_it_is(tmp_path, monkeypatch):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    with monkeypatch.context() as patched:
        patched.setattr(
            type(model), "__deepcopy__", lambda self, memo: pytest.fail("the model is copied"), raising=False
        )
        average = torch.optim.swa_utils.AveragedModel(scales)
        randomise(scales)
        average.update_parameters(scales)
        average.update_parameters(scales)
    kept = average.module
    assert kept.attachment is None and scales.attachment is not None
    for (_, mean), (_, last) in zip(kept.items(), scales.items()):
        assert torch.equal(mean, last)  # the first update copies
    kept.save_pretrained(tmp_path)
    randomise(scales, seed=9)
    seal_ops.load(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), scales.parameters()))


@pytest.mark.parametrize("order", [("model", "scales"), ("scales", "model")])
def test_scales_copied_with_their_model_are_on_its_copy(order):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    both = {"model": model, "scales": scales}
    twins = copy.deepcopy({name: both[name] for name in order})
    assert twins["scales"] is twins["model"].seal_scales and twins["scales"].attachment.owner is twins["model"]
    with torch.no_grad():
        for p in twins["scales"].parameters():
            p.mul_(2)
    assert not close(logits(twins["model"], tokens()), logits(model, tokens()))
    seal_ops.detach(twins["model"])
    assert scales.attachment.owner is model
    assert close(logits(twins["model"], tokens()), logits(LLAMA.build(), tokens()))


@pytest.mark.parametrize("numbers", [np.array([2, 0, 2]), torch.tensor([0, 2]), {0, 2}, range(0, 3, 2)], ids=repr)
def test_numbers_of_layers(numbers):
    found = seal_ops.attach(LLAMA.build(num_hidden_layers=3), "head", layers=numbers).config.layers
    assert found == (0, 2) and all(type(n) is int for n in found)


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


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float64)],
    ids=["bfloat16", "half", "float64"],
)
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
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=dict(use_reentrant=False),
    )
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


@pytest.mark.parametrize(
    "rows, message",
    [
        (torch.ones(3, 2, 4), r"seal_ops.Scales.rows: rows must have 2 entries, one a layer, got 3"),
        ({5: torch.ones(2, 4)}, r"seal_ops.Scales.rows: layers must be among \[0, 1\], got 5"),
        (
            {0: torch.ones(2, 3)},
            r"seal_ops.Scales.rows: rows of layer 0 must have shape \[B, 4\] or \[B, 4, 16\], got \[2, 3, 1\]",
        ),
    ],
)
def test_bad_rows(rows, message):
    scales = seal_ops.attach(LLAMA.build(), "head")
    with pytest.raises(ValueError, match=message), scales.rows(rows):
        pass


# -- refusals of attach ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(granularity="layer"), "granularity must be 'head' or 'channel', got 'layer'"),
        (dict(layers=[0, 2]), r"layers must be indices from 0 to 1, got \[0, 2\]"),
        (dict(layers=[True]), r"layers must be indices from 0 to 1, got \[True\]"),
        (dict(layers=torch.tensor([0.5])), r"layers must be indices from 0 to 1, got \[tensor\(0.5000\)\]"),
        (dict(layers=[]), r"layers must be indices from 0 to 1, got \[\]"),
        (dict(backend="cuda"), "cuda"),
        (dict(backend="tpu"), "tpu"),
    ],
)
def test_bad_arguments(arguments, message):
    model = LLAMA.build()
    with pytest.raises(ValueError, match=message):
        seal_ops.attach(model, **arguments)
    assert_untouched(model)
    assert all(p.requires_grad for p in model.parameters())


def test_attached_twice_and_not_at_all(tmp_path):
    model = LLAMA.build()
    for call in (
        seal_ops.detach,
        seal_ops.merge,
        lambda m: seal_ops.disabled(m).__enter__(),
        lambda m: export_ia3(m, tmp_path),
    ):
        with pytest.raises(ValueError, match="model must have scales attached, this LlamaForCausalLM has none"):
            call(model)
    scales = seal_ops.attach(model)
    scales.save_pretrained(tmp_path)
    for call in (seal_ops.attach, lambda m: import_ia3(m, tmp_path)):
        with pytest.raises(ValueError, match="model already has scales attached"):
            call(model)


def test_a_model_wrapped_for_several_devices_is_refused():
    with pytest.raises(ValueError, match="seal_ops.attach: model must be given before .*got DataParallel"):
        seal_ops.attach(nn.DataParallel(LLAMA.build()))


def test_a_shared_config_object_is_refused():
    first = LLAMA.build()
    second = transformers.LlamaForCausalLM(first.config)
    seal_ops.attach(first)
    with pytest.raises(ValueError, match="shares its config object"):
        seal_ops.attach(second)


def of_family(name):
    def build():
        if name not in causal_lms.FAMILIES:
            pytest.skip(f"this transformers has no {name}")
        return causal_lms.build(name)

    return build


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


@pytest.mark.parametrize(
    "build, message",
    [
        (
            of_family("inkling_text"),
            "seal_ops.attach: model must have attention without a position bias, InklingAttention passes",
        ),
        (
            of_family("deepseek_v4"),
            "model must hand the mask to attention as it is, DeepseekV4Attention extends it by keys of its own",
        ),
        (bloom, "transformers' attention registry, BloomForCausalLM has no module that takes part in it"),
        (lambda: nn.Linear(3, 3), "transformers' attention registry, Linear has no module that takes part in it"),
        (Homemade, "transformers' attention registry, Homemade has no module that takes part in it"),
        (weightless, "model must have its weights loaded, found parameters on the meta device"),
    ],
)
def test_models_that_call_attention_in_no_known_way(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        seal_ops.attach(model)
    assert not hasattr(model, "seal_scales") and all("_seal_layer" not in m.__dict__ for m in model.modules())


def test_deepcopied_scales_of_a_detached_model():
    model = LLAMA.build()
    scales = seal_ops.attach(model)
    seal_ops.detach(model)
    twin = copy.deepcopy(scales)
    assert twin.config == scales.config and twin.attachment is None


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block", ["rows", "adapters_per_row", "disabled", "extended"])
def test_checkpointed_layers_are_recomputed_in_their_block_or_not_at_all(block, reentrant):
    """A backward pass behind the block would take other scales, in silence where checkpointing is reentrant."""
    model, ids = LLAMA.build().train(), tokens()
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    inside = {
        "rows": lambda: scales.rows(torch.full((2, len(ids), 4), 0.5)),
        "adapters_per_row": lambda: scales.adapters_per_row(["base"] * len(ids)),
        "disabled": lambda: seal_ops.disabled(model),
        "extended": lambda: extended(model, "self_extend", trained=16, window=8, group=2),
    }[block]

    def gradient(backward_inside):
        embeds.grad = None
        with inside():
            loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return embeds.grad

    expected = gradient(False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert close(gradient(True), expected)
    with pytest.raises(RuntimeError, match="must be recomputed inside the block that it ran in, got a backward pass"):
        gradient(False)
    with torch.no_grad(), inside():  # as for a reference, between a forward pass and its own backward pass
        model(inputs_embeds=embeds, use_cache=False)
    loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
    with torch.no_grad(), inside():
        model(inputs_embeds=embeds, use_cache=False)
    loss.backward()


# -- what is no model, no folder, no row ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "models/seal-tiny", LLAMA, type(LLAMA), torch.nn.Linear], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        seal_ops.attach,
        seal_ops.detach,
        seal_ops.merge,
        lambda model: seal_ops.disabled(model).__enter__(),
        lambda model: seal_ops.load(model, "nowhere"),
        lambda model: seal_ops.train(model, []),
        lambda model: seal_ops.evaluate(model, None, "lines", 300),
        seal_ops.parameter_groups,
        seal_ops.attach_weak_columns,
        lambda model: seal_ops.extend(model, "ntk"),
        lambda model: seal_ops.ia3.import_ia3(model, "nowhere"),
    ],
)
def test_what_is_no_model_is_named(call, given):
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, got (NoneType|str|Family|the class )"):
        call(given)


@pytest.mark.parametrize("layers", [1, "01", ["a", 0], [[0]]], ids=str)
def test_layers_of_another_kind(layers):
    with pytest.raises(ValueError, match="seal_ops.attach: layers must be indices from 0 to 1, got "):
        seal_ops.attach(LLAMA.build(), layers=layers)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.rows(None).__enter__(), "rows: rows must be tensors, one a layer, or a mapping .* got None"),
        (lambda s: s.rows(torch.ones(())).__enter__(), "rows: rows must be tensors, one a layer, or a mapping"),
        (lambda s: s.rows({0: [1.0]}).__enter__(), r"rows: rows of layer 0 must be a tensor, got \[1.0\]"),
        (lambda s: s.adapters_per_row([]).__enter__(), "adapters_per_row: adapter_names must be a list of names"),
        (lambda s: s.adapters_per_row("default").__enter__(), "adapter_names must be a list of names.* got 'default'"),
        (lambda s: s.adapters_per_row(None).__enter__(), "adapter_names must be a list of names.* got None"),
        (lambda s: s.save_pretrained(""), "save_pretrained: save_directory must be a path, got ''"),
        (lambda s: s.save_pretrained(None), "save_pretrained: save_directory must be a path, got None"),
        (lambda s: s.save_pretrained("x", []), r"save_pretrained: selected_adapters must be a list .* got \[\]"),
        (lambda s: s.save_pretrained("x", 3), "save_pretrained: selected_adapters must be a list .* got 3"),
    ],
)
def test_what_is_no_row_name_or_folder(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(seal_ops.attach(LLAMA.build(), "head"))
    assert not list(tmp_path.iterdir())
