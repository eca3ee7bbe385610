"""What the bodies of all requests have in common: no unknown keys, no guessed types, and text that is text."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class RequestBody(BaseModel):
    """A JSON object that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _text_is_text(cls, values: Any) -> Any:
        # JSON can name half of a surrogate pair (RFC 8259, section 8.2): no tokenizer, file or answer can hold it.
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
        except (TypeError, ValueError, RecursionError):
            # No JSON, as the validators of the fields will say.
            pass
        return values
