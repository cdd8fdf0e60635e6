"""minference under compiled Triton: the blocks that heads choose on a GPU, and what a model computes through them."""

import pytest
import torch
from families import FAMILIES, tokens

import seal_ops
from seal_ops.huggingface.context_extension import block_prefill

OPTIONS = dict(vertical=40, slash=40, last_q=64, sinks=4, window=200, dense=400, block=64)


def read(model, ids, mask, monkeypatch):
    """``(logits [B, S, V] in fp64, block maps of each call)`` on the model's device."""
    chosen, plain = [], block_prefill.masks.blocks
    with monkeypatch.context() as patch:
        patch.setattr(
            block_prefill.masks, "blocks", lambda visited, *rest: chosen.append(visited.cpu()) or plain(visited, *rest)
        )
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return found.double().cpu(), chosen


@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_blocks_and_logits_are_those_of_the_cpu(family, pattern, monkeypatch):
    """fp32 beside fp64, a batch padded on the left, with a scale on every channel."""
    model = FAMILIES[family].build(torch.float64, max_position_embeddings=2048)
    scales = seal_ops.attach(model, "channel")
    with torch.no_grad():
        for number, (_, scale) in enumerate(scales.items()):
            scale += 0.3 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(number))
    ids, mask = tokens(2, 1500), torch.ones(2, 1500, dtype=torch.long)
    mask[1, :430] = 0
    seal_ops.extend(model, "minference", pattern=pattern, **OPTIONS)
    expected, blocks = read(model, ids, mask, monkeypatch)
    model = model.float().cuda()
    found, on_the_gpu = read(model, ids.cuda(), mask.cuda(), monkeypatch)
    assert len(blocks) == len(on_the_gpu) == 4, "two rows in two layers"
    for own, other in zip(blocks, on_the_gpu, strict=True):
        assert own.shape == other.shape
        # Of equal scores in fp64 and fp32 one may be taken for another: a block in a thousand.
        assert (own != other).double().mean() <= 1e-3
        assert own.tril().sum() < torch.ones_like(own).tril().sum(), "no block is left out"
    real = mask.bool()
    error = (found - expected)[real].norm() / expected[real].norm()
    print(f"{family}, {pattern}: relative error {error:.1e}")
    assert error < 1e-4
