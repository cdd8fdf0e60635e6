"""Prompts and scores of ``longeval_lines``; the harness imports this file beside its YAML."""

from seal_ops.tasks import Sample, lines
from seal_ops.tasks.reading import final_answer

SEED = 0


def dataset(**kwargs):
    """``{"test": Dataset}`` with ``cases`` prompts of each of ``max_seq_lengths`` tokens.

    The harness passes the metadata: ``tokenizer`` (or ``pretrained``), a name, ``max_seq_lengths`` and ``cases``.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    name = kwargs.get("tokenizer") or kwargs.get("pretrained")
    if not name:
        raise ValueError("seal_ops.lm_eval.longeval_lines: metadata must name a tokenizer, got none")
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = []
    for length in kwargs.get("max_seq_lengths", [4096]):
        # Plain text: the harness puts it into a chat format where it is asked to.
        for sample in lines.generate(
            tokenizer, length, kwargs.get("cases", 50), SEED, split="test", chat_template=False, progress=False
        ):
            meta = {key: sample.meta[key] for key in ("key", "number", "depth")}
            rows.append({"prompt": sample.prompt, "answer": sample.answer, "length": length, **meta})
    return {"test": Dataset.from_list(rows)}


def process_results(doc, results):
    """Accuracy of one output, read as :func:`seal_ops.evaluate` reads it."""
    text = final_answer(results[0], lines.stop)
    return {"acc": lines.score(Sample([], [], doc["prompt"], doc["answer"], {"number": doc["number"]}), text)}
