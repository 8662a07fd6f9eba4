# SPDX-License-Identifier: Apache-2.0
"""The word tokenizer of the tasks: every word, tag and integer is one token."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from r1jax.data.tasks import HIGH, LOW

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL_TOKENS = (
    PAD,
    BOS,
    EOS,
    UNK,
    USER,
    ASSISTANT,
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<reasoning_process>",
    "</reasoning_process>",
    "<summary>",
    "</summary>",
)
_WORDS = ("try", "yes", "no", "wait", "so", "use", "to", "make", "solve", "compute", "x")
_SIGNS = ("^", "=", "+", "-", "*", "(", ")", ",", ":")


class TaskTokenizer:
    """A `tokenizers.Tokenizer` with the names this package needs."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        missing = [t for t in SPECIAL_TOKENS if tokenizer.token_to_id(t) is None]
        if missing:
            raise ValueError(f"the tokenizer lacks the special tokens {missing}")
        self.inner = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.pad_id: int = tokenizer.token_to_id(PAD)
        self.bos_id: int = tokenizer.token_to_id(BOS)
        self.eos_id: int = tokenizer.token_to_id(EOS)
        self.unk_id: int = tokenizer.token_to_id(UNK)

    def id(self, token: str) -> int:
        """The id of one token; ValueError if the vocabulary lacks it."""
        number = self.inner.token_to_id(token)
        if number is None:
            raise ValueError(f"{token!r} is not in the vocabulary of {self.vocab_size} tokens")
        return number

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added, unknown words become `<unk>`."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The tokens joined by spaces, without any special token (tags too) if `skip_special`."""
        return self.inner.decode(list(map(int, ids)), skip_special_tokens=skip_special)

    def decode_batch(
        self,
        ids_BT: Sequence[Sequence[int]],
        *,
        lengths: Sequence[int] | None = None,
        skip_special: bool = False,
    ) -> list[str]:
        """`decode` of each row, one after the other: the library's own batches start threads and
        then warn at every later fork.

        Args:
          ids_BT: rows of ids [B, T], a numpy array or lists.
          lengths: how many ids of each row to keep [B]; all where None.
          skip_special: leave special tokens out.

        Returns:
          B texts.
        """
        rows = [row if isinstance(row, list) else row.tolist() for row in ids_BT]
        if lengths is not None:
            rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return [self.inner.decode(row, skip_special_tokens=skip_special) for row in rows]

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`."""
        self.inner.save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> "TaskTokenizer":
        """Reads what `save` wrote; ValueError where the file is no such tokenizer."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every cause
            raise ValueError(f"cannot read a tokenizer from {path}: {error}") from error
        return cls(tokenizer)


def task_tokenizer() -> TaskTokenizer:
    """The tokenizer of all tasks: special tokens first, then words, then LOW..HIGH."""
    names = (*SPECIAL_TOKENS, *_WORDS, *_SIGNS, *map(str, range(LOW, HIGH + 1)))
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return TaskTokenizer(tokenizer)
