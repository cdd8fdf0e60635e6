"""Tiny random models of the families that the seam into transformers is tested on: two or four layers, hidden size 64."""
from __future__ import annotations

import copy
import dataclasses

import torch
import transformers
from torch import nn

VOCABULARY, HEADS, WINDOW = 97, 4, 8

_COMMON = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
               num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
               # The usual 0.02 would leave attention almost uniform and its effect on the logits near rounding.
               initializer_range=0.2)


@dataclasses.dataclass(frozen=True)
class Family:
    """A config, and what the seam is expected to find in the model built from it."""
    config: str
    overrides: dict = dataclasses.field(default_factory=dict)
    fused_rotation: bool = True
    mergeable: bool = True
    head_dim: int = 16
    implementation: str | None = None  # where transformers' own choice differs between versions

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> nn.Module:
        """A causal language model with random weights and a config object of its own, in eval mode."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**_COMMON, **self.overrides, **overrides})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                              attn_implementation=self.implementation)
        with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes in them
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    p.add_(torch.randn_like(p), alpha=0.1)
        return model.to(dtype).eval()


FAMILIES = {
    "llama": Family("LlamaConfig"),
    "llama-mqa-head_dim-32": Family("LlamaConfig", dict(num_key_value_heads=1, head_dim=32), head_dim=32),
    "mistral": Family("MistralConfig", dict(sliding_window=WINDOW)),
    "qwen2": Family("Qwen2Config", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": Family("Qwen3Config", dict(head_dim=16, attention_bias=True)),
    "gemma2": Family("Gemma2Config", dict(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=20,
                                          attn_logit_softcapping=3.0),
                     implementation="eager"),  # up to 5.17 the default, SDPA, drops the soft cap of the scores
    "gemma3": Family("Gemma3TextConfig", dict(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=20,
                                              layer_types=["sliding_attention", "full_attention"])),
    "phi3": Family("Phi3Config", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                                           partial_rotary_factor=0.5))),
    "cohere": Family("CohereConfig", fused_rotation=False),  # pairs (2c, 2c + 1): its rotation is left alone
    "bitnet": Family("BitNetConfig", mergeable=False),
}
MERGEABLE = [name for name, family in FAMILIES.items() if family.mergeable]


def untouched(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy made before `attach`, optionally in another precision: what results are held against."""
    return copy.deepcopy(model).to(dtype)


def tokens(batch: int = 2, length: int = 21, seed: int = 1) -> torch.Tensor:
    """Random ids [batch, length], without the padding id."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(scales, seed: int = 2) -> None:
    """Scales around 1, with a zero and a negative one in every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, scale in scales.items():
            scale.copy_(1 + 0.4 * torch.randn(scale.shape, generator=generator))
            scale.view(-1)[0], scale.view(-1)[-1] = 0.0, -0.7


def scale_by_hooks(model: nn.Module, scales: dict[int, torch.Tensor], head_dim: int) -> list[torch.Tensor]:
    """Plain PyTorch's SEAL: the input of every o_proj is multiplied. Returns the scales as leaves that need gradients."""
    leaves = []
    for index, layer in enumerate(model.model.layers):
        dtype = next(layer.parameters()).dtype
        leaf = scales[index].detach().clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        leaves.append(leaf)

        def multiply(module, args, leaf=leaf):
            x = args[0].unflatten(-1, (-1, head_dim))
            factor = leaf if leaf.dim() == 2 else leaf[:, None]
            return ((x.to(factor.dtype) * factor).to(x.dtype).flatten(-2),)

        attention = layer.self_attn
        # Before BitNet's norm where there is one: the scale belongs to the attention output.
        getattr(attention, "attn_sub_norm", attention.o_proj).register_forward_pre_hook(multiply)
    return leaves


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b|, in fp64."""
    return (a.double() - b.double()).abs().max().item()


def logits(model: nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of another order of fp32 sums, in logits of size 1 to 100."""
    return largest(a, b) <= 2e-5 * max(1.0, b.abs().max().item())
