"""The method on a GPU: the identity of a model there, batches that do not fit, and a run that is resumed."""

import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from retrieval_fixtures import model, tokenizer

import seal_ops
from seal_ops import tasks
from seal_ops.huggingface import identity
from seal_ops.huggingface.identity import fingerprint


def test_the_identity_sees_every_bit_on_the_gpu():
    lm = model().cuda().eval()
    seen = [fingerprint(lm)]
    assert fingerprint(lm) == seen[0] != fingerprint(model().eval()), "not that of the CPU, which computes otherwise"
    weight = lm.model.layers[1].self_attn.o_proj.weight.data

    def bit():
        weight.view(torch.int32)[-1, -1].bitwise_xor_(1)

    def signs():
        weight[3, [4, 9]] *= -1

    def columns():
        weight[:, 1:] *= 2

    def frequencies():
        lm.model.rotary_emb.inv_freq *= 0.5

    for change in (bit, signs, columns, frequencies, lm.bfloat16):
        change()
        seen.append(fingerprint(lm))
    assert len(set(seen)) == len(seen)


def test_sums_are_those_of_the_cpu():
    values = torch.randn(3 * identity.BLOCK + 5, dtype=torch.bfloat16)
    flat = values.view(torch.uint8)
    assert identity._sums(flat.cuda()) == identity._sums(flat)


def test_fourteen_gigabytes_take_seconds():
    weights = torch.randn(2**30, device="cuda").bfloat16()  # 2 GB
    identity._contents(weights)
    torch.cuda.synchronize()
    started = time.monotonic()
    identity._contents(weights)
    seconds = time.monotonic() - started
    print(f"{weights.nbytes / seconds / 1e9:.0f} GB/s")
    assert 7 * seconds < 10


def test_an_evaluation_goes_on_with_less_where_memory_ends(monkeypatch):
    """More prompts than fit: the batch is halved, which is said, and the outputs stay."""
    from seal_ops.evaluation import runner

    lm, tok, original = model().cuda().eval(), tokenizer(), runner.generate
    whole = seal_ops.evaluate(lm, tok, "lines", 300, 8, batch_size=8, max_new_tokens=8)

    def hungry(lm, tok, prompts, **options):
        if len(prompts) > 2:
            torch.empty(2**46, dtype=torch.uint8, device="cuda")
        return original(lm, tok, prompts, **options)

    monkeypatch.setattr(runner, "generate", hungry)
    with pytest.warns(UserWarning, match="do not fit into the GPU's memory; going on with 2"):
        less = seal_ops.evaluate(lm, tok, "lines", 300, 8, batch_size=8, max_new_tokens=8)
    assert [r["output"] for r in less.records] == [r["output"] for r in whole.records]


def test_a_resumed_run_ends_alike(tmp_path, monkeypatch):
    """With dropout, so that the GPU's random state counts."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    samples = tasks.lines(tokenizer(), 190, 6)

    def made():
        lm = model().eval()
        lm.model.layers[0].mlp.register_forward_hook(lambda m, _, output: F.dropout(output, 0.3, m.training))
        lm = lm.cuda()
        seal_ops.attach(lm, "channel")
        return lm

    class Killed(Exception):
        pass

    def kill(step, loss):
        if step == 5:
            raise Killed

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = seal_ops.train(made(), samples)
            with pytest.raises(Killed):
                seal_ops.train(made(), samples, checkpoint_every=2, output_dir=tmp_path, on_step=kill)
            resumed = seal_ops.train(made(), samples, checkpoint_every=2, output_dir=tmp_path, resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert resumed.losses == pytest.approx(expected.losses, rel=1e-5)
