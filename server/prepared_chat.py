"""From a chat request to all that its generation needs: everything but the generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quart import Request

from jaxserve.errors import ContextLengthError
from jaxserve.inputs import TokenizedPrompt
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answer_plan import AnswerPlan, plan_answer
from jaxserve.server.answer_reader import AnswerReader
from jaxserve.server.conversation import (
    forget_loaded_images,
    ignored_image_fields,
    ignored_template_fields,
    render,
)
from jaxserve.server.errors import ApiError
from jaxserve.server.intake import Intake, take
from jaxserve.server.prompts import fit
from jaxserve.server.protocol import ChatRequest
from jaxserve.server.sampling import chat_sampling, check_stream_options
from jaxserve.server.state import ServerState
from jaxserve.server.tool_choice import Mode
from jaxserve.server.unsupported import CHAT_FIELDS


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A chat request that has passed every check that is possible before its first token."""

    taken: Intake[ChatRequest]
    plan: AnswerPlan
    prompt: TokenizedPrompt
    prompt_text: str  # as rendered, whatever truncation left of it
    params: SamplingParams
    holds_calls: bool  # a grammar holds the calls that the answer may have

    def new_reader(self) -> AnswerReader:
        """A reader for one of the n answers."""
        return self.plan.reader(self.prompt_text, holds_calls=self.holds_calls)


async def prepare_chat(state: ServerState, request: Request) -> PreparedChat:
    """Read a request.  Raises ApiError or JaxserveError for what cannot be answered."""
    taken = await take(state, request, ChatRequest, CHAT_FIELDS)
    fields = taken.fields
    check_stream_options(fields)
    plan = plan_answer(state, fields)
    fields = plan.fields
    params = chat_sampling(state.llm, fields)
    _check_number(state, fields)
    shown = plan.shown_fields
    rendered = await render(
        state,
        fields.messages,
        shown,
        taken.num_bytes,
        # The chat template writes special tokens itself, hence the other default than for plain completions.
        add_special_tokens=bool(fields.add_special_tokens),
        wants_tool_calls=plan.choice.mode is not Mode.NONE,
        must_fit=fields.truncate_prompt_tokens is None,
    )
    taken = replace(taken, ignored=taken.ignored + _unread(state, shown))
    # Plug-ins may have copied the messages.
    taken.share.give_back(forget_loaded_images(state, taken.fields.messages, fields.messages))
    prompt = fit(state.llm, rendered, params, fields.truncate_prompt_tokens, param="messages")
    text = rendered.text or ""
    params, holds_calls = await plan.sampling(params, text)
    return PreparedChat(taken, plan, prompt, text, params, holds_calls)


def _unread(state: ServerState, fields: ChatRequest) -> tuple[str, ...]:
    """What the request says to a chat template that does not read it, or of images that are taken as they are."""
    of_template = ignored_template_fields(state, fields)
    of_images = ignored_image_fields(state, fields.messages)
    if state.settings.strict_params:
        if of_template:
            raise ApiError(
                400,
                f"{of_template[0]:.100} means nothing to this model's chat template.",
                param=of_template[0],
            )
        if of_images:
            raise ApiError(400, f"{of_images[0]} means nothing to this model.", param="messages")
    return (*of_template, *of_images)


def _check_number(state: ServerState, fields: ChatRequest) -> None:
    """Refuse what cannot fit before it is rendered: every message has a token at least."""
    limit, count = state.llm.info.max_model_len, len(fields.messages)
    if count > limit and fields.truncate_prompt_tokens is None:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens, and messages has {count} messages.",
            param="messages",
        )
