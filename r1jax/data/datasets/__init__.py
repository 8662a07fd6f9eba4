# SPDX-License-Identifier: Apache-2.0
"""Data sets in the formats that people have them in, as checked records, tokens and batches.

`questions` and `chats` read files, `encode` makes tokens of records, `pipeline` makes batches.
"""

from r1jax.data.datasets.chats import conversations, labelled, preferences
from r1jax.data.datasets.encode import (
    LabelledIds,
    PreferenceIds,
    conversation_examples,
    encode_conversation,
    encode_labelled,
    encode_preference,
    encode_prompt,
    encode_question,
    encode_reply,
    encode_turns,
    encoded,
    end_of,
    preference_examples,
)
from r1jax.data.datasets.files import read, read_rows
from r1jax.data.datasets.pipeline import Batches, Shard, packed_batches, shuffled
from r1jax.data.datasets.questions import (
    QUESTIONS,
    cruxeval,
    evaluation_texts,
    gsm8k,
    humaneval,
    identity,
    math,
    mbpp,
    read_indices,
    with_answers,
)
from r1jax.data.datasets.records import (
    Conversation,
    Labelled,
    Message,
    Messages,
    Preference,
    Question,
    Rows,
    Skipped,
    joined,
)

__all__ = [
    "QUESTIONS",
    "Batches",
    "Conversation",
    "Labelled",
    "LabelledIds",
    "Message",
    "Messages",
    "Preference",
    "PreferenceIds",
    "Question",
    "Rows",
    "Shard",
    "Skipped",
    "conversation_examples",
    "conversations",
    "cruxeval",
    "encode_conversation",
    "encode_labelled",
    "encode_preference",
    "encode_prompt",
    "encode_question",
    "encode_reply",
    "encode_turns",
    "encoded",
    "end_of",
    "evaluation_texts",
    "gsm8k",
    "humaneval",
    "identity",
    "joined",
    "labelled",
    "math",
    "mbpp",
    "packed_batches",
    "preference_examples",
    "preferences",
    "read",
    "read_indices",
    "read_rows",
    "shuffled",
    "with_answers",
]
