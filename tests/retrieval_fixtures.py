"""A tokenizer and a random model small enough for tests of tasks, training and evaluation."""

import functools
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seal_ops.tasks import lines as task
from seal_ops.tasks.words import ADJECTIVES, NOUNS

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPLIT = r"\n| ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]| "


@functools.cache
def tokenizer(chat=False, without=()):
    """Word-level tokenizer of the line task; ``without`` names words it shall not know."""
    texts = [task.write(random.Random(0), 2, index=0, split="train")[0]]
    words = [w for text in (*texts, *(f"{a} {n}" for a, n in zip(ADJECTIVES, NOUNS, strict=True))) for w in text.split()]
    pieces = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    known = dict.fromkeys(["<s>", "</s>", "<unk>", "\n", " ", *"0123456789"])
    for word in [*words, "The", "assistant", "user", "<", "|", "><", "'<", "'", "?", ".", ":", "-", ">", "A"]:
        for form in (word, " " + word):
            known.update(dict.fromkeys(piece for piece, _ in pieces.pre_tokenize_str(form)))
    for word in without:
        known.pop(word, None), known.pop(" " + word, None)
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pieces
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def model(seed=0, layers=2, kv_heads=2, dtype=torch.float32):
    """A random Llama of a few thousand parameters, 4 query heads of 8 channels."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on two threads, and much slower where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
