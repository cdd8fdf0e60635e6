"""Paired statistics, the comparison with LoRA and DoRA, the transfer matrix."""

import csv
import json
import math
import os

import pytest
import torch
from own_tasks import Colours
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

from seal_ops.evaluation.results import Evaluation
from seal_ops.evaluation.statistics import holm, mcnemar, paired, spearman
from seal_ops.experiments import comparison as comparing
from seal_ops.experiments.comparison import Comparison, adapted, compare
from seal_ops.experiments.transfer_matrix import transfer

LENGTH = 190


def load_model_fn():
    return model().eval(), tokenizer()


@pytest.mark.parametrize(
    "better, worse, p",
    [(10, 2, 2 * (1 + 12 + 66) / 4096), (0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64), (1, 0, 1.0), (400, 300, 1.7848e-4)],
)
def test_mcnemar(better, worse, p):
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(p, rel=1e-4)


def test_paired():
    first, second = [0, 0, 0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    found = paired(first, second)
    assert (found.cases, found.better, found.worse, found.p) == (10, 3, 1, mcnemar(3, 1))
    assert found.difference == pytest.approx(0.2)
    # Agresti and Min: (3.5 - 1.5) / 12, with the discordant cells' variance
    middle, half = 2 / 12, 1.96 * math.sqrt((3.5 + 1.5) / 12 - (2 / 12) ** 2) / math.sqrt(12)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-4)
    same = paired([1, 1], [1, 1])
    assert same.p == 1 and same.low < 0 < same.high, "agreement in few cases is no proof of equality"
    with pytest.raises(ValueError, match="must hold the same cases"):
        paired([1], [1, 0])


def test_mcnemar_holds_its_level():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(2, 400, 30, generator=generator) < 0.7).int().tolist()
    small = sum(paired(a, b).p < 0.05 for a, b in zip(*scores, strict=True))
    assert small <= 0.05 * 400 + 8


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    "one, other, rho",
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486833),
        ([86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12], -0.1757576),
    ],
)
def test_spearman(one, other, rho):
    assert spearman(torch.tensor(one), torch.tensor(other)) == pytest.approx(rho, abs=1e-6)
    assert math.isnan(spearman(torch.ones(4), torch.arange(4)))


def test_compare(tmp_path, monkeypatch):
    lines, output = [], tmp_path / "out"
    options = dict(samples=3, rates={"LoRA": 1e-2, "DoRA": [1e-3, 3e-2]}, log=lines.append, output=output)
    found = compare(load_model_fn, Colours(), [60, 90], 3, **options)
    assert list(found.evaluations) == ["base", "SEAL-H", "SEAL-C", "LoRA", "DoRA"] and len(lines) == 5
    trained = {name: t["parameters"] for name, t in found.training.items()}
    # q, o: 32 x 32; k, v: 16 x 32; rank 4, two layers; DoRA adds a magnitude for each output
    lora = 2 * 4 * (2 * 64 + 2 * 48)
    assert trained == {"SEAL-H": 8, "SEAL-C": 64, "LoRA": lora, "DoRA": lora + 2 * 96}
    assert [found.training[n]["lr"] for n in ("SEAL-H", "SEAL-C", "LoRA")] == [1e-2, 2e-2, 1e-2]
    tried = found.training["DoRA"]["tried"]
    assert set(tried) == {"0.001", "0.03"} and f"{found.training['DoRA']['lr']:g}" == min(tried, key=tried.get)
    assert all(r["samples"] == 3 for r in (t["settings"] for t in found.training.values()))

    found.save(output / "comparison.json"), found.save_csv(output / "comparison.csv")
    content = json.loads((output / "comparison.json").read_text())
    assert {(t["first"], t["second"]) for t in content["tests"]["90"]} >= {("base", "SEAL-H"), ("SEAL-C", "DoRA")}
    assert content["tests"]["all lengths"][0]["cases"] == 6
    assert len(list(csv.DictReader((output / "comparison.csv").open()))) == 5

    def no_training(*_, **__):
        raise AssertionError("what is finished was trained again")

    monkeypatch.setattr(comparing, "train", no_training)
    again = compare(load_model_fn, Colours(), [60, 90], 3, **options)
    assert [e.records for e in again.evaluations.values()] == [e.records for e in found.evaluations.values()]
    with pytest.raises(ValueError, match="compare: output .* must be new or hold this run, got one with another cases"):
        compare(load_model_fn, Colours(), [60, 90], 4, **options)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "SEAL-H"])
def test_adapters_start_at_the_base_and_come_back(tmp_path, method):
    lm, tok = load_model_fn()
    ids = torch.tensor([tok("The record is over.")["input_ids"]])
    expected = lm(ids).logits
    changed, _, done = adapted(load_model_fn, method, str(tmp_path / "none"))
    assert done is None and torch.allclose(changed(ids).logits, expected, atol=1e-5)
    folder = str(tmp_path / method)
    comparing.train(changed, Colours()(tok, 60, 2), lr=0.05, output_dir=folder)
    moved = changed(ids).logits
    back, _, done = adapted(load_model_fn, method, folder)
    assert done["settings"]["lr"] == 0.05 and torch.allclose(back(ids).logits, moved, atol=1e-5)
    assert not torch.allclose(moved, expected, atol=1e-3)


def test_tests_are_on_the_same_cases():
    def made(name, scores):
        return Evaluation("t", name, {}, [{"length": 8, "index": i, "score": s} for i, s in enumerate(scores)])

    found = Comparison({"lengths": [8]}, {"a": made("a", [0, 0, 0, 1, 0, 0]), "b": made("b", [1, 1, 1, 1, 1, 1])}, {})
    (test,) = found.tests(8)
    assert (test["better"], test["worse"], test["cases"]) == (5, 0, 6) and test["p"] == test["p_adjusted"] == 2 / 32
    assert [row["accuracy_8"] for row in found.rows()] == [1 / 6, 1.0]


class Shades(Colours):
    name = "shades"


def test_transfer(tmp_path):
    found = transfer(
        load_model_fn, [Colours(), Shades()], [Shades(), Colours()], 60, 2, output=tmp_path, samples=2, lr=1e-2
    )
    rows, columns, values = found.matrix()
    assert rows == ["base", "colours", "shades"] and columns == ["shades", "colours"]
    assert all(0 <= v <= 1 for line in values for v in line)
    found.save(tmp_path / "transfer.json"), found.save_csv(tmp_path / "transfer.csv")
    content = json.loads((tmp_path / "transfer.json").read_text())
    assert len(content["cells"]) == 6 and content["cells"][0]["against_base"]["p"] == 1
    assert (tmp_path / "transfer.csv").read_text().splitlines()[0] == "trained,shades,colours"
    assert sorted(os.listdir(tmp_path / "adapters")) == ["colours", "shades"]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda p: compare(load_model_fn, "lines", [LENGTH], 1, output=p, methods=["IA3"]),
            "methods must be among SEAL-H",
        ),
        (
            lambda p: compare(load_model_fn, "lines", [LENGTH], 1, output=p, rates={"lora": 1}),
            "methods must be among .* got 'lora'",
        ),
        (
            lambda p: compare(load_model_fn, "lines", [LENGTH], 1, output=p, rates={"LoRA": []}),
            "rates must be positive numbers",
        ),
        (
            lambda p: transfer(load_model_fn, ["lines"], ["lines"], LENGTH, 1, output=p, method="none"),
            "method must be one of",
        ),
        (lambda p: mcnemar(-1, 2), "counts must not be negative"),
    ],
)
def test_errors(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
