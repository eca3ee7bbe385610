"""Hostile request bodies against the HTTP application: python -m tests.fuzz.messages MINUTES [--seed N]."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz.application import Attack, run

# Bodies may have 4 MB.
LONG = 1_300_000
NUMBERS = [
    0, 1, -1, 2, 0.5, -0.5, 1e-300, 1e308, 10**6, 2**31, 2**63, 2**64, 10**30, 10**4000, -(10**18), float("nan"),
    float("inf"), float("-inf"), True,
]  # fmt: skip
WORDS = [
    "",
    " ",
    "\x00",
    "\x00" * 100,
    "\ud800",
    "a\udfffb",
    "é",
    "中文。",
    "🙂" * 30,
    "\u2028",
    "\u202e",
    "\r\n\r\n",
    "<|user|>" * 9,
    "<|endoftext|>",
    "{{ 7 * 7 }}",
    "{% for a in b %}",
    "data: [DONE]\n\n",
    "../../etc/passwd",
    "rain in berlin . ",
    "'; DROP",
    "\ufeff",
    "e\u0301" * 20,
    "\ufffd",
    "ﷺ",
    "a" * 3000,
]
ROUTES = {
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    "/v1/embeddings": "input",
    "/v1/classify": "input",
    "/v1/qa": "question",
    "/v1/rerank": "query",
    "/score": "text_1",
    "/tokenize": "prompt",
    "/detokenize": "tokens",
}
# What a route needs besides.
COMPANIONS = {"/v1/rerank": "documents", "/score": "text_2"}
NAMES = [
    "model", "max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "stop", "stream",
    "stream_options", "user", "n", "echo", "response_format", "logprobs", "top_logprobs", "max_completion_tokens",
    "encoding_format", "top", "collection", "context", "mode", "null_threshold", "passages", "tools", "metadata",
    "logit_bias", "suffix", "best_of", "nonsense", "__class__", "", "messages", "prompt", "input", "question",
    "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output", "truncate_prompt_tokens", "add_special_tokens", "return_token_ids", "dimensions",
    "structured_outputs", "chat_template_kwargs", "continue_final_message", "add_generation_prompt", "documents",
    "top_n", "text_2", "tokens", "return_token_strs", "use_activation",
]  # fmt: skip
GOOD: dict[str, list[Any]] = {
    "model": ["tiny", "reader", "classifier", "bare", None], "max_tokens": [1, 4, 16, 32], "temperature": [0, 0.5, 2],
    "top_p": [0, 0.1, 1], "stream": [True, False], "stream_options": [{"include_usage": True}], "n": [1, 2, 5, 64],
    "echo": [True], "logprobs": [0, 1, 20, True], "top_logprobs": [0, 3, 20], "stop": ["a", ["a", "", "b" * 10**5]],
    "mode": ["extractive", "generative"], "top": [1, 2, 10**30], "context": ["anna lives in berlin . " * 20],
    "encoding_format": ["base64", "float"], "null_threshold": [0.0, float("nan"), -1e308], "max_completion_tokens": [3],
    "top_k": [-1, 0, 1, 3, 10**30], "min_p": [0, 0.1, 1], "repetition_penalty": [1e-6, 0.5, 1.0, 2, 1e6],
    "min_tokens": [0, 1, 4], "stop_token_ids": [[], [0], [5, 300]], "ignore_eos": [True], "logit_bias": [{"5": 100.0}],
    "skip_special_tokens": [False], "include_stop_str_in_output": [True], "truncate_prompt_tokens": [-1, 1, 7, 256],
    "return_token_ids": [True], "add_special_tokens": [True, False], "continue_final_message": [True],
    "structured_outputs": [
        {"choice": ["a", "\u2028", ""]}, {"regex": "(a|aa)+"}, {"regex": "^.*$"}, {"json": {"pattern": ".*"}},
        {"grammar": "root ::= root root | \"a\" | \"\""}, {"grammar": "root ::= [^a]*"}, {"json_object": True},
    ],
    "chat_template_kwargs": [{"enable_thinking": False}, {"bos": "a"}], "documents": [["a", {"text": "b"}] * 30],
    "text_2": ["a", ["a", "b"]], "tokens": [[5, 6, 7]], "top_n": [0, 1], "return_token_strs": [True],
}  # fmt: skip


def word(chance: random.Random) -> str:
    """Words one behind the other, seldom megabytes of them."""
    if chance.random() < 0.04:
        text = chance.choice([*WORDS, "a", "ab ", "\n", ".", "中", "<", "a.", "A1!", "\t "])
        return text * (chance.choice([10**4, 10**5, LONG]) // max(1, len(text.encode("utf-8", "surrogatepass"))))
    return "".join(chance.choice(WORDS) for _ in range(chance.randrange(1, 4)))


def value(chance: random.Random, depth: int = 3) -> Any:
    """Any JSON."""
    kind = chance.randrange(6)
    if kind == 0 and depth:
        return [value(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind == 1 and depth:
        return {word(chance)[:50]: value(chance, depth - 1) for _ in range(chance.randrange(4))}
    return chance.choice([None, False, chance.choice(NUMBERS), word(chance), word(chance)])


def many(chance: random.Random) -> list[Any]:
    """A long list of one thing, mostly of a wrong one."""
    item = chance.choice(
        [1, 0, 319, 320, -1, 1.5, "", "a", None, [], [1], {}, ["a"], True, 10**20, [[1]], {"role": "user"}]
    )
    return [item] * chance.choice([0, 1, 64, 65, 257, 5000, 100_000, 800_000 // max(1, len(json.dumps(item)))])


def messages(chance: random.Random) -> Any:
    """A conversation, right or nearly so."""
    count = chance.choice([0, 1, 1, 1, 2, 5, 100, 20_000 if chance.random() < 0.1 else 3])
    text = word(chance) if count < 10 else chance.choice(["", "a"])
    found = []
    for _ in range(count):
        content: Any = text
        if chance.random() < 0.2:
            content = [{"type": "text", "text": text}] * chance.randrange(4)
        found.append({"role": chance.choice(["user", "assistant", "system", "developer"]), "content": content})
    if chance.random() < 0.2 and found:
        found[0][chance.choice(["role", "content", "name", "tool_calls"])] = value(chance)
    return found


def main_value(chance: random.Random, name: str) -> Any:
    """What the route is about."""
    if chance.random() < 0.12:
        return value(chance)
    if chance.random() < 0.1:
        return many(chance)
    if name == "messages":
        return messages(chance)
    if name == "question" or chance.random() < 0.4:
        return word(chance)
    kind = chance.randrange(3)
    if kind == 0:
        return [word(chance) for _ in range(chance.randrange(5))]
    ids = [[chance.randrange(-1, 330) for _ in range(chance.randrange(300))] for _ in range(chance.randrange(1, 4))]
    return ids if kind == 1 else ids[0]


def raw(chance: random.Random, body: bytes) -> bytes:
    """Bytes that are no JSON, or JSON of a kind that no client sends."""
    depth, place = chance.choice([10, 500, 990, 5000, 10**6]), chance.randrange(len(body) + 1)
    schema = b'{"prompt":"a","response_format":{"type":"json_schema","json_schema":{"schema":'
    kinds: list[Callable[[], bytes]] = [
        lambda: chance.choice([b"", b"\x00", b"\xff\xfe", b"null", b"[]", b'"a"', b"1e999", b"NaN", b"-" * 100]),
        lambda: b"[" * depth,
        lambda: b"[" * depth + b"]" * depth,
        lambda: b'{"a":' * depth + b"1" + b"}" * depth,
        lambda: b'{"prompt":' + b"[" * depth + b"]" * depth + b"}",
        lambda: schema + b'{"a":' * depth + b"1" + b"}" * depth + b"}}}",
        lambda: body[:place],
        lambda: body[:place] + b"\xff" + body[place:],
        lambda: body + b"}",
        lambda: b" " * 10**6 + body,
        lambda: b'{"prompt":' + b"9" * chance.choice([10, 10**5, 10**6]) + b"}",
        lambda: b"{" + b'"a":1,' * 10**5 + b'"b":1}',
        lambda: b"{" + b",".join(b'"k%d":1' % number for number in range(10**5)) + b"}",
        lambda: b"\xef\xbb\xbf" + body,
        lambda: body.decode("utf-8").encode("utf-16"),
    ]
    return chance.choice(kinds)()


def attack(chance: random.Random) -> Attack:
    """One request."""
    route = chance.choice(list(ROUTES))
    body: dict[str, Any] = {ROUTES[route]: main_value(chance, ROUTES[route])}
    if route in COMPANIONS and chance.random() < 0.9:
        body[COMPANIONS[route]] = chance.choice(GOOD[COMPANIONS[route]])
    for _ in range(chance.randrange(4)):
        name = chance.choice(NAMES if chance.random() < 0.5 else list(GOOD))
        body[name] = chance.choice(GOOD[name]) if name in GOOD and chance.random() < 0.8 else value(chance)
    if chance.random() < 0.02:
        body |= {word(chance)[:200] + str(number): None for number in range(chance.choice([50, 50_000]))}
    # Also as it is, where no escape stands for half of a character.
    text = json.dumps(body)
    data = text.encode()
    if chance.random() < 0.3:
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if chance.random() < 0.08:
        data = raw(chance, text.encode())
    what = f"{len(data)} bytes, {[(key[:30], type(given).__name__) for key, given in list(body.items())[:6]]}"
    return Attack(route, data, what=what)


if __name__ == "__main__":
    run(attack, __doc__, encoders=True, exported=False)
