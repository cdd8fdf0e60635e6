"""Training: the recipe, repeatability, resuming after a kill, checks, checkpointing, and transformers' Trainer."""

import json
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from installed import environment
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.training.checkpoint import NAME as CHECKPOINT
from seal_ops.training.collator import Collator
from seal_ops.training.loop import train

SAMPLES = tasks.lines(tokenizer(), length=190, samples=6)


def with_scales(granularity="head", **options):
    lm = model(**options).eval()
    seal_ops.attach(lm, granularity)
    return lm


def values(lm):
    return {layer: scale.detach().clone() for layer, scale in lm.seal_scales.items()}


def same(one, other):
    return all(torch.equal(one[layer], other[layer]) for layer in one)


@pytest.mark.parametrize("granularity, lr", [("head", 1e-2), ("channel", 2e-2)])
def test_recipe(granularity, lr):
    lm = with_scales(granularity)
    frozen = {n: p.detach().clone() for n, p in lm.named_parameters() if not p.requires_grad}
    result = train(lm, SAMPLES)
    assert not lm.training, "the mode is left as found"
    assert result.lr == lr and len(result.losses) == len(SAMPLES)
    assert result.parameters == 2 * 4 * (8 if granularity == "channel" else 1)
    assert result.peak_memory > 0 and result.seconds > 0
    assert all(torch.equal(p, frozen[n]) for n, p in lm.named_parameters() if n in frozen)
    assert not same(values(lm), {layer: torch.ones_like(s) for layer, s in lm.seal_scales.items()})


def test_learns():
    """The loss on the training samples falls, for one sample a step and for padded batches."""
    for options in ({}, {"batch_size": 3}, {"batch_size": 2, "accumulate": 2}):
        lm = with_scales("channel")
        losses = train(lm, SAMPLES, epochs=16, lr=5e-2, **options).losses
        epoch = len(losses) // 16
        assert sum(losses[-epoch:]) < 0.9 * sum(losses[:epoch]), options


def test_first_step_by_hand():
    """Loss and update equal those written out with full logits."""
    lm = with_scales("channel")
    twin = with_scales("channel")
    loss = train(lm, SAMPLES[:1], lr=1e-3).losses[0]
    ids, labels = torch.tensor([SAMPLES[0].input_ids]), torch.tensor([SAMPLES[0].labels])
    expected = F.cross_entropy(twin(ids).logits[0, :-1], labels[0, 1:])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    optimizer = torch.optim.AdamW([s for _, s in twin.seal_scales.items()], lr=1e-3, weight_decay=0)
    optimizer.step()
    for layer, scale in twin.seal_scales.items():
        torch.testing.assert_close(lm.seal_scales.layers[str(layer)].scale, scale, rtol=0, atol=2e-5)


def test_batches_and_accumulation_give_one_gradient():
    runs = []
    for options in ({"batch_size": 6}, {"batch_size": 2, "accumulate": 3}, {"accumulate": 6}):
        lm = with_scales("channel")
        runs.append((train(lm, SAMPLES, **options).losses, values(lm)))
    for losses, found in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for layer in found:
            torch.testing.assert_close(found[layer], runs[0][1][layer], rtol=0, atol=1e-4)


def test_seed_repeats():
    runs = []
    for seed in (5, 5, 6):
        lm = with_scales()
        state = torch.get_rng_state()
        train(lm, SAMPLES, seed=seed)
        assert torch.equal(state, torch.get_rng_state()), "the caller's random state is left alone"
        runs.append(values(lm))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


KILLED = """
import os, signal, sys, torch
sys.path[:0] = [{tests!r}, {fixtures!r}]
torch.set_num_threads({threads})
import test_train
def on_step(step, loss):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
test_train.train(test_train.with_scales("channel"), test_train.SAMPLES, epochs=2, checkpoint_every=3,
                 output_dir={folder!r}, on_step=on_step)
"""


def test_resume_after_kill_is_bit_for_bit(tmp_path, request):
    folder = str(tmp_path / "run")
    whole = with_scales("channel")
    expected = train(whole, SAMPLES, epochs=2)
    script = KILLED.format(
        tests=str(request.path.parent),
        fixtures=str(request.path.parents[1] / "fixtures"),
        threads=torch.get_num_threads(),
        folder=folder,
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".seal.lock", CHECKPOINT]

    lm, steps = with_scales("channel"), []
    result = train(
        lm, SAMPLES, epochs=2, checkpoint_every=3, output_dir=folder, resume=True, on_step=lambda n, _: steps.append(n)
    )
    assert steps == [7, 8, 9, 10, 11, 12], "continued from the checkpoint of step 6"
    assert result.losses == expected.losses
    assert same(values(lm), values(whole))
    # A finished run is not run again, and its scales come back.
    again = with_scales("channel")
    train(again, SAMPLES, epochs=2, output_dir=folder, resume=True, on_step=lambda n, _: steps.append(n))
    assert len(steps) == 6 and same(values(again), values(whole))
    loaded = model()
    seal_ops.load(loaded, folder)
    assert same(values(loaded), values(whole))
    assert json.loads((tmp_path / "run" / "training.json").read_text())["losses"] == expected.losses


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(with_scales(), SAMPLES[:2], output_dir=tmp_path)
    for change in ({"lr": 3e-2}, {"seed": 1}):
        with pytest.raises(ValueError, match="must come from the same model, samples and settings to resume"):
            train(with_scales(), SAMPLES[:2], output_dir=tmp_path, resume=True, **change)
    with pytest.raises(ValueError, match="must come from the same model"):
        train(with_scales(), SAMPLES[1:3], output_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="must come from the same model"):
        train(with_scales(seed=1), SAMPLES[:2], output_dir=tmp_path, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"junk")
    with pytest.raises(ValueError, match="must be a checkpoint"):
        train(with_scales(), SAMPLES[:2], output_dir=tmp_path, resume=True)


@pytest.mark.parametrize("kind", [True, "selective"])
def test_gradient_checkpointing_changes_nothing(kind):
    plain, checkpointed = with_scales("channel"), with_scales("channel")
    train(plain, SAMPLES[:3])
    train(checkpointed, SAMPLES[:3], gradient_checkpointing=kind)
    for layer, scale in values(plain).items():
        torch.testing.assert_close(values(checkpointed)[layer], scale, rtol=0, atol=1e-6)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())


def test_selective_checkpointing_runs_attention_once():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func in (torch.ops.seal.attention.default, torch.ops.seal.rope_attention.default)
            return func(*args, **(kwargs or {}))

    counts = []
    for kind in (False, "selective", True):
        with Count() as counter:
            train(with_scales(), SAMPLES[:1], gradient_checkpointing=kind)
        counts.append(counter.calls)
    assert counts[0] == counts[1] < counts[2]


def test_scale_without_gradient_is_named():
    lm = with_scales()
    layer = lm.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *a, **k: forward(*a, **k).detach()  # cuts the graph, as reentrant checkpointing can
    lm.lm_head.weight.requires_grad_(True)  # so that there is a graph at all
    with pytest.raises(RuntimeError, match=r"got no gradient for seal_scales\.layers\.0\.scale"):
        train(lm, SAMPLES[:1])


def test_gradient_that_is_not_finite_is_named():
    lm = with_scales()
    lm.seal_scales.layers["1"].scale.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RuntimeError, match=r"got a gradient that is not finite for seal_scales\.layers\.1\.scale"):
        train(lm, SAMPLES[:1])


def test_bf16_model_trains_fp32_scales():
    lm = with_scales(dtype=torch.bfloat16)
    train(lm, SAMPLES[:2], lr=1e-3)
    for _, scale in lm.seal_scales.items():
        assert scale.dtype == torch.float32
        assert ((scale - 1).abs() > 0).all() and ((scale - 1).abs() < 3e-3).all(), "steps below bf16's were kept"


def _bf16_scales():
    lm = with_scales()
    scale = lm.seal_scales.layers["1"]
    scale.scale = torch.nn.Parameter(scale.scale.bfloat16())
    return lm


def _frozen_scale():
    lm = with_scales()
    lm.seal_scales.layers["0"].scale.requires_grad_(False)
    return lm


@pytest.mark.parametrize(
    "make, options, message",
    [
        (
            model,
            {},
            "must have scales attached .* got a LlamaForCausalLM without scales and with every parameter trainable",
        ),
        (lambda: model().requires_grad_(False), {}, "without scales and with no trainable parameter"),
        (_bf16_scales, {}, "scales must be torch.float32 .* got torch.bfloat16 in layer 1"),
        (_frozen_scale, {}, "every scale must require gradients, got layer 0's frozen"),
        (with_scales, {"samples": []}, "must hold at least one sample, got none"),
        (with_scales, {"samples": [SAMPLES[0], "text"]}, r"samples\[1\] must be a Sample, or a dict .* got str"),
        (with_scales, {"samples": None}, "samples must be a list of samples, got None"),
        (with_scales, {"epochs": 0}, "epochs must be at least 1, got 0"),
        (with_scales, {"epochs": "2"}, "epochs must be an integer, got '2'"),
        (with_scales, {"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        (with_scales, {"accumulate": None}, "accumulate must be an integer, got None"),
        (with_scales, {"seed": float("nan")}, "seed must be an integer, got nan"),
        (with_scales, {"seed": 2**80}, "seed must be at most 1099511627776, got "),
        (with_scales, {"lr": "1e-2"}, "lr must be a finite number, got '1e-2'"),
        (with_scales, {"lr": float("nan")}, "lr must be a finite number, got nan"),
        (with_scales, {"lr": -1}, "lr must be at least 0, got -1"),
        (with_scales, {"weight_decay": None}, "weight_decay must be a finite number, got None"),
        (with_scales, {"betas": 0.9}, "betas must be two numbers from 0 to below 1, got 0.9"),
        (with_scales, {"betas": (0.9, 1.0)}, r"betas must be two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        (with_scales, {"max_grad_norm": 0}, "max_grad_norm must be above 0, got 0"),
        (with_scales, {"checkpoint_every": "5"}, "checkpoint_every must be an integer, got '5'"),
        (with_scales, {"on_step": 3}, "on_step must be a function, got 3"),
        (with_scales, {"output_dir": ""}, "output_dir must be a path, got ''"),
        (with_scales, {"resume": True}, "resume needs output_dir"),
        (with_scales, {"gradient_checkpointing": "all"}, "must be 'auto', False, True or 'selective', got 'all'"),
    ],
)
def test_errors_are_one_sentence(make, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(make(), **{"samples": SAMPLES[:1], **options})
    assert "\n" not in str(caught.value)


def test_without_gradients():
    lm = with_scales()
    with torch.no_grad(), pytest.raises(ValueError, match="gradients must be on, got a call inside torch.no_grad"):
        train(lm, SAMPLES[:1])
    with seal_ops.disabled(lm), pytest.raises(RuntimeError, match="the loss must depend on what is trained"):
        train(lm, SAMPLES[:1])


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**70])
@pytest.mark.parametrize("place", ["input_ids", "labels"])
def test_samples_of_another_tokenizer_are_told(place, wrong):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    row[place] = [5, 6, wrong]
    with pytest.raises(ValueError, match=rf"samples\[1\] must hold token ids from 0 to \d+ .* got {wrong}"):
        train(with_scales(), [SAMPLES[0], row])


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir must be a writable folder, got .*file"):
        train(with_scales(), SAMPLES[:1], output_dir=tmp_path / "file")


def test_lora_needs_a_rate_and_trains(tmp_path):
    peft = pytest.importorskip("peft")
    lm = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="lr must be given for a model without attached scales"):
        train(lm, SAMPLES[:1])
    result = train(lm, SAMPLES, lr=1e-2, epochs=3, output_dir=tmp_path)
    assert result.losses[-1] < result.losses[0]
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_collator():
    short = tasks.Sample([5, 6], [7, 8])
    long = tasks.Sample([1, 2, 3], [4, 9])
    batch = Collator(pad_token_id=11)([short, long])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 11], [1, 2, 3, 4, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100], [-100, -100, -100, 4, 9]]
    assert batch["logits_to_keep"].tolist() == [1, 2, 3]
    assert batch["shift_labels"].tolist() == [[7, 8, -100], [-100, 4, 9]]


@pytest.mark.parametrize("label_positions_only", [True, False])
def test_transformers_trainer(tmp_path, label_positions_only):
    """One epoch of Trainer with the same recipe gives the same scales."""
    from transformers import Trainer, TrainingArguments

    lm, ours = with_scales("channel"), with_scales("channel")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        num_train_epochs=2,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model=lm,
        args=arguments,
        train_dataset=SAMPLES,
        data_collator=Collator(label_positions_only=label_positions_only),
    ).train()
    train(ours, SAMPLES, batch_size=6, epochs=2)
    for layer, scale in values(ours).items():
        torch.testing.assert_close(values(lm)[layer], scale, rtol=0, atol=1e-4)
