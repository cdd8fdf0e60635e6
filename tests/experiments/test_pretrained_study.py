"""The study of a pretrained model: its queue, its jobs on a tiny model, and what the summary makes of them."""

import json
import pathlib

import pytest
import torch
from command_line import TINY, folder, seal  # noqa: F401
from retrieval_fixtures import one_thread  # noqa: F401

from seal_ops.experiments.pretrained_study import drawings
from seal_ops.experiments.pretrained_study.plan import Plan, check, jobs
from seal_ops.experiments.pretrained_study.summary import write_summary

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_job_comes_behind_what_it_needs():
    plan = Plan(text=__file__)
    names = [job.name for job in jobs(plan)]
    assert len(set(names)) == len(names) and names[0] == f"main-{plan.curve_task}-0"
    for job in jobs(plan):
        assert all(names.index(need) < names.index(job.name) for need in job.needs), job.name
    with pytest.raises(ValueError, match="sections must be among main, .*, got 'mian'"):
        check(Plan(sections=("mian",)))


def test_study_and_summary(capsys, folder, tmp_path):  # noqa: F811
    output = tmp_path / "study"
    text = tmp_path / "text.txt"
    text.write_text("Tell me the number in line 1 2 3. I need the number.\n" * 200)
    arguments = [
        "study",
        "--preset",
        "smollm2",
        "--model",
        folder,
        *TINY,
        "--output",
        output,
        "--text",
        text,
        "--sections",
        "main",
        "adapters",
        "beyond",
        "curve",
        "length",
        "elsewhere",
        "format",
        "--plan",
        "tasks=[lines]",
        "lengths=[190,230]",
        "cases=2",
        "samples=2",
        "seeds=[0,1]",
        "adapter_tasks=[lines]",
        "curve_task=lines",
        "curve_cases=2",
        "curve_samples=[1]",
        "curve_rates={SEAL-H: [0.01], SEAL-C: [0.02]}",
        "train_lengths=[190]",
        "beyond=[[ntk,2,260]]",
        "beyond_cases=2",
        "format_tasks=[lines]",
        "format_lengths=[190]",
        "format_cases=2",
        "rates={SEAL-H: [0.01, 0.1], SEAL-C: [0.02], LoRA: [0.001], DoRA: [0.001]}",
    ]
    start = arguments.index("--sections") + 1
    code, out, err = seal(capsys, *arguments[:start], "main", *arguments[arguments.index("--plan") :])
    assert code == 0 and out.splitlines()[-1] == "2 jobs done here; 0 left: ", err
    code, out, err = seal(capsys, *arguments)
    assert code == 0, err
    assert "failed" not in out and "; 0 left" in out
    environments = [json.loads(path.read_text()) for path in output.glob("environment-*.json")]
    assert sorted(name for found in environments for name in found["jobs"]) == sorted(
        path.stem for path in output.glob("*-*.json") if not path.stem.startswith("environment")
    ), "every job's environment is kept, also where two processes bear the same number"
    first = json.loads((output / "main-lines-0.json").read_text())
    assert set(first["training"]["SEAL-H"]["tried"]) == {"0.01", "0.1"}
    assert {n: len(s) for n, s in first["measured"]["SEAL-C"]["scores"].items()} == {"190": 2, "230": 2}
    second = json.loads((output / "main-lines-1.json").read_text())
    assert second["training"]["SEAL-H"]["lr"] == first["training"]["SEAL-H"]["lr"], "the rate is chosen once"
    merged = json.loads((output / "elsewhere-merged.json").read_text())
    assert merged["measured"]["SEAL-C merged"]["scores"]["230"] == first["measured"]["SEAL-C"]["scores"]["230"]

    code, out, err = seal(capsys, *arguments)
    assert code == 0 and out.startswith("0 jobs done here; 0 left"), "nothing runs twice"
    code, _, err = seal(capsys, *arguments, "seed=1")
    assert code == 1 and "plan must be among" in err
    code, _, err = seal(capsys, *arguments, "cases=3")
    assert code == 1 and "got one with another cases" in err

    plan = json.loads((output / "plan.json").read_text())
    (output / "plan.json").write_text(json.dumps({key: plan[key] for key in plan if key != "heads_cases"}))
    assert seal(capsys, *arguments)[0] == 0, "a folder of a version that did not know one of the settings"

    code, out, err = seal(capsys, "study", "--preset", "smollm2", "--summary", "--output", output)
    assert code == 0, err
    content = json.loads((output / "summary.json").read_text())
    cells = {(c["method"], c["length"]): c for c in content["main"]["cells"]}
    assert cells["SEAL-C", 230]["cases"] == 4 and cells["LoRA", 190]["seeds"] == 2
    both = first["measured"]["base"]["scores"]["190"] + second["measured"]["base"]["scores"]["190"]
    assert cells["base", 190]["accuracy"] == sum(both) / 4
    assert {(r["samples"], r["lr"]) for r in content["curve"] if r["method"] == "SEAL-C"} == {
        (None, 0.02),
        (2, 0.02),
        (1, 0.02),
    }
    (by_rate,) = (r for r in content["curve"] if r["method"] == "SEAL-C" and r["samples"] is None)
    rates = json.loads((output / "elsewhere-rates.json").read_text())["perplexity"]
    change = rates["rate-lines-SEAL-C-0.02"]["perplexity"] / rates["base"]["perplexity"] - 1
    assert by_rate["perplexity_change"] == change != 0 and by_rate["validation_loss"] > 0
    assert by_rate["shortest"] is not None and by_rate["cases"] == 2, "the longest is the row, the shortest a column"
    names = {r["scales"] for r in content["elsewhere"]["perplexity"]}
    assert (
        names == {"base", "lines-SEAL-H-0", "lines-SEAL-C-0"} and content["elsewhere"]["perplexity"][0]["change"] == 0
    )
    tables = (output / "tables.md").read_text()
    for word in ("| lines | SEAL-C |", "base → SEAL-C", "validation loss by rate", "| ntk | 2 | base |"):
        assert word in tables
    against = by_rate["against_base"]
    assert against["cases"] == 2 and by_rate["shortest_against_base"]["cases"] == 2
    base = first["measured"]["base"]["scores"]
    assert against["base"] == sum(base["230"]) / 2 and by_rate["shortest_against_base"]["base"] == sum(base["190"]) / 2
    assert {(r["method"], r["train_length"]) for r in content["length"]} == {
        ("base", ""), ("SEAL-H", 190), ("SEAL-C", 190), ("SEAL-H", 230), ("SEAL-C", 230),
    }  # fmt: skip
    assert len(content["similarity"]) == 2, "two draws a method: what differs in its rate only is no draw"
    tested = {(t["first"], t["second"], t["length"]) for t in content["main"]["tests"]}
    assert {("SEAL-H", "LoRA", 230), ("SEAL-C", "DoRA", 230), ("SEAL-C", "LoRA", 190)} <= tested
    for name in ("main.png", "curve.png", "length.png", "beyond.png", "report.html", "main.csv"):
        assert (output / name).stat().st_size > 1000 or name == "main.csv"


def test_plots_of_a_whole_study(tmp_path):
    """The stored study has every section."""
    content = json.loads((ROOT / "results/smollm2/summary.json").read_text())
    names = drawings.draw(content, str(tmp_path))
    assert names == ["main.png", "curve.png", "length.png", "beyond.png", "transfer.png"]
    assert all((tmp_path / name).stat().st_size > 20_000 for name in names)


def test_summary_of_nothing(capsys, tmp_path):
    assert write_summary(str(tmp_path)) == []
    code, _, err = seal(capsys, "study", "--preset", "smollm2", "--summary", "--output", tmp_path)
    assert code == 1 and "must hold a finished job of the main table" in err


def test_a_search_ends_where_its_best_rate_left_the_model(tmp_path, folder):  # noqa: F811
    from seal_ops.experiments.pretrained_study.workbench import Workbench

    bench = Workbench(str(folder), str(tmp_path), device="cpu")
    seen = {}

    def trained_values(model):
        return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])

    for rate in (1e-3, 0.3):
        with bench.adapted("SEAL-H") as lm:
            bench.train(lm, "lines", 190, 2, rate, 0)
            seen[f"{rate:g}"] = trained_values(lm)
    training, found = bench.search("SEAL-H", "lines", 190, 2, (0.3, 1e-3), 0, trained_values)
    best = min(training["tried"], key=training["tried"].get)
    assert best == "0.3", "the best is not the last, so that taking the last shows"
    assert f"{training['lr']:g}" == best and torch.equal(found, seen[best])
    assert not torch.equal(seen["0.001"], seen["0.3"]) and not hasattr(bench.model, "seal_scales")


def test_jobs_that_train_tell_their_results_alike():
    """Methods in order, each at its own rates; later draws take the first one's rate."""

    class Training:
        done = []

        def measure(self, task, lengths, cases, seed, model=None):
            self.done.append(("measured", model))
            return {"scores": {str(n): [1, 0] for n in lengths}}

        def search(self, method, task, length, samples, rates, seed, then):
            return {"lr": rates[-1]}, then(f"{method} at {rates[-1]}")

        def scales_folder(self, name):
            raise AssertionError("only models with scales are kept")

        def result(self, job):
            return {"training": {method: {"lr": f"{method} of {job}"} for method in ("LoRA", "DoRA")}}

    sizes = dict(seeds=(3, 4), lengths=(64,), samples=2, cases=2, sections=("adapters",))
    plan = Plan(tasks=("lines",), adapter_tasks=(), **sizes)
    found = {job.name: job for job in jobs(plan)}
    first, bench = found["adapters-lines-3"], Training()
    result = first.run(bench)
    assert list(result) == ["task", "seed", "measured", "training", "summary"]
    assert (result["task"], result["seed"], list(result["measured"])) == ("lines", 3, ["LoRA", "DoRA"])
    assert result["training"] == {m: {"lr": plan.rates[m][0]} for m in ("LoRA", "DoRA")}, "not searched on this task"
    assert result["summary"] == "LoRA: 64 0.50; DoRA: 64 0.50"
    assert bench.done == [("measured", f"{m} at {plan.rates[m][0]}") for m in ("LoRA", "DoRA")]
    again = {job.name: job for job in jobs(Plan(tasks=("lines",), adapter_tasks=("lines",), **sizes))}[
        "adapters-lines-4"
    ]
    assert again.run(bench)["training"]["DoRA"] == {"lr": "DoRA of adapters-lines-3"}
