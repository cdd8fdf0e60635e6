"""Files of texts and conversations as training rows, tokenised and packed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping

from ..tasks.sample import IGNORE_INDEX
from ..utils.files import read_text
from .samples import Row, to_rows


def packed_texts(source: str | os.PathLike | Iterable[str], tokenizer, length: int, call: str) -> list[Row]:
    """Rows of ``length`` tokens, every token trained: documents laid end to end, each followed by the end token.

    ``source``: a text file (one document), a ``.jsonl`` file of objects with ``text``, or texts.  What does not fill a
    last row is left out.

    Raises:
        ValueError: no tokenizer, a line without ``text``, or fewer tokens than one row; in the name of ``call``.
        OSError: the file cannot be read.
    """
    if tokenizer is None:
        raise ValueError(f"{call}: tokenizer must be given for texts, got None")
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in _texts(source, call):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + ends
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise ValueError(f"{call}: texts must fill at least one row of {length} tokens, got {len(ids)} tokens")
    return [Row(row, row) for row in rows]


def rows_of_file(
    path: str | os.PathLike,
    tokenizer,
    length: int | None,
    call: str,
    chat_template=None,
    chat_template_kwargs: Mapping | None = None,
) -> list[Row]:
    """Rows of a text file or a ``.jsonl`` file.

    Texts become rows of exactly ``length`` tokens, as `packed_texts` makes them.  Lines of a ``.jsonl`` file that hold
    ``messages``, or ``prompt`` and ``answer``, become rows of their own, of which the assistant's words alone are
    trained; with a ``length`` as many whole ones as fit are laid end to end in a row.

    Raises:
        ValueError: texts without a length, chat options for texts, a line that is none of these, or a conversation of
            more than ``length`` tokens; in the name of ``call``.
        OSError: the file cannot be read.
    """
    items = list(_objects(path, call)) if os.fspath(path).endswith(".jsonl") else []
    if not any("messages" in item or "prompt" in item for _, item in items):
        if length is None:
            raise ValueError(f"{call}: length must be given for texts, which are packed into rows, got None")
        if chat_template is not None or chat_template_kwargs:
            raise ValueError(f"{call}: a chat format must be given for conversations, got it for texts in {path}")
        return packed_texts(path, tokenizer, length, call)
    rows = []
    for number, item in items:
        try:
            (row,) = to_rows([item], tokenizer, chat_template, chat_template_kwargs, call)
        except ValueError as error:
            raise ValueError(str(error).replace("samples[0]", f"line {number} of {path}", 1)) from None
        if length is not None and len(row) > length:
            raise ValueError(
                f"{call}: line {number} of {path} must have at most {length} tokens (the length), got {len(row)}"
            )
        rows.append(Row(list(row.input_ids), list(row.labels)))
    return rows if length is None else _end_to_end(rows, length)


def _end_to_end(rows: list[Row], length: int) -> list[Row]:
    """Neighbours in one row, in their order, until the next one does not fit.

    A row's first token is no label of the one before it: nothing there says that another row follows.
    """
    packed: list[Row] = []
    for row in rows:
        labels = [IGNORE_INDEX, *row.labels[1:]]
        if packed and len(packed[-1]) + len(row) <= length:
            packed[-1] = Row(packed[-1].input_ids + row.input_ids, packed[-1].labels + labels)
        else:
            packed.append(Row(row.input_ids, labels))
    return packed


def _texts(source, call: str) -> Iterator[str]:
    if not isinstance(source, (str, os.PathLike)):
        yield from source
        return
    if not os.fspath(source).endswith(".jsonl"):
        yield read_text(source)
        return
    for number, item in _objects(source, call):
        if not isinstance(item.get("text"), str):
            raise ValueError(f"{call}: every line of {source} must be an object with a text, got line {number}")
        yield item["text"]


def _objects(path, call: str) -> Iterator[tuple[int, dict]]:
    """(number of the line, what it says)."""
    for number, line in enumerate(io.StringIO(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{call}: every line of {path} must be an object with a text, got line {number}")
        yield number, found
