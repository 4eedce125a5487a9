"""The fields of a request that describe tools: names and types, nothing else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TOOLS = 1024  # of one request: each is rendered into the prompt, and may be compiled into a grammar


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of an object
    return_: Any = Field(default=None, alias="return")  # of transformers' own schemas; some templates tell it
    strict: bool | None = None  # calls must keep to the schema, whatever tool_choice is


class Tool(BaseModel):
    """One of `tools`."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Function

    def as_sent(self) -> dict[str, Any]:
        """The tool as plain data: what the request says, known keys first, in OpenAI's order."""
        said = self.model_dump(by_alias=True, exclude_unset=True)
        return {"type": self.type, **said}
