"""LongEval's lines through lm-evaluation-harness, on a model object with scales."""

import json
import warnings

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
    results = harness.evaluate(lm, tok, ["longeval_lines"], length=LENGTH, cases=3)
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
    assert saved["by_length"][str(LENGTH)]["provenance"]["model"]["class"] == "LlamaForCausalLM"
    found = saved["by_length"][str(LENGTH)]["results"]["longeval_lines"]["acc,none"]
    assert found == results["results"]["longeval_lines"]["acc,none"] == sum(s["acc"] for s in samples) / 3


def lengths_seen(monkeypatch):
    from lm_eval.models.huggingface import HFLM

    seen, original = [], HFLM._model_generate
    monkeypatch.setattr(
        HFLM,
        "_model_generate",
        lambda self, context, *a, **k: seen.append(context.shape[1]) or original(self, context, *a, **k),
    )
    return seen


def few_positions(most):
    lm = model().eval()
    lm.config.max_position_embeddings = most
    return lm


@pytest.mark.parametrize("positions, length", [(220, 220), (220, 300), (1024, 300)])
def test_prompts_are_not_cut(monkeypatch, positions, length):
    """Up to the model's window and beyond it: all of the prompt reaches the model, as in `seal_ops.evaluate`."""
    tok, seen = tokenizer(), lengths_seen(monkeypatch)
    pad, side = tok.pad_token, tok.padding_side
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        harness.evaluate(few_positions(positions), tok, ["longeval_lines"], length=length, cases=1)
    (sample,) = tasks.lines(tok, length, 1, split="test", chat_template=False)
    assert seen == [len(sample.prompt_ids)]
    said = [str(w.message) for w in caught if "positions" in str(w.message)]
    assert bool(said) == (length > positions) and (tok.pad_token, tok.padding_side) == (pad, side)


def test_a_prompt_is_cut_only_where_it_is_asked_for(monkeypatch, caplog):
    seen = lengths_seen(monkeypatch)
    with caplog.at_level("WARNING"):
        harness.evaluate(model().eval(), tokenizer(), ["longeval_lines"], length=300, cases=1, max_length=200)
    assert seen == [100] and "Left truncation applied" in caplog.text
    monkeypatch.setattr(harness, "RESERVE", 0)
    with pytest.raises(
        ValueError, match=r"prompts must be at most 200 tokens \(300 with the output\), got one of 2\d\d"
    ) as raised:
        harness.evaluate(few_positions(100), tokenizer(), ["longeval_lines"], length=300, cases=1)
    assert "\n" not in str(raised.value)


def test_unknown_task():
    with pytest.raises(ValueError, match="tasks must be known to lm_eval or 'longeval_lines', got 'longeval_topics'"):
        harness.evaluate(model(), tokenizer(), ["longeval_topics"], length=LENGTH, cases=1)


@pytest.mark.parametrize("output, score", [("\n It is 7.\nline 8", 1), ("8 or 7", 1), ("7, not 8", 0), ("", 0)])
def test_scores_as_evaluate_does(output, score):
    from seal_ops.evaluation.lm_eval.longeval import longeval

    assert longeval.process_results({"prompt": "", "answer": "", "number": 7}, [output]) == {"acc": score}
