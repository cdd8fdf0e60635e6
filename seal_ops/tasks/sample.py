"""One prompt with its expected answer, as token ids and as text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy and transformers skip


@dataclass(frozen=True)
class Sample:
    """One prompt with its expected answer.

    Attributes:
        prompt_ids: token ids of the prompt, special tokens and chat format included.
        answer_ids: token ids that the model should write after it, with the token that ends its turn, if there is one.
        prompt: the text of the prompt before any chat format.
        answer: the text of the answer.
        meta: what scoring and reports need (keys, numbers, depth in [0, 1]); plain JSON values.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt: str = ""
    answer: str = ""
    meta: dict = field(default_factory=dict)

    @property
    def input_ids(self) -> list[int]:
        """Prompt and answer, as the model sees them in training."""
        return self.prompt_ids + self.answer_ids

    @property
    def label_mask(self) -> list[bool]:
        """True where a token of ``input_ids`` is a training target: on the answer."""
        return [False] * len(self.prompt_ids) + [True] * len(self.answer_ids)

    @property
    def labels(self) -> list[int]:
        """``input_ids`` with ``IGNORE_INDEX`` on the prompt (not shifted: as transformers expects labels)."""
        return [IGNORE_INDEX] * len(self.prompt_ids) + self.answer_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    def to_json(self) -> str:
        """One line of JSON; :meth:`from_json` reads it back."""
        return json.dumps(vars(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Sample:
        """Reads one line written by :meth:`to_json`; raises ``ValueError`` where it is not a sample."""
        try:
            fields = json.loads(line)
            sample = cls(**fields)
            if not all(isinstance(i, int) for i in sample.prompt_ids + sample.answer_ids):
                raise TypeError("token ids must be integers")
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a sample (expected the JSON of prompt_ids, answer_ids, ...): {error}") from None
        return sample
