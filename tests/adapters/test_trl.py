"""TRL's trainers on models with scales: SFT with packing and without padding, DPO's reference. They need the package
trl, which `make test` does not install; what needs no TRL is in tests/huggingface/test_packed_rows.py."""

import pytest
import torch
import transformers
from chat_templates import MODEL
from families import FAMILIES, randomise

import seal_ops
from seal_ops.huggingface import attention

trl = pytest.importorskip("trl", reason="TRL's trainers are tested where the package trl is installed")
datasets = pytest.importorskip("datasets")

SETTINGS = dict(
    max_steps=2,
    per_device_train_batch_size=4,
    learning_rate=0.05,
    weight_decay=0.0,
    lr_scheduler_type="constant",
    optim="sgd",
    max_grad_norm=0.0,
    gradient_checkpointing=False,
    bf16=False,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    save_strategy="no",
    logging_steps=1,
    seed=0,
)
TEXTS = ["the first line is short", "a second, which is longer than the first one", "three", "and a fourth line"] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def attached(tokenizer, granularity="channel"):
    model = FAMILIES["llama"].build(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    randomise(seal_ops.attach(model, granularity))
    return model


def spied(monkeypatch):
    """The fused calls: lengths of cu_seqlens, or None for rows that are not packed."""
    calls = []
    for name in ("attention", "rope_attention", "_composed"):

        def spy(*args, _name=name, _function=getattr(attention, name), **kwargs):  # noqa: B008
            lengths = kwargs.get("cu_seqlens")
            calls.append((_name, None if lengths is None else len(lengths) - 1, kwargs.get("max_seqlen")))
            return _function(*args, **kwargs)

        monkeypatch.setattr(attention, name, spy)
    return calls


def sft(tmp_path, tokenizer, model=None, resume=None, callbacks=None, **options):
    model = attached(tokenizer) if model is None else model
    rows = datasets.Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS])
    config = trl.SFTConfig(str(tmp_path), **{**SETTINGS, "max_length": None, **options})
    trainer = trl.SFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks or [seal_ops.SealCallback()]
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [scale.detach().clone() for _, scale in model.seal_scales.items()]


def test_padding_free_learns_what_padding_does(tmp_path, tokenizer, monkeypatch):
    losses, scales = sft(tmp_path, tokenizer)
    calls = spied(monkeypatch)
    free_losses, free_scales = sft(tmp_path, tokenizer, padding_free=True)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert calls and all(name == "attention" and n == 4 and most in lengths for name, n, most in calls)
    assert free_losses == pytest.approx(losses, rel=1e-4)
    for a, b in zip(scales, free_scales):
        assert (a - b).abs().max() <= 1e-4 < (a - 1).abs().max()


def test_packing_by_best_fit_learns_from_each_text_alone(tmp_path, tokenizer, monkeypatch):
    """One step on all texts, packed, is one step on all texts, padded."""
    once = dict(max_steps=1, per_device_train_batch_size=8)
    losses, scales = sft(tmp_path, tokenizer, **once)
    calls = spied(monkeypatch)
    packed_losses, packed_scales = sft(tmp_path, tokenizer, packing=True, max_length=256, **once)
    assert calls and all(name == "attention" and n == len(TEXTS) for name, n, _ in calls)
    assert packed_losses == pytest.approx(losses, rel=1e-4)
    for a, b in zip(scales, packed_scales):
        assert (a - b).abs().max() <= 1e-4 < (a - 1).abs().max()


def test_wrapped_packing_mixes_texts_as_trl_means_it_to(tmp_path, tokenizer, monkeypatch):
    calls = spied(monkeypatch)
    losses, _ = sft(tmp_path, tokenizer, packing=True, packing_strategy="wrapped", max_length=16)
    assert len(losses) == 2 and ("rope_attention", None, None) in calls
    assert "_composed" not in [name for name, *_ in calls]  # the last row is shorter, so its batch is padded


def test_resuming_goes_on_exactly(tmp_path, tokenizer):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, padding_free=True)
    callbacks = [seal_ops.SealCallback(save_base_model=False)]
    losses, scales = sft(tmp_path, tokenizer, callbacks=callbacks, **options)
    again, resumed = sft(
        tmp_path, tokenizer, callbacks=[seal_ops.SealCallback(False)], resume=str(tmp_path / "checkpoint-2"), **options
    )
    assert again == losses and all(torch.equal(a, b) for a, b in zip(scales, resumed))


# -- preferences -------------------------------------------------------------------------------------------------------
PAIRS = [
    {"prompt": text, "chosen": f" {number} yes", "rejected": f" {number} no, not at all"}
    for number, text in enumerate(TEXTS[:4])
]


def log_probabilities(model, tokenizer, kind):
    """log p(completion | prompt) of every pair, one by one."""
    found = []
    for pair in PAIRS:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        whole = tokenizer(pair["prompt"] + pair[kind])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model(torch.tensor([whole]), use_cache=False).logits.log_softmax(-1)[0]
        found.append(sum(logs[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
    return found


def dpo(tmp_path, tokenizer, model, reference=None, **options):
    config = trl.DPOConfig(str(tmp_path), **{**SETTINGS, "max_steps": 3, "beta": 0.1, "max_length": None, **options})
    rows = datasets.Dataset.from_list(PAIRS)
    return trl.DPOTrainer(
        model,
        ref_model=reference,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[seal_ops.SealCallback()],
    )


@pytest.mark.parametrize("scales", ["off", "frozen"])
def test_dpo_with_a_reference_on_the_same_weights(tmp_path, tokenizer, scales):
    model = attached(tokenizer)
    with seal_ops.disabled(model):
        base = [log_probabilities(model, tokenizer, kind) for kind in ("chosen", "rejected")]
    expected = base if scales == "off" else [log_probabilities(model, tokenizer, k) for k in ("chosen", "rejected")]
    trainer = dpo(tmp_path, tokenizer, model, seal_ops.reference_model(model, scales=scales))
    before = [scale.detach().clone() for scale in model.seal_scales.parameters()]
    trainer.train()
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, model.seal_scales.parameters()))
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    got = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    for mine, theirs in zip(got, expected):
        assert sorted(mine.tolist()) == pytest.approx(sorted(theirs), rel=1e-4)
    assert sorted(expected[0]) == pytest.approx(sorted(base[0]), rel=1e-4) or scales == "frozen"


def test_dpo_with_log_probabilities_computed_before(tmp_path, tokenizer):
    """Scales that are 1 before training are the base; scales that were loaded are the reference as they are."""
    model = attached(tokenizer)
    expected = log_probabilities(model, tokenizer, "chosen")
    trainer = dpo(tmp_path, tokenizer, model, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    assert sorted(trainer.train_dataset["ref_chosen_logps"]) == pytest.approx(sorted(expected), rel=1e-4)
    trainer.train()


def learns(trainer, model):
    before = [scale.detach().clone() for scale in model.seal_scales.parameters()]
    trainer.train()
    return all((a - b).abs().max() > 1e-4 for a, b in zip(before, model.seal_scales.parameters()))


def named(tokenizer, folder):
    """A model with scales whose base lies on disk, where TRL looks for it."""
    FAMILIES["llama"].build(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    randomise(seal_ops.attach(model))
    return model


def test_without_a_reference_a_sentence_says_so(tmp_path, tokenizer):
    model = named(tokenizer, tmp_path / "base")
    with pytest.raises(RuntimeError, match="must have a config of its own, its config says attn_implementation='seal'"):
        dpo(tmp_path, tokenizer, model).train()


def test_kto_with_a_reference(tmp_path, tokenizer):
    model = attached(tokenizer)
    rows = [dict(prompt=pair["prompt"], completion=pair["chosen"], label=n % 2 == 0) for n, pair in enumerate(PAIRS)]
    trainer = trl.KTOTrainer(
        model,
        ref_model=seal_ops.reference_model(model),
        args=trl.KTOConfig(str(tmp_path), **SETTINGS, max_length=None),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert learns(trainer, model)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(tmp_path, tokenizer, beta):
    """With a KL term TRL loads the reference itself, under the name of attention that it is told."""
    model = named(tokenizer, tmp_path / "base")
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(
            str(tmp_path),
            **SETTINGS,
            num_generations=4,
            max_completion_length=8,
            beta=beta,
            model_init_kwargs={"attn_implementation": "sdpa"} if beta else None,
        ),
        train_dataset=datasets.Dataset.from_list([dict(prompt=pair["prompt"]) for pair in PAIRS]),
        processing_class=tokenizer,
    )
    assert learns(trainer, model)
    if beta:
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert len(kl) == 2 and min(kl) > 0
