"""Logits at chosen positions of the input, for any causal model: with and without ``logits_to_keep``, with virtual
tokens."""

from __future__ import annotations

from torch import Tensor, nn

from .model_call import is_split
from .modes import accepts

_KEPT_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's prompts that are keys and values, not positions


def logits_at(model: nn.Module, positions: Tensor, **inputs) -> Tensor:
    """Logits ``[B, K, vocabulary]`` at ``positions`` ``[K]`` of ``input_ids``; no others are computed where the model
    can."""
    positions = positions + virtual_tokens(model)
    if accepts(model, "logits_to_keep"):
        if is_split(model):  # also one without scales, whose calls nothing watches
            positions = positions.tolist()
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def virtual_tokens(model: nn.Module) -> int:
    """How many positions a learned prompt (PEFT's prompt tuning, p-tuning) puts before the input."""
    config = _prompt_config(model)
    return 0 if config is None or _kind(config) in _KEPT_IN_CACHE else config.num_virtual_tokens


def learns_prompt(model: nn.Module) -> bool:
    """Whether ``model`` is a PEFT model whose adapter is a prompt, so that its base alone is another model."""
    return _prompt_config(model) is not None


def prompt_cache(model: nn.Module, rows: int) -> tuple[dict, int]:
    """Keys and values of a learned prompt for ``rows`` rows: ``({argument of the base's generate: cache}, its
    positions)``.

    PEFT's own ``generate`` puts prompts in by rules that follow neither every release of transformers nor rows that
    differ in length; with a cache before the input there is nothing left to put in.
    """
    base, config = model.get_base_model(), _prompt_config(model)
    cache = model.get_prompt(rows)
    if _kind(config) not in _KEPT_IN_CACHE:
        embeds = cache.to(base.get_input_embeddings().weight.dtype)
        output = base(inputs_embeds=embeds, use_cache=True)
        cache = getattr(output, "cache", None) or output.past_key_values
    return {"cache" if accepts(base, "cache") else "past_key_values": cache}, config.num_virtual_tokens


def _prompt_config(model):
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or getattr(model.forward, "__self__", model) is not model:
        return None  # inside PEFT's `disable_adapter` the base's forward stands in the place of the model's
    return config


def _kind(config):
    return str(getattr(config.peft_type, "value", config.peft_type))
