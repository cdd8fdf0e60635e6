"""The study of context extension on a tiny model with tiny lengths: its jobs, resumed, and its tables."""

import csv
import json
import math

import pytest
import torch
from command_line import TINY, seal
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

from seal_ops.experiments.context_study import plan as plans
from seal_ops.experiments.context_study import summary

TRAINED = 200
SETTINGS = [
    "lengths=[190,260,400]", "reaches=[260,400]", "methods=[ntk,streaming]", "windows=2", "tasks=[lines]",
    "cases=1", "seeds=[0,1]", "train_length=260", "samples=1", "rates=[0.02]", "tuned_lengths=[400]",
    "tuned_steps=3", "tuned_rates=[0.001,0.003]",
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model that was trained on few tokens, as its config says."""
    path = str(tmp_path_factory.mktemp("models") / "small")
    lm = model()
    lm.config.max_position_embeddings = TRAINED
    lm.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Tell me the number in line {i % 7} {i % 5} {i % 3}. I need it.\n" for i in range(250)))
    return path


def the_plan(text, **settings):
    return plans.Plan(text=str(text), **settings)


def test_every_variant_and_job():
    plan = the_plan(__file__)
    found = plans.variants(plan)
    assert ("yarn", 16384) in found and ("yarn", 32768) in found and ("none", 32768) in found
    assert [v for v in found if v[0] == "streaming"] == [("streaming", 32768)]
    assert plans.lengths_of(plan, "yarn", 16384) == [2048, 4096, 8192, 16384]
    names = [job.name for job in plans.jobs(plan)]
    assert len(set(names)) == len(names) and len([n for n in names if n.startswith("retrieval")]) == 3 * len(found)
    for job in plans.jobs(plan):
        assert all(names.index(need) < names.index(job.name) for need in job.needs), job.name
    assert plans.options_of("self_extend", 32768, 8192) == dict(group=5, window=2048)
    assert plans.options_of("ntk", 16384, 8192) == dict(factor=2.0)


def test_scales_are_trained_under_every_method():
    """At the shortest reach that holds the length; methods that read any length have one reach."""
    plan = the_plan(__file__)
    found = dict(plans.scaled_variants(plan))
    assert set(found) == set(plan.methods) and len(plans.scaled_variants(plan)) == len(found)
    assert found["self_extend"] == found["ntk"] == 16384 and found["dual_chunk"] == found["streaming"] == 32768
    assert set(dict(plans.scaled_variants(the_plan(__file__, train_length=32768))).values()) == {32768}
    jobs = {job.name: job for job in plans.jobs(plan)}
    assert len([name for name in jobs if name.startswith("scaled")]) == 24
    assert jobs["scaled-yarn-16384-2"].needs == ("scaled-yarn-16384-0",)


def test_context_study_and_its_summary(capsys, small, text, tmp_path):
    """Every kind of job, resumed in the middle."""
    pytest.importorskip("peft")
    output = tmp_path / "study"
    arguments = [
        "study", "--preset", "smollm2-context", "--model", small, *TINY, "--text", text, "--output", output, "--plan",
        *SETTINGS,
    ]  # fmt: skip
    code, out, err = seal(capsys, *arguments, "--budget-s", 50)  # too little for what needs a minute
    assert code == 0 and " 0 left" not in out, err
    first = {p.name: p.read_bytes() for p in output.glob("perplexity-*.json")}
    assert first and not list(output.glob("retrieval-*.json"))
    code, out, err = seal(capsys, *arguments)
    assert code == 0 and "; 0 left" in out, out + err
    assert not list(output.glob("*.failed.txt"))
    assert all((output / name).read_bytes() == content for name, content in first.items())

    code, out, err = seal(capsys, "study", "--preset", "smollm2-context", "--output", output, "--summary")
    assert code == 0 and "tables.md" in out, err
    content = json.loads((output / "summary.json").read_text())
    unscaled = [r for r in content["perplexity"] if not r["scales"]]
    reached = {(r["method"], r["reach"]): [] for r in unscaled}
    for row in unscaled:
        reached[row["method"], row["reach"]].append(row["length"])
    assert reached == {
        ("none", 400): [190, 260, 400], ("ntk", 260): [190, 260], ("ntk", 400): [190, 260, 400],
        ("streaming", 400): [190, 260, 400],
    }  # fmt: skip
    plain = {r["length"]: r["perplexity"] for r in unscaled if r["method"] == "none"}
    streamed = {r["length"]: r["perplexity"] for r in unscaled if r["method"] == "streaming"}
    assert abs(plain[190] - streamed[190]) < 1e-3 * plain[190] and abs(plain[400] - streamed[400]) > 1e-6
    assert all(r["draws"] == 2 and r["cases"] == 2 for r in content["retrieval"])
    scaled = {"none": [], "ntk": [190, 260], "streaming": [190, 260, 400]}
    for table in ("perplexity", "retrieval"):
        assert {
            method: [r["length"] for r in content[table] if r["scales"] == "SEAL-C" and r["method"] == method]
            for method in ("none", "ntk", "streaming")
        } == scaled, table
    jobs = [json.loads((output / f"scaled-ntk-260-{seed}.json").read_text()) for seed in (0, 1)]
    (row,) = [r for r in content["perplexity"] if (r["method"], r["length"], r["scales"]) == ("ntk", 260, "SEAL-C")]
    losses = [job["perplexity"]["lines"]["260"]["nats"] for job in jobs]
    assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / 2)) and losses[0] != losses[1]
    # With scales, so not what the method alone reads.
    assert row["perplexity"] != [r["perplexity"] for r in unscaled if (r["method"], r["length"]) == ("ntk", 260)][0]

    tuned = {r["recipe"]: r for r in content["tuned"] if r["measured_at"] == 400}
    assert set(tuned) == {"full_attention", "longlora", "sinklora"} and len(content["tuned"]) == 6
    assert len({(r["steps"], r["untrained"], r["extended"], r["parameters"]) for r in tuned.values()}) == 1
    full = tuned["full_attention"]
    assert full["steps"] == 3 and full["gain"] > 0 and full["share_of_full_attention"] == 1
    for row in tuned.values():
        assert row["share_of_full_attention"] == pytest.approx((row["extended"] - row["tuned"]) / full["gain"])
    assert len({row["tuned"] for row in tuned.values()}) == 3
    job = json.loads((output / "tuned-longlora-400.json").read_text())["training"]
    assert f"{job['lr']:g}" == min(job["tried"], key=job["tried"].get) and len(job["tried"]) == 2
    rows = list(csv.DictReader((output / "tuned.csv").open()))
    assert float(rows[0]["tuned"]) == content["tuned"][0]["tuned"]
    table = (output / "tables.md").read_text()
    assert all(f"| {name} |" in table for name in (
        "ntk for 260", "ntk for 260 + SEAL-C", "ntk for 260 + SEAL-C of lines",
        "streaming for 400 + SEAL-C of lines",
    ))  # fmt: skip
    assert all((output / name).stat().st_size > 5000 for name in ("perplexity.png", "retrieval.png"))

    # A folder of an older version: its settings are said to differ, and what this version knows of it is summed up.
    older = json.loads((output / "plan.json").read_text()) | {"best": 3}
    (output / "plan.json").write_text(json.dumps(older))
    code, out, err = seal(capsys, "study", "--preset", "smollm2-context", "--output", output, "--summary")
    assert code == 0 and json.loads((output / "summary.json").read_text()) == content, err
    code, _, err = seal(capsys, *arguments[:-1], "tuned_rates=[0.01]")
    assert code == 1 and "got one with another tuned_rates" in err


def test_the_model_is_as_it_was_and_a_refusal_is_a_finding(small, text, tmp_path):
    from seal_ops.experiments.context_study.workbench import Workbench

    plan = the_plan(text, lengths=(190, 260), reaches=(260,), train_length=260, methods=("ntk",))
    bench = Workbench(small, str(tmp_path), plan, device="cpu", dtype="float32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = bench.model(ids).logits
        with bench.extended("self_extend", 260) as (lm, facts):
            assert facts["options"] and lm is bench.model and facts["positions"] >= 260
        bench.model.config.rope_parameters = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
        with bench.extended("ntk", 260) as (lm, facts):
            assert lm is None and "ntk needs a rotary embedding of default frequencies" in facts["refused"]
        assert torch.equal(bench.model(ids).logits, before)
    bench.samples.close()


WRONG = [
    (dict(text="nowhere.txt"), FileNotFoundError, "text must be a file of English text"),
    (dict(sections=("tables",)), ValueError, "sections must be among perplexity, .*, got tables"),
    (dict(methods=("rope",)), ValueError, "methods must be among .*, got rope"),
    (dict(recipes=("lora",)), ValueError, "recipes must be among .*, got lora"),
    (dict(lengths=()), ValueError, "lengths must name at least one, got none"),
    (dict(train_length=100), ValueError, r"train_length must be one of the lengths .* that a reach holds, got 100"),
]


@pytest.mark.parametrize("settings, error, sentence", WRONG, ids=lambda value: str(value)[:40])
def test_plans_that_cannot_be_meant(settings, error, sentence):
    with pytest.raises(error, match=f"seal study: {sentence}"):
        plans.check(plans.Plan(**{"text": __file__, **settings}))


def test_reaches_that_the_model_reads_already(small, text, tmp_path):
    from seal_ops.experiments.context_study.driver import STUDY

    with pytest.raises(ValueError, match="reaches must go beyond the 200 tokens"):
        STUDY.run(small, str(tmp_path / "x"), the_plan(text, reaches=(200, 400), lengths=(400,), train_length=400),
            device="cpu")  # fmt: skip


def test_summary_of_nothing(tmp_path):
    assert summary.write_summary(str(tmp_path)) == []
