"""Greedy decoding of prompts of unequal length.

Prompts of a batch need no padding although their lengths differ: all are read up to the shortest one's end, and where a
longer one goes on, its own tokens are fed in the place of generated ones. An output ends at the end token or at a stop text.
"""
import contextlib
from collections.abc import Sequence

import torch


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
    from transformers import (
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )

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
