"""The messages of a conversation as clients send them, an assistant's own replies among them.

Client libraries send back what they got: null and empty parts of a reply say nothing and are not read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from raylm.serving.http.bodies import Items, Part
from raylm.serving.http.errors import LIST, TEXT, UNSUPPORTED

# Messages of one conversation, and parts of one message.
MOST_MESSAGES = 10_000
_TEXT_ONLY = "the models of this server read text only"


class TextPart(Part):
    """A part of a message's content; only text is supported."""

    image_url: Any = Field(default=None, exclude=True)
    """Not supported."""
    input_audio: Any = Field(default=None, exclude=True)
    """Not supported."""
    audio_url: Any = Field(default=None, exclude=True)
    """Not supported."""
    video_url: Any = Field(default=None, exclude=True)
    """Not supported."""
    file: Any = Field(default=None, exclude=True)
    """Not supported."""
    type: Literal["text", "refusal"]
    """A refusal is what an assistant said in place of a text."""
    text: str | None = None
    """Of the type text."""
    refusal: str | None = None
    """Of the type refusal."""
    annotations: list[Any] | None = None
    """Not read."""
    cache_control: Any = None
    """Has no effect."""

    @field_validator("image_url", "input_audio", "audio_url", "video_url", "file", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        raise PydanticCustomError(UNSUPPORTED, _TEXT_ONLY)

    @model_validator(mode="after")
    def _says_it(self) -> TextPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"{self.type} is missing")
        return self

    @property
    def said(self) -> str:
        """The text of the part."""
        return getattr(self, self.type)


Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[Items[TextPart], Field(max_length=MOST_MESSAGES), Tag(LIST)],
    Discriminator(
        lambda value: LIST if isinstance(value, list) else TEXT if isinstance(value, str) else None,
        custom_error_type="kind",
        custom_error_message="found neither a text nor a list of parts",
    ),
]


class Message(Part):
    """One message of a conversation."""

    audio: Any = None
    """Not supported."""
    function_call: Any = None
    """Not supported."""
    tool_calls: list[Any] | None = None
    """Not supported; an empty list is none."""
    role: Literal["system", "developer", "user", "assistant", "tool"]
    """developer is the newer name of system."""
    content: Content | None = None
    """Text, or parts of it; an assistant's may be missing."""
    name: str | None = None
    """Not read."""
    refusal: str | None = None
    """Of an assistant: what it said where there is no content."""
    tool_call_id: str | None = None
    """Of a tool: which call it answers. Not read."""
    annotations: list[Any] | None = None
    """Not read."""
    reasoning: str | None = None
    """Not read."""
    reasoning_content: str | None = None
    """Not read."""
    parsed: Any = None
    """What OpenAI's client made of the content. Not read."""

    @field_validator("audio", "function_call", "tool_calls", mode="before")
    @classmethod
    def _not_done(cls, value: Any) -> Any:
        if value == []:
            return value
        raise PydanticCustomError(UNSUPPORTED, "leave it out")

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, str]:
        """The message as a chat template takes it."""
        if isinstance(self.content, list):
            content = "".join(part.said for part in self.content)
        else:
            content = self.refusal or "" if self.content is None else self.content
        return {"role": "system" if self.role == "developer" else self.role, "content": content}
