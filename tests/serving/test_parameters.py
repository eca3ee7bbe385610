"""What a text's parameters do, over HTTP on both engines: where it ends, what it must be, what is shown of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from raylm.data.loading import load_tokenizer
from tests.serving.in_process import Application, opened

PROMPT = "the quick brown fox"
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def served(
    request: pytest.FixtureRequest, exported_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Application]:
    with opened(exported_model, tmp_path_factory.mktemp("runs"), engine=request.param) as application:
        yield application


@pytest.fixture(scope="module")
def tokenizer(exported_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(exported_model)


def choice(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]


def plain(served: Application, **more: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return served.post(COMPLETE, **body | more)


def test_a_conversation_goes_on_with_the_reply_itself(served: Application) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "fox?"},
    ]
    for _ in range(2):
        answer = served.post(CHAT, messages=messages, max_tokens=6, temperature=0)
        messages += [choice(answer)["message"], {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    assert answer["usage"]["prompt_tokens"] > 0


def test_ids_of_prompt_and_text(served: Application, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = plain(served, prompt=[PROMPT, [5, 6]], n=2)
    assert [one["prompt_token_ids"] for one in answer["choices"]] == [tokenizer(PROMPT)["input_ids"]] * 2 + [[5, 6]] * 2
    for one in answer["choices"]:
        assert len(one["token_ids"]) == 24
        assert one["text"] == tokenizer.decode(one["token_ids"], skip_special_tokens=True)
    events = served.events(
        COMPLETE, prompt=PROMPT, max_tokens=24, temperature=0, ignore_eos=True, return_token_ids=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    assert events[0]["choices"][0]["prompt_token_ids"] == tokenizer(PROMPT)["input_ids"]
    pieces = [event for event in events if event["choices"]]
    assert [token for event in pieces for token in event["choices"][0]["token_ids"]] == choice(answer)["token_ids"]
    assert pieces[-1]["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"] == 24
    chat = served.post(CHAT, messages=[{"role": "user", "content": "fox"}], max_tokens=4, return_token_ids=True)
    assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert len(choice(chat)["token_ids"]) == chat["usage"]["completion_tokens"]
    assert "token_ids" not in choice(served.post(COMPLETE, prompt=PROMPT, max_tokens=2))


def test_what_was_in_the_cache_is_said_where_it_is_known(served: Application) -> None:
    details = plain(served)["usage"]["prompt_tokens_details"]
    known = served.models.services[0].engine.name == "transformers"
    assert details == ({"cached_tokens": 0, "audio_tokens": 0} if known else None)


def test_stop_strings(served: Application) -> None:
    text = choice(plain(served))["text"]
    stop = text[6:9]
    ended = choice(plain(served, stop=[stop, "never comes"]))
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == (text[: text.index(stop)], "stop", stop)
    with_it = choice(plain(served, stop=stop, include_stop_str_in_output=True))
    assert with_it["text"] == text[: text.index(stop) + len(stop)]
    streamed = served.events(
        COMPLETE,
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        ignore_eos=True,
        stop=stop,
        include_stop_str_in_output=True,
    )
    assert "".join(event["choices"][0]["text"] for event in streamed) == with_it["text"]


def test_stop_strings_are_not_looked_for_in_the_first_tokens(
    served: Application, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = choice(plain(served))
    first = tokenizer.decode(whole["token_ids"][:8], skip_special_tokens=True)
    stop = first.strip()[:2]
    assert len(choice(plain(served, stop=stop))["text"]) < len(first)
    late = choice(plain(served, stop=stop, min_tokens=8))
    assert len(late["token_ids"]) >= 8
    assert late["text"].startswith(first)


def test_stop_token_ids_stay_in_the_text(served: Application, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = choice(plain(served))["token_ids"]
    stop = ids[5]
    ended = choice(plain(served, stop_token_ids=[stop]))
    assert ended["token_ids"] == ids[: ids.index(stop) + 1]
    assert ended["text"] == tokenizer.decode(ended["token_ids"], skip_special_tokens=True)
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", stop)


def special_end(served: Application, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A body whose text ends with the model's end token."""
    for start in range(4, 280):
        body = {"prompt": [start], "max_tokens": 60, "temperature": 0, "return_token_ids": True}
        found = choice(served.post(COMPLETE, **body))
        if found["finish_reason"] == "stop":
            assert found["token_ids"][-1] == tokenizer.eos_token_id
            return body
    pytest.fail("no prompt ends early; choose another seed for the tiny model")


def test_a_special_token_as_stop_string(served: Application, tokenizer: PreTrainedTokenizerBase) -> None:
    """The text that stop strings are looked for in holds no special tokens: this one never matched."""
    body, end = special_end(served, tokenizer), tokenizer.eos_token
    whole = choice(served.post(COMPLETE, **body))
    assert whole["stop_reason"] is None
    ended = choice(served.post(COMPLETE, **body, ignore_eos=True, stop=[end]))
    assert ended["token_ids"] == whole["token_ids"]
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == (whole["text"], "stop", end)
    for skip in (True, False):
        shown = choice(
            served.post(COMPLETE, **body, stop=end, include_stop_str_in_output=True, skip_special_tokens=skip)
        )
        assert shown["text"] == whole["text"] + end
    hidden = choice(served.post(COMPLETE, **body, skip_special_tokens=False))
    assert hidden["text"] == whole["text"], "the token that ends a text is no part of it"
    past = choice(served.post(COMPLETE, **body, ignore_eos=True, skip_special_tokens=False))
    assert end in past["text"]
    assert len(past["token_ids"]) == 60
    later = choice(served.post(COMPLETE, **body, min_tokens=60))
    assert len(later["token_ids"]) == 60


def test_prompts_are_cut_from_the_left(served: Application, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    assert choice(plain(served, truncate_prompt_tokens=3))["prompt_token_ids"] == ids[-3:]
    assert choice(plain(served, prompt=ids, truncate_prompt_tokens=2))["prompt_token_ids"] == ids[-2:]
    assert choice(plain(served, truncate_prompt_tokens=200))["prompt_token_ids"] == ids
    long = choice(plain(served, prompt="fox " * 900, truncate_prompt_tokens=-1))
    assert len(long["prompt_token_ids"]) == 256 - 24
    echoed = choice(plain(served, truncate_prompt_tokens=3, echo=True))
    assert echoed["text"].startswith(tokenizer.decode(ids[-3:]))


def test_a_text_may_be_as_long_as_the_context(served: Application) -> None:
    assert len(choice(plain(served, prompt=[5], max_tokens=255))["token_ids"]) == 255
    error = served.refused(COMPLETE, prompt=[5], max_tokens=256)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "max_tokens: found 256, allowed: at most 255" in error["message"]
    chat = served.post(CHAT, messages=[{"role": "user", "content": "fox"}], ignore_eos=True)
    assert chat["usage"]["total_tokens"] == 256


def test_the_last_message_goes_on(served: Application, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "It is a quick"}]
    answer = served.post(
        "/tokenize", messages=messages, continue_final_message=True, return_token_strs=True, add_generation_prompt=False
    )
    assert tokenizer.decode(answer["tokens"]).endswith("It is a quick")
    assert tokenizer.convert_ids_to_tokens(answer["tokens"]) == answer["token_strs"]
    chat = served.post(CHAT, messages=messages, continue_final_message=True, max_tokens=2, return_token_ids=True)
    assert chat["prompt_token_ids"] == answer["tokens"]
    asked = served.post("/tokenize", messages=messages[:1], add_generation_prompt=False)
    begun = served.post("/tokenize", messages=messages[:1])
    assert begun["tokens"][: asked["count"]] == asked["tokens"] != begun["tokens"]


def test_tokens_and_back(served: Application, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = served.post("/tokenize", prompt=PROMPT)
    ids = tokenizer(PROMPT)["input_ids"]
    assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    assert served.post("/detokenize", tokens=answer["tokens"]) == {"prompt": PROMPT}
    assert served.post("/tokenize", prompt="")["count"] == 0
    assert "found token id 9999" in served.refused("/detokenize", tokens=[9999])["message"]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,4}$"},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "minItems": 1,
            "maxItems": 2,
        },
        "white  space": {"enum": ["a  b", None]},
    },
    "required": ["name", "sizes", "white  space"],
    "additionalProperties": False,
}


def between_tokens(text: str) -> list[str]:
    """The white space that stands between the tokens of JSON."""
    return re.findall(r"[ \t\r\n]+", re.sub(r'"(?:[^"\\]|\\.)*"', "0", text))


def test_white_space_in_json_has_an_end(served: Application) -> None:
    """Small models went on with it until the limit."""
    forms = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
    ]
    found: list[str] = []
    for form in forms:
        for seed in range(6):
            answer = choice(served.post(COMPLETE, prompt=PROMPT, max_tokens=240, temperature=2, seed=seed, **form))
            assert answer["finish_reason"] == "stop", answer
            value = json.loads(answer["text"])
            assert re.fullmatch("[a-z]{1,4}", value["name"])
            assert value["white  space"] in ("a  b", None)
            gaps = between_tokens(answer["text"])
            assert all(re.fullmatch(r" |\n[ \t]{0,16}", gap) for gap in gaps), gaps
            if "disable_any_whitespace" in str(form):
                assert set(gaps) == {" "}
            found += gaps
    assert any("\n" in gap for gap in found)


def test_white_space_that_the_model_likes_best_has_an_end(served: Application, tokenizer: Any) -> None:
    if served.models.services[0].engine.name == "openvino":
        pytest.skip("the engine has no logit_bias")
    blanks = [number for number in range(len(tokenizer)) if tokenizer.decode([number]).isspace()]
    assert len(blanks) > 2
    answer = choice(
        served.post(
            COMPLETE, prompt=PROMPT, max_tokens=250, temperature=0, structured_outputs={"json": SCHEMA},
            logit_bias={str(number): 100 for number in blanks},
        )
    )  # fmt: skip
    assert answer["finish_reason"] == "stop"
    assert json.loads(answer["text"])["sizes"]
    assert any(len(gap) == 17 for gap in between_tokens(answer["text"]))


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["yes", 'a "no" \\ \n', "é中"]}, 'yes|a "no" \\\\ \n|é中'),
        ({"regex": "[a-c]{2,4}@x\\.(com|org)"}, r"[a-c]{2,4}@x\.(com|org)"),
        ({"grammar": 'root ::= number ("+" number){1,2}\nnumber ::= [0-9]{1,2}'}, r"\d{1,2}(\+\d{1,2}){1,2}"),
    ],
)
def test_texts_of_a_form(served: Application, form: dict[str, Any], pattern: str) -> None:
    texts = set()
    for seed in range(8):
        answer = served.post(
            CHAT, messages=[{"role": "user", "content": "?"}], seed=seed, max_tokens=64, temperature=1.5,
            structured_outputs=form,
        )  # fmt: skip
        assert choice(answer)["finish_reason"] == "stop"
        texts.add(choice(answer)["message"]["content"])
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(texts) > 1


def test_every_get_has_its_head(served: Application) -> None:
    for route in (
        "/version",
        "/health",
        "/v1/models",
        "/v1/models/tiny",
        "/metrics",
        "/",
        "/openapi.json",
        "/v1/collections",
    ):
        whole, head = served.ask("GET", route), served.ask("HEAD", route)
        assert (head.status_code, head.content) == (200, b""), route
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert served.ask("HEAD", "/v1/completions").status_code == 405
    assert set(served.ask("GET", "/version").json()) == {"version"}


def test_unknown_routes_are_refused_as_openai_does(served: Application) -> None:
    for method in ("GET", "POST", "PUT"):
        answer = served.ask(method, "/v1/nowhere")
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_url")
        assert f"{method} /v1/nowhere" in error["message"]
