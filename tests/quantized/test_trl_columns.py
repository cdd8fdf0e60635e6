"""TRL's SFTTrainer trains weak columns on texts and on conversations, and goes on after a kill bit for bit.

They need the package trl, which `make test` does not install; what needs no TRL is in test_training_columns.py.
"""

import pytest
import safetensors.torch
import torch
from chat_templates import chat_tokenizer
from families import FAMILIES
from transformers import TrainerCallback

import seal_ops
from seal_ops.tasks.sample import IGNORE_INDEX

trl = pytest.importorskip("trl", reason="SFTTrainer comes from the package trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("bitsandbytes")

ANSWERS = ["The quick brown fox.", "The lazy dog.", "It likes to."]
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in zip(["What jumps?", "Over what?", "Why?"], ANSWERS)
]
CHATS[0].insert(0, {"role": "system", "content": "A fox story."})
CHATS[2] += [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."}]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)


class Killed(BaseException):
    """As a signal would: nothing after it is saved."""


def run(folder, rows, scales=None, kill_at=None, resume=None, save_base_model=True, **options):
    """What a run has trained, its optimiser's state, and what the model was called with, step by step."""
    made, read = chat_tokenizer(TEMPLATE), []
    model = FAMILIES["llama"].build(vocab_size=len(made), max_position_embeddings=512)
    columns = seal_ops.attach_weak_columns(model, 4, calibration=ANSWERS, tokenizer=made, quantize="nf4")
    assert columns.config.start == "residual"
    if scales:
        seal_ops.attach(model, scales)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    rates = dict(column_lr=1e-3) | (dict(lr=1e-2) if scales else {})
    optimizer = torch.optim.AdamW(seal_ops.parameter_groups(model, **rates))
    settings = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=1, report_to=[], use_cpu=True, bf16=False,
        save_steps=2, save_strategy="steps", lr_scheduler_type="constant", max_grad_norm=0.3,
    )  # fmt: skip

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                raise Killed

    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**{**settings, **options}), train_dataset=datasets.Dataset.from_list(rows),
        processing_class=made, optimizers=(optimizer, None),
        callbacks=[Kill(), seal_ops.SealCallback(save_base_model)],
    )  # fmt: skip
    note = lambda _m, _args, given: read.append((given["input_ids"].tolist(), given["labels"].tolist()))
    model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train(resume_from_checkpoint=resume)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return values, state, read


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("scales, save_base_model", [("channel", True), (None, False)])
def test_conversations_and_a_kill(tmp_path, scales, save_base_model):
    """Weights, optimiser and order of the samples are those of a run that nobody has killed."""
    rows = [{"messages": chat} for chat in CHATS]
    options = dict(scales=scales, save_base_model=save_base_model, assistant_only_loss=True)
    whole, state, read = run(tmp_path / "whole", rows, **options)
    assert len(whole) == 14 + 2 * bool(scales) and all(bool(torch.isfinite(v).all()) for v in whole.values())
    with pytest.raises(Killed):
        run(tmp_path / "killed", rows, kill_at=5, **options)
    last = tmp_path / "killed" / "checkpoint-4"
    assert last.is_dir() and not (tmp_path / "killed" / "checkpoint-6").exists()
    resumed, resumed_state, rest = run(tmp_path / "killed", rows, resume=str(last), **options)
    assert same(whole, resumed) and all(map(torch.equal, state, resumed_state))
    assert rest == read[4:] and len({str(step) for step in read}) == len(CHATS), "the order of the samples"
    answers = [*ANSWERS[:2], ANSWERS[2] + "It is."]
    for ids, labels in read:
        said = chat_tokenizer(TEMPLATE).decode([label for label in labels[0] if label != IGNORE_INDEX])
        assert said in answers and len(labels[0]) == len(ids[0]), "the assistant's answers, no others"
    saved = safetensors.torch.load_file(last / "model.safetensors")
    assert ("model.embed_tokens.weight" in saved) == save_base_model


def test_a_checkpoint_loads_on_the_16_bit_model(tmp_path):
    values, _, _ = run(tmp_path, [{"text": text} for text in ANSWERS], max_steps=2)
    model = FAMILIES["llama"].build(vocab_size=len(chat_tokenizer(TEMPLATE)), max_position_embeddings=512)
    seal_ops.load_weak_columns(model, tmp_path / "checkpoint-2")
    assert same(values, {n: p for n, p in model.named_parameters() if p.requires_grad})
