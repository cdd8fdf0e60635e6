"""What a study found, from the files of its jobs: accuracies with intervals, and exact paired tests."""

import json
import os
from collections.abc import Sequence

import torch

from ...evaluation.statistics import holm, paired, spearman, wilson
from ...utils.files import atomic_write, write_csv
from ..runs import read_json_file
from . import drawings
from .sections.shared import LOW_RANK, RATE, SCALED
from .tables import markdown

METHODS = ("base", *SCALED, *LOW_RANK)
SUMMARY, TABLES = "summary.json", "tables.md"
_SECTIONS = ("main", "adapters", "beyond", "curve", "length", "heads", "transfer", "elsewhere", "quantised", "format")


def write_summary(folder: str) -> list[str]:
    """Writes tables, tests and plots of whatever jobs are finished; returns the names of the files."""
    found = _jobs(folder)
    main = _main(found)
    if not main["cells"]:
        return []
    content = {
        "kind": "seal_ops.pretrained_study",
        "main": main,
        "training": _training(found),
        "curve": _curve(found, read_json_file(os.path.join(folder, "plan.json"))["samples"]),
        "length": _length(found),
        "transfer": _transfer(found),
        "beyond": _beyond(found),
        "heads": _heads(found, folder),
        "elsewhere": _elsewhere(found),
        "quantised": _quantised(found),
        "format": _format(found),
        "similarity": _similarity(folder),
        "seconds": {name: job["job_seconds"] for name, job in found.items()},
    }
    atomic_write(os.path.join(folder, SUMMARY), json.dumps(content, indent=1) + "\n")
    write_csv(os.path.join(folder, "main.csv"), list(main["cells"][0]), main["cells"])
    atomic_write(os.path.join(folder, TABLES), markdown(content))
    return [SUMMARY, TABLES, "main.csv", *drawings.draw(content, folder)]


def cell(scores: Sequence[float]) -> dict:
    """Mean, 95 % Wilson interval and number of cases."""
    low, high = wilson(sum(scores), len(scores))
    return {"accuracy": sum(scores) / len(scores), "low": low, "high": high, "cases": len(scores)}


def _jobs(folder):
    names = sorted(n[: -len(".json")] for n in os.listdir(folder) if n.endswith(".json") and n.startswith(_SECTIONS))
    return {name: read_json_file(os.path.join(folder, f"{name}.json")) for name in names}


def _section(found, name):
    return [job for key, job in found.items() if key.startswith(f"{name}-")]


# --------------------------------------------------------------------------------------------------------- main table


def _main(found):
    """Cells pooled over seeds, and paired tests on the cases that both have, at the longest and the shortest length."""
    scores: dict[str, dict[str, dict[int, dict[int, list]]]] = {}  # [task][method][length][seed]
    for job in _section(found, "main") + _section(found, "adapters"):
        for method, measured in job["measured"].items():
            for length, values in measured["scores"].items():
                scores.setdefault(job["task"], {}).setdefault(method, {}).setdefault(int(length), {})[job["seed"]] = (
                    values
                )
    cells = [
        {
            "task": task,
            "method": method,
            "length": length,
            **cell([s for values in by_seed.values() for s in values]),
            "seeds": len(by_seed),
            "lowest_seed": min(map(_mean, by_seed.values())),
            "highest_seed": max(map(_mean, by_seed.values())),
        }
        for task, by_method in scores.items()
        for method in METHODS
        if method in by_method
        for length, by_seed in sorted(by_method[method].items())
    ]
    tests = []
    for task, by_method in scores.items():
        shortest, longest = min(by_method["base"]), max(by_method["base"])
        pairs = [("base", m, longest) for m in METHODS[1:]] + [("SEAL-H", "SEAL-C", longest)]
        pairs += [(a, b, longest) for a in SCALED for b in LOW_RANK]
        pairs += [("base", m, shortest) for m in METHODS[1:]] + [("SEAL-C", m, shortest) for m in LOW_RANK]
        for first, second, length in pairs:
            if first in by_method and second in by_method:
                row = {"task": task, "first": first, "second": second, "length": length}
                tests.append({**row, **_paired(by_method[first][length], by_method[second][length])})
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_adjusted"] = p
    return {"cells": cells, "tests": tests}


def _paired(first, second):
    seeds = sorted(set(first) & set(second))
    return vars(paired(*([score for seed in seeds for score in side[seed]] for side in (first, second))))


def _mean(values):
    return sum(values) / len(values)


def _training(found):
    rows = []
    for job in _section(found, "main") + _section(found, "adapters"):
        for method, training in job["training"].items():
            kept = {k: training[k] for k in ("lr", "parameters", "seconds", "peak_memory", "first_loss")}
            kept |= {"last_loss": training["last_losses"][-1], "tried": training.get("tried")}
            evaluation = job["measured"][method]["seconds"]
            rows.append(
                {"task": job["task"], "seed": job["seed"], "method": method, **kept, "evaluation_seconds": evaluation}
            )
    return rows


# ------------------------------------------------------------------------------------------------------ other sections


def _curve(found, plan_samples):
    """Accuracy at the longest length, by samples and by rate; of a rate also what it does elsewhere."""
    perplexities = found.get("elsewhere-rates", {}).get("perplexity", {})
    rows = []
    for job in _section(found, "curve"):
        main = found.get(f"main-{job['task']}-0", {})
        for method, measured in job["measured"].items():
            scores = {int(length): values for length, values in measured["scores"].items()}
            shortest, longest = min(scores), max(scores)
            training = job["training"][method]
            row = {
                "method": method,
                "samples": job.get("samples"),
                "lr": training["lr"],
                "seconds": training["seconds"],
            }
            row |= {"last_loss": training["last_losses"][-1], **cell(scores[longest])}
            row["against_base"] = _against_base(found, job["task"], longest, scores[longest])
            row["validation_loss"] = training.get("tried", {}).get(f"{training['lr']:g}")
            row["shortest"] = _mean(scores[shortest]) if shortest < longest else None
            if shortest < longest:
                row["shortest_against_base"] = _against_base(found, job["task"], shortest, scores[shortest])
            scales = f"{RATE}{job['task']}-{method}-{training['lr']:g}"
            if row["samples"] is None and scales in perplexities:
                row["perplexity_change"] = perplexities[scales]["perplexity"] / perplexities["base"]["perplexity"] - 1
            rows.append(row)
            chosen = main.get("training", {}).get(method, {})
            if row["samples"] is None and chosen.get("lr") == row["lr"]:  # of both curves
                rows.append({**row, "samples": plan_samples})
    return rows


def _against_base(found, task, length, values):
    """The paired test on the cases of the first seed on which the base was measured too; None where it was not."""
    key = str(length)
    importance, main = found.get("heads-importance", {}), found.get(f"main-{task}-0", {})
    base = importance.get("quadrants", {}).get("base", {}).get(key) if importance.get("task") == task else None
    base = base or main.get("measured", {}).get("base", {}).get("scores", {}).get(key)  # which are fewer cases
    if not base:
        return None
    count = min(len(base), len(values))
    return {"base": _mean(base[:count]), **vars(paired(base[:count], values[:count]))}


def _length(found):
    """Accuracy by the length trained at, on the cases of the first seed; the main table's training is one of them."""
    jobs = _section(found, "length")
    rows = []
    for main in {job["task"]: found.get(f"main-{job['task']}-0") for job in jobs}.values():
        for method, measured in (main or {"measured": {}})["measured"].items():
            longest = max(map(int, measured["scores"]))
            rows += _at_lengths(measured, method=method, train_length="" if method == "base" else longest)
    for job in jobs:
        for method, measured in job["measured"].items():
            rows += _at_lengths(measured, method=method, train_length=job["train_length"])
    return rows


def _at_lengths(measured, **names):
    return [{**names, "length": int(length), **cell(values)} for length, values in measured["scores"].items()]


def _transfer(found):
    base = found.get("transfer-base")
    rows = []
    for job in _section(found, "transfer"):
        for task, measured in job["measured"].items():
            for length, values in measured["scores"].items():
                row = {"trained": job["trained"] or "base", "measured": task, "length": int(length), **cell(values)}
                if base is not None:
                    row["against_base"] = vars(paired(base["measured"][task]["scores"][length], values))
                rows.append(row)
    tests = [row["against_base"] for row in rows if row["trained"] != "base" and "against_base" in row]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_adjusted"] = p
    return rows


def _beyond(found):
    rows = []
    for job in _section(found, "beyond"):
        base = job["measured"]["base"]["scores"]
        for method, measured in job["measured"].items():
            for length, values in measured["scores"].items():
                row = {
                    "kind": job["kind"],
                    "factor": job["factor"],
                    "method": method,
                    "length": int(length),
                    **cell(values),
                }
                rows.append({**row, "against_base": vars(paired(base[length], values))})
    return rows


def _heads(found, folder):
    content = {}
    importance, retrieval = found.get("heads-importance"), found.get("heads-retrieval")
    if importance is not None:
        content["agreement"], content["groups"] = importance["agreement"], importance["groups"]
        content["quadrants"] = [
            {
                "variant": name,
                "length": int(length),
                **cell(values),
                "against_base": vars(paired(importance["quadrants"]["base"][length], values)),
            }
            for name, lengths in importance["quadrants"].items()
            for length, values in lengths.items()
        ]
        logprobs = {
            key.split()[1]: values for key, values in importance["changes"].items() if key.startswith("logprob")
        }
        content["largest"] = {
            length: [
                {"layer": importance["units"][i][0], "head": importance["units"][i][1], "change": values[i]}
                for i in sorted(range(len(values)), key=lambda i: values[i])[:5]
            ]
            for length, values in logprobs.items()
        }
    if retrieval is not None:
        scores = torch.tensor(retrieval["scores"]).flatten()
        content["retrieval"] = {
            "over_0.1": int((scores > 0.1).sum()),
            "over_0.5": int((scores > 0.5).sum()),
            "heads": len(scores),
        }
        order = scores.argsort(descending=True)[:10].tolist()
        width = len(retrieval["scores"][0])
        content["retrieval"]["best"] = [
            {"layer": i // width, "head": i % width, "score": round(float(scores[i]), 4)} for i in order
        ]
        content["correlations"] = _correlations(scores, importance, folder)
    return content


def _correlations(retrieval, importance, folder):
    """Spearman's, head by head: of the retrieval score with importance and with how far learned scales moved."""
    rows = {}
    if importance is not None:
        for key, values in importance["changes"].items():
            if not key.startswith("accuracy"):
                rows[f"importance, {key}"] = spearman(retrieval, -torch.tensor(values))
    for name, layers in _learned(folder).items():
        moved = torch.cat([(layer - 1).abs().reshape(layer.shape[0], -1).mean(1) for layer in layers])
        rows[f"moved by {name}"] = spearman(retrieval, moved)
    return {key: round(value, 3) for key, value in rows.items()}


def _learned(folder):
    """The scales that the jobs saved, by name: one tensor a layer, in order."""
    from safetensors.torch import load_file

    scales, found = os.path.join(folder, "scales"), {}
    for name in sorted(os.listdir(scales)) if os.path.isdir(scales) else ():
        (weights,) = (n for n in os.listdir(os.path.join(scales, name)) if n.endswith(".safetensors"))
        tensors = load_file(os.path.join(scales, name, weights))
        found[name] = [tensors[key] for key in sorted(tensors, key=lambda key: int("".join(filter(str.isdigit, key))))]
    return found


def _similarity(folder):
    """Pearson's correlation of what two trainings of one method moved: of one task from two draws, and of two tasks."""
    vectors = {
        name: torch.cat([layer.flatten() for layer in layers]) - 1
        for name, layers in _learned(folder).items()
        if not name.startswith(RATE)  # those differ in the rate, not in the draw
    }
    rows = []
    for method in SCALED:
        mine = {tuple(name.split(f"-{method}-")): v for name, v in vectors.items() if f"-{method}-" in name}
        for i, (one, first) in enumerate(mine.items()):
            for other, second in list(mine.items())[i + 1 :]:
                if (one[0] == other[0]) != (one[1] == other[1]):
                    r = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
                    kind = "one task, two draws" if one[0] == other[0] else "two tasks"
                    rows.append(
                        {"method": method, "kind": kind, "first": "-".join(one), "second": "-".join(other), "r": r}
                    )
    return rows


def _elsewhere(found):
    content = {}
    if "elsewhere-perplexity" in found:
        job = found["elsewhere-perplexity"]
        base = job["perplexity"]["base"]["perplexity"]
        content["perplexity"] = [
            {"scales": name, "perplexity": x["perplexity"], "change": x["perplexity"] / base - 1, "tokens": x["tokens"]}
            for name, x in job["perplexity"].items()
        ]
    if "elsewhere-merged" in found:
        job = found["elsewhere-merged"]
        main = found[f"main-{job['task']}-0"]
        content["merged"] = []
        for name, measured in job["measured"].items():
            ((length, values),) = measured["scores"].items()
            before = main["measured"][name.removesuffix(" merged")]["scores"][length]
            differ = sum(a != b for a, b in zip(before, values, strict=True))
            content["merged"].append(
                {"method": name, "length": int(length), **cell(values), "unmerged": _mean(before), "differ": differ}
            )
    return content


def _quantised(found):
    return [
        {"method": method, "length": int(length), **cell(values)}
        for job in _section(found, "quantised")
        for method, measured in job["measured"].items()
        for length, values in measured["scores"].items()
    ]


def _format(found):
    return [
        {"task": task, "length": int(length), **cell(values)}
        for job in _section(found, "format")
        for task, measured in job["measured"].items()
        for length, values in measured["scores"].items()
    ]
