"""PEFT's learned prompts: trained at the right positions, and part of what is evaluated."""

import pytest
import torch
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.evaluation.decoding import generate
from seal_ops.evaluation.logprobs import answer_logprobs
from seal_ops.huggingface.identity import fingerprint

peft = pytest.importorskip("peft")
SAMPLES = tasks.lines(tokenizer(), length=190, samples=2)
CONFIGS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False),
}


def adapted(kind):
    lm = model()
    torch.manual_seed(1)
    return peft.get_peft_model(lm, CONFIGS[kind]()).eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_the_models_own(kind):
    lm, sample = adapted(kind), SAMPLES[0]
    expected = lm(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss.item()
    assert seal_ops.train(lm, [sample], lr=0.0).losses[0] == pytest.approx(expected, rel=1e-4)
    logprob, _ = answer_logprobs(lm, torch.tensor([sample.input_ids]), sample)
    assert -logprob.item() / len(sample.answer_ids) == pytest.approx(expected, rel=1e-4)
    assert seal_ops.train(lm, SAMPLES, lr=1e-2, epochs=4).losses[-1] < expected


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_outputs_are_the_adapted_models(kind):
    lm, tok = adapted(kind), tokenizer()
    texts = ["The record is over.\n", "Tell me the number in line 1 2 3?\n"]
    prompts = [tok(text)["input_ids"] for text in texts]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tok.eos_token_id:
                break
        expected.append(tok.decode(ids[len(prompt) :], skip_special_tokens=True).lstrip())
    assert generate(lm, tok, prompts, max_new_tokens=6) == expected
    assert [generate(lm, tok, [prompt], max_new_tokens=6)[0] for prompt in prompts] == expected
    before = fingerprint(lm)
    with lm.disable_adapter():
        assert fingerprint(lm) != before
        assert generate(lm, tok, prompts, max_new_tokens=6) != expected, "the prompt counts"
