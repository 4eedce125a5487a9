"""`jaxserve generate`: answers to a batch of prompts, on stdout or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jaxserve.cli.config_file import add_config_flag
from jaxserve.cli.engine_flags import add_engine_flags, add_model_argument, engine_config
from jaxserve.cli.prompt_files import Prompt, read_prompts
from jaxserve.cli.quantities import positive
from jaxserve.cli.sampling_flags import add_sampling_flags, sampling_fields
from jaxserve.errors import ConfigError, JaxserveError

if TYPE_CHECKING:
    from jaxserve.inputs import TokenizedPrompt
    from jaxserve.llm import LLM
    from jaxserve.outputs import RequestOutput


def add_parser(subparsers: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the command; returns its parser by name."""
    parser = subparsers.add_parser("generate", allow_abbrev=False, help="answer a batch of prompts")
    add_model_argument(parser)
    add_config_flag(parser)
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="one prompt a line; .jsonl: `prompt` or `messages` a line",
    )
    add("--chat", action="store_true", help="put every prompt through the chat template as a user's message")
    add("--n", type=positive, default=1, help="answers to each prompt (default: %(default)s)")
    add(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="write prompts and answers here instead of to stdout",
    )
    add_sampling_flags(parser, max_tokens=256)
    add_engine_flags(parser)
    parser.set_defaults(run=run)
    return {"generate": parser}


def run(args: argparse.Namespace) -> int:
    """Answer all prompts."""
    from jaxserve.sampling_params import SamplingParams

    config = engine_config(args)
    sampling = {**sampling_fields(args), "n": args.n}
    SamplingParams(**sampling)  # a field out of range is known before the model is loaded
    prompts = read_prompts(args.prompt, args.prompts_file, sys.stdin)
    with ExitStack() as stack:
        out = stack.enter_context(_open_output(args.output)) if args.output else None

        from jaxserve.assembly import assemble
        from jaxserve.llm import LLM

        llm = stack.enter_context(LLM.from_parts(assemble(config), seed=config.seed))
        rendered = _render(prompts, llm, is_chat=args.chat)
        is_shown = sys.stderr.isatty() or out is not None
        outputs = llm.generate(rendered, llm.get_default_sampling_params(**sampling), use_tqdm=is_shown)
        if out is None:
            _print(outputs)
        else:
            _write(out, prompts, outputs)
    return 0


def _open_output(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def _write(out: TextIO, prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> None:
    try:
        with out:
            for prompt, output in zip(prompts, outputs, strict=True):
                out.write(json.dumps(_as_json(prompt, output), ensure_ascii=False) + "\n")
    except OSError as error:
        raise JaxserveError(f"--output {out.name}: {error.strerror}") from error


def _render(prompts: Sequence[Prompt], llm: LLM, *, is_chat: bool) -> list[str | TokenizedPrompt]:
    """Texts as they are, or through the chat template; conversations always through it."""
    if not is_chat and all(isinstance(prompt, str) for prompt in prompts):
        return [prompt for prompt in prompts if isinstance(prompt, str)]
    if llm.get_tokenizer().chat_template is None:
        raise ConfigError(
            "the model has no chat template: leave --chat out, and give prompts rather than messages"
        )
    rendered: list[str | TokenizedPrompt] = []
    for prompt in prompts:
        if isinstance(prompt, str) and not is_chat:
            rendered.append(prompt)
            continue
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        rendered.append(llm.render_chat(messages))
    return rendered


def _print(outputs: Sequence[RequestOutput]) -> None:
    """The answers alone; numbered headings only where there are several."""
    num_answers = sum(len(output.outputs) for output in outputs)
    number = 0
    for output in outputs:
        for answer in output.outputs:
            number += 1
            if num_answers > 1:
                print(f"{'' if number == 1 else chr(10)}--- {number}")
            print(answer.text)


def _as_json(prompt: Prompt, output: RequestOutput) -> dict[str, Any]:
    answers = [
        {"text": a.text, "num_tokens": len(a.token_ids), "finish_reason": a.finish_reason}
        for a in output.outputs
    ]
    asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    return {**asked, "num_prompt_tokens": len(output.prompt_token_ids), "outputs": answers}
