# SPDX-License-Identifier: Apache-2.0
"""The chat templates of R1 as data, and the strict reading of a completion.

`R1` is the paper's `<think>…</think> <answer>…</answer>`. `PRIMER_SFT` and `PRIMER_RL` are the
primer's `<reasoning_process>…</reasoning_process>` followed by `<summary>…</summary>` in supervised
data and `<answer>…</answer>` under reinforcement.
"""

import dataclasses

from r1jax.data.tasks import Trace
from r1jax.data.tokenizer import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, USER


@dataclasses.dataclass(frozen=True)
class Template:
    """The four tags of a completion and the four marks around a turn."""

    think_open: str
    think_close: str
    answer_open: str
    answer_close: str
    bos: str = BOS
    user: str = USER
    assistant: str = ASSISTANT
    eos: str = EOS


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A completion taken apart.

    Attributes:
      reasoning: the text of the reasoning block; of a malformed completion, what stands where
        the reasoning should.
      answer: the text of the only answer block outside the reasoning, "" if there is none.
      well_formed: whether the completion follows the template to the letter.
    """

    reasoning: str
    answer: str
    well_formed: bool


R1 = Template("<think>", "</think>", "<answer>", "</answer>")
PRIMER_SFT = Template("<reasoning_process>", "</reasoning_process>", "<summary>", "</summary>")
PRIMER_RL = Template("<reasoning_process>", "</reasoning_process>", "<answer>", "</answer>")


def prompt(question: str, template: Template) -> str:
    """The prompt of a question; the model's completion begins with the reasoning tag."""
    return f"{template.bos} {template.user} {question} {template.assistant}"


def completion(trace: Trace, template: Template) -> str:
    """The completion that a trace stands for, end of sequence included."""
    return (
        f"{template.think_open} {trace.reasoning} {template.think_close} "
        f"{template.answer_open} {trace.answer} {template.answer_close} {template.eos}"
    )


def parse(text: str, template: Template) -> Parsed:
    """Reads a completion; linear in its length and defined for any text.

    Well formed is exactly: the reasoning block, then the answer block, each once and neither blank;
    white space alone before, between and after, save one end of sequence; inside the blocks no tag,
    no turn mark and no other special token.

    Args:
      text: what the model wrote after the prompt.
      template: the tags to look for.

    Returns:
      `Parsed`; reasoning and answer without the white space around them.
    """
    body = text.strip().removesuffix(template.eos).strip()
    return Parsed(
        reasoning=_reasoning(body, template),
        answer=_answer(body, template),
        well_formed=_well_formed(body, template),
    )


def _well_formed(body: str, template: Template) -> bool:
    if not (body.startswith(template.think_open) and body.endswith(template.answer_close)):
        return False
    head, close_found, tail = body[len(template.think_open) :].partition(template.think_close)
    gap, open_found, answer = tail.removesuffix(template.answer_close).partition(
        template.answer_open
    )
    if not (close_found and open_found) or gap.strip():
        return False
    if not (head.strip() and answer.strip()):
        return False
    marks = {*SPECIAL_TOKENS, *dataclasses.astuple(template)}
    return not any(mark in part for mark in marks for part in (head, answer))


def _answer(body: str, template: Template) -> str:
    """The answer of a perhaps malformed completion: one block, after all reasoning tags."""
    if body.count(template.answer_open) != 1 or body.count(template.answer_close) != 1:
        return ""
    start, end = body.find(template.answer_open), body.find(template.answer_close)
    # An answer counts where no reasoning was begun, or all of it was closed before.
    unclosed = body.count(template.think_open) > body.count(template.think_close)
    late = max(body.rfind(template.think_open), body.rfind(template.think_close)) > start
    if end < start or unclosed or late:
        return ""
    return body[start + len(template.answer_open) : end].strip()


def _reasoning(body: str, template: Template) -> str:
    start = body.find(template.think_open)
    start = start + len(template.think_open) if start >= 0 else 0
    ends = [body.find(tag, start) for tag in (template.think_close, template.answer_open)]
    end = min((end for end in ends if end >= 0), default=len(body))
    return body[start:end].strip()
