"""Head importance: what every head, or every channel of its output, does for retrieval.

Two measures of one thing, the change of the answer's log-probability when a unit is taken away:

* *ablation*: the unit's scale set to 0 (or to a ``factor`` of itself).  Many units' variants of one prompt run as the
  rows of one batch, each row with scales of its own (:meth:`seal_ops.Scales.rows`), so that nothing is patched
  between forward passes;
* *gradient*: ``-d log p / d keep`` at ``keep = 1``, the same change to first order, for all units in one backward pass.

The first order is exact for small changes only: expect the two to agree at ``factor=0.9`` and less so at 0.
"""

import json
import os
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .. import tasks
from ..adapters.attachment import attach, detach
from ..adapters.scales import Scales
from ..evaluation.logprobs import answer_logprobs
from ..evaluation.statistics import spearman
from ..huggingface.modes import mode, prepared
from ..huggingface.origin import provenance
from ..tasks.description import describe, prompt_options
from ..utils.files import atomic_write, check_file, write_csv
from ..utils.locks import only_writer
from ..utils.memory import Pieces
from ..utils.progress import bar
from ..utils.runs import Growing, load_result
from ..utils.runs import resume as resume_run

METHODS = ("ablation", "gradient")
BATCH_TOKENS = 16_384  # prompt tokens in a batch of variants
SAVE_EVERY = 5.0  # seconds


@dataclass
class HeadImportance:
    """What taking each unit away changes, case by case.

    Attributes:
        settings: what decides the outcome: task, tokenizer, chat format, lengths, cases, seed, granularity, fingerprint
            of the model.
        units: ``[layer, head]`` or ``[layer, head, channel]``, all of them.
        ablated: indices into ``units`` of those that were ablated.
        records: one dict a case: ``length``, ``index``, ``logprob`` and ``exact`` of the whole model,
            ``ablated_logprob`` and ``ablated_exact`` (one value an ablated unit), ``gradient`` (one value a unit: the
            estimated change).
        seconds: time spent by method.
        provenance: model and versions that wrote it, for people.
    """

    settings: dict
    units: list[list[int]]
    ablated: list[int]
    records: list[dict] = field(default_factory=list)
    seconds: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """The lengths of the cases that were measured, in tokens."""
        return sorted({record["length"] for record in self.records})

    def change(self, measure: str, length: int | None = None) -> torch.Tensor:
        """Mean change by taking a unit away: fp64 ``[units]``, NaN where it was not measured.

        Args:
            measure: "logprob" (nats of the whole answer) or "accuracy" by ablation, "gradient" (nats, first order).
            length: of one length; None for the mean over all cases.

        Raises:
            ValueError: an unknown measure, or a length without cases.
        """
        return self._changes(measure, length).mean(0)

    def standard_error(self, measure: str, length: int | None = None) -> torch.Tensor:
        """Standard error of :meth:`change` over the cases, ``[units]``; NaN with fewer than two."""
        changes = self._changes(measure, length)
        if len(changes) < 2:
            return torch.full_like(changes[0], float("nan"))
        return changes.std(0) / len(changes) ** 0.5

    def _changes(self, measure, length):
        if measure not in ("logprob", "accuracy", "gradient"):
            raise ValueError(
                f"seal_ops.HeadImportance.change: measure must be logprob, accuracy or gradient, got {measure!r}"
            )
        records = [r for r in self.records if length is None or r["length"] == length]
        if not records:
            raise ValueError(f"seal_ops.HeadImportance.change: length must be one of {self.lengths}, got {length}")
        found = torch.full((len(records), len(self.units)), float("nan"), dtype=torch.float64)
        key = {"logprob": "logprob", "accuracy": "exact"}.get(measure)
        for row, record in zip(found, records, strict=True):
            if key is None and "gradient" in record:
                row[:] = torch.tensor(record["gradient"], dtype=torch.float64)
            elif key is not None and f"ablated_{key}" in record:
                values = torch.tensor(record[f"ablated_{key}"], dtype=torch.float64)
                row[self.ablated] = values - float(record[key])
        return found

    def accuracy(self, length: int) -> float:
        """Share of the cases of a length whose answer the whole model writes token for token."""
        exact = [record["exact"] for record in self.records if record["length"] == length]
        return sum(exact) / len(exact)

    def agreement(self) -> dict:
        """Spearman's rank correlations over the units that have both values.

        ``{"gradient_ablation": {length: rho}, "lengths": {"a,b": rho}}``: of the gradient's estimate with the
        ablation's change of the log-probability, and of the ablation's changes at two lengths.
        """
        of_methods, of_lengths = {}, {}
        for length in self.lengths:
            one, other = self.change("gradient", length), self.change("logprob", length)
            if both := _correlation(one, other):
                of_methods[length] = both
        for a, b in zip(self.lengths, self.lengths[1:], strict=False):
            if both := _correlation(self.change("logprob", a), self.change("logprob", b)):
                of_lengths[f"{a},{b}"] = both
        return {"gradient_ablation": of_methods, "lengths": of_lengths}

    def grid(self, measure: str, length: int | None = None) -> list[list[float]]:
        """``change`` as layers x heads; channels of a head are summed (gradient) or averaged (ablated ones)."""
        change = self.change(measure, length)
        layers = sorted({unit[0] for unit in self.units})
        rows: list[list[list[float]]] = [[] for _ in layers]
        for unit, value in zip(self.units, change.tolist(), strict=True):
            row = rows[layers.index(unit[0])]
            while len(row) <= unit[1]:
                row.append([])
            row[unit[1]].append(value)
        combine = _total if measure == "gradient" else _mean
        return [[combine(cell) for cell in row] for row in rows]

    def save(self, path) -> None:
        """Writes everything as JSON; the file is replaced in one step."""
        content = {"kind": "seal_ops.heads", **vars(self), "agreement": self.agreement()}
        atomic_write(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path) -> "HeadImportance":
        """Reads what :meth:`save` wrote; ``ValueError`` where the file is something else."""
        return load_result(cls, path, "head importance")

    def save_csv(self, path) -> None:
        """Writes one row a unit and length: the changes with their standard errors."""
        names = ["layer", "head", "channel"][: len(self.units[0])]
        measures = ("logprob", "accuracy", "gradient")
        rows = []
        for length in self.lengths:
            columns = []
            for measure in measures:
                columns += [self.change(measure, length).tolist(), self.standard_error(measure, length).tolist()]
            for unit, *values in zip(self.units, *columns, strict=True):
                rows.append([length, *unit, *("" if v != v else f"{v:.6g}" for v in values)])
        write_csv(path, ["length", *names, *(column for m in measures for column in (m, f"{m}_stderr"))], rows)


def measure_head_importance(
    model,
    tokenizer,
    task="lines",
    lengths: int | Iterable[int] = (1024, 2048),
    cases: int = 20,
    *,
    granularity: str = "head",
    methods: Sequence[str] = METHODS,
    factor: float = 0.0,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    chat_template=None,
    chat_template_kwargs: dict | None = None,
    gradient_checkpointing: bool | str = False,
    backend: str | None = None,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> HeadImportance:
    """The importance of every head or channel on the task's answers, on training samples of the task.

    An answer counts as exact where greedy decoding would write it token for token, which one forward pass over prompt
    and answer tells; so an ablated variant costs one forward pass.

    Args:
        model: a causal language model of transformers; scales that are attached stay, and what is taken away is
            their unit.
        task: see :func:`seal_ops.evaluate`; samples are of the split "train", so that test cases remain unseen.
        lengths: tokens a sample fills, one or more.
        cases: samples at each length.
        granularity: "head" or "channel".
        methods: "ablation", "gradient" or both.
        factor: what ablation multiplies a unit's scale by; the gradient's estimate is for the same step.
        limit: ablate only that many units, drawn by ``seed`` (channels are many); None for all.
        batch_size: variants in one forward pass; None takes as many as fit in 16,384 tokens.
        gradient_checkpointing: False, True or "selective", of :func:`seal_ops.train`.
        output, resume, progress: as in :func:`seal_ops.evaluate`.

    Raises:
        ValueError: a bad setting, or ``output`` holds another run.
    """
    task = tasks.get(task)
    lengths = sorted({lengths} if isinstance(lengths, int) else set(lengths))
    _check(lengths, cases, granularity, methods, limit, batch_size)
    call, output = "seal_ops.measure_head_importance", None if output is None else check_file(output)
    origin, prompts = provenance(model), prompt_options(chat_template, chat_template_kwargs)
    with only_writer(output, call), with_scales(model, granularity, backend) as scales, mode(model, False):
        units = _units(scales, granularity)
        ablated = list(range(len(units)))
        if limit is not None and limit < len(units):
            ablated = sorted(random.Random(seed).sample(ablated, limit))
        if "ablation" not in methods:
            ablated = []
        settings = {
            **describe(task, tokenizer, **prompts),
            "lengths": lengths,
            "cases": cases,
            "seed": seed,
            "granularity": granularity,
            "methods": sorted(methods),
            "factor": factor,
            "limit": None if len(ablated) in (0, len(units)) else limit,
            "model": origin["model"]["fingerprint"],
        }
        result = HeadImportance(settings, units, ablated, [], {method: 0.0 for method in methods}, origin)
        if resume and output is not None and os.path.exists(output):
            found = resume_run(HeadImportance.load, output, settings, call)
            result.records, result.seconds = found.records, found.seconds
        growing, per_case = Growing(result, output, SAVE_EVERY), len(ablated) + ("gradient" in methods)
        with bar(len(lengths) * cases * per_case, f"importance of {len(units)} {granularity}s", progress) as update:
            update(len(result.records) * per_case)
            for length in lengths:
                if not (missing := growing.missing(length, cases)):
                    continue
                pieces = Pieces(batch_size or max(1, BATCH_TOKENS // length), call)
                samples = task.generate(tokenizer, length, cases, seed, **prompts)
                for index, sample in ((index, samples[index]) for index in missing):
                    record = {"length": length, "index": index, "answer_tokens": len(sample.answer_ids)}
                    started = time.monotonic()
                    if "gradient" in methods:
                        record |= _gradient(model, scales, sample, units, factor, gradient_checkpointing)
                        result.seconds["gradient"] += time.monotonic() - started
                        update(1)
                    if "ablation" in methods:
                        started = time.monotonic()
                        record |= _ablation(model, scales, sample, [units[i] for i in ablated], factor, pieces, update)
                        result.seconds["ablation"] += time.monotonic() - started
                    growing.add([record])
    return growing.finish()


def _check(lengths, cases, granularity, methods, limit, batch_size):
    def refuse(name, expected, got):
        raise ValueError(f"seal_ops.measure_head_importance: {name} must be {expected}, got {got!r}")

    if not lengths or not all(isinstance(n, int) and n > 0 for n in lengths):
        refuse("lengths", "positive integers, at least one", lengths)
    if granularity not in ("head", "channel"):
        refuse("granularity", "'head' or 'channel'", granularity)
    if not methods or not set(methods) <= set(METHODS):
        refuse("methods", f"among {', '.join(METHODS)}, at least one", list(methods))
    for name, value in {"cases": cases, "limit": limit, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            refuse(name, "at least 1", value)


@contextmanager
def with_scales(model, granularity, backend):
    """The model's scales; attached inside only, where it has none."""
    found = getattr(model, "seal_scales", None)
    if isinstance(found, Scales):
        yield found
        return
    scales = attach(model, granularity, backend=backend)
    try:
        yield scales
    finally:
        detach(model)


def _units(scales, granularity):
    config = scales.config
    sizes = zip(config.layers, config.num_heads, config.head_dim, strict=True)
    if granularity == "head":
        return [[layer, h] for layer, heads, _ in sizes for h in range(heads)]
    return [[layer, h, c] for layer, heads, dim in sizes for h in range(heads) for c in range(dim)]


def ones_to_keep(scales, rows, per_channel):
    """Ones ``{layer: [rows, Hq, 1 or D]}``: what of every unit is kept."""
    config = scales.config
    sizes = zip(config.layers, config.num_heads, config.head_dim, strict=True)
    devices = {layer: scale.device for layer, scale in scales.items()}
    return {n: torch.ones(rows, heads, dim if per_channel else 1, device=devices[n]) for n, heads, dim in sizes}


def _times_scale(scales, keep):
    """``keep`` times the scales that the model has."""
    return {n: keep[n] * (s.detach() if s.dim() == 2 else s.detach()[:, None]) for n, s in scales.items()}


@torch.no_grad()
def _ablation(model, scales, sample, units, factor, pieces, update):
    input_ids = torch.tensor([sample.input_ids], device=model.device)
    per_channel = any(len(unit) == 3 for unit in units)
    logprobs, exact = [], []

    def measure(chunk):
        keep = ones_to_keep(scales, len(chunk), per_channel)
        for row, unit in enumerate(chunk):
            if unit is not None:
                keep[unit[0]][row, unit[1], unit[2] if per_channel else 0] = factor
        with scales.rows(_times_scale(scales, keep)):
            return answer_logprobs(model, input_ids.expand(len(chunk), -1), sample)

    variants = [None, *units]  # None: the whole model, which runs in the first batch
    for chunk, (logprob, right) in pieces.run(variants, measure):
        logprobs += logprob.tolist()
        exact += right.tolist()
        update(len(chunk) - (chunk[0] is None))
    return {
        "logprob": _short(logprobs[0]),
        "exact": exact[0],
        "ablated_logprob": [_short(x) for x in logprobs[1:]],
        "ablated_exact": [int(x) for x in exact[1:]],
    }


def _gradient(model, scales, sample, units, factor, checkpointing):
    """The first-order change by taking each unit down to ``factor``: ``(factor - 1) d log p / d keep`` at ``keep`` =
    1."""
    input_ids = torch.tensor([sample.input_ids], device=model.device)
    keep = ones_to_keep(scales, 1, per_channel=len(units[0]) == 3)
    for tensor in keep.values():
        tensor.requires_grad_()
    with torch.enable_grad(), prepared(model, checkpointing), scales.rows(_times_scale(scales, keep)):
        logprob, exact = answer_logprobs(model, input_ids, sample)
        gradients = torch.autograd.grad(logprob.sum(), list(keep.values()))
    change = torch.cat([(factor - 1) * g.flatten().cpu() for g in gradients])
    if not torch.isfinite(change).all():
        raise RuntimeError(
            "seal_ops.measure_head_importance: gradients of the scales must be finite, got NaN or infinity"
        )
    found = {"logprob": _short(logprob.item()), "exact": bool(exact)}
    return {**found, "gradient": [_short(x) for x in change.tolist()]}


def _short(value):
    """Six digits: what fp32 holds, without its decimal tail in a file."""
    return float(f"{value:.6g}")


def _correlation(one, other):
    both = ~(one.isnan() | other.isnan())
    if int(both.sum()) < 3:
        return None
    rho = spearman(one[both], other[both])
    return None if rho != rho else rho


def _total(values):
    return sum(values) if values else float("nan")


def _mean(values):
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else float("nan")
