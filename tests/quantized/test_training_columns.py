"""Weak columns in training: rates by their number, with scales, text and chat, checkpoints, Trainer and TRL."""

import copy
import math

import pytest
import safetensors.torch
import torch
from families import FAMILIES, logits, tokens
from retrieval_fixtures import tokenizer
from toy_quantizer import quantize

import seal_ops
from seal_ops.training.recipe import LEARNING_RATES, columns_rate

LLAMA = FAMILIES["llama"]


@pytest.fixture
def rows(token_ids):
    return [{"input_ids": ids} for ids in token_ids]


def columns_model(token_ids, scales=None, **overrides):
    model = LLAMA.build(**overrides)
    weights = quantize(model)
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids, original=weights)
    if scales:
        seal_ops.attach(model, scales)
    return model


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_the_papers_rates():
    assert columns_rate(128) == 5e-6 and columns_rate(8) == pytest.approx(1.4e-5, rel=1e-3)
    assert columns_rate(8) > columns_rate(32) > columns_rate(128) > columns_rate(512)


def test_groups_and_settings(token_ids, rows):
    model = columns_model(token_ids, "channel")
    scales, columns = seal_ops.parameter_groups(model)
    assert scales["lr"] == LEARNING_RATES["SEAL-C"] and columns["lr"] == columns_rate(4)
    assert len(scales["params"]) == 2 and len(columns["params"]) == 14
    assert {id(p) for g in (scales, columns) for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    result = seal_ops.train(model, rows, lr=3e-3, column_lr=1e-4, progress=False)
    assert result.lr == 3e-3 and result.settings["column_lr"] == 1e-4 and result.settings["columns"] == 4
    assert result.settings["max_grad_norm"] == 0.3
    assert result.parameters == model.seal_weak_columns.count() + 2 * 64
    alone = columns_model(token_ids)
    assert [g["lr"] for g in seal_ops.parameter_groups(alone, lr=7e-4)] == [7e-4]
    result = seal_ops.train(alone, rows, max_grad_norm=math.inf, progress=False)
    assert result.lr == columns_rate(4) and result.settings["max_grad_norm"] == math.inf


def test_each_group_moves_at_its_rate(token_ids, rows):
    """AdamW's first step is the rate itself, whatever the gradient."""
    model = columns_model(token_ids, "head")
    before = values(model)
    seal_ops.train(model, rows[:1], lr=1e-2, column_lr=1e-3, progress=False)
    for name, value in values(model).items():
        step = float((value - before[name]).abs().max())
        assert step == pytest.approx(1e-2 if "seal_scales" in name else 1e-3, rel=0.05), name


def test_training_lowers_the_loss(token_ids, rows):
    model = columns_model(token_ids)
    losses = seal_ops.train(model, rows[:2], lr=3e-2, epochs=15, progress=False).losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("wrong, sentence", [
    (lambda t: seal_ops.train(columns_model(t), [{"input_ids": t[0]}], lr=1e-3, column_lr=1e-3), "got both"),
    (lambda t: seal_ops.parameter_groups(LLAMA.build().requires_grad_(False)), "lr must be given for a model without"),
    (
        lambda t: _with_scales(lambda m: seal_ops.train(m, [{"input_ids": t[0]}], column_lr=1e-3)),
        "column_lr needs a model whose weak columns are trained, got 0.001",
    ),
])  # fmt: skip
def test_one_sentence(token_ids, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong(token_ids)


def _with_scales(call):
    model = LLAMA.build()
    seal_ops.attach(model, "head")
    call(model)


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_gradient_checkpointing_changes_nothing(token_ids, rows, checkpointing):
    plain, recomputed = columns_model(token_ids, "channel"), columns_model(token_ids, "channel")
    seal_ops.train(plain, rows, lr=1e-2, column_lr=1e-3, progress=False)
    seal_ops.train(recomputed, rows, lr=1e-2, column_lr=1e-3, gradient_checkpointing=checkpointing, progress=False)
    for (name, a), b in zip(values(plain).items(), values(recomputed).values()):
        assert torch.allclose(a, b, atol=1e-6), name


def test_saved_and_resumed(token_ids, rows, tmp_path):
    """What a run saves is found by both loads; a run that stops halfway goes on bit for bit."""
    whole, halved, base = (columns_model(token_ids, "head") for _ in range(3))
    seal_ops.detach(base)
    seal_ops.detach_weak_columns(base)
    options = dict(lr=1e-2, column_lr=1e-3, epochs=2, checkpoint_every=1, progress=False)
    seal_ops.train(whole, rows, output_dir=tmp_path / "whole", **options)

    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal_ops.train(halved, rows, output_dir=tmp_path / "halved", on_step=stop, **options)
    fresh = columns_model(token_ids, "head")
    seal_ops.train(fresh, rows, output_dir=tmp_path / "halved", resume=True, **options)
    assert equal(values(whole), values(fresh))
    other = columns_model(token_ids, "head")
    with pytest.raises(ValueError, match="must come from the same model, samples and settings"):
        seal_ops.train(other, rows, output_dir=tmp_path / "halved", resume=True, **{**options, "column_lr": 2e-3})
    seal_ops.load_weak_columns(base, tmp_path / "halved")
    seal_ops.load(base, tmp_path / "halved")
    assert torch.equal(logits(base, tokens()), logits(whole, tokens()))


def test_with_a_lora_of_pefts(token_ids, rows, tmp_path):
    """Three kinds of adapter on one model: each is saved, where its own library finds it."""
    peft = pytest.importorskip("peft")
    base = LLAMA.build()
    model = copy.deepcopy(base)
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    model.seal_weak_columns.requires_grad_(True)
    seal_ops.train(wrapped, rows, lr=1e-2, column_lr=1e-3, output_dir=tmp_path, progress=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    seal_ops.load_weak_columns(loaded, tmp_path)
    assert torch.allclose(logits(loaded.eval(), tokens()), logits(wrapped.eval(), tokens()), atol=1e-5)


def test_text_and_chat(rows):
    words = tokenizer()
    model = LLAMA.build(vocab_size=len(words), max_position_embeddings=512)
    found = seal_ops.attach_weak_columns(
        model, 4, calibration=["The quick brown fox.", {"text": "It jumps."}], tokenizer=words
    )
    before = values(model)
    chat = [{"prompt": "What is it?", "answer": "A fox."}, {"text": "It jumps over the lazy dog."}]
    result = seal_ops.train(model, chat, tokenizer=words, lr=1e-3, progress=False)
    assert len(result.losses) == 2 and not equal(values(model), before) and found.count() == result.parameters


class Killed(BaseException):
    """As a signal would: nothing after it is saved."""


def trained_by_trainer(folder, model, rows, callback, resume=None, kill_at=None, **options):
    """transformers' Trainer, a rate a group; the trained values afterwards."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                raise Killed

    groups = seal_ops.parameter_groups(model, lr=1e-2, column_lr=1e-3) if options.pop("others", True) else None
    optimizer = torch.optim.AdamW(groups or seal_ops.parameter_groups(model, column_lr=1e-3))
    settings = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=1, save_steps=2, logging_steps=1,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, remove_unused_columns=False, max_grad_norm=0.3,
    )  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(**{**settings, **options}), train_dataset=rows, eval_dataset=rows,
        data_collator=seal_ops.Collator(), optimizers=(optimizer, None), callbacks=[callback, Kill()],
    )  # fmt: skip
    assert [g["lr"] for g in optimizer.param_groups] == ([1e-2, 1e-3] if groups else [1e-3])
    trainer.train(resume_from_checkpoint=resume)
    return values(model)


@pytest.mark.parametrize("save_base_model", [True, False])
@pytest.mark.parametrize("scales", ["head", None])
def test_trainer(token_ids, rows, tmp_path, scales, save_base_model):
    """A run that was killed ends, from its last checkpoint, where the whole run does; what a checkpoint holds loads."""

    def run(folder, **options):
        model, callback = columns_model(token_ids, scales), seal_ops.SealCallback(save_base_model)
        return trained_by_trainer(tmp_path / folder, model, rows, callback, others=scales is not None, **options)

    before = values(columns_model(token_ids, scales))
    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", kill_at=3)
    resumed = run("killed", resume=str(tmp_path / "killed" / "checkpoint-2"))
    assert equal(whole, resumed) and all(not torch.equal(whole[n], before[n]) for n in before)
    saved = safetensors.torch.load_file(tmp_path / "killed" / "checkpoint-4" / "model.safetensors")
    assert ("model.embed_tokens.weight" in saved) == save_base_model and set(before) < set(saved)
    assert (tmp_path / "killed" / "checkpoint-4" / "config.json").exists() == save_base_model
    loaded = columns_model(token_ids, scales)
    seal_ops.load_weak_columns(loaded, tmp_path / "killed" / "checkpoint-4")
    if scales:
        seal_ops.load(loaded, tmp_path / "killed" / "checkpoint-4")
    assert equal(values(loaded), whole)


def test_the_best_columns_come_back_and_a_killed_run_leaves_the_model_whole(token_ids, rows, tmp_path):
    model, callback = columns_model(token_ids), seal_ops.SealCallback(save_base_model=False)
    ignored = model._keys_to_ignore_on_save
    with pytest.raises(Killed):
        trained_by_trainer(tmp_path, model, rows, callback, kill_at=1, others=False)
    model.save_pretrained(tmp_path / "final")
    best = dict(save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True, save_total_limit=1)
    best |= dict(metric_for_best_model="loss", greater_is_better=True)  # the first step counts as the best one
    found = trained_by_trainer(
        tmp_path, model, rows, seal_ops.SealCallback(save_base_model=False), others=False, **best
    )
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    model.save_pretrained(tmp_path / "after")
    for folder in ("final", "after"):
        saved = safetensors.torch.load_file(tmp_path / folder / "model.safetensors")
        assert "model.embed_tokens.weight" in saved and (tmp_path / folder / "config.json").exists()
    assert model._keys_to_ignore_on_save == ignored and "save_pretrained" not in model.__dict__
    fresh = columns_model(token_ids)
    seal_ops.load_weak_columns(fresh, tmp_path / "checkpoint-1")
    assert equal(values(fresh), found)


def test_columns_beside_a_lora_resume_in_trainer(token_ids, rows, tmp_path):
    """PEFT's checkpoints hold PEFT's adapter alone; the columns come back from the files beside it."""
    peft = pytest.importorskip("peft")

    def run(folder, **options):
        model = columns_model(token_ids)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
        model.seal_weak_columns.requires_grad_(True)
        return trained_by_trainer(tmp_path / folder, wrapped, rows, seal_ops.SealCallback(), **options)

    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", kill_at=3)
    assert equal(whole, run("killed", resume=str(tmp_path / "killed" / "checkpoint-2")))
    best = dict(save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True)
    found = run("best", metric_for_best_model="loss", greater_is_better=True, max_steps=2, **best)
    saved = safetensors.torch.load_file(tmp_path / "best" / "checkpoint-1" / "weak_columns.safetensors")
    deltas = {n.removeprefix("base_model.model."): v for n, v in found.items() if n.endswith("column_delta")}
    assert deltas and all(torch.equal(v, saved[n.replace("column_delta", "delta")]) for n, v in deltas.items())


def test_the_callback_needs_something_to_save():
    with pytest.raises(ValueError, match="seal_ops.SealCallback: model must have scales attached"):
        seal_ops.SealCallback().on_init_end(None, None, None, model=LLAMA.build())
