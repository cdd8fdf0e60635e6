"""Frequencies of rotary embedding under context extension, and the cos and sin tables that the ops read.

Where transformers has a schedule, its own function computes it (`ROPE_INIT_FUNCTIONS`: linear, dynamic, yarn, longrope,
llama3). Written here are only those that it lacks: static NTK-aware, and Giraffe's truncated and power bases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.arguments import integer, number, shown

_TRANSFORMERS = ("linear", "dynamic", "yarn", "longrope", "llama3")
TYPES = ("default", "ntk", "truncated", "power", *_TRANSFORMERS)


def rope_frequencies(
    head_dim: int,
    rope_type: str = "default",
    *,
    base: float = 10_000.0,
    seq_len: int | None = None,
    max_position_embeddings: int = 4096,
    partial_rotary_factor: float = 1.0,
    **parameters,
) -> tuple[Tensor, float]:
    """Inverse frequencies fp32 `[R/2]` in radians per position, and the factor that multiplies cos and sin.

    R is head_dim * partial_rotary_factor. The factor is 1 but for YaRN and LongRoPE.

    rope_type and its parameters:
      default    base^(-2i/R)                                                      RoFormer, arXiv 2104.09864
      linear     factor                                                            position interpolation, 2306.15595
      ntk        factor: base * factor^(R/(R-2))                                   NTK-aware, static
      dynamic    factor, seq_len                                                   dynamic NTK (transformers)
      yarn       factor, beta_fast, beta_slow, attention_factor, ...               YaRN, 2309.00071 (transformers)
      llama3     factor, low_freq_factor, high_freq_factor, original_max_position_embeddings     (transformers)
      longrope   short_factor, long_factor, original_max_position_embeddings, ...  LongRoPE, 2402.13753 (transformers)
      power      k: default frequencies times (1 - 2i/R)^k                         Giraffe, 2308.10882, section 3
      truncated  low, high, rho: frequencies >= high stay, those between low and high become rho, those <= low become 0
                                                                                   Giraffe, 2308.10882, section 3

    Raises:
        ValueError: an unknown type, a missing or unknown parameter, or one that is no number.
    """
    head_dim = integer("rope_frequencies", "head_dim", head_dim)
    partial_rotary_factor = number("rope_frequencies", "partial_rotary_factor", partial_rotary_factor)
    base = number("rope_frequencies", "base", base, above=0)
    rotary_dim = int(head_dim * partial_rotary_factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"rope_frequencies: head_dim * partial_rotary_factor must be even and at least 2, got {rotary_dim}"
        )
    if rope_type in _TRANSFORMERS:
        return _from_transformers(
            head_dim, rope_type, base, seq_len, max_position_embeddings, partial_rotary_factor, parameters
        )
    wanted = {"default": (), "ntk": ("factor",), "power": ("k",), "truncated": ("low", "high", "rho")}
    if rope_type not in wanted:
        raise ValueError(f"rope_frequencies: rope_type must be one of {', '.join(TYPES)}, got {rope_type!r}")
    if set(parameters) != set(wanted[rope_type]):
        raise ValueError(
            f"rope_frequencies: rope_type {rope_type!r} takes the parameters "
            f"{list(wanted[rope_type])}, got {sorted(parameters)}"
        )
    parameters = {name: number("rope_frequencies", name, value) for name, value in parameters.items()}
    if rope_type == "ntk":
        if rotary_dim < 4 or parameters["factor"] <= 0:
            raise ValueError(
                f"rope_frequencies: rope_type 'ntk' must have at least 4 rotary channels and a factor above 0, got "
                f"{rotary_dim} and {parameters['factor']:g}"
            )
        base = base * parameters["factor"] ** (rotary_dim / (rotary_dim - 2))
    fraction = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    frequencies = base**-fraction
    if rope_type == "power":
        frequencies = frequencies * (1 - fraction) ** parameters["k"]
    elif rope_type == "truncated":
        low, high, rho = parameters["low"], parameters["high"], parameters["rho"]
        if not 0 <= low <= high:
            raise ValueError(f"rope_frequencies: low and high must satisfy 0 <= low <= high, got {low} and {high}")
        middle = torch.where(frequencies > low, rho, 0.0).to(frequencies.dtype)
        frequencies = torch.where(frequencies >= high, frequencies, middle)
    return frequencies.float(), 1.0


def _from_transformers(head_dim, rope_type, base, seq_len, max_position_embeddings, partial_rotary_factor, parameters):
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PretrainedConfig()
    config.head_dim, config.hidden_size, config.num_attention_heads = head_dim, head_dim, 1
    config.max_position_embeddings = max_position_embeddings
    original = parameters.get("original_max_position_embeddings")
    if original is not None:
        config.original_max_position_embeddings = original
    config.rope_theta = base
    config.partial_rotary_factor = partial_rotary_factor
    config.rope_parameters = {
        "rope_type": rope_type,
        "rope_theta": base,
        "partial_rotary_factor": partial_rotary_factor,
        **parameters,
    }
    try:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)
    except KeyError as missing:
        raise ValueError(
            f"rope_frequencies: rope_type {rope_type!r} needs the parameter {missing}, got {sorted(parameters)}"
        ) from None
    return frequencies.float(), float(factor)


def rope_tables(
    length: int | Tensor, frequencies: Tensor, attention_factor: float = 1.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 `[N, R/2]`, for positions 0..length-1 or an explicit tensor of positions `[N]`.

    The angle is formed in fp64: at position 131,071 an fp32 product is already off by up to 0.004 radians.

    Raises:
        ValueError: a length below 0, positions or frequencies that are no vector, or a factor that is no number.
    """
    for name, t in (("length", length), ("frequencies", frequencies)):
        if isinstance(t, Tensor):
            if t.dim() != 1:
                raise ValueError(f"rope_tables: {name} must be a tensor of one dimension, got {list(t.shape)}")
        elif name == "frequencies":
            raise ValueError(f"rope_tables: frequencies must be a tensor (of rope_frequencies), got {shown(t)}")
        else:
            length = integer("rope_tables", "length", length, 0)
    attention_factor = number("rope_tables", "attention_factor", attention_factor)
    positions = torch.arange(length, device=frequencies.device) if isinstance(length, int) else length
    angle = torch.outer(positions.double(), frequencies.double().to(positions.device))
    return tuple((f(angle) * attention_factor).float().to(device or positions.device) for f in (torch.cos, torch.sin))
