"""transformers' Trainer with scales: resuming, the best checkpoint, what is on disk, with the callback and without."""

import shutil
import sys
import types
import warnings

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from families import FAMILIES, tokens

import seal_ops
from seal_ops.adapters.files import WEIGHTS_FILE

pytest.importorskip("accelerate")
LLAMA = FAMILIES["llama"]
BATCH = [dict(input_ids=row, labels=row) for row in tokens(8, 12, seed=3)]


def trainer(folder, model, callbacks, steps=8, **options):
    settings = dict(
        max_steps=steps,
        save_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
    )
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    return transformers.Trainer(model, arguments, train_dataset=BATCH, eval_dataset=BATCH, callbacks=callbacks)


def trained(folder, callbacks, granularity="channel", resume=None, **options):
    """The scales after a run of the Trainer."""
    model = LLAMA.build()
    scales = seal_ops.attach(model, granularity)
    trainer(folder, model, callbacks, **options).train(resume_from_checkpoint=resume)
    return {layer: scale.detach().clone() for layer, scale in scales.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("save_base_model", [True, False])
def test_eight_steps_are_four_and_a_resume(tmp_path, save_base_model, granularity):
    whole = trained(tmp_path, [seal_ops.SealCallback(save_base_model)], granularity)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds no scales")
        resumed = trained(
            tmp_path, [seal_ops.SealCallback(save_base_model)], granularity, resume=str(tmp_path / "checkpoint-4")
        )
    assert same(whole, resumed)
    assert all((scale - 1).abs().max() > 0.05 for scale in whole.values())


def test_a_checkpoint_of_a_whole_model(tmp_path):
    whole = trained(tmp_path, [seal_ops.SealCallback()], steps=4)
    folder = tmp_path / "checkpoint-4"
    assert (folder / "seal_scales" / "default" / WEIGHTS_FILE).exists()
    model = LLAMA.build()
    assert same(whole, {n: s.detach() for n, s in seal_ops.load(model, folder).items()})
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert "model.embed_tokens.weight" in weights and "seal_scales.layers.1.scale" in weights


def test_a_checkpoint_without_the_base_model(tmp_path):
    whole = trained(tmp_path, [seal_ops.SealCallback(save_base_model=False)], steps=4)
    folder = tmp_path / "checkpoint-4"
    names = set(safetensors.torch.load_file(folder / "model.safetensors"))
    assert names == {f"seal_scales.layers.{n}.scale" for n in whole}
    assert same(whole, {n: s.detach() for n, s in seal_ops.load(LLAMA.build(), folder).items()})
    with pytest.raises((OSError, ValueError), match="config.json"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("save_base_model", [True, False])
def test_the_best_checkpoint_comes_back(tmp_path, save_base_model):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "head")
    run = trainer(
        tmp_path,
        model,
        [seal_ops.SealCallback(save_base_model)],
        steps=4,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        save_total_limit=1,
    )  # the first step counts as the best one
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[0] == max(losses) > losses[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert same(
        {n: s.detach() for n, s in scales.items()},
        {n: s.detach() for n, s in seal_ops.load(LLAMA.build(), tmp_path / "checkpoint-1").items()},
    )
    run.save_model(tmp_path / "final")  # a whole model again, with plain weights
    weights = safetensors.torch.load_file(tmp_path / "final" / "model.safetensors")
    assert "model.embed_tokens.weight" in weights and not any("seal_scales" in n for n in weights)


def test_the_callback_resumes_what_was_saved_without_it(tmp_path):
    whole = trained(tmp_path, [])
    with pytest.warns(UserWarning, match="holds no scales"):
        assert not same(whole, trained(tmp_path / "again", [], resume=str(tmp_path / "checkpoint-4")))
    assert same(whole, trained(tmp_path, [seal_ops.SealCallback()], resume=str(tmp_path / "checkpoint-4")))
    elsewhere = [seal_ops.SealCallback(resume_from=tmp_path / "checkpoint-4")]
    assert same(whole, trained(tmp_path / "more", elsewhere, resume=str(tmp_path / "checkpoint-4")))
    with pytest.raises(ValueError, match="seal_ops.SealCallback: resume_from must name the checkpoint"):
        trained(tmp_path / "third", [seal_ops.SealCallback()], resume=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("order", ["attach first", "LoRA first"])
def test_scales_and_lora_resume_together(tmp_path, peft, order):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=True)

    def run(folder, resume=None):
        torch.manual_seed(0)
        model = LLAMA.build()
        if order == "attach first":
            scales = seal_ops.attach(model, "head")
            model = peft.get_peft_model(model, config)
            scales.requires_grad_(True)
        else:
            model = peft.get_peft_model(model, config)
            scales = seal_ops.attach(model, "head")
        trainer(folder, model, [seal_ops.SealCallback()]).train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path)
    assert sum("seal_scales" in n for n in whole) == 2 and sum("lora_" in n for n in whole) == 4
    assert same(whole, run(tmp_path, str(tmp_path / "checkpoint-4")))


@pytest.mark.parametrize("save_base_model", [True, False])
def test_a_model_is_saved_whole_after_an_interrupted_run(tmp_path, save_base_model):
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    model = LLAMA.build()
    scales = seal_ops.attach(model)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, [seal_ops.SealCallback(save_base_model), Interrupt()]).train()
    model.save_pretrained(tmp_path / "final")
    loaded, info = type(model).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert same(
        {n: s.detach() for n, s in seal_ops.load(loaded, tmp_path / "final").items()},
        {n: s.detach() for n, s in scales.items()},
    )


class Uploads:
    """Stands for the hub: what each upload of the Trainer holds, copied."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.found = folder, []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *a, **k: types.SimpleNamespace(repo_id="me/x"))
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.take)
        for name, module in list(sys.modules.items()):  # by name, where the Trainer holds the functions
            if name.startswith("transformers"):
                for function in ("create_repo", "upload_folder"):
                    if function in vars(module):
                        monkeypatch.setattr(module, function, getattr(huggingface_hub.HfApi(), function))

    def take(self, *args, folder_path, ignore_patterns=None, path_in_repo=None, **kwargs):
        copied = self.folder / str(len(self.found))
        shutil.copytree(folder_path, copied, ignore=shutil.ignore_patterns(*(ignore_patterns or [])))
        self.found.append(copied)
        done = lambda *a: True
        return types.SimpleNamespace(is_done=done, done=done, result=lambda *a: None)


def pushing(tmp_path, monkeypatch, callback):
    """A run of four steps that uploads at the second and at the fourth, and is not over."""
    uploads, model = Uploads(monkeypatch, tmp_path / "hub"), LLAMA.build()
    scales = seal_ops.attach(model, "channel")
    options = dict(
        push_to_hub=True, hub_model_id="me/x", hub_strategy="every_save", hub_always_push=True, hub_token="t"
    )
    run = trainer(tmp_path / "run", model, [callback], steps=4, save_steps=2, **options)
    run.train()
    return uploads, run, model, scales


def test_uploads_of_a_run_hold_the_scales(tmp_path, monkeypatch):
    """What a run that dies leaves on the hub can be loaded, at every step."""
    uploads, run, model, scales = pushing(tmp_path, monkeypatch, seal_ops.SealCallback())
    assert len(uploads.found) == 2
    for step, folder in zip((2, 4), uploads.found):
        fresh = transformers.AutoModelForCausalLM.from_pretrained(folder)
        found = {n: s.detach() for n, s in seal_ops.load(fresh, folder).items()}
        saved = LLAMA.build()
        expected = seal_ops.load(saved, tmp_path / "run" / f"checkpoint-{step}")
        assert same(found, {n: s.detach() for n, s in expected.items()})
    seal_ops.merge(model)
    monkeypatch.setattr(run, "create_model_card", lambda **_: None)
    run.push_to_hub()
    last = uploads.found[-1]
    assert len(uploads.found) == 3 and not (last / "seal_scales").exists(), "merged, and applied twice with them"


def test_uploads_without_the_base_are_no_models(tmp_path, monkeypatch):
    uploads, *_ = pushing(tmp_path, monkeypatch, seal_ops.SealCallback(save_base_model=False))
    for folder in uploads.found:
        assert not (folder / "config.json").exists(), "a model with random weights"
        assert (folder / "seal_scales" / "default" / WEIGHTS_FILE).exists()


# -- what a Trainer would do wrong -----------------------------------------------------------------------------------


def test_smoothed_labels_need_all_logits(tmp_path):
    def run(collate, **options):
        model = LLAMA.build()
        scales = seal_ops.attach(model, "head")
        made = trainer(tmp_path, model, [seal_ops.SealCallback()], 1, label_smoothing_factor=0.1, **options)
        made.data_collator = collate
        made.train()
        return scales

    for options in ({}, {"remove_unused_columns": False}):
        with pytest.raises(ValueError, match="SealCallback: label_smoothing_factor must be 0 with seal_ops.Collator"):
            run(seal_ops.Collator(), **options)
    scales = run(seal_ops.Collator(label_positions_only=False), save_strategy="no")
    assert any((scale != 1).any() for _, scale in scales.items())


def test_a_part_with_scales_goes_on_where_it_stopped(tmp_path):
    def run(resume=None, **options):
        whole = LLAMA.build()
        scales = seal_ops.attach(whole.model, "channel")
        whole.lm_head.requires_grad_(False)  # outside of what was attached to
        trainer(tmp_path, whole, [seal_ops.SealCallback(**options)]).train(resume_from_checkpoint=resume)
        return {layer: scale.detach().clone() for layer, scale in scales.items()}

    expected = run()
    assert same(run(str(tmp_path / "checkpoint-4")), expected)
    assert same(seal_ops.load(LLAMA.build(), tmp_path / "checkpoint-8").values(), expected)
    with pytest.raises(
        ValueError, match="save_base_model=False must have the scales on the Trainer's model itself, got"
    ):
        run(save_base_model=False)
