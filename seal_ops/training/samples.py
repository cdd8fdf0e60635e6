"""What is trained on, in any of the usual forms: samples of a task, token ids with labels, texts, conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..tasks.encoding import Encoder
from ..tasks.sample import IGNORE_INDEX, Sample
from ..utils.arguments import shown

FORMS = "a Sample, or a dict with input_ids (and labels), prompt and answer, messages, or text"


@dataclass(frozen=True)
class Row:
    """Token ids with labels, which are ``IGNORE_INDEX`` where nothing is trained (not shifted)."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def label_count(row: Sample | Row) -> int:
    """How many tokens of a row are trained; its first token has nothing before it to be predicted from."""
    return sum(label != IGNORE_INDEX for label in row.labels[1:])


def to_rows(
    samples: Iterable,
    tokenizer=None,
    chat_template=None,
    chat_template_kwargs: Mapping | None = None,
    call: str = "seal_ops.train",
) -> list[Sample | Row]:
    """Training rows of any iterable: a list, a ``datasets.Dataset``, a generator.

    An item is a :class:`seal_ops.tasks.Sample` or a dict with

    * ``input_ids`` and, where not all of them are trained, ``labels``; what an ``attention_mask`` leaves out is
      dropped;
    * ``prompt`` and ``answer`` (or ``completion``), texts; the answer is trained;
    * ``messages``, a conversation; what the assistant says is trained, with the token that ends its turn;
    * ``text``; all of it is trained.

    Other keys are left alone. Texts need the ``tokenizer``; ``chat_template`` and its variables are those of
    :class:`seal_ops.tasks.Encoder`.

    Raises:
        ValueError: an item of another form (its number is named), or one without a label.
    """
    if not isinstance(samples, Iterable):
        raise ValueError(f"{call}: samples must be a list of samples, got {shown(samples)}")
    encoder, rows = None, []
    for number, item in enumerate(samples):
        where = f"{call}: samples[{number}]"
        if isinstance(item, (Sample, Row)):
            row = item
        elif not isinstance(item, Mapping):
            raise ValueError(f"{where} must be {FORMS}, got {type(item).__name__}")
        elif "input_ids" in item:
            row = _tokens(item, where)
        else:
            if tokenizer is None:
                raise ValueError(f"{where} is text and needs the argument tokenizer, got None")
            encoder = encoder or Encoder(tokenizer, chat_template, call, chat_template_kwargs)
            row = _text(item, encoder, where)
        if not label_count(row):
            raise ValueError(f"{where} must have a label behind its first token, got none in {len(row)} tokens")
        rows.append(row)
    if not rows:
        raise ValueError(f"{call}: samples must hold at least one sample, got none")
    return rows


def check_vocabulary(rows, model, call: str) -> None:
    """ValueError where a row holds ids that the model has no embedding for, as samples for another tokenizer do."""
    size = _vocabulary(model)
    for number, row in enumerate(rows):
        for ids in (row.input_ids, [label for label in row.labels if label != IGNORE_INDEX]):
            if size is not None and ids and not (min(ids) >= 0 and max(ids) < size):
                wrong = next(i for i in ids if not 0 <= i < size)
                raise ValueError(
                    f"{call}: samples[{number}] must hold token ids from 0 to {size - 1} (the model's embeddings), "
                    f"got {wrong}; samples made with another model's tokenizer do not fit"
                )


def _vocabulary(model) -> int | None:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _tokens(item, where):
    ids = _integers(item["input_ids"], f"{where}: input_ids")
    labels = _integers(item["labels"], f"{where}: labels") if item.get("labels") is not None else ids
    if len(labels) != len(ids):
        raise ValueError(f"{where}: labels must be as many as input_ids, got {len(labels)} and {len(ids)}")
    mask = item.get("attention_mask")
    kept = [bool(m) for m in _integers(mask, f"{where}: attention_mask")] if mask is not None else [True] * len(ids)
    if len(kept) != len(ids):
        raise ValueError(f"{where}: attention_mask must be as long as input_ids, got {len(kept)} and {len(ids)}")
    return Row([i for i, k in zip(ids, kept, strict=True) if k], [i for i, k in zip(labels, kept, strict=True) if k])


def _integers(given, where):
    values = given.tolist() if hasattr(given, "tolist") else given
    values = list(values) if isinstance(values, Iterable) else [None]
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"{where} must be a flat list of integers, got {shown(given)}")
    return [int(value) for value in values]  # a mask may be of booleans


def _text(item, encoder, where):
    answer = item.get("answer", item.get("completion"))
    if isinstance(item.get("prompt"), str) and isinstance(answer, str):
        return Sample(*encoder(item["prompt"], answer), item["prompt"], answer)
    if isinstance(item.get("messages"), (list, tuple)):
        return Row(*encoder.conversation(item["messages"], where))
    if isinstance(item.get("text"), str):
        ids = encoder.text(item["text"])
        return Row(ids, ids)
    raise ValueError(f"{where} must be {FORMS}, got a dict with {', '.join(map(str, item)) or 'nothing'}")
