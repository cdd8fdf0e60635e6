"""TRL's SFTTrainer trains weak columns on conversations, and resumes after a kill bit for bit."""

import copy

import pytest
import torch
from families import FAMILIES
from retrieval_fixtures import tokenizer

import seal_ops

trl = pytest.importorskip("trl", reason="SFTTrainer comes from the package trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("bitsandbytes")

CHATS = [
    [{"role": "user", "content": "What jumps?"}, {"role": "assistant", "content": "The quick brown fox."}],
    [{"role": "user", "content": "Over what?"}, {"role": "assistant", "content": "The lazy dog."}],
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It likes to."}],
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)


class Killed(BaseException):
    """As a signal would: nothing after it is saved."""


def words():
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def run(folder, kill_at=None, resume=None):
    from transformers import TrainerCallback

    made = words()
    model = FAMILIES["llama"].build(vocab_size=len(made), max_position_embeddings=512)
    texts = [" ".join(m["content"] for m in chat) for chat in CHATS]
    columns = seal_ops.attach_weak_columns(model, 4, calibration=texts, tokenizer=made, quantize="nf4")
    seal_ops.attach(model, "channel")
    frozen = copy.deepcopy(model.model.embed_tokens.weight)
    optimizer = torch.optim.AdamW(seal_ops.parameter_groups(model, lr=1e-2, column_lr=1e-3))
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=1, report_to=[], use_cpu=True, bf16=False,
        save_steps=2, save_strategy="steps", assistant_only_loss=True, lr_scheduler_type="constant",
        gradient_checkpointing=False,
    )  # fmt: skip

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                raise Killed

    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict({"messages": CHATS}), processing_class=made,
        optimizers=(optimizer, None), callbacks=[Kill(), seal_ops.SealCallback()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, columns


def test_conversations_and_a_kill(tmp_path):
    whole, columns = run(tmp_path / "whole")
    start = columns.config.start
    assert start == "residual" and len(whole) == 14 + 2 and all(bool(torch.isfinite(v).all()) for v in whole.values())
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5)
    assert (tmp_path / "killed" / "checkpoint-4").is_dir() and not (tmp_path / "killed" / "checkpoint-6").exists()
    resumed, _ = run(tmp_path / "killed", resume=str(tmp_path / "killed" / "checkpoint-4"))
    assert whole.keys() == resumed.keys()
    assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []
