"""Weak columns in training: rates by their number, with scales, text and chat, checkpoints, Trainer and TRL."""

import copy
import math

import pytest
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


@pytest.mark.parametrize("save_base_model", [True, False])
def test_trainer(token_ids, rows, tmp_path, save_base_model):
    """transformers' Trainer, a rate a group; a run from a checkpoint ends where the whole run does."""
    from transformers import Trainer, TrainingArguments

    def run(resume, steps):
        model = columns_model(token_ids, "head")
        optimizer = torch.optim.AdamW(seal_ops.parameter_groups(model, lr=1e-2, column_lr=1e-3))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=1, save_steps=2, logging_steps=1,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, remove_unused_columns=False, max_grad_norm=0.3,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=seal_ops.Collator(), optimizers=(optimizer, None),
            callbacks=[seal_ops.SealCallback(save_base_model)],
        )  # fmt: skip
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3]
        trainer.train(resume_from_checkpoint=resume)
        return model

    before = values(columns_model(token_ids, "head"))
    whole = run(None, 4)
    resumed = run(str(tmp_path / "checkpoint-2"), 4)
    assert equal(values(whole), values(resumed)) and not equal(values(whole), before)
    assert all(not torch.equal(values(whole)[n], before[n]) for n in before)


def test_trl(tmp_path):
    """TRL's SFTTrainer on a model that we have quantised."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("bitsandbytes")
    words = tokenizer()
    model = LLAMA.build(vocab_size=len(words), max_position_embeddings=512)
    texts = ["The quick brown fox jumps.", "It jumps over the lazy dog."]
    seal_ops.attach_weak_columns(model, 4, calibration=texts, tokenizer=words, quantize="nf4")
    before, frozen = values(model), copy.deepcopy(model.model.embed_tokens.weight)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(seal_ops.parameter_groups(model, column_lr=1e-3))
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict({"text": texts}), processing_class=words,
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    assert all(not torch.equal(v, before[n]) for n, v in values(model).items()) and len(before) == 14
    assert torch.equal(model.model.embed_tokens.weight, frozen)
