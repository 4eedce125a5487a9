"""How a model marks what it thinks, as a declaration."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.server.reasoning_parsers.splitter import ReasoningSplitter


@dataclass(frozen=True)
class ReasoningFormat:
    """One way of marking reasoning: a beginning, an end, and what an answer begins with.

    Whether an answer begins inside reasoning is told by its prompt where that ends with one of the marks, as
    templates do that switch thinking on or off.  Where it does not, an answer that begins with the beginning mark has
    reasoning, and one that does not has some only if `is_usual`.
    """

    names: tuple[str, ...]  # under --reasoning-parser
    starts: tuple[str, ...] = ("<think>",)
    ends: tuple[str, ...] = ("</think>",)  # where one is the end of another, both are found at once
    is_usual: bool = False  # an answer without a beginning mark is taken to begin inside reasoning
    has_calls: bool = False  # tool calls inside reasoning are calls; otherwise they are thoughts
    answer_marks: tuple[str, str] | None = None  # what the model puts around its answer, behind the reasoning
    is_content: bool = False  # reasoning stays in the content, marks included

    @property
    def markers(self) -> frozenset[str]:
        """The literals that the parser must see, even if they are special tokens."""
        return frozenset((*self.starts, *self.ends, *(self.answer_marks or ())))

    def begins_inside(self, prompt: str) -> bool | None:
        """What a prompt says about the answer behind it: inside reasoning, behind it, or nothing (None)."""
        tail = prompt.rstrip()
        if tail.endswith(tuple(start.rstrip() for start in self.starts)):
            return True
        if tail.endswith(tuple(end.rstrip() for end in self.ends)):
            return False
        return None

    def marks_before_answer(self, prompt: str) -> tuple[str | None, str] | None:
        """What stands around the reasoning with which an answer to `prompt` begins, or may begin.

        None: there is none.  (None, end): the answer begins inside it.  (start, end): it begins with the
        reasoning's start, or has no reasoning.
        """
        prompt_says = self.begins_inside(prompt)
        if self.is_content or prompt_says is False:
            return None
        return (None if prompt_says or self.is_usual else self.starts[0], self.ends[0])

    def parser(self, prompt: str = "", *, request: object = None) -> ReasoningSplitter:
        """Tells the reasoning in one answer from the rest.

        Args:
            prompt: the rendered text that the answer follows.
            request: for plug-ins; not looked at.
        """
        prompt_says = self.begins_inside(prompt)
        return ReasoningSplitter(
            self.starts,
            self.ends,
            is_inside=prompt_says is True or (prompt_says is None and self.is_usual),
            is_over=prompt_says is False,
            answer_marks=self.answer_marks,
            is_content=self.is_content,
        )
