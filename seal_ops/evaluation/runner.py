"""Accuracy of a model on a generated task, by length and by whatever else the samples carry.

Decoding is greedy (:mod:`.decoding`).  Test samples come from other random numbers than training samples, whatever the
seeds.
"""

import os
import time
from collections.abc import Iterable

from .. import tasks
from ..huggingface.context_window import warn_beyond_window
from ..huggingface.modes import mode
from ..huggingface.origin import provenance
from ..huggingface.wrappers import check_module
from ..tasks.description import describe, prompt_options
from ..tasks.reading import final_answer, opens_reasoning
from ..utils.arguments import integer, path, shown
from ..utils.files import check_file
from ..utils.locks import only_writer
from ..utils.memory import Pieces
from ..utils.progress import bar
from ..utils.runs import Growing
from ..utils.runs import resume as resume_run
from .decoding import generate, rows_at_once
from .results import Evaluation

LARGEST_SPREAD = 64  # tokens between the longest and the shortest prompt of a batch: each is read or costs a step
SAVE_EVERY = 2.0  # seconds between writes of an unfinished result


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
    chat_template_kwargs: dict | None = None,
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
        lengths: prompt lengths in tokens (answer and reserved tokens included), one or more.
        cases: samples at each length.
        batch_size: prompts in a batch at most; None takes as many as :func:`.decoding.rows_at_once` says.  Where they
            do not fit into the GPU's memory half as many are taken, with a warning.  An output does not depend on what
            else is in its batch, up to rounding.
        seed: draws the test samples; equal seeds give equal cases, for every model with this tokenizer.
        max_new_tokens: longest output; None for the task's own.
        chat_template: None, True, False or a string: see :class:`seal_ops.tasks.Encoder`.
        chat_template_kwargs: the template's variables.  With ``enable_thinking`` true, what a model writes before
            ``</think>`` is not scored, and ``max_new_tokens`` has to allow for it.
        name: what is evaluated, for tables and plots.
        output: a JSON file, kept up to date while running.
        resume: continue what ``output`` holds; it must come from the same model and settings.
        progress: draw a bar; None draws where stderr is a terminal.

    Returns:
        An :class:`Evaluation`; ``.accuracy[length]`` is a :class:`Cell`.

    Raises:
        ValueError: a scale is not finite, a length is too short, the tokenizer lacks a token, or ``output`` holds
            another run's cases.
    """
    check_module(model, "evaluate")
    task = tasks.get(task)
    lengths = _lengths(lengths)
    call = "seal_ops.evaluate"
    cases, seed = integer(call, "cases", cases, 1), integer(call, "seed", seed)
    batch_size = None if batch_size is None else integer(call, "batch_size", batch_size, 1)
    max_new_tokens = None if max_new_tokens is None else integer(call, "max_new_tokens", max_new_tokens, 1)
    output = None if output is None else check_file(path(call, "output", output))
    if (scales := getattr(model, "seal_scales", None)) is not None:
        scales.check_finite("evaluate")
    warn_beyond_window(model, lengths[-1], "seal_ops.evaluate")
    origin = provenance(model)
    settings = {
        **describe(task, tokenizer, chat_template, chat_template_kwargs),
        "lengths": lengths,
        "cases": cases,
        "seed": seed,
        "max_new_tokens": max_new_tokens or task.max_new_tokens,
        "model": origin["model"]["fingerprint"],
    }
    with only_writer(output, call):
        result = Evaluation(task.name, name, settings, provenance=origin)
        if resume and output is not None and os.path.exists(output):
            found = resume_run(Evaluation.load, output, settings, "seal_ops.evaluate")
            result.records, result.seconds = found.records, found.seconds
        options = prompt_options(chat_template, chat_template_kwargs)
        thinks = tasks.Encoder(tokenizer, chat_template, "seal_ops.evaluate", chat_template_kwargs).thinks

        growing = Growing(result, output, SAVE_EVERY)
        started, spent = time.monotonic(), result.seconds
        with mode(model, False), bar(len(lengths) * cases, name or task.name, progress) as update:
            update(len(result.records))
            for length in lengths:
                if not (missing := growing.missing(length, cases)):
                    continue
                samples = task.generate(tokenizer, length, cases, seed, split="test", **options)
                if max_new_tokens is None:
                    _check_room(task, samples)
                pieces = Pieces(
                    batch_size or rows_at_once(model, length + settings["max_new_tokens"]), "seal_ops.evaluate"
                )

                def write(batch, samples=samples):
                    return generate(
                        model,
                        tokenizer,
                        [samples[i].prompt_ids for i in batch],
                        max_new_tokens=settings["max_new_tokens"],
                        stop=None if thinks else task.stop,  # which may occur in the reasoning
                    )

                together = _batches(missing, samples, pieces.size)
                for batch, outputs in (piece for near in together for piece in pieces.run(near, write)):
                    found = []
                    for i, text in zip(batch, outputs, strict=True):
                        opened = thinks and opens_reasoning(tokenizer.decode(samples[i].prompt_ids[-16:]))
                        answer = final_answer(text, task.stop, opened)
                        found.append(_record(task, samples[i], length, i, text, answer))
                    result.seconds = spent + time.monotonic() - started
                    growing.add(found)
                    here = [record["score"] for record in result.records if record["length"] == length]
                    update(len(batch), f"{length} tokens: {sum(here) / len(here):.2f}")
        return growing.finish()


def _lengths(lengths):
    lengths = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    if not lengths or not all(isinstance(n, int) and n > 0 for n in lengths):
        raise ValueError(f"seal_ops.evaluate: lengths must be positive integers, at least one, got {shown(lengths)}")
    return sorted(set(lengths))


def _check_room(task, samples):
    longest = max(len(sample.answer_ids) for sample in samples)
    if longest > task.max_new_tokens + 1:  # the token that ends it apart
        raise ValueError(
            f"seal_ops.evaluate: max_new_tokens must be at least {longest} for the answers of {task.name} in this tokenizer, "  # noqa: E501
            f"got the task's {task.max_new_tokens}"
        )


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


def _record(task, sample, length, index, text, answer):
    score = float(task.score(sample, answer))
    if not 0 <= score <= 1:
        raise ValueError(f"seal_ops.tasks.{task.name}: score must be in [0, 1], got {score}")
    return {
        "length": length,
        "index": index,
        "prompt_tokens": len(sample.prompt_ids),
        "answer": sample.answer,
        "output": text,
        "score": score,
        **{key: value for key, value in sample.meta.items() if key not in ("index", "task", "length")},
    }
