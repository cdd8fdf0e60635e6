"""Head importance: ablation by rows of scales, gradients, their agreement, quadrants."""

import csv
import json

import pytest
import torch
from importances import made
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.experiments.head_importance import HeadImportance, measure_head_importance
from seal_ops.experiments.quadrants import group_by_sign, quadrant_experiment
from seal_ops.huggingface.identity import fingerprint

LENGTH = 190


def logprob_of(lm, sample):
    with torch.no_grad():
        logits = lm(torch.tensor([sample.input_ids])).logits[0, len(sample.prompt_ids) - 1 : -1]
    targets = torch.tensor(sample.answer_ids)
    exact = bool((logits.argmax(-1) == targets).all())
    return logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item(), exact


@pytest.mark.parametrize("granularity, kv_heads", [("head", 2), ("channel", 4)])
def test_ablation_is_the_model_without_those_columns(granularity, kv_heads):
    lm, tok = model(kv_heads=kv_heads).eval(), tokenizer()
    before = fingerprint(lm)
    found = measure_head_importance(lm, tok, "lines", LENGTH, 2, granularity=granularity, limit=9, batch_size=4, seed=3)
    assert fingerprint(lm) == before and not hasattr(lm, "seal_scales"), "the model is left as it was"
    assert len(found.units) == (8 if granularity == "head" else 64) and len(found.ablated) == min(9, len(found.units))
    for record, sample in zip(found.records, tasks.lines(tok, LENGTH, 2, 3), strict=True):
        whole, exact = logprob_of(lm, sample)
        assert record["logprob"] == pytest.approx(whole, rel=1e-4) and record["exact"] == exact
        for value, unit in zip(record["ablated_logprob"], (found.units[i] for i in found.ablated), strict=True):
            weight = lm.model.layers[unit[0]].self_attn.o_proj.weight
            columns = slice(unit[1] * 8, unit[1] * 8 + 8) if len(unit) == 2 else unit[1] * 8 + unit[2]
            kept = weight.data.clone()
            weight.data[:, columns] = 0
            assert value == pytest.approx(logprob_of(lm, sample)[0], rel=1e-4)
            weight.data.copy_(kept)


def test_gradient_is_the_slope_at_the_whole_model():
    lm, tok = model().eval().double(), tokenizer()
    sample = tasks.lines(tok, LENGTH, 1, 0)[0]
    found = measure_head_importance(lm, tok, "lines", LENGTH, 1, methods=["gradient"], seed=0)
    assert found.ablated == [] and "ablated_logprob" not in found.records[0]
    step = 2e-3  # not smaller: the model's norms compute in fp32
    for unit, change in zip(found.units, found.records[0]["gradient"], strict=True):
        weight = lm.model.layers[unit[0]].self_attn.o_proj.weight
        columns, kept, values = slice(unit[1] * 8, unit[1] * 8 + 8), weight.data.clone(), []
        for factor in (1 + step, 1 - step):
            weight.data[:, columns] = kept[:, columns] * factor
            values.append(logprob_of(lm, sample)[0])
        weight.data.copy_(kept)
        assert change == pytest.approx(-(values[0] - values[1]) / (2 * step), rel=5e-3, abs=1e-3)


def test_channels_of_a_head_add_up_in_the_gradient():
    lm, tok = model().eval(), tokenizer()
    heads = measure_head_importance(lm, tok, "lines", LENGTH, 1, methods=["gradient"])
    channels = measure_head_importance(lm, tok, "lines", LENGTH, 1, granularity="channel", methods=["gradient"])
    summed = torch.tensor(channels.grid("gradient")).flatten().tolist()
    assert summed == pytest.approx(heads.change("gradient").tolist(), rel=1e-3, abs=1e-4)


def test_attached_scales_count_and_stay():
    lm, tok = model().eval(), tokenizer()
    scales = seal_ops.attach(lm, "channel")
    for _, scale in scales.items():
        scale.data.uniform_(0.2, 1.8)
    before = {layer: scale.detach().clone() for layer, scale in scales.items()}
    found = measure_head_importance(lm, tok, "lines", LENGTH, 1, limit=3)
    assert lm.seal_scales is scales and all(torch.equal(before[layer], scale) for layer, scale in scales.items())
    sample = tasks.lines(tok, LENGTH, 1, 0)[0]
    layer, head = found.units[found.ablated[1]]
    scales.layers[str(layer)].scale.data[head] = 0
    assert found.records[0]["ablated_logprob"][1] == pytest.approx(logprob_of(lm, sample)[0], rel=1e-4)


def test_changes_agreement_and_group_by_sign():
    found = made()
    assert found.change("logprob", 100).tolist() == [-2, -1, 0, 1, 2, 3]
    assert found.change("accuracy").tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5]
    assert found.grid("gradient", 200) == [[-4, -2, 0], [2, 4, 6]]
    assert found.standard_error("accuracy", 100)[0] == pytest.approx(torch.tensor([0.0, 1, 0, 1]).std().item() / 2)
    assert found.agreement() == {"gradient_ablation": {100: 1.0, 200: 1.0}, "lengths": {"100,200": 1.0}}
    assert group_by_sign(found, noise=0.0) == {"harmful": [3, 4, 5], "helpful": [0, 1, 2], "mixed": []}
    assert group_by_sign(found, "logprob", noise=0.0) == {"harmful": [3, 4, 5], "helpful": [0, 1], "mixed": [2]}
    assert 0 < made(noise=8.0).agreement()["gradient_ablation"][100] < 1
    with pytest.raises(ValueError, match="length must be one of"):
        found.change("logprob", 300)
    with pytest.raises(ValueError, match="measure must be logprob, accuracy or gradient, got 'loss'"):
        found.change("loss")


def test_changes_within_their_noise_are_mixed():
    """A unit one case away from 0 says nothing."""
    found = made(cases=8)
    for record in found.records:
        record["exact"] = True
        record["ablated_exact"] = [1] * 6
    found.records[0]["ablated_exact"][0] = found.records[8]["ablated_exact"][0] = 0  # one case of eight at each length
    for record in found.records:
        record["ablated_exact"][1] = 0
    assert group_by_sign(found, noise=0)["helpful"] == [0, 1]
    assert group_by_sign(found) == {"harmful": [], "helpful": [1], "mixed": [0, 2, 3, 4, 5]}
    for i, record in enumerate(found.records):
        record["ablated_logprob"][5] = record["logprob"] + (9.9 if i % 2 else -9.7)
    assert 5 in group_by_sign(found, "logprob", noise=0)["harmful"] and 5 in group_by_sign(found, "logprob")["mixed"]
    assert group_by_sign(made(cases=1), "logprob")["helpful"] == [0, 1], "without a standard error every change counts"
    assert group_by_sign(made(noise=8.0), "logprob", noise=0) != group_by_sign(made(noise=8.0), "logprob")
    with pytest.raises(ValueError, match="seal_ops.group_by_sign: noise must be at least 0, got -1"):
        group_by_sign(found, noise=-1)


def test_small_steps_follow_the_gradient():
    lm, tok = model().eval(), tokenizer()
    found = measure_head_importance(lm, tok, "lines", LENGTH, 2, factor=0.97)
    assert found.agreement()["gradient_ablation"][LENGTH] > 0.95
    assert found.change("logprob").tolist() == pytest.approx(found.change("gradient").tolist(), rel=0.3, abs=0.02)


def test_files_and_resume(tmp_path):
    lm, tok, path = model().eval(), tokenizer(), tmp_path / "heads.json"
    full = measure_head_importance(lm, tok, "lines", [LENGTH, 220], 2, output=path)
    assert HeadImportance.load(path).records == full.records and json.loads(path.read_text())["agreement"]
    content = json.loads(path.read_text())
    content["records"] = content["records"][:3]
    path.write_text(json.dumps(content))
    resumed = measure_head_importance(lm, tok, "lines", [LENGTH, 220], 2, output=path, resume=True)
    assert resumed.records == full.records
    with pytest.raises(ValueError, match="must come from the same model and settings to resume, got another seed"):
        measure_head_importance(lm, tok, "lines", [LENGTH, 220], 2, output=path, resume=True, seed=1)
    full.save_csv(tmp_path / "heads.csv")
    rows = list(csv.DictReader((tmp_path / "heads.csv").open()))
    assert len(rows) == 16 and {"length", "layer", "head", "logprob", "logprob_stderr", "gradient"} <= set(rows[0])
    assert float(rows[5]["logprob"]) == pytest.approx(full.change("logprob", LENGTH)[5].item(), rel=1e-4)


def test_quadrant_experiment_scales_the_named_units(monkeypatch):
    lm, tok, found, seen = model().eval(), tokenizer(), made(units=8), []
    found.units = [[u // 4, u % 4] for u in range(8)]

    def look(lm, *_, name, **options):
        seen.append((name, torch.stack([scale.detach().clone() for _, scale in lm.seal_scales.items()])))
        return name

    monkeypatch.setattr("seal_ops.experiments.quadrants.evaluate", look)
    results = quadrant_experiment(lm, tok, found, "lines", LENGTH, 2, noise=0)
    assert list(results) == ["base", "harmful x0.9", "helpful x1.1", "both"] and not hasattr(lm, "seal_scales")
    low, high = torch.ones(2, 4), torch.ones(2, 4)
    low[0, 3], low[1] = 0.9, 0.9
    high[0, :3] = 1.1
    for (_, got), expected in zip(seen, (torch.ones(2, 4), low, high, low * high), strict=True):
        assert torch.allclose(got, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": []}, "lengths must be positive integers"),
        ({"granularity": "layer"}, "granularity must be 'head' or 'channel', got 'layer'"),
        ({"methods": ["shapley"]}, "methods must be among ablation, gradient"),
        ({"cases": 0}, "cases must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        measure_head_importance(model(), tokenizer(), "lines", **{"lengths": LENGTH, **options})
