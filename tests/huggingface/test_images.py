"""Models that read images beside tokens: the scales are their decoder's, and act on image tokens as on text."""

import pytest
import scaled_reference
import torch
import transformers as t
from families import close, randomise

import seal_ops

TEXT = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, vocab_size=98, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
)
IMAGE = 97  # its token


def llava():
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION),
            text_config=t.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
    )


def paligemma():
    return t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**VISION).to_dict(),
            text_config=t.GemmaConfig(**TEXT).to_dict(),
            image_token_id=IMAGE,
            projection_dim=64,
        )
    )


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    text = t.Gemma3TextConfig(**TEXT, sliding_window=6, query_pre_attn_scalar=16, layer_types=kinds)
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config=text,
            vision_config=t.SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
            image_token_index=IMAGE,
            boi_token_index=96,
            eoi_token_index=95,
        )  # fmt: skip
    )


def qwen3_vl():
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
    vision = dict(
        hidden_size=32, depth=2, num_heads=4, intermediate_size=64, patch_size=8, out_hidden_size=64,
        num_position_embeddings=16, deepstack_visual_indexes=[0], spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    return t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=96,
            vision_start_token_id=95,
            vision_end_token_id=94,
        )  # fmt: skip
    )


def inputs(make):
    """Two rows of text with an image each."""
    torch.manual_seed(1)
    ids, image_tokens = torch.randint(3, 90, (2, 14)), 1 if make is qwen3_vl else 4
    ids[:, 3 : 3 + image_tokens] = IMAGE
    found = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    if make is qwen3_vl:
        ids[:, 2] = 95
        found |= {"pixel_values": torch.randn(2 * 4, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    elif make is gemma3:  # image tokens see each other
        found["token_type_ids"] = (ids == IMAGE).long()
    elif make is paligemma:  # image and question see each other, the answer what lies before it
        found["token_type_ids"] = (torch.arange(14) >= 10).long().expand(2, -1)
    return found


def built(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.mark.parametrize("make", [llava, paligemma, gemma3, qwen3_vl])
def test_scales_of_a_model_that_reads_images(make):
    model, given = built(make), inputs(make)
    padding = torch.ones_like(given["input_ids"])
    padding[0, :2] = 0

    def run(m, **options):
        with torch.no_grad():
            return m(use_cache=False, **{**given, **options}).logits

    def both(m):
        return run(m), run(m, attention_mask=padding)[padding.bool()]

    base = both(model)
    assert not close(run(model, pixel_values=-given["pixel_values"]), base[0]), "the image is read"
    scales = seal_ops.attach(model, "channel")
    assert all(map(close, both(model), base))
    randomise(scales)
    layers = scales.attachment.patch.layers
    assert all("language_model" in layer.name for layer in layers) and len(layers) == 2
    reference, _ = scaled_reference.scaled(built(make), {layer.name: layer.scaling.scale for layer in layers})
    expected = both(reference)
    assert all(map(close, both(model), expected)) and not close(expected[0], base[0])
    options = dict(max_new_tokens=4, do_sample=False, attention_mask=padding, **given)
    assert torch.equal(model.generate(**options), reference.generate(**options))
    assert all(map(close, both(seal_ops.merge(model)), expected))
