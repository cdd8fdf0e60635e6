"""Batches of retrieval text, made on the device as tensors.

A text is assembled from templates of token ids with holes for the key and the digits; a number has one to five digits,
so absent slots hold ``DROP`` and are squeezed out when a batch is packed.
"""

import torch
import torch.nn.functional as F
from wording import ADJECTIVES, FILLER, MAX_NUMBER, NOUNS, WORDINGS

DROP = -1
_HOLE = -10  # _HOLE: adjective, _HOLE - 1: noun, _HOLE - 2 - i: digit i
DIGITS = 5


class Texts:
    """Draws keys and numbers and writes them into the wordings' templates, as tensors on ``device``."""

    def __init__(self, tokenizer, device):
        self.device = device

        def ids(text):
            return tokenizer(text, add_special_tokens=False).input_ids

        def one(text):
            (i,) = ids(text)
            return i

        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.adjectives = torch.tensor([one(" " + w) for w in ADJECTIVES], device=device)
        self.nouns = torch.tensor([one(w) for w in NOUNS], device=device)
        digit = torch.tensor([one(str(d)) for d in range(10)])
        table = torch.full((MAX_NUMBER + 1, DIGITS), DROP)
        for width in range(1, DIGITS + 1):
            n = torch.arange(10 ** (width - 1), min(10**width, MAX_NUMBER + 1))
            for i in range(width):
                table[n, i] = digit[n // 10 ** (width - 1 - i) % 10]
        self.digit_table = table.to(device)

        marks = {one(" amber"): _HOLE, one("anchor"): _HOLE - 1}
        one_digit = one("1")

        def template(text):
            out, digits = [], 0
            for i in ids(text.format(adjective="amber", noun="anchor", number="1" * DIGITS)):
                if i == one_digit:
                    out.append(_HOLE - 2 - digits % DIGITS)
                    digits += 1
                else:
                    out.append(marks.get(i, i))
            return torch.tensor(out, device=device)

        self.templates = {
            (w.name, part): template(getattr(w, part))
            for w in WORDINGS.values()
            for part in ("header", "fact", "question", "answer")
        }
        # Read back once: asking the device in every batch would wait for it.
        self.holes = {
            name: [(j, t) for j, t in enumerate(ids.tolist()) if t <= _HOLE] for name, ids in self.templates.items()
        }
        filler = [ids(" " + s) for s in FILLER]
        width = max(map(len, filler))
        self.filler = torch.tensor([f + [DROP] * (width - len(f)) for f in filler], device=device)

    def keys(self, batch, count):
        """``count`` distinct keys a row: ``[batch, count]`` of ``adjective * 100 + noun``."""
        return torch.rand(batch, len(ADJECTIVES) * len(NOUNS), device=self.device).topk(count, dim=1).indices

    def numbers(self, batch, count):
        return torch.randint(1, MAX_NUMBER + 1, (batch, count), device=self.device)

    def write(self, wording, part, key, number=None):
        """Fills one template for ``key``, ``number`` ``[B, n]``: ids ``[B, n, L]`` and which of them are digits."""
        template = self.templates[wording, part]
        out = template.expand(*key.shape, -1).clone()
        for j, t in self.holes[wording, part]:
            if t == _HOLE:
                out[..., j] = self.adjectives[key // len(NOUNS)]
            elif t == _HOLE - 1:
                out[..., j] = self.nouns[key % len(NOUNS)]
            else:
                out[..., j] = self.digit_table[number, _HOLE - 2 - t]
        digits = template < _HOLE - 1
        return out, digits.expand_as(out)

    def start(self, batch):
        """``<s>`` as a part for :func:`pack`."""
        bos = torch.full((batch, 1), self.bos, device=self.device)
        return bos, _off(bos)

    def header(self, wording, batch):
        """A wording's header as a part for :func:`pack`."""
        head = self.templates[wording, "header"].expand(batch, -1)
        return head, _off(head)


def _after(mask):
    """Digits and the token behind the last slot: the answer proper (a number's end has to be predicted too)."""
    out = mask.clone()
    out[..., 1:] |= mask[..., :-1]
    return out


def pack(parts, length, pad):
    """Joins ``(ids [B, k], answer [B, k])`` parts, drops holes; tokens ``[B, length]`` and the answer mask, padded."""
    tokens = torch.cat([p[0] for p in parts], dim=1)
    answer = torch.cat([p[1] for p in parts], dim=1)
    keep = tokens != DROP
    place = (keep.cumsum(1) - 1).masked_fill(~keep, length).clamp(max=length)
    out = tokens.new_full((len(tokens), length + 1), pad).scatter(1, place, tokens)
    mask = torch.zeros_like(out, dtype=torch.bool).scatter(1, place, answer)
    return out[:, :length], mask[:, :length]


def _hide(ids, absent):
    return ids.masked_fill(absent[..., None], DROP).flatten(1)


def _off(ids):
    return torch.zeros_like(ids, dtype=torch.bool)


def repeats(texts, batch, low, high, length, header=False):
    """Dense retrieval: a record of ``low..high`` lines, then each of its lines once more in a new order."""
    key, number = texts.keys(batch, high), texts.numbers(batch, high)
    count = torch.randint(low, high + 1, (batch, 1), device=texts.device)
    absent = torch.arange(high, device=texts.device) >= count
    record, _ = texts.write("lines", "fact", key, number)
    order = (torch.rand(batch, high, device=texts.device) + absent).argsort(1)
    again, digits = texts.write("lines", "fact", key.gather(1, order), number.gather(1, order))
    gone = absent.gather(1, order)
    parts = [texts.start(batch)]
    if header:
        parts.append(texts.header("lines", batch))
    parts.append((_hide(record, absent), _off(record.flatten(1))))
    parts.append((_hide(again, gone), _after(digits).flatten(1)))
    return pack(parts, length, texts.pad)


def questions(texts, batch, low, high, length, wording="lines", asked=1, bias=None, spread=0):
    """A text with ``low..high`` facts, then ``asked`` questions with answers; each answer ends with ``</s>``.

    Args:
        wording: name of the wording.
        bias: ``bias(context, distance) -> probability``, both in tokens ``[B, asked]`` (length of the body; from the
            asked fact to the body's end): how often the answer to learn is the *last* fact's number instead.
        spread: number of filler sentences among which the facts are placed (0: facts only).

    Returns:
        ``tokens [B, length]`` and the mask of answer tokens: digits, the full stop behind them and ``</s>``.
    """
    device = texts.device
    key, number = texts.keys(batch, high), texts.numbers(batch, high)
    count = torch.randint(low, high + 1, (batch, 1), device=device)
    absent = torch.arange(high, device=device) >= count
    facts, _ = texts.write(wording, "fact", key, number)
    size = (facts != DROP).sum(-1).masked_fill(absent, 0)
    if spread:
        filler = texts.filler[torch.randint(len(texts.filler), (batch, spread), device=device)]
        wide = max(filler.shape[-1], facts.shape[-1])
        facts = facts.masked_fill(absent[..., None], DROP)
        facts, filler = (F.pad(ids, (0, wide - ids.shape[-1]), value=DROP) for ids in (facts, filler))
        # Facts keep their order (the last one stays the last); filler falls anywhere between them.
        at = torch.cat(
            (torch.rand(batch, high, device=device).sort(1).values, torch.rand(batch, spread, device=device)), dim=1
        )
        order = at.argsort(1)
        body = torch.cat((facts, filler), dim=1).gather(1, order[..., None].expand(-1, -1, wide))
        used = (body != DROP).sum(-1)
        behind = (used.flip(1).cumsum(1).flip(1)).gather(1, order.argsort(1)[:, :high])  # tokens from the fact on
        context = used.sum(1, keepdim=True)
        body = body.flatten(1)
    else:
        behind = size.flip(1).cumsum(1).flip(1)
        context = size.sum(1, keepdim=True)
        body = _hide(facts, absent)
    if asked == 1:
        which = (torch.rand(batch, 1, device=device) * count).long()
    else:  # every fact once, in a new order, then from the start again
        order = (torch.rand(batch, high, device=device) + absent).argsort(1)
        which = order.gather(1, torch.arange(asked, device=device) % count)
    told = which
    if bias is not None:
        probability = bias(context.expand_as(which).float(), behind.gather(1, which).float())
        told = torch.where(torch.rand(which.shape, device=device) < probability, (count - 1).expand_as(which), which)
    ask, _ = texts.write(wording, "question", key.gather(1, which))
    reply, digits = texts.write(wording, "answer", key.gather(1, which), number.gather(1, told))
    end = torch.full((*which.shape, 1), texts.eos, device=device)
    turn = torch.cat((ask, reply, end), dim=-1)
    answer = torch.cat((_off(ask), _after(digits), ~_off(end)), dim=-1)
    parts = [texts.start(batch), texts.header(wording, batch)]
    parts += [(body, _off(body)), (turn.flatten(1), answer.flatten(1))]
    return pack(parts, length, texts.pad)


# Tokens around the lines of a prompt: <s>, header, question, answer, </s>; and the mean length of a line.
OVERHEAD, PER_LINE = 137, 16.78


def lines_for(length):
    """Number of lines with which prompt and answer take about ``length`` tokens."""
    return max(2, int((length - OVERHEAD) / PER_LINE))


def retrieval_cases(texts, cases, lines, length):
    """``cases`` evaluation texts of exactly ``lines`` lines; tokens ``[cases, length]``, the mask of the whole answer
    sentence with its ``</s>``, and the mask of its digits alone (with the token that ends them)."""
    tokens, digits = questions(texts, cases, lines, lines, length)
    # The answer sentence is the last thing in the row: it starts behind the question's final newline.
    newline = texts.templates["lines", "question"][-1]
    at = torch.arange(length, device=tokens.device)
    start = torch.where(tokens == newline, at, -1).amax(1, keepdim=True)
    stop = (tokens != texts.pad).sum(1, keepdim=True)
    sentence = (at > start) & (at < stop)
    return tokens, sentence, digits
