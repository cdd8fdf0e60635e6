"""lm-evaluation-harness on a model object, with the scales that are on it.

The harness has RULER, LongBench and much more; it lacks LongEval's line retrieval, which is ``longeval_lines`` here (the
folder :data:`FOLDER`; ``lm_eval --include_path`` takes it too).  The package ``lm_eval`` is needed only when used.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence

from ...utils.files import atomic_write

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "longeval")


def require() -> None:
    """Raises ``ImportError``, one sentence, where the package ``lm_eval`` is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f"seal_ops.lm_eval: needs the package lm_eval (pip install 'seal_ops[harness]'): {error}") from error


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    length: int = 4096,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
) -> dict:
    """Runs tasks of lm-evaluation-harness on ``model`` as it is: base, with scales, or merged.

    Args:
        model: a causal language model of transformers.
        tasks: names: "longeval_lines", "ruler" or its parts ("niah_single_1"), "longbench", ...  LongBench and parts of
            RULER download data.
        length: prompt tokens, for tasks that generate their prompts (RULER reports 4096, 8192, ... 131072 only).
        limit: cases of each task; None for all (50 of longeval_lines).
        batch_size: prompts in a batch, padded on the left.
        chat: prompts in the tokenizer's chat format.

    Returns:
        What ``lm_eval.simple_evaluate`` returns: ``["results"][task]["acc,none"]``, ``["samples"]`` and so on.

    Raises:
        ImportError: no package ``lm_eval``; ValueError: a task that it does not know.
    """
    require()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "lm_eval.models.huggingface"):
        logging.getLogger(name).setLevel(logging.ERROR)  # advice for other ways of calling it
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # tasks load the tokenizer by name
        metadata = {"tokenizer": folder, "max_seq_lengths": [length], "cases": limit or 50}
        ours = set(tasks) <= {"longeval_lines"}  # then the harness need not read the thousands of tasks of its own
        manager = TaskManager(include_path=FOLDER, include_defaults=not ours, metadata=metadata)
        for name in tasks:
            if not manager.match_tasks([name]):
                raise ValueError(f"seal_ops.lm_eval.evaluate: tasks must be known to lm_eval or 'longeval_lines', got {name!r}")
        training = model.training
        try:
            return lm_eval.simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks), limit=limit,
                task_manager=manager, metadata=metadata, apply_chat_template=chat, bootstrap_iters=1000,
            )  # fmt: skip
        finally:
            model.train(training)


def table(results: dict) -> str:
    """The results as lm_eval prints them."""
    from lm_eval.utils import make_table

    return make_table(results)


def save(by_length: Mapping[int, dict], path) -> None:
    """Writes the results of some lengths, with configurations and samples, as JSON, in one step."""
    keys = ("results", "configs", "versions", "n-samples", "samples")
    kept = {length: {key: found[key] for key in keys if key in found} for length, found in by_length.items()}
    atomic_write(path, json.dumps({"kind": "seal_ops.harness", "by_length": kept}, default=str, indent=1) + "\n")
