"""Evaluation: intervals, decoding, batching, stopping, resuming, files, plot."""

import csv
import json

import pytest
import torch
from own_tasks import Colours
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.evaluation import runner, static_decoding
from seal_ops.evaluation.decoding import _Outputs, generate
from seal_ops.evaluation.results import Evaluation
from seal_ops.evaluation.runner import _batches, evaluate
from seal_ops.evaluation.statistics import wilson
from seal_ops.huggingface.identity import fingerprint


class Oracle(torch.nn.Module):
    """Answers line retrieval from the text, wrongly where the number ends in one of ``misses``."""

    device = torch.device("cpu")

    def __init__(self, misses=""):
        super().__init__()
        self.misses, self.answered = misses, 0
        self.weight = torch.nn.Parameter(torch.ones(1))

    def answer(self, prompt):
        text = tokenizer().decode(prompt)
        key = text.split("in line ")[-1].split("?")[0]
        number = text.split(f"line {key}: REGISTER_CONTENT is <")[1].split(">")[0]
        self.answered += 1
        return "line 5 holds 0" if number[-1] in self.misses else f"line 5 holds {number}"


@pytest.fixture(autouse=True)
def oracles_need_no_decoding(monkeypatch):
    def answer(lm, tok, prompts, **options):
        return [lm.answer(p) for p in prompts] if isinstance(lm, Oracle) else generate(lm, tok, prompts, **options)

    monkeypatch.setattr(runner, "generate", answer)


@pytest.mark.parametrize(
    "correct, cases, low, high",
    [(0, 50, 0.0, 0.0713), (50, 50, 0.9287, 1.0), (25, 50, 0.3664, 0.6336), (1, 1, 0.2065, 1.0)],
)
def test_wilson(correct, cases, low, high):
    assert wilson(correct, cases) == pytest.approx((low, high), abs=1e-4)


def test_accuracy_counts_right_answers():
    result = evaluate(Oracle(misses="13579"), tokenizer(), "lines", [200, 300], 20, name="oracle")
    for length, cell in result.accuracy.items():
        records = [r for r in result.records if r["length"] == length]
        even = [r for r in records if r["number"] % 2 == 0]
        assert cell.cases == len(records) == 20
        assert cell.correct == len(even) and 0 < cell.accuracy < 1
        assert cell.low < cell.accuracy < cell.high
    assert set(result.by("length", lambda r: r["depth"] < 0.5)) <= {(n, b) for n in (200, 300) for b in (False, True)}
    lines = str(result).splitlines()
    assert lines[0] == "lines, oracle" and lines[2].split()[:2] == ["200", f"{result.accuracy[200].accuracy:.3f}"]


def test_batches_hold_prompts_of_similar_length():
    samples = [tasks.Sample([0] * n, [1]) for n in (90, 10, 12, 11, 300, 91, 13)]
    batches = list(_batches(range(7), samples, 3))
    assert batches == [[1, 3, 2], [6], [0, 5], [4]]


@pytest.mark.parametrize("granularity", [None, "head"])
def test_generate_is_greedy_decoding(granularity):
    """Prompts of different lengths, one of them with an end token inside, against decoding written out."""
    lm, tok = model().eval(), tokenizer()
    if granularity:
        seal_ops.attach(lm, granularity)
        torch.nn.init.uniform_(lm.seal_scales.layers["1"].scale)
    texts = ["The record is over.\n", "Tell me the number in line 1 2 3</s> I need the number.\n", "line 3 4 5 6?\n"]
    prompts = [tok(text)["input_ids"] for text in texts]
    assert len({len(p) for p in prompts}) == 3 and tok.eos_token_id in prompts[1]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            token = lm(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == tok.eos_token_id:
                break
            ids.append(token)
        expected.append(tok.decode(ids[len(prompt) :], skip_special_tokens=True).lstrip())
    assert generate(lm, tok, prompts, max_new_tokens=8) == expected
    assert [generate(lm, tok, [p], max_new_tokens=8)[0] for p in prompts] == expected


def test_the_models_own_generation_config_does_not_apply():
    lm, tok = model().eval(), tokenizer()
    prompts = [tok("Tell me the number.\n")["input_ids"]]
    expected = generate(lm, tok, prompts, max_new_tokens=8)
    own = lm.generation_config
    own.update(repetition_penalty=9.0, do_sample=True, temperature=5.0, max_new_tokens=2, suppress_tokens=[5, 6, 7])
    assert generate(lm, tok, prompts, max_new_tokens=8) == expected
    assert lm.generation_config is own


def test_outputs_end_at_the_end_token(monkeypatch):
    lm, tok = model().eval(), tokenizer()
    first = tok("The 5.</s> 77", add_special_tokens=False)["input_ids"]
    logits = torch.full((1, 1, len(tok)), -1.0)
    calls = []

    def scripted(hidden):
        calls.append(1)
        return logits.index_fill(2, torch.tensor(first[len(calls) - 1]), 1.0)

    monkeypatch.setattr(lm.lm_head, "forward", scripted)
    assert generate(lm, tok, [tok("Tell me\n")["input_ids"]], max_new_tokens=50) == ["The 5."]
    assert len(calls) == first.index(tok.eos_token_id) + 1


def test_stops_at_the_end_of_the_answer(monkeypatch):
    lm, tok, calls = model().eval(), tokenizer(), []
    script = tok("\nThe 5.\nline 77 1 2 3 4 5 6 7 8 9", add_special_tokens=False)["input_ids"]
    head = lm.lm_head.forward

    def scripted(hidden):  # the next token is fixed by the number of calls
        logits = torch.full_like(head(hidden), -1.0)
        logits[..., script[len(calls)]] = 1.0
        calls.append(hidden.shape)
        return logits

    monkeypatch.setattr(lm.lm_head, "forward", scripted)
    assert generate(lm, tok, [tok("Tell me\n")["input_ids"]], max_new_tokens=50, stop="\n") == ["The 5."]
    assert len(calls) == len(tok("\nThe 5.\n", add_special_tokens=False)["input_ids"]), "went on behind the answer"


def test_model_and_mode_are_left_as_found():
    lm = model()
    before = fingerprint(lm)
    lm.train()
    evaluate(lm, tokenizer(), Colours(), 60, 2, max_new_tokens=2)
    assert lm.training and fingerprint(lm) == before
    with torch.no_grad():
        lm.model.layers[1].self_attn.o_proj.weight[0, 0] += 1
    assert fingerprint(lm) != before


def test_resume_runs_only_what_is_missing(tmp_path):
    path = tmp_path / "result.json"
    full = evaluate(Oracle("5"), tokenizer(), "lines", [200, 300], 8, output=path)
    content = json.loads(path.read_text())
    assert content["accuracy"][0]["cases"] == 8
    content["records"] = content["records"][:11]
    path.write_text(json.dumps(content))
    again = Oracle("5")
    resumed = evaluate(again, tokenizer(), "lines", [200, 300], 8, output=path, resume=True)
    assert resumed.records == full.records == Evaluation.load(path).records
    assert again.answered == 5
    with pytest.raises(ValueError, match="must come from the same model and settings to resume, got another seed"):
        evaluate(Oracle("5"), tokenizer(), "lines", [200, 300], 8, output=path, resume=True, seed=1)
    other = Oracle("5")
    other.weight.data += 1
    with pytest.raises(ValueError, match="got another model"):
        evaluate(other, tokenizer(), "lines", [200, 300], 8, output=path, resume=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a saved evaluation"):
        evaluate(Oracle("5"), tokenizer(), "lines", [200, 300], 8, output=path, resume=True)


def test_csv(tmp_path):
    result = evaluate(Oracle(), tokenizer(), "lines", [200], 3, name="oracle")
    result.save_csv(tmp_path / "cases.csv")
    rows = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert len(rows) == 3 and rows[0]["name"] == "oracle" and float(rows[0]["score"]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": []}, "lengths must be positive integers"),
        ({"lengths": [0]}, "lengths must be positive integers"),
        ({"cases": 0}, "cases must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"cases": 1.5}, "cases must be an integer, got 1.5"),
        ({"cases": "2"}, "cases must be an integer, got '2'"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens must be an integer, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"lengths": None}, r"lengths must be positive integers, at least one, got \[None\]"),
        ({"lengths": "200"}, "lengths must be positive integers"),
        ({"chat_template": 3}, "chat_template must be None, True, False or a text, got 3"),
        ({"tokenizer": "gpt2"}, "tokenizer must be a Hugging Face tokenizer, got 'gpt2'"),
        ({"output": ""}, "output must be a path, got ''"),
        ({"task": ["lines"]}, "task must be one of"),
        ({"task": ":"}, "must name an importable module:Class"),
        ({"lengths": [50]}, "length must be at least"),
        ({"task": "liens"}, "task must be one of"),
    ],
)
def test_errors(options, message):
    arguments = {"tokenizer": tokenizer(), "task": "lines", "lengths": [200], "cases": 2, **options}
    with pytest.raises(ValueError, match=message):
        evaluate(Oracle(), **arguments)


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for output, message in ((tmp_path, "which is a folder"), (tmp_path / "file" / "x.json", "writable folder")):
        oracle = Oracle()
        with pytest.raises(OSError, match=f"output must be a file.*{message}"):
            evaluate(oracle, tokenizer(), "lines", [200], 2, output=output)
        assert oracle.answered == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": []},
        {"settings": None},
        {"records": None},
        {"records": [3]},
        {"records": [{"index": 0, "score": 1.0}]},
        {"records": [{"length": 200, "index": "a", "score": 1.0}]},
        {"records": [{"length": 200, "index": 0, "score": "a"}]},
        {"records": [{"length": 200, "index": 0}]},
        {"seconds": None},
        {"provenance": 3},
    ],
    ids=str,
)
def test_a_damaged_result_is_told(tmp_path, damage):
    path = tmp_path / "result.json"
    evaluate(Oracle(), tokenizer(), "lines", [200], 1, output=path)
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match="must be a saved evaluation, got ") as caught:
        evaluate(Oracle(), tokenizer(), "lines", [200], 1, output=path, resume=True)
    assert "\n" not in str(caught.value)


def test_train_and_test_cases_differ():
    result = evaluate(Oracle(), tokenizer(), "lines", [250], 20)
    trained = {s.meta["key"] + str(s.meta["number"]) for s in tasks.lines(tokenizer(), length=250, samples=20)}
    assert not trained & {r["key"] + str(r["number"]) for r in result.records}


def test_fixed_cache_and_transformers_generate_agree(monkeypatch):
    """Rows of very different lengths, an end and a stop text at different steps, both ways of decoding."""
    lm, tok = model(seed=3).eval(), tokenizer()
    assert static_decoding.supports(lm)
    texts = ["line 1 2 3 4 5 6 7 8 9 0 " * n + "Tell me the number.\n" for n in (1, 9, 2, 4, 1)]
    prompts = [tok(text)["input_ids"] for text in texts]
    stop = "number"
    monkeypatch.setattr(static_decoding, "PREFILL_TOKENS", (700, 700))  # several groups, of unequal rows
    found = generate(lm, tok, prompts, max_new_tokens=12, stop=stop)
    monkeypatch.setattr(static_decoding, "supports", lambda lm: False)
    assert generate(lm, tok, prompts, max_new_tokens=12, stop=stop) == found
    assert [generate(lm, tok, [p], max_new_tokens=12, stop=stop)[0] for p in prompts] == found
    assert len(set(found)) > 1


def test_fixed_cache_is_left_to_models_that_it_fits():
    assert static_decoding.supports(model())
    for change in (
        {"sliding_window": 8},
        {"_attn_implementation_internal": "eager"},
        {"layer_types": ["sliding_attention"]},
    ):
        lm = model()
        for name, value in change.items():
            setattr(lm.config, name, value)
        assert not static_decoding.supports(lm), change
    lm = model()
    lm.config.rope_parameters = {**lm.config.rope_parameters, "rope_type": "dynamic"}
    assert not static_decoding.supports(lm)


def test_attention_implementation_is_given_back(monkeypatch):
    lm, tok = model().eval(), tokenizer()
    before, head = lm.config._attn_implementation, lm.lm_head.forward
    calls = []

    def breaks(hidden):  # in the second step, when the prompt has been read
        calls.append(lm.config._attn_implementation)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return head(hidden)

    monkeypatch.setattr(lm.lm_head, "forward", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        generate(lm, tok, [tok("Tell me\n")["input_ids"]], max_new_tokens=4)
    assert lm.config._attn_implementation == before == calls[0] != calls[1]


def test_text_is_decoded_only_where_a_stop_can_end(monkeypatch):
    tok = tokenizer()
    decoded = []
    outputs = _Outputs(tok, {tok.eos_token_id}, 1, 50, "\n")
    text = outputs._text
    monkeypatch.setattr(outputs, "_text", lambda row: decoded.append(row) or text(row))
    ids = tok("\nThe 5.\n 7", add_special_tokens=False)["input_ids"]
    steps = [outputs.add([token]) for token in ids]
    newlines = [i for i, token in enumerate(ids) if "\n" in tok.decode([token])]
    assert len(decoded) == len(newlines) == 2
    assert steps.index(True) == newlines[1], "leading white space is no end"
    assert outputs.texts() == ["The 5."]
