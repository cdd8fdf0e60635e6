"""A Llama written for training under CUDA graphs; its parameter names are ``LlamaForCausalLM``'s."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Size:
    """Shape of the network, and how it starts."""

    vocab_size: int = 1280
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    head_dim: int = 64
    mlp: int = 640
    rope_theta: float = 1_000_000.0
    max_positions: int = 8192
    # "normal": every weight N(0, 0.02).  "match": queries and keys of layers 1.. start as the same projection, so that
    # every token attends to copies of itself from the first step on (mimetic initialisation, Trockman and Kolter 2023).
    init: str = "normal"

    def hf_config(self, **kwargs):
        """The same shape as a ``transformers.LlamaConfig``."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.head_dim,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            attention_bias=False,
            mlp_bias=False,
            **kwargs,
        )


def _linear(x, weight):
    return F.linear(x, weight.to(x.dtype))


def _norm(x, weight, dtype):
    return F.rms_norm(x, weight.shape, weight, 1e-6).to(dtype)


class _Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.heads, self.head_dim = size.heads, size.head_dim
        inner = size.heads * size.head_dim
        self.q_proj = nn.Linear(size.hidden, inner, bias=False)
        self.k_proj = nn.Linear(size.hidden, inner, bias=False)
        self.v_proj = nn.Linear(size.hidden, inner, bias=False)
        self.o_proj = nn.Linear(inner, size.hidden, bias=False)

    def forward(self, x, cos, sin, scale):
        batch, length, _ = x.shape
        split = (batch, length, self.heads, self.head_dim)
        q = _linear(x, self.q_proj.weight).view(split).transpose(1, 2)
        k = _linear(x, self.k_proj.weight).view(split).transpose(1, 2)
        v = _linear(x, self.v_proj.weight).view(split).transpose(1, 2)
        half = self.head_dim // 2
        q = q * cos + torch.cat((-q[..., half:], q[..., :half]), dim=-1) * sin
        k = k * cos + torch.cat((-k[..., half:], k[..., :half]), dim=-1) * sin
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        if scale is not None:  # [Hq] or [Hq, D], onto the attention output, before o_proj
            out = (out * scale.view(self.heads, -1)).to(x.dtype)
        return _linear(out.reshape(batch, length, -1), self.o_proj.weight)


class _MLP(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.mlp, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.mlp, bias=False)
        self.down_proj = nn.Linear(size.mlp, size.hidden, bias=False)

    def forward(self, x):
        gate, up = _linear(x, self.gate_proj.weight), _linear(x, self.up_proj.weight)
        return _linear(F.silu(gate) * up, self.down_proj.weight)


class _Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.self_attn, self.mlp = _Attention(size), _MLP(size)
        self.input_layernorm = nn.Module()
        self.input_layernorm.weight = nn.Parameter(torch.ones(size.hidden))
        self.post_attention_layernorm = nn.Module()
        self.post_attention_layernorm.weight = nn.Parameter(torch.ones(size.hidden))

    def forward(self, x, cos, sin, scale):
        dtype = cos.dtype
        x = x + self.self_attn(_norm(x, self.input_layernorm.weight, dtype), cos, sin, scale)
        return x + self.mlp(_norm(x, self.post_attention_layernorm.weight, dtype))


class Llama(nn.Module):
    """Decoder with tied embeddings.  fp32 weights and residual stream, matrix products in ``compute`` precision."""

    def __init__(self, size, compute=torch.bfloat16):
        super().__init__()
        self.size, self.compute = size, compute
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(size.vocab_size, size.hidden)
        self.model.layers = nn.ModuleList(_Layer(size) for _ in range(size.layers))
        self.model.norm = nn.Module()
        self.model.norm.weight = nn.Parameter(torch.ones(size.hidden))
        inv_freq = size.rope_theta ** (-torch.arange(0, size.head_dim, 2, dtype=torch.float64) / size.head_dim)
        angle = torch.arange(size.max_positions, dtype=torch.float64)[:, None] * inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos().to(compute), persistent=False)
        self.register_buffer("sin", angle.sin().to(compute), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self):
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        if self.size.init == "match":
            for layer in list(self.model.layers)[1:]:
                attention = layer.self_attn
                for h in range(self.size.heads):
                    rows = slice(h * self.size.head_dim, (h + 1) * self.size.head_dim)
                    shared = nn.init.orthogonal_(torch.empty(self.size.head_dim, self.size.hidden))
                    # A normalised token has length sqrt(hidden): its logit with itself starts near 8 * 0.5.
                    shared *= math.sqrt(0.5)
                    attention.q_proj.weight[rows] += shared.to(attention.q_proj.weight)
                    attention.k_proj.weight[rows] += shared.to(attention.k_proj.weight)

    def hidden_states(self, tokens, scales=None):
        """``tokens [B, T]`` to the normalised last hidden states ``[B, T, hidden]``; ``scales``: one tensor a layer."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, None if scales is None else scales[i])
        return _norm(x, self.model.norm.weight, self.compute)

    def logits(self, hidden):
        return _linear(hidden, self.model.embed_tokens.weight)
