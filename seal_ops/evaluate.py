"""Accuracy of a model on a generated task, by length and by whatever else the samples carry.

Decoding is greedy, through ``model.generate``.  Prompts of a batch need no padding although their lengths differ: all are
read up to the shortest one's end, and where a longer one goes on, its own tokens are fed in the place of generated ones.
An output ends at the end token or at the task's ``stop`` text.  Test samples come from other random numbers than training
samples, whatever the seeds.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from . import tasks
from .files import atomic_write
from .progress import bar

BATCH_TOKENS = (8_192, 16_384)  # prompt tokens in a batch where batch_size is left to us: on a CPU, on a GPU
LARGEST_SPREAD = 64  # tokens between the longest and the shortest prompt of a batch: each costs a decoding step
SAVE_EVERY = 2.0  # seconds between writes of an unfinished result


@dataclass(frozen=True)
class Cell:
    """Accuracy of one group of cases with its 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    correct: float
    cases: int

    def __str__(self):
        return f"{self.accuracy:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(correct: float, cases: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927); honest at 0 and 1, where the normal one has no width.

    Partial scores in [0, 1] may be summed into ``correct``: their variance is never above that of right and wrong, so
    the interval is then wide rather than narrow.
    """
    if cases < 1:
        raise ValueError(f"wilson: cases must be at least 1, got {cases}")
    p, n = correct / cases, cases
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        task: name of the task.
        name: what was evaluated ("base", "SEAL-H"), for tables and plots.
        settings: what decides the outcome: lengths, cases, seed, chat format, fingerprint of the model.
        records: one dict a case: ``length``, ``index``, ``prompt_tokens``, ``answer``, ``output``, ``score`` and the
            sample's ``meta``.
        seconds: time spent on generating and decoding, summed over resumed runs.
    """

    task: str
    name: str
    settings: dict
    records: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    def by(self, *keys: str | Callable[[dict], object]) -> dict:
        """Accuracy by the values of record fields (or of functions of a record): ``{value or tuple: Cell}``, sorted."""
        groups: dict = {}
        for record in self.records:
            value = tuple(key(record) if callable(key) else record.get(key) for key in keys)
            groups.setdefault(value[0] if len(keys) == 1 else value, []).append(record["score"])
        return {value: _cell(groups[value]) for value in sorted(groups)}

    @property
    def accuracy(self) -> dict[int, Cell]:
        """Accuracy by length."""
        return self.by("length")

    def table(self) -> str:
        """Accuracy by length as text."""
        rows = [f"{'tokens':>8}  {'accuracy':>8}  {'95 % interval':>14}  {'cases':>5}"]
        for length, cell in self.accuracy.items():
            interval = f"{cell.low:.2f} to {cell.high:.2f}"
            rows.append(f"{length:>8}  {cell.accuracy:>8.3f}  {interval:>14}  {cell.cases:>5}")
        return "\n".join(rows)

    def save(self, path) -> None:
        """Writes everything as JSON; the file is replaced in one step."""
        cells = [{"length": length, **asdict(cell)} for length, cell in self.accuracy.items()]
        atomic_write(path, json.dumps({**vars(self), "accuracy": cells}, indent=1, ensure_ascii=False) + "\n")

    def __str__(self):
        return f"{self.task}, {self.name}\n{self.table()}" if self.name else f"{self.task}\n{self.table()}"

    @classmethod
    def load(cls, path) -> "Evaluation":
        """Reads what :meth:`save` wrote; ``ValueError`` where the file is something else."""
        with open(path, encoding="utf-8") as file:
            try:
                content = json.load(file)
                return cls(**{key: content[key] for key in ("task", "name", "settings", "records", "seconds")})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"Evaluation.load: {path} must be a saved evaluation, got {error!r}") from None

    def save_csv(self, path) -> None:
        """Writes one row a case as CSV; the file is replaced in one step."""
        columns = list(dict.fromkeys(key for record in self.records for key in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, ["task", "name", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"task": self.task, "name": self.name, **record} for record in self.records)
        atomic_write(path, text.getvalue())


def _cell(scores):
    low, high = wilson(sum(scores), len(scores))
    return Cell(sum(scores) / len(scores), low, high, sum(scores), len(scores))


def evaluate(
    model,
    tokenizer,
    task,
    lengths: int | Iterable[int],
    cases: int = 50,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    chat_template=None,
    name: str = "",
    output: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Evaluation:
    """Accuracy of ``model`` on ``task``, greedy decoding, ``cases`` test samples at each length.

    Args:
        model: a causal language model of transformers, with or without attached scales.
        tokenizer: its tokenizer.
        task: a :class:`seal_ops.tasks.Task`, a task's name, or ``"module:Class"``.
        lengths: prompt lengths in tokens (answer and room included), one or more.
        cases: samples at each length.
        batch_size: prompts in a batch at most; None takes as many as fit in 16,384 tokens (8,192 on a CPU).
        seed: draws the test samples; equal seeds give equal cases, for every model with this tokenizer.
        max_new_tokens: longest output; None for the task's own.
        chat_template: None, True, False or a string: see :class:`seal_ops.tasks.Encoder`.
        name: what is evaluated, for tables and plots.
        output: a JSON file, kept up to date while running.
        resume: continue what ``output`` holds; it must come from the same model and settings.
        progress: draw a bar; None draws where stderr is a terminal.

    Returns:
        An :class:`Evaluation`; ``.accuracy[length]`` is a :class:`Cell`.

    Raises:
        ValueError: a length is too short, the tokenizer lacks a token, or ``output`` holds another run's cases.
    """
    task = tasks.get(task)
    lengths = _lengths(lengths)
    if cases < 1:
        raise ValueError(f"evaluate: cases must be at least 1, got {cases}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1 or None, got {batch_size}")
    result = Evaluation(
        task.name,
        name,
        {
            "lengths": lengths,
            "cases": cases,
            "seed": seed,
            "max_new_tokens": max_new_tokens or task.max_new_tokens,
            "chat_template": chat_template,
            "task": {key: repr(value) for key, value in vars(task).items()},
            "model": fingerprint(model),
        },
    )
    if resume and output is not None and os.path.exists(output):
        result = _resumed(result, output)

    done = {(record["length"], record["index"]) for record in result.records}
    saved = started = time.monotonic()
    spent = result.seconds
    batch_tokens = BATCH_TOKENS[model.device.type == "cuda"]
    training = model.training
    model.eval()
    try:
        with bar(len(lengths) * cases, name or task.name, progress) as advance:
            advance(len(done))
            for length in lengths:
                if all((length, index) in done for index in range(cases)):
                    continue
                samples = task.generate(tokenizer, length, cases, seed, split="test", chat_template=chat_template)
                open_cases = [i for i in range(cases) if (length, i) not in done]
                for batch in _batches(open_cases, samples, batch_size or max(1, batch_tokens // length)):
                    outputs = generate(
                        model,
                        tokenizer,
                        [samples[i].prompt_ids for i in batch],
                        max_new_tokens=result.settings["max_new_tokens"],
                        stop=task.stop,
                    )
                    for i, text in zip(batch, outputs, strict=True):
                        result.records.append(_record(task, samples[i], length, i, text))
                    result.seconds = spent + time.monotonic() - started
                    here = [record["score"] for record in result.records if record["length"] == length]
                    advance(len(batch), f"{length} tokens: {sum(here) / len(here):.2f}")
                    if output is not None and time.monotonic() - saved > SAVE_EVERY:
                        result.save(output)
                        saved = time.monotonic()
    finally:
        model.train(training)
    result.records.sort(key=lambda record: (record["length"], record["index"]))
    if output is not None:
        result.save(output)
    return result


def _lengths(lengths):
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    if not lengths or not all(isinstance(n, int) and n > 0 for n in lengths):
        raise ValueError(f"evaluate: lengths must be positive integers, at least one, got {lengths}")
    return sorted(set(lengths))


def _resumed(fresh, output):
    found = Evaluation.load(output)
    if found.task != fresh.task or found.settings != json.loads(json.dumps(fresh.settings)):
        differing = [key for key, value in fresh.settings.items() if found.settings.get(key) != value] or ["task"]
        raise ValueError(
            f"evaluate: output {output} must come from the same model and settings to resume, "
            f"got another {', '.join(differing)}"
        )
    return Evaluation(fresh.task, fresh.name, fresh.settings, found.records, found.seconds)


def _batches(indices, samples, batch_size):
    """Lists of at most ``batch_size`` indices whose prompts are nearly as long as each other."""
    batch: list[int] = []
    for i in sorted(indices, key=lambda i: len(samples[i].prompt_ids)):
        spread = len(samples[i].prompt_ids) - len(samples[batch[0]].prompt_ids) if batch else 0
        if len(batch) == batch_size or spread > LARGEST_SPREAD:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _record(task, sample, length, index, text):
    score = float(task.score(sample, text))
    if not 0 <= score <= 1:
        raise ValueError(f"tasks.{task.name}: score must be in [0, 1], got {score}")
    return {
        "length": length,
        "index": index,
        "prompt_tokens": len(sample.prompt_ids),
        "answer": sample.answer,
        "output": text,
        "score": score,
        **{key: value for key, value in sample.meta.items() if key != "index"},
    }


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 100, stop: str | None = None
) -> list[str]:
    """Greedy continuations of prompts.

    Args:
        prompts: token ids, one list a prompt; every token by which they differ in length costs a step.
        max_new_tokens: longest continuation.
        stop: text at which a continuation ends (leading white space apart); it is cut off.

    Returns:
        Texts without special tokens, without leading white space.
    """
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    lengths = [len(prompt) for prompt in prompts]
    shortest, longest = min(lengths), max(lengths)
    ends = _end_ids(model, tokenizer)

    def read(row, ids):
        """The text so far of a row, and whether it has ended."""
        new = ids[lengths[row] : lengths[row] + max_new_tokens]
        cut = next((i for i, token in enumerate(new) if token in ends), None)
        text = tokenizer.decode(new[:cut], skip_special_tokens=True).lstrip()
        return text, cut is not None or len(new) == max_new_tokens or (stop is not None and stop in text)

    class _Feed(LogitsProcessor):
        """Where a prompt goes on, its next token is the most probable one."""

        def __call__(self, input_ids, scores):
            here = input_ids.shape[1]
            rows = [row for row in range(len(prompts)) if lengths[row] > here]
            if rows:
                scores = scores.clone()
                scores[rows, [prompts[row][here] for row in rows]] = torch.inf
            return scores

    class _Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            ended = [read(row, ids)[1] for row, ids in enumerate(input_ids.tolist())]
            return torch.tensor(ended, device=input_ids.device)

    # Without an end token, since prompts may contain it where they are fed; rows that have ended go on until all have.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest - shortest + max_new_tokens,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0),
    )
    input_ids = torch.tensor([prompt[:shortest] for prompt in prompts], device=model.device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    with _configured(base, config):
        sequences = base.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Feed()] if longest > shortest else []),
            stopping_criteria=StoppingCriteriaList([_Stop()]),
        )
    texts = [read(row, ids)[0] for row, ids in enumerate(sequences.tolist())]
    return [text.partition(stop)[0] if stop is not None else text for text in texts]


@contextlib.contextmanager
def _configured(model, config):
    """Inside, nothing of the model's own generation config applies: ``generate`` would fill ours up from it."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _end_ids(model, tokenizer):
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set() if found is None else {found} if isinstance(found, int) else set(found)
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


@torch.no_grad()
def fingerprint(model, trainable: bool = True) -> str:
    """Hash of a model's weights (up to 64 evenly spaced values of each): tells runs of different models apart.

    ``trainable=False`` leaves out the parameters that require gradients.
    """
    attachment = getattr(getattr(model, "seal_scales", None), "attachment", None)
    off = attachment is not None and not attachment.seam.installed  # inside seal_ops.disabled
    digest = hashlib.sha256(b"scales off" if off else b"")
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.requires_grad and not trainable:
            continue
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 64)]
        values = values.double() if values.is_floating_point() else values.long()
        digest.update(f"{name}{list(parameter.shape)}".encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
