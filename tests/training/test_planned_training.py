"""Training under a plan: what is planned and stated, resumed, and lowered where memory ends."""

import contextlib
import dataclasses
import json

import pytest
import torch
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.huggingface.modes import mode
from seal_ops.training import loop
from seal_ops.training.checkpoint import NAME as CHECKPOINT
from seal_ops.training.checkpoint import load_checkpoint
from seal_ops.training.memory_plan import measuring, memory
from seal_ops.training.memory_plan.execution import EVERYTHING
from seal_ops.training.memory_plan.planned_model import PlannedModel
from seal_ops.training.memory_plan.planning import Plan, Planner
from seal_ops.training.processes import Processes
from seal_ops.training.step import OptimizerStep

SAMPLES = tasks.lines(tokenizer(), length=190, samples=4)


def trainable(granularity="channel", **options):
    lm = model(**options).eval()
    seal_ops.attach(lm, granularity)
    return lm


def values(lm):
    return [scale.detach().clone() for _, scale in lm.seal_scales.items()]


@contextlib.contextmanager
def free(monkeypatch, count):
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free", lambda device: count)
        yield


def test_a_measurement_that_fails_stops_no_run(monkeypatch):
    plain = loop.train(trainable(), SAMPLES[:1], gradient_checkpointing=False).losses

    def fail(*_):
        raise RuntimeError("no short samples\nplease")

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Measurement, "_look", fail)
        for setting in (False, True, "selective"):
            assert loop.train(trainable(), SAMPLES[:1], gradient_checkpointing=setting).losses == pytest.approx(plain)
        with pytest.warns(UserWarning, match=r"measuring it failed \(RuntimeError: no short samples\)"):
            assert loop.train(trainable(), SAMPLES[:1]).losses == pytest.approx(plain)
    lm = trainable()
    layer, forward, calls = lm.model.layers[1], lm.model.layers[1].forward, []

    def third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # among the samples, with their counters on
            raise RuntimeError("later")
        return forward(*args, **kwargs)

    layer.forward = third
    with pytest.warns(UserWarning, match=r"nothing is planned, because measuring it failed \(RuntimeError: later\)"):
        assert loop.train(lm, SAMPLES[:1]).losses == pytest.approx(plain)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


class Two(Processes):
    """This process and another one, which has half of each number and has found the last layer wanting."""

    def all(self, value):
        if isinstance(value, int):
            return [value, value // 2]
        if isinstance(value, Plan):
            return [value, dataclasses.replace(value, tile=77) if value.memory == 77 else value]
        return [value, ("of a reason", value[1]) if isinstance(value, tuple) else value]


def test_processes_agree_on_the_memory_and_on_what_may_be_cut(monkeypatch):
    lm = trainable()
    with mode(lm, True):
        monkeypatch.setattr(memory, "free", lambda device: 20_000)
        planner = Planner(lm, 128, 8, processes=Two(count=2, turns=2))
        plan = planner.plan()
        assert plan.memory == 9_200 and not plan.fits and plan.cuts_last_layer
        planner = Planner(lm, 128, 8, processes=Two(count=2, alike=True))
        assert not planner.plan().cuts_last_layer and "because of a reason" in str(planner.plan())
        with pytest.raises(RuntimeError, match="must run one plan, got .* here and another one elsewhere"):
            planner.plan(memory=77)


def test_a_process_in_which_memory_ends_leaves_those_that_wait_for_it(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    lm = trainable()
    monkeypatch.setattr(measuring.Measurement, "_measured", fail)
    with mode(lm, True):
        planner = Planner(lm, 128, 8, processes=Two(count=2, alike=True))
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            planner.plan()
        assert "nothing is planned" in str(Planner(lm, 128, 8, processes=Two(count=2, turns=2)).plan())
        monkeypatch.setattr(measuring.Measurement, "_look", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            Planner(lm, 128, 8, processes=Two(count=2, alike=True))
        monkeypatch.undo()
        with PlannedModel(lm, SAMPLES, processes=Two(count=2, turns=2)) as planned:
            planned.follow("auto")
            with pytest.raises(torch.OutOfMemoryError, match=rf"; try memory below {planned.plan.memory} bytes, a sm"):
                planned.lower("no memory")


def test_training_plans_and_states_what_came(tmp_path):
    lm = trainable()
    result = loop.train(lm, SAMPLES[:2], output_dir=tmp_path)
    assert result.plan["layers"] == {EVERYTHING: 2} and result.plan["cuts_last_layer"]
    assert result.plan["measured_peak"] == result.peak_memory > 0 and result.plan["expected_peak"] > 0
    assert json.loads((tmp_path / "training.json").read_text())["plan"] == result.plan


def test_every_setting_gives_the_same_bits_and_a_run_may_change_its_plan(tmp_path, monkeypatch):
    whole = trainable()
    plain = loop.train(whole, SAMPLES, gradient_checkpointing=False)
    for setting in (True, "selective"):
        lm = trainable()
        assert loop.train(lm, SAMPLES, gradient_checkpointing=setting).losses == plain.losses
        assert all(map(torch.equal, values(lm), values(whole)))

    class Stop(Exception):
        pass

    def stop(step, _loss):
        if step == 2:
            raise Stop

    lm = trainable()
    with free(monkeypatch, 10**4), pytest.warns(UserWarning, match="may not fit"), pytest.raises(Stop):
        loop.train(lm, SAMPLES, output_dir=tmp_path, checkpoint_every=1, on_step=stop)
    lm = trainable()
    result = loop.train(lm, SAMPLES, output_dir=tmp_path, resume=True)
    assert result.losses == plain.losses and all(map(torch.equal, values(lm), values(whole)))
    assert result.plan["layers"] == {EVERYTHING: 2}


def test_a_run_is_planned_for_the_memory_that_it_is_given():
    plain = loop.train(trainable(), SAMPLES)
    with pytest.warns(UserWarning, match="may not fit"):
        little = loop.train(trainable(), SAMPLES, memory=10**4)
    assert plain.plan["layers"] == {EVERYTHING: 2} != little.plan["layers"] and little.losses == plain.losses
    for wrong, sentence in [
        (dict(memory=0), "memory must be"),
        (dict(memory=10, gradient_checkpointing=True), "memory needs gradient_checkpointing='auto', got True"),
    ]:
        with pytest.raises(ValueError, match=f"seal_ops.train: {sentence}"):
            loop.train(trainable(), SAMPLES, **wrong)


def test_a_resumed_run_keeps_its_tiles(tmp_path, monkeypatch):
    from seal_ops.training.memory_plan import planning

    monkeypatch.setattr(planning, "TILE", 64)
    for folder in ("one", "two"):
        with free(monkeypatch, 10**4), pytest.warns(UserWarning, match="may not fit"):
            first = loop.train(trainable(), SAMPLES[:2], output_dir=tmp_path / folder, epochs=1)
    assert first.plan["tile"] == 64
    # The header alone decides; a run with a step left to go is made of the finished one.
    from safetensors import safe_open

    with safe_open(tmp_path / "two" / CHECKPOINT, "pt") as file:
        assert file.metadata()["tile"] == "64"
        identity = file.metadata()["identity"]
    lm = trainable()
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    tile = load_checkpoint(tmp_path / "two" / CHECKPOINT, trained, optimizer, identity).tile
    with mode(lm, True), PlannedModel(lm, SAMPLES[:2]) as planned:
        planned.follow("auto", tile)
        assert planned.plan.tile == 64 and planned.plan.fits
        planned.follow(False, tile)
        assert planned.plan.tile == 64


def test_a_step_that_runs_out_of_memory_goes_on_with_less_and_says_so(monkeypatch):
    whole, lm = trainable(), trainable()
    plain = loop.train(whole, SAMPLES)
    accumulated, calls = OptimizerStep._accumulated, []

    def fail(self, *args):
        calls.append(self.planned.plan.keeps)
        if len(calls) == 2:
            accumulated(self, *args)  # gradients are there when it happens
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return accumulated(self, *args)

    monkeypatch.setattr(OptimizerStep, "_accumulated", fail)
    with pytest.warns(
        UserWarning, match=r"does not fit into memory with 2 x everything; going on with .*attention"
    ) as said:
        result = loop.train(lm, SAMPLES)
    assert said[0].filename == __file__
    assert result.losses == plain.losses and all(map(torch.equal, values(lm), values(whole)))
    assert calls[1] == (EVERYTHING,) * 2 != calls[2] and len(calls) == len(SAMPLES) + 1
    calls.clear()
    monkeypatch.setattr(
        OptimizerStep, "_accumulated", lambda self, *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    )
    with pytest.raises(torch.OutOfMemoryError, match="with 2 x input; try gradient_checkpointing='auto', a smaller"):
        loop.train(trainable(), SAMPLES, gradient_checkpointing=True)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match="; try a smaller batch_size") as caught:
        loop.train(trainable(), SAMPLES)
    assert "\n" not in str(caught.value)
