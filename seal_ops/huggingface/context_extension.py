"""Longer contexts for a loaded model, by the rotary frequencies that it is given."""

import contextlib

from ..ops.rotary_tables import rope_frequencies

KINDS = ("ntk", "yarn")


@contextlib.contextmanager
def extended(model, kind: str, factor: float):
    """Inside, ``model`` turns its queries and keys by the frequencies of ``kind`` for ``factor`` times its positions.

    Args:
        kind: "ntk" (static NTK-aware) or "yarn".

    Raises:
        ValueError: an unknown kind, or a model without one rotary embedding of default frequencies.
    """
    if kind not in KINDS:
        raise ValueError(f"extended: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    found = [m for name, m in model.named_modules() if name.endswith("rotary_emb") and hasattr(m, "inv_freq")]
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if len(found) != 1 or rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        raise ValueError(
            f"extended: model must have one rotary embedding of default frequencies, {type(model).__name__} has not"
        )
    (rotary,) = found
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, attention_factor = rope_frequencies(
        head_dim, kind, base=rope["rope_theta"], max_position_embeddings=config.max_position_embeddings, factor=factor
    )
    before = rotary.inv_freq, rotary.attention_scaling, config.max_position_embeddings
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device, rotary.inv_freq.dtype)
    rotary.attention_scaling = attention_factor
    config.max_position_embeddings = int(before[2] * factor)
    try:
        yield model
    finally:
        rotary.inv_freq, rotary.attention_scaling, config.max_position_embeddings = before
