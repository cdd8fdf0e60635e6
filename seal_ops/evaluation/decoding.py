"""Greedy decoding of prompts of unequal length.

Plain decoders run on a cache of fixed size (:mod:`.static_decoding`).  Any other model runs through transformers' own
``generate``: prompts of a batch need no padding although their lengths differ, since all are read up to the shortest
one's
end, and where a longer one goes on, its own tokens are fed in the place of generated ones.  An output ends at the end
token or
at a stop text.
"""

import contextlib
from collections.abc import Sequence

import torch

from ..huggingface.logits import learns_prompt, prompt_cache
from ..utils.memory import free_on_gpu
from . import static_decoding

BATCH_TOKENS = (8_192, 16_384)  # prompt tokens in a batch without a cache of fixed size: on a CPU, on a GPU at least
SHARE = 0.25  # of the GPU's free memory, for the cache that grows and for reading the prompts


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 100, stop: str | None = None
) -> list[str]:
    """Greedy continuations of prompts.

    Args:
        prompts: token ids, one list a prompt, best of similar length.
        max_new_tokens: longest continuation.
        stop: text at which a continuation ends (leading white space apart); it is cut off.

    Returns:
        Texts without special tokens, without leading white space.
    """
    base = _without_peft(model)
    outputs = _Outputs(tokenizer, _end_ids(model, tokenizer), len(prompts), max_new_tokens, stop)
    cache = {}
    if learns_prompt(model):
        cache, width = prompt_cache(model, len(prompts))
        prompts = [[0] * width + list(prompt) for prompt in prompts]  # places only: the cache holds what is there
    if static_decoding.supports(base) and not cache:
        static_decoding.decode(base, prompts, max_new_tokens, outputs.add)
    else:
        _generate(base, tokenizer, prompts, outputs, cache)
    return outputs.texts()


def rows_at_once(model, length: int) -> int:
    """How many prompts of ``length`` tokens, outputs included, :func:`generate` should be given at once."""
    base = _without_peft(model)
    if model.device.type != "cuda":
        return max(1, BATCH_TOKENS[0] // length)
    if static_decoding.supports(base) and not learns_prompt(model):
        return static_decoding.rows_that_fit(base, length)
    return max(1, BATCH_TOKENS[1] // length, _rows_that_fit(base, length))


def _rows_that_fit(model, length: int) -> int:
    """Rows whose cache, and what their longest layer takes to read them, are a :data:`SHARE` of the GPU's free memory;
    0 for a model whose sizes have other names."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    sizes = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return 0
    # A layer: its states, queries, keys, values and their copies, about twelve of them, and four of the MLP's.
    numbers = static_decoding.cached_numbers(config) + 12 * config.hidden_size + 4 * config.intermediate_size
    row = numbers * model.dtype.itemsize * length
    return min(static_decoding.MOST_ROWS, int(SHARE * free_on_gpu(model.device)) // row)


class _Outputs:
    """What every row has written; told one token at a time, so that no text is decoded twice without need."""

    def __init__(self, tokenizer, ends, rows, most, stop):
        self.tokenizer, self.ends, self.most, self.stop = tokenizer, ends, most, stop
        self.new: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        self.may_stop: dict[int, bool] = {}

    def add(self, tokens, rows=None) -> bool:
        """Takes the next token of every row (of ``rows``); True once all have ended."""
        for row, token in zip(range(len(self.new)) if rows is None else rows, tokens, strict=True):
            if self.ended[row]:
                continue
            if token in self.ends:
                self.ended[row] = True
                continue
            self.new[row].append(token)
            self.ended[row] = len(self.new[row]) == self.most or (
                self.stop is not None and self._completes_stop(token) and self.stop in self._text(row)
            )
        return all(self.ended)

    def texts(self) -> list[str]:
        found = [self._text(row) for row in range(len(self.new))]
        return [text.partition(self.stop)[0] if self.stop is not None else text for text in found]

    def _text(self, row):
        return self.tokenizer.decode(self.new[row], skip_special_tokens=True).lstrip()

    def _completes_stop(self, token):
        """Whether a text can end with the stop's last character by this token.

        A character that is split over tokens shows as U+FFFD; a space at a token's start may be lost where it is alone.
        """
        if token not in self.may_stop:
            last, alone = self.stop[-1:], self.tokenizer.decode([token], skip_special_tokens=True)
            self.may_stop[token] = last in alone or last == " " or "\ufffd" in alone
        return self.may_stop[token]


def _generate(base, tokenizer, prompts, outputs, cache):
    """Decodes by transformers' ``generate``, with its argument ``cache`` of what lies before the input.

    Every token by which prompts differ in length costs a step.
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
            rows = [row for row in range(len(prompts)) if lengths[row] < input_ids.shape[1]]
            latest = input_ids[:, -1].tolist()
            done = outputs.add([latest[row] for row in rows], rows)
            return torch.full((len(prompts),), done, device=input_ids.device)

    # Without an end token, since prompts may contain it where they are fed; rows that have ended go on until all have.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest - shortest + outputs.most,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(outputs.ends, default=0),
    )
    input_ids = torch.tensor([prompt[:shortest] for prompt in prompts], device=base.device)
    with _configured(base, config):
        base.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Feed()] if longest > shortest else []),
            stopping_criteria=StoppingCriteriaList([_Stop()]),
            **cache,
        )


@contextlib.contextmanager
def _configured(model, config):
    """Inside, nothing of the model's own generation config applies: ``generate`` would fill ours up from it."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _without_peft(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _end_ids(model, tokenizer):
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set() if found is None else {found} if isinstance(found, int) else set(found)
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
