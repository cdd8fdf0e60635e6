"""Scales against low-rank adapters on equal samples and cases.

:func:`compare` trains SEAL-H, SEAL-C and the paper's baselines, LoRA and DoRA of rank 4 on q, k, v and o (through
PEFT), on the same samples, measures all of them on the same test cases and tests the differences.  Every finished step
leaves a file in the output folder, and a second run continues from there.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from .. import tasks
from ..adapters.attachment import attach, load
from ..evaluation.logprobs import answer_logprobs
from ..evaluation.results import Evaluation
from ..evaluation.runner import evaluate
from ..evaluation.statistics import holm, paired
from ..huggingface.origin import provenance
from ..tasks.description import describe, prompt_options
from ..training.loop import train
from ..training.recipe import GRANULARITIES, LEARNING_RATES
from ..training.run_folder import RESULT
from ..utils.files import atomic_write, write_csv
from .runs import read_json_file, reserved

METHODS = tuple(LEARNING_RATES)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
BASE = "base"
VALIDATION = 10  # samples on which a learning rate is chosen


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        settings: task, lengths, samples, seed and the adapters' form.
        evaluations: ``{name: Evaluation}``, the base first.
        training: ``{name: dict}`` with ``lr``, ``parameters``, ``seconds``, ``peak_memory``, ``losses`` and, where
            rates were searched, ``tried``: the validation loss of each.
        provenance: model and versions, for people.
    """

    settings: dict
    evaluations: dict[str, Evaluation]
    training: dict[str, dict]
    provenance: dict = field(default_factory=dict)

    def tests(self, length: int | None = None) -> list[dict]:
        """Paired tests of every two models on the cases of a length (None: of all lengths).

        Dicts ``first``, ``second``, the fields of :class:`seal_ops.evaluation.statistics.Paired`, and ``p_adjusted``
        (Holm, over this list).
        """
        scores = {}
        for name, evaluation in self.evaluations.items():
            kept = [r for r in evaluation.records if length is None or r["length"] == length]
            scores[name] = {(r["length"], r["index"]): r["score"] for r in kept}
        cases = sorted(set.intersection(*(set(s) for s in scores.values())))
        names, found = list(scores), []
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                values = [[scores[name][case] for case in cases] for name in (first, second)]
                found.append({"first": first, "second": second, **asdict(paired(*values))})
        for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
            row["p_adjusted"] = p
        return found

    def rows(self) -> list[dict]:
        """One dict a model: accuracy at each length with its interval, what was trained, and the time it took."""
        found = []
        for name, evaluation in self.evaluations.items():
            row = {"name": name}
            for length, cell in evaluation.accuracy.items():
                row |= {f"accuracy_{length}": cell.accuracy, f"low_{length}": cell.low, f"high_{length}": cell.high}
            training = self.training.get(name, {})
            row |= {key: training.get(key) for key in ("parameters", "lr", "peak_memory")}
            found.append(row | {"training_seconds": training.get("seconds"), "evaluation_seconds": evaluation.seconds})
        return found

    def save(self, path) -> None:
        """Writes rows, tests and training as JSON; the file is replaced in one step."""
        longest = max(self.settings["lengths"])
        content = {
            "kind": "seal_ops.compare",
            "settings": self.settings,
            "rows": self.rows(),
            "tests": {str(longest): self.tests(longest), "all lengths": self.tests()},
            "training": self.training,
            "provenance": self.provenance,
        }
        atomic_write(path, json.dumps(content, indent=1) + "\n")

    def save_csv(self, path) -> None:
        """Writes :meth:`rows` as CSV."""
        rows = self.rows()
        write_csv(path, list(dict.fromkeys(key for row in rows for key in row)), rows)


def compare(
    load_model_fn: Callable[[], tuple],
    task,
    lengths: Sequence[int],
    cases: int = 50,
    *,
    output: str | os.PathLike,
    train_length: int | None = None,
    samples: int = 50,
    methods: Sequence[str] = METHODS,
    rates: Mapping[str, float | Sequence[float]] | None = None,
    rank: int = 4,
    alpha: int = 8,
    target_modules: Sequence[str] = TARGETS,
    seed: int = 0,
    chat_template=None,
    chat_template_kwargs: dict | None = None,
    backend: str | None = None,
    progress: bool | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Trains each method on the same samples and measures all on the same test cases.

    Args:
        load_model_fn: returns ``(model, tokenizer)``, the model as loaded; called once for each training and the base.
        task, lengths, cases, seed, chat_template, chat_template_kwargs: see :func:`seal_ops.evaluate`.
        output: a folder; what it holds of these settings is not run again.
        train_length: tokens of a training sample; None for the longest of ``lengths``.
        samples: training samples, the same for all.
        methods: of ``METHODS``; LoRA and DoRA need the package peft.
        rates: learning rates by method; a list is searched: the rate with the least loss on 10 further training-split
            samples is taken, and every rate tried is reported.  Default: the paper's, which were found on 7B models.
        rank, alpha, target_modules: of LoRA and DoRA (alpha: not stated in the paper; twice the rank is PEFT's usage).

    Raises:
        ValueError: an unknown method, or an output folder of other settings.
    """
    task, lengths = tasks.get(task), sorted(set(lengths))
    train_length = train_length or max(lengths)
    rates = {**LEARNING_RATES, **(rates or {})}
    for name in [*methods, *rates]:
        if name not in METHODS:
            raise ValueError(f"seal_ops.compare: methods must be among {', '.join(METHODS)}, got {name!r}")
    model, tokenizer = load_model_fn()
    prompts = prompt_options(chat_template, chat_template_kwargs)
    origin = provenance(model)
    settings = {
        **describe(task, tokenizer, **prompts), "lengths": lengths, "cases": cases, "train_length": train_length,
        "samples": samples, "rates": {name: _rates(rates[name]) for name in methods}, "rank": rank, "alpha": alpha,
        "target_modules": list(target_modules), "seed": seed, "model": origin["model"]["fingerprint"],
    }  # fmt: skip
    with reserved(output, settings, "seal_ops.compare"):
        form = {"rank": rank, "alpha": alpha, "target_modules": list(target_modules), "backend": backend}

        def measure(model, tokenizer, name):
            path = os.path.join(output, f"{name}.json")
            result = evaluate(
                model, tokenizer, task, lengths, cases, seed=seed, name=name, output=path, resume=True,
                progress=progress, **prompts,
            )  # fmt: skip
            log(result.line())
            return result

        @functools.cache
        def draw():
            return task.generate(tokenizer, train_length, samples, seed, progress=progress, **prompts)

        evaluations, training = {BASE: measure(model, tokenizer, BASE)}, {}
        for method in methods:
            tried = {}
            for lr in settings["rates"][method]:
                folder = os.path.join(output, "adapters", f"{method}-{lr:g}")
                model, tokenizer, training[method] = trained(
                    load_model_fn, method, folder, draw, lr=lr, seed=seed, progress=progress, **form
                )
                if len(settings["rates"][method]) > 1:
                    drawing = {**prompts, "progress": progress}
                    tried[lr] = _validation_loss(model, tokenizer, task, train_length, seed, drawing, folder)
            if tried:
                best = min(tried, key=tried.get)
                folder = os.path.join(output, "adapters", f"{method}-{best:g}")
                model, tokenizer, training[method] = adapted(load_model_fn, method, folder, **form)
                training[method]["tried"] = {f"{lr:g}": loss for lr, loss in tried.items()}
            evaluations[method] = measure(model, tokenizer, method)
        return Comparison(settings, evaluations, training, origin)


def trained(load_model_fn, method, folder, draw, *, lr, seed=0, progress=None, **form):
    """``(model, tokenizer, training)`` of a method: as ``folder`` holds it, else trained there on what ``draw()``
    gives."""
    model, tokenizer, training = adapted(load_model_fn, method, folder, **form)
    if training is None:
        train(model, draw(), lr=lr, seed=seed, output_dir=folder, resume=True, progress=progress)
        training = read_json_file(os.path.join(folder, RESULT))
    return model, tokenizer, training


def adapted(load_model_fn, method, folder, *, rank=4, alpha=8, target_modules=TARGETS, backend=None):
    """``(model, tokenizer, training)`` of a method: trained, as ``folder`` holds it, or new, with training None."""
    model, tokenizer = load_model_fn()
    done = os.path.exists(os.path.join(folder, RESULT))
    result = read_json_file(os.path.join(folder, RESULT)) if done else None
    if method in GRANULARITIES:
        load(model, folder, backend=backend) if done else attach(model, GRANULARITIES[method], backend=backend)
        return model, tokenizer, result
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ImportError(
            f"seal_ops.compare: {method} needs the package peft (pip install 'seal_ops[peft]'): {error}"
        ) from error
    if done:
        return PeftModel.from_pretrained(model, folder).eval(), tokenizer, result
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # A is random, so that the adapter starts where any other run of it does
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(target_modules),
            use_dora=method == "DoRA",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config).eval(), tokenizer, result


def _validation_loss(model, tokenizer, task, length, seed, drawing, folder):
    """:func:`validation_loss` on training-split samples of another seed; kept in the adapter's folder."""
    path = os.path.join(folder, "validation.json")
    if not os.path.exists(path):
        drawn = task.generate(tokenizer, length, VALIDATION, seed + 1, **drawing)
        atomic_write(path, json.dumps({"loss": validation_loss(model, drawn)}) + "\n")
    return read_json_file(path)["loss"]


@torch.no_grad()
def validation_loss(model, samples) -> float:
    """Mean loss of an answer token, in nats."""
    total = count = 0
    for sample in samples:
        logprob, _ = answer_logprobs(model, torch.tensor([sample.input_ids], device=model.device), sample)
        total, count = total - logprob.item(), count + len(sample.answer_ids)
    return total / count


def _rates(value):
    rates = [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value]
    if not rates or min(rates) <= 0:
        raise ValueError(f"seal_ops.compare: rates must be positive numbers, at least one a method, got {value!r}")
    return rates
