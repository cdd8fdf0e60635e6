"""Prompts, answers and conversations as token ids, in the chat format of a tokenizer where it has one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..utils.arguments import shown
from .reading import CLOSE, opens_reasoning, read_output
from .sample import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from .base import Task

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = "enable_thinking"  # the switch that templates of reasoning models read
_SET_HERE = {"messages", "conversation", "chat_template", "add_generation_prompt", "tokenize"}


class Encoder:
    """Turns prompt and answer into token ids, in the chat format of a tokenizer where it has one.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: None for the tokenizer's own chat template if it has one; True to require it; False for plain
            text; a string with ``{prompt}`` in it for a format of one's own (``"USER: {prompt} ASSISTANT:"``); any
            other string is a Jinja chat template.
        caller: how error messages name the call.
        chat_template_kwargs: variables of the template; ``enable_thinking`` is False where it is not given.

    What a template writes between the prompt and the answer (an empty reasoning block) belongs to the prompt, and a
    reasoning block that it opens is closed, unless ``enable_thinking`` is true.

    Raises:
        ValueError: no template where one is required, or a variable that the template does not read.
    """

    def __init__(self, tokenizer, chat_template=None, caller="seal_ops.tasks", chat_template_kwargs=None):
        self.tokenizer, self.caller = tokenizer, caller
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise ValueError(f"{caller}: tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}")
        if not isinstance(chat_template, (str, bool, type(None))):
            raise ValueError(f"{caller}: chat_template must be None, True, False or a text, got {shown(chat_template)}")
        own = getattr(tokenizer, "chat_template", None)
        if chat_template is True and not own:
            raise ValueError(
                f"{caller}: chat_template=True needs a tokenizer with a chat template, {_name(tokenizer)} has none"
            )
        self.wrapper = self.template = None
        if isinstance(chat_template, str):
            if "{prompt}" in chat_template:
                self.wrapper = chat_template
            elif "{%" in chat_template or "{{" in chat_template:
                self.template = chat_template
            else:
                raise ValueError(
                    f"{caller}: chat_template must be Jinja or contain {{prompt}}, got {chat_template[:60]!r}"
                )
        elif chat_template is not False and own:
            self.template = own
        self.variables = {_THINKING: False, **self._checked(chat_template_kwargs)}

    def _checked(self, given) -> Mapping:
        """The variables of the template that were given: a template ignores a name that it does not read."""
        if not isinstance(given, Mapping | None):
            raise ValueError(
                f"{self.caller}: chat_template_kwargs must be a dict of the template's variables, got {given!r}"
            )
        for name in given or {}:
            if name in _SET_HERE:
                raise ValueError(f"{self.caller}: chat_template_kwargs must leave {name} alone, which is set here")
            # Templates that always reason read no switch; then it says how an output is read.
            if name != _THINKING and (self.template is None or not _names(name, self.template)):
                reader = "no template" if self.template is None else "a template that does not read it"
                raise ValueError(
                    f"{self.caller}: chat_template_kwargs must name variables of the chat template, got {name!r} for {reader}"  # noqa: E501
                )
        return given or {}

    def __call__(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids ``(prompt_ids, answer_ids)``; the answer ends with the token that ends a turn, if there is one."""
        if self.template is not None:
            before, after = self._chat(prompt, answer)
            prompt_ids = self._encode(before, special=False)
            return prompt_ids, self._continue(prompt_ids, before, after, special=False)
        before = prompt if self.wrapper is None else self.wrapper.replace("{prompt}", prompt)
        after = answer if before[-1:].isspace() else " " + answer
        prompt_ids = self._encode(before, special=True)
        answer_ids = self._continue(prompt_ids, before, after, special=True)
        return prompt_ids, answer_ids + self._end()

    def _chat(self, prompt, answer):
        turn = [{"role": "user", "content": prompt}]

        def render(turns, **options):
            options = {**self.variables, **options, "tokenize": False, "chat_template": self.template}
            return self.tokenizer.apply_chat_template(turns, **options)

        before = render(turn, add_generation_prompt=True)
        whole = render([*turn, {"role": "assistant", "content": answer}]).rstrip()
        if whole.startswith(before) and answer in whole[len(before) :]:
            after = whole[len(before) :]
            if not self.thinks and (fixed := after[: after.index(answer)].rstrip(" ")).strip():
                before, after = before + fixed, after[len(fixed) :]
            return before, after
        # Templates that rewrite earlier turns (reasoning blocks): the answer itself, ended by the end token.
        closing = f"\n{CLOSE}\n\n" if opens_reasoning(before) else ""
        if not self.thinks:
            before, closing = before + closing, ""
        separator = "" if (before + closing)[-1:].isspace() else " "
        return before, closing + separator + answer + (getattr(self.tokenizer, "eos_token", None) or "")

    def text(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one."""
        return self._encode(text, special=True) + self._end()

    def conversation(self, messages, where: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation: what the assistant says, with the token that ends its turn.

        Where the template marks what is generated (``{% generation %}``), the labels are what it marks; else the
        assistant's words are looked for in the rendered text.

        Args:
            messages: dicts with ``role`` and ``content``, and whatever else the template reads.
            where: how an error names the conversation.
        """
        if self.template is None:
            raise ValueError(f"{where}: messages need a chat template, {_name(self.tokenizer)} has none")
        if _GENERATION.search(self.template):
            return self._marked(messages, where)
        text = self.tokenizer.apply_chat_template(
            list(messages), **self.variables, chat_template=self.template, tokenize=False
        )
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except NotImplementedError:
            raise ValueError(f"{where}: messages need a fast tokenizer, got {type(self.tokenizer).__name__}") from None
        ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]
        marks = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        labels, end = [IGNORE_INDEX] * len(ids), 0
        for message in messages:
            said = str(message.get("content") or "").strip()
            start = text.find(said, end)
            if start < 0:
                if message.get("role") != "assistant":
                    continue  # templates leave out or rewrite what they please of the others
                raise ValueError(
                    f"{where}: the chat template must keep what the assistant says, got {said[:60]!r} without it"
                )
            end = start + len(said)
            if message.get("role") == "assistant" and said:
                inside = [i for i, (a, b) in enumerate(places) if a < end and b > start]
                last = behind = inside[-1]
                while (
                    behind + 1 < len(ids) and ids[behind] not in marks and not text[end : places[behind + 1][0]].strip()
                ):
                    behind += 1
                if ids[behind] in marks:
                    last = behind
                labels[inside[0] : last + 1] = ids[inside[0] : last + 1]
        return ids, labels

    def _marked(self, messages, where: str) -> tuple[list[int], list[int]]:
        """As transformers reads a template's own marks."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{where}: messages need a fast tokenizer, got {type(self.tokenizer).__name__}")
        encoded = self.tokenizer.apply_chat_template(
            list(messages), **self.variables, chat_template=self.template, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, marks = list(encoded["input_ids"]), encoded["assistant_masks"]
        return ids, [i if mark else IGNORE_INDEX for i, mark in zip(ids, marks, strict=True)]

    @property
    def thinks(self) -> bool:
        """Whether an output may begin with reasoning."""
        return self.template is not None and bool(self.variables[_THINKING])

    def _encode(self, text, special):
        try:
            ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        except Exception as error:  # tokenizers raises bare Exceptions, e.g. for a vocabulary without an unknown token
            raise ValueError(f"{self.caller}: the tokenizer {_name(self.tokenizer)} failed: {error}") from error
        end = self._end()
        return ids[:-1] if special and end and ids[-1:] == end else ids

    def _continue(self, prompt_ids, before, after, special):
        # Encoded behind the prompt, as the model would write it: SentencePiece marks the start of a text, which the
        # answer is not.  Where a token spans the border, the prompt must stay what the model gets: encode on its own.
        ids = self._encode(before + after, special)
        n = len(prompt_ids)
        return ids[n:] if ids[:n] == prompt_ids else self._encode(after, special=False)

    def _end(self):
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return [] if eos is None else [eos]

    def check(self, sample: Sample, task: Task) -> None:
        """Raises ``ValueError`` where a model that writes exactly the sample's answer would not be right.

        That is so where the tokenizer has no token for something in the sample, and where the answer's tokens, read as
        :func:`seal_ops.evaluate` reads an output, do not score 1.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None and unknown in sample.input_ids:
            pieces = re.findall(r"\s*\S+", sample.prompt + " " + sample.answer)
            lost = next(
                (p for p in dict.fromkeys(pieces) if unknown in self._encode(p, special=False)), "its chat format"
            )
            raise ValueError(
                f"{self.caller}: the tokenizer {_name(self.tokenizer)} needs a token for every word of the task, "
                f"got the unknown token for {lost.strip()!r}"
            )
        opened = opens_reasoning(self.tokenizer.decode(sample.prompt_ids[-16:])) if self.thinks else False
        text = read_output(self.tokenizer, sample.answer_ids, self._end(), task.stop, opened)
        score = task.score(sample, text)
        if score < 1:
            raise ValueError(
                f"{self.caller}: the answer {sample.answer[:80]!r}, in the tokens of {_name(self.tokenizer)} and read as an "  # noqa: E501
                f"output is (up to {task.stop!r}, without special tokens), must score 1, got {score:g} for {text[:80]!r}"  # noqa: E501
            )


def _names(variable: str, template: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(variable)}(?!\w)", template) is not None


def _name(tokenizer):
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
