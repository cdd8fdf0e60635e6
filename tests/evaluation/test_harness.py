"""LongEval's lines through lm-evaluation-harness, on a model object with scales."""

import json

import pytest
import torch
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.evaluation import lm_eval as harness

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra 'harness')")
LENGTH = 190


def test_longeval_lines_on_a_model_object(tmp_path):
    lm, tok = model().eval(), tokenizer()
    scales = seal_ops.attach(lm, "head")
    for _, scale in scales.items():
        scale.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    results = harness.evaluate(lm, tok, ["longeval_lines"], length=LENGTH, limit=3)
    samples = sorted(results["samples"]["longeval_lines"], key=lambda s: s["doc_id"])
    expected = tasks.lines(tok, LENGTH, 3, split="test", chat_template=False)
    assert [s["doc"]["prompt"] for s in samples] == [e.prompt for e in expected], "the cases of seal_ops.evaluate"
    ours = seal_ops.evaluate(lm, tok, "lines", LENGTH, 3, chat_template=False)
    assert [s["acc"] for s in samples] == [r["score"] for r in ours.records]
    for sample, record in zip(samples, ours.records, strict=True):
        assert sample["resps"][0][0].lstrip().partition("\n")[0] == record["output"], "greedy, with the scales"
    assert "longeval_lines" in harness.table(results)
    harness.save({LENGTH: results}, tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text())
    found = saved["by_length"][str(LENGTH)]["results"]["longeval_lines"]["acc,none"]
    assert found == results["results"]["longeval_lines"]["acc,none"] == sum(s["acc"] for s in samples) / 3


def test_unknown_task():
    with pytest.raises(ValueError, match="tasks must be known to lm_eval or 'longeval_lines', got 'longeval_topics'"):
        harness.evaluate(model(), tokenizer(), ["longeval_topics"], length=LENGTH, limit=1)


@pytest.mark.parametrize("output, score", [("\n It is 7.\nline 8", 1), ("8 or 7", 1), ("7, not 8", 0), ("", 0)])
def test_scores_as_evaluate_does(output, score):
    from seal_ops.evaluation.lm_eval.longeval import longeval

    assert longeval.process_results({"prompt": "", "answer": "", "number": 7}, [output]) == {"acc": score}
