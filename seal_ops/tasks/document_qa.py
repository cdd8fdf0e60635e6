"""Question answering over one's own documents, in the format of LongBench (Bai et al., 2024).

A file holds one JSON object a line with ``context`` (the document), ``input`` (the question) and ``answers`` (a list of
right answers, the first of which is trained); LongBench's other fields may be there and are not read, ``_id`` apart.
"""

import functools
import hashlib
import io
import json
import os
import re
import string
from collections import Counter

from ..utils.files import read_text
from .base import Task
from .sample import Sample

PROMPT = (
    "Answer the question based on the given text. Only give me the answer and do not output any other words.\n\n"
    "{context}\n\nQuestion: {question}\n"
)
ELLIPSIS = "\n...\n"


class DocumentQA(Task):
    """Questions about the documents of one jsonl file.

    Args:
        path: the file.
        prompt: a template with ``{context}`` and ``{question}``.
        held_out: share of the documents that belong to the split "test", with all questions about them. Which they are
            depends on their text only, so that a file that grows keeps its split. 0 and 1 put all into "train" or
            "test".
        max_new_tokens: longest output; an answer that is longer is refused when it is evaluated.

    ``length`` is a limit here, not a target: a document that is too long loses its middle, as in LongBench, and a short
    one is taken as it is.  The score is LongBench's word F1 with the best of the answers.  ``meta``: ``row`` (line of
    the file, from 1), ``answers``, ``kept`` (share of the document's words in the prompt).
    """

    name = "documents"
    item = "word of the document"
    stop = None  # answers may have several lines

    def __init__(self, path, prompt: str = PROMPT, held_out: float = 0.5, max_new_tokens: int = 100):
        if "{context}" not in prompt or "{question}" not in prompt:
            raise ValueError(
                f"seal_ops.tasks.documents: prompt must contain {{context}} and {{question}}, got {prompt[:60]!r}"
            )
        if not 0 <= held_out <= 1:
            raise ValueError(f"seal_ops.tasks.documents: held_out must be in [0, 1], got {held_out!r}")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(
                f"seal_ops.tasks.documents: max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}"
            )
        self.path, self.prompt, self.held_out = os.fspath(path), prompt, held_out
        self.max_new_tokens = max_new_tokens
        # Part of an evaluation's settings: a file that changed cannot be resumed.
        self.content = hashlib.sha256(repr(self._rows()).encode()).hexdigest()[:16]

    def _rows(self):
        status = os.stat(self.path)
        return _read(self.path, status.st_mtime_ns, status.st_size)

    def rows(self, split: str) -> list[tuple[int, dict]]:
        """The rows of a split, ``(line number, row)``."""
        return [(n, row) for n, row in self._rows() if (_fraction(row) < self.held_out) == (split == "test")]

    def _stream(self, encoder, length, samples, seed, split):
        rows = self.rows(split)
        if samples > len(rows):
            raise ValueError(
                f"seal_ops.tasks.documents: samples must be at most {len(rows)} (the rows of split {split!r} in {self.path}), "  # noqa: E501
                f"got {samples}"
            )
        # Another seed takes other rows, a longer list starts with the shorter one.
        rows.sort(key=lambda item: hashlib.sha256(f"{seed}/{item[0]}".encode()).digest())
        for index, (number, row) in enumerate(rows[:samples]):
            sample = self._shorten(encoder, row, length, {"index": index, "row": number})
            encoder.check(sample, self)
            yield sample

    def _shorten(self, encoder, row, length, meta):
        """The sample with the most words of the document that fits."""
        words = re.findall(r"\S+\s*", row["context"])

        def draw(kept):
            head = (kept + 1) // 2
            context = "".join(words)
            if kept < len(words):
                context = "".join(words[:head]).rstrip() + ELLIPSIS + "".join(words[len(words) - (kept - head) :])
            prompt = self.prompt.replace("{question}", row["input"]).replace("{context}", context.strip())
            prompt_ids, answer_ids = encoder(prompt, row["answers"][0])
            share = kept / max(len(words), 1)
            return Sample(
                prompt_ids, answer_ids, prompt, row["answers"][0], {**meta, "answers": row["answers"], "kept": share}
            )

        whole = draw(len(words))
        if len(whole) + self.reserve <= length:
            return whole
        low, high, best = 0, len(words), draw(0)
        if len(best) + self.reserve > length:
            raise ValueError(
                f"seal_ops.tasks.documents: length must be at least {len(best) + self.reserve} tokens for the question in line "  # noqa: E501
                f"{meta['row']} of {self.path}, got {length}"
            )
        while high - low > 1:
            middle = (low + high) // 2
            sample = draw(middle)
            if len(sample) + self.reserve <= length:
                low, best = middle, sample
            else:
                high = middle
        return best

    def score(self, sample, text):
        return max(word_f1(text, answer) for answer in sample.meta["answers"])


def word_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, articles, punctuation and capitals apart."""
    got, wanted = (_words(value) for value in (text, answer))
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted)) if shared else float(got == wanted)


def _words(text):
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _fraction(row):
    """A number in [0, 1) that depends on the document alone: all questions about it belong to one split."""
    content = " ".join(row["context"].split())
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6]) / 2**48


@functools.lru_cache(maxsize=4)
def _read(path, changed, size):
    """``(line number, row)`` of every row; kept for as long as the file's time and size stay."""
    rows = []
    for number, line in enumerate(io.StringIO(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"seal_ops.tasks.documents: {path}, line {number} must be a JSON object, got {error}"
            ) from None
        texts = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("context", "input"))
        answers = row.get("answers") if texts else None
        if not answers or not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
            raise ValueError(
                f"seal_ops.tasks.documents: {path}, line {number} must have the texts context and input and a list of answers, "  # noqa: E501
                f"got {sorted(row) if isinstance(row, dict) else type(row).__name__}"
            )
        rows.append((number, row))
    if not rows:
        raise ValueError(f"seal_ops.tasks.documents: {path} must hold at least one row, got an empty file")
    return rows
