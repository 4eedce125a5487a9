"""What a chat request makes of its answer: the calls it may have, its constraint, and who tells its parts apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answer_reader import AnswerReader, Reading
from jaxserve.server.conversation import echoed_text
from jaxserve.server.protocol import ChatRequest
from jaxserve.server.response_format import asked_constraint, constrained
from jaxserve.server.state import ServerState
from jaxserve.server.tool_choice import Mode, ToolChoice, tool_choice
from jaxserve.structured_outputs import StructuredOutputsParams


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How the answer to one request will be made and read, but for what depends on its prompt."""

    state: ServerState
    fields: ChatRequest
    choice: ToolChoice
    asked: StructuredOutputsParams | None  # response_format or structured_outputs
    tools: list[dict[str, Any]]  # those that the answer may call, as the request has them

    @property
    def shown_fields(self) -> ChatRequest:
        """The request as the chat template sees it: with the tools that it may show to the model."""
        shown = list(self.choice.shown) or None
        return self.fields if shown == self.fields.tools else self.fields.model_copy(update={"tools": shown})

    @property
    def has_parts(self) -> bool:
        """Whether anything but content may be in the answer."""
        calls, reasoning = self.state.answer_format.tools, self.state.answer_format.reasoning
        return bool(self.tools) or reasoning is not None or (calls is not None and calls.tells_reasoning)

    async def sampling(self, params: SamplingParams, prompt: str) -> tuple[SamplingParams, bool]:
        """`params` with the answer's constraint, compiled, and the special tokens that its parts are told by.

        Also whether a grammar holds the calls.  `prompt` is the rendered text: whether reasoning comes first
        depends on its end.  Raises RequestError for what cannot be compiled, naming the field.
        """
        if self.has_parts:
            params = replace(params, kept_special_tokens=self.state.kept_special_tokens)
        constraint = await self._constraint()
        if constraint is None:
            return params, False
        holds_calls = constraint.alternative is not None or constraint.param == "tools"
        constraint = self._behind_reasoning(constraint, prompt)
        return await constrained(params, constraint, self.state.llm), holds_calls

    def reader(self, prompt: str, *, holds_calls: bool) -> AnswerReader:
        """A reader for one of the answers; `holds_calls` says whether a grammar does."""
        told = Reading(
            tells_reasoning=self.fields.include_reasoning is not False,
            is_single_call=self.choice.is_single,
        )
        parser = self.state.answer_format.parser(
            tools=self.tools,
            prompt=self._opening(prompt),
            constrained=holds_calls,
            request=self.fields,
            tokenizer=self.state.llm.tokenizer,
        )
        return AnswerReader(parser, told)

    async def _constraint(self) -> StructuredOutputsParams | None:
        """What the answer must look like, but for the reasoning that may come before it."""
        if not self.tools:
            return self.asked
        if self.asked is None:
            grammar = self._calls(_choice_for_grammar(self.choice))
            return None if grammar is None else StructuredOutputsParams(grammar=grammar, param="tools")
        if self.asked.param != "response_format":
            return self.asked
        # OpenAI's meaning: the answer has this format, unless it is a call.
        return replace(self.asked, alternative=await self._calls_if_possible())

    async def _calls_if_possible(self) -> str | None:
        """The grammar of calls, or None where none can hold them: a format alone holds the answer then, as in vLLM."""
        try:
            calls = self._calls(Mode.REQUIRED.value)
            if calls is not None:
                await self.state.llm.check_structured(StructuredOutputsParams(grammar=calls, param="tools"))
        except RequestError:
            return None
        return calls

    def _behind_reasoning(self, constraint: StructuredOutputsParams, prompt: str) -> StructuredOutputsParams:
        """The constraint for what follows the reasoning with which the answer begins, or may begin."""
        marks = self.state.answer_format.reasoning_marks(self._opening(prompt))
        if marks is None:
            return constraint
        start, end = marks
        return replace(constraint, reasoning_start=start, reasoning_end=end)

    def _opening(self, prompt: str) -> str:
        """The text whose end tells whether the answer begins inside reasoning.

        A message that is continued has said so itself: its answer is content, unless it has begun to reason.
        """
        reasoning = self.state.answer_format.reasoning
        if reasoning is None or not self.fields.continue_final_message:
            return prompt
        said = echoed_text(self.fields.messages)
        start, end = (max(marks, key=said.rfind, default="") for marks in (reasoning.starts, reasoning.ends))
        return prompt + (start if said.rfind(start) > said.rfind(end) else end)

    def _calls(self, choice: str | dict[str, Any]) -> str | None:
        return self.state.answer_format.grammar(
            self.tools, choice, not self.choice.is_single, self.state.llm.tokenizer
        )


def plan_answer(state: ServerState, fields: ChatRequest) -> AnswerPlan:
    """The plan of a request.  Raises RequestError naming the field that is wrong or not served here."""
    choice = tool_choice(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    _check_served(state, fields, choice)
    asked = asked_constraint(fields)
    if asked is not None and choice.mode is Mode.REQUIRED:
        raise RequestError(
            f"{asked.param} cannot constrain an answer that must be a tool call: leave it out, or send "
            'tool_choice "auto" or "none".',
            param=asked.param,
        )
    tools = [tool.as_sent() for tool in choice.callable]
    adjusted = state.answer_format.adjusted(fields, tools)
    return AnswerPlan(state, adjusted, choice, asked_constraint(adjusted), tools)


def _check_served(state: ServerState, fields: ChatRequest, choice: ToolChoice) -> None:
    """Raise RequestError where the operator has not set up what the choice needs."""
    if choice.mode is Mode.NONE:
        return
    param = "tools" if fields.tool_choice is None else "tool_choice"
    has_parser = state.answer_format.tools is not None
    if choice.mode is Mode.AUTO and not (has_parser and state.settings.enable_auto_tool_choice):
        said = "tools alone mean tool_choice" if fields.tool_choice is None else "tool_choice"
        raise RequestError(
            f'{said} "auto", which requires --enable-auto-tool-choice and --tool-call-parser to be set where '
            'the server is started. Send tool_choice "none" otherwise.',
            param=param,
        )
    if not has_parser:
        raise RequestError(
            f"{choice.said} requires --tool-call-parser to be set where the server is started. Send "
            'tool_choice "none" otherwise.',
            param=param,
        )


def _choice_for_grammar(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.named is not None:
        return {"type": "function", "function": {"name": choice.named}}
    return choice.mode.value
