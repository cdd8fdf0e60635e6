"""The texts that the model of ``models/seal-tiny`` is trained on, and the tokenizer made for them.

Three retrieval wordings share one form: a header, a body that hides ``key -> number`` facts, a question, an answer.

* ``lines``    LongEval's line retrieval (Li et al., 2023), the task the model is made for;
* ``needles``  sentences with magic numbers for keys among filler, after RULER's NIAH tasks (Hsieh et al., 2024);
* ``passkey``  one pass key among filler (Mohtashami and Jaggi, 2023).

Run as a script to write the tokenizer: ``python models/train_seal_tiny/wording.py models/seal-tiny``.
"""

import json
import os
import runpy
import sys
from dataclasses import dataclass

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# The file itself rather than the package: training needs no installed seal_ops.
_words = runpy.run_path(os.path.join(REPOSITORY, "seal_ops", "tasks", "vocabulary.py"))
ADJECTIVES, NOUNS = _words["ADJECTIVES"], _words["NOUNS"]

MAX_NUMBER = 50_000
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


@dataclass(frozen=True)
class Wording:
    """One retrieval wording; ``fact``, ``question`` and ``answer`` are ``str.format`` templates of a key and number."""

    name: str
    header: str
    fact: str
    question: str
    answer: str


LINES = Wording(
    name="lines",
    header=(
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
    ),
    fact="line {adjective}-{noun}: REGISTER_CONTENT is <{number}>\n",
    question=(
        "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {adjective}-{noun}? "
        "I need the number.\n"
    ),
    answer="The <REGISTER_CONTENT> in line {adjective}-{noun} is {number}.",
)
NEEDLES = Wording(
    name="needles",
    header=(
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n"
    ),
    fact=" One of the special magic numbers for {adjective}-{noun} is: {number}.",
    question="\nWhat is the special magic number for {adjective}-{noun} mentioned in the provided text?\n",
    answer="The special magic number for {adjective}-{noun} mentioned in the provided text is {number}.",
)
PASSKEY = Wording(
    name="passkey",
    header=(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n"
    ),
    fact=" The pass key is {number}. Remember it. {number} is the pass key.",
    question="\nWhat is the pass key?\n",
    answer="The pass key is {number}.",
)
WORDINGS = {w.name: w for w in (LINES, NEEDLES, PASSKEY)}

# One token per digit and per newline, words with their leading space, runs of punctuation, other white space.
PRE_TOKENS = r"\p{N}|\n| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"


def build_tokenizer():
    """Byte-level BPE over the wordings and the words: each of their words is one token, any text can be encoded.

    Returns:
        A ``PreTrainedTokenizerFast`` with ``<s>`` (prepended to every text), ``</s>`` and ``<pad>``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    # Both forms of a word (with and without a leading space) are wanted wherever the text puts them.
    texts = [" ".join(FILLER)]
    for w in WORDINGS.values():
        texts += [w.header, w.fact, w.question, w.answer]
    wanted = sorted({w for text in texts for w in text.replace("{", " ").replace("}", " ").split()})
    corpus = texts + [form for w in (*wanted, *ADJECTIVES, *NOUNS) for form in (w, " " + w)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging stops when every pre-token is one token
        min_frequency=2,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus * 2, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=4096,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer, folder):
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer.save_pretrained(folder)
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path) as f:
        config = json.load(f)
    # The class name that every release of transformers resolves; newer ones write the name of their base class.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    with open(path + ".tmp", "w") as f:
        json.dump(config, f, indent=2, sort_keys=True)
        f.write("\n")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, sys.argv[1])
    print(f"{len(tokenizer)} tokens written to {sys.argv[1]}")
