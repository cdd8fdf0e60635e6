"""Plain text as training rows of one length: files and lists of documents, tokenised and packed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator

from ..utils.files import read_text
from .samples import Row


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


def _texts(source, call: str) -> Iterator[str]:
    if not isinstance(source, (str, os.PathLike)):
        yield from source
        return
    content = read_text(source)
    if not os.fspath(source).endswith(".jsonl"):
        yield content
        return
    for number, line in enumerate(io.StringIO(content), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{call}: every line of {source} must be an object with a text, got line {number}")
        yield text
