"""lm-evaluation-harness on a model object, with the scales that are on it.

The harness has RULER, LongBench and much more; it lacks LongEval's line retrieval, which is ``longeval_lines`` here
(the folder :data:`FOLDER`; ``lm_eval --include_path`` takes it too).  The package ``lm_eval`` is needed only when used.
"""

import contextlib
import copy
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence

from ...huggingface.context_window import warn_beyond_window, window
from ...huggingface.modes import mode
from ...huggingface.origin import provenance
from ...utils.files import atomic_write

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "longeval")
RESERVE = 1024  # tokens beyond `length` for chat format and output
_ADVICE = ("`pretrained` model kwarg is not of type `str`",)  # that its loading options have no effect


def require() -> None:
    """Makes sure that the package ``lm_eval`` is there.

    Raises:
        ImportError: it is not; the message says how to install it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"seal_ops.lm_eval: needs the package lm_eval (pip install 'seal_ops[harness]'): {error}"
        ) from error


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    length: int = 4096,
    cases: int | None = None,
    batch_size: int = 1,
    chat_template: bool | None = False,
    max_length: int | None = None,
) -> dict:
    """Runs tasks of lm-evaluation-harness on ``model`` as it is: base, with scales, or merged.

    Args:
        model: a causal language model of transformers.
        tasks: names: "longeval_lines", "ruler" or its parts ("niah_single_1"), "longbench", ...  LongBench and parts of
            RULER download data.
        length: prompt tokens, for tasks that generate their prompts (RULER reports 4096, 8192, ... 131072 only).
        cases: of each task; None for all (50 of longeval_lines).
        batch_size: prompts in a batch, padded on the left.
        chat_template: True for prompts in the tokenizer's chat format, None for that where it has one; reasoning is
            off.
        max_length: tokens of a prompt and its output.  None for what ``length`` needs, and at least the model's window;
            a longer prompt is refused.  Given: a longer prompt loses its beginning, as the harness has it, with a
            warning.

    Returns:
        What ``lm_eval.simple_evaluate`` returns: ``["results"][task]["acc,none"]``, ``["samples"]`` and so on, and
        ``["provenance"]``.

    Raises:
        ImportError: no package ``lm_eval``; ValueError: a task that it does not know, or a prompt that does not fit.
    """
    require()
    import lm_eval
    from lm_eval.tasks import TaskManager

    chat = bool(tokenizer.chat_template) if chat_template is None else chat_template
    warn_beyond_window(model, length, "seal_ops.lm_eval.evaluate")
    with tempfile.TemporaryDirectory() as folder, mode(model, False), _without_advice():
        tokenizer.save_pretrained(folder)  # tasks load the tokenizer by name
        metadata = {"tokenizer": folder, "max_seq_lengths": [length], "cases": cases or 50}
        ours = set(tasks) <= {"longeval_lines"}  # then the harness need not read the thousands of tasks of its own
        manager = TaskManager(include_path=FOLDER, include_defaults=not ours, metadata=metadata)
        for name in tasks:
            if not manager.match_tasks([name]):
                raise ValueError(
                    f"seal_ops.lm_eval.evaluate: tasks must be known to lm_eval or 'longeval_lines', got {name!r}"
                )
        found = lm_eval.simple_evaluate(
            _wrapped(model, tokenizer, batch_size, length, max_length), tasks=list(tasks), limit=cases,
            task_manager=manager, metadata=metadata, apply_chat_template=chat, bootstrap_iters=1000,
        )  # fmt: skip
        return {**found, "provenance": provenance(model)}


def _wrapped(model, tokenizer, batch_size, length, max_length):
    """``model`` as a model of the harness, which refuses what it would cut in silence."""
    from lm_eval.models.huggingface import HFLM

    whole = max_length is None

    class Whole(HFLM):
        def tok_batch_encode(self, strings, *args, left_truncate_len=None, **options):
            ids, mask = super().tok_batch_encode(
                strings, *args, left_truncate_len=None if whole else left_truncate_len, **options
            )
            if whole and left_truncate_len and ids.shape[1] > left_truncate_len:
                raise ValueError(
                    f"seal_ops.lm_eval.evaluate: prompts must be at most {left_truncate_len} tokens "
                    f"({self.max_length} with the output), got one of {ids.shape[1]}; max_length lets it be longer, or cut"  # noqa: E501
                )
            return ids, mask

    known = inspect.signature(HFLM.__init__).parameters
    options = {"enable_thinking": False} if "enable_thinking" in known else {}
    # The harness fits prompts into the window that the config speaks of, less the output: a length equal to it, too.
    most = max(window(model) or 0, length + RESERVE) if whole else max_length
    # It changes the tokenizer's padding.
    return Whole(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=most, **options
    )


@contextlib.contextmanager
def _without_advice():
    """Inside, the harness keeps to itself what it advises about other ways of calling it; warnings stay."""

    def wanted(record):
        return record.levelno > logging.WARNING or not any(text in record.getMessage() for text in _ADVICE)

    loggers = [logging.getLogger(name) for name in ("lm_eval.models.huggingface", "lm_eval.evaluator", "lm_eval")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addFilter(wanted)
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeFilter(wanted)
            logger.setLevel(level)


def table(results: dict) -> str:
    """The results as lm_eval prints them."""
    from lm_eval.utils import make_table

    return make_table(results)


def save(by_length: Mapping[int, dict], path) -> None:
    """Writes the results of some lengths, with configurations and samples, as JSON, in one step."""
    keys = ("results", "configs", "versions", "n-samples", "samples", "provenance")
    kept = {length: {key: found[key] for key in keys if key in found} for length, found in by_length.items()}
    atomic_write(path, json.dumps({"kind": "seal_ops.harness", "by_length": kept}, default=str, indent=1) + "\n")
