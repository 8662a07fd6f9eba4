# SPDX-License-Identifier: Apache-2.0
"""Text in and out of a model: any `tokenizer.json`, its chat template, and streaming.

Templates are programs that come with a checkpoint, so they run in jinja2's sandbox.
"""

import functools
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import tokenizers

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# Llama 3.2's template says so where it is told no date: a run that goes on tomorrow asks as today.
UNDATED = date(2024, 7, 26)
BROKEN = "\ufffd"  # what an incomplete character decodes to
LONGEST = 16  # tokens after which text that ends in BROKEN is taken as it is


class TextTokenizer:
    """A `tokenizers.Tokenizer` with what the files beside it say.

    Attributes:
        config: as in tokenizer_config.json, each special token a string or None.
        bos_id, pad_id: ids, or None.
        unk_id: what text becomes that has no token of its own; None if there is none, or if the
            token has another meaning as well.
        eos_ids: ids that end a completion, perhaps none.
        chat_template: jinja2 source, or None.
        today: the date that a chat template is told; None is the day's.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        config: Mapping[str, Any] = {},
        *,
        eos_ids: Iterable[int] = (),
    ):
        """Args: the tokenizer; its config; further ids that end a completion.

        Raises:
            ValueError: a special token that the vocabulary lacks.
        """
        self.tokenizer = tokenizer
        self.config = {**config, **{name: _content(config.get(name)) for name in NAMES}}
        self.bos_id, eos_id, self.pad_id, unk_id = (self._special(name) for name in NAMES)
        found = {*eos_ids, *(() if eos_id is None else (eos_id,))}
        self.eos_ids = tuple(sorted(found))
        others = {self.bos_id, self.pad_id, *found}
        self.unk_id = None if unk_id in others else unk_id
        self.chat_template: str | None = self.config.get("chat_template")
        self.today: date | None = None

    def _special(self, name: str) -> int | None:
        token = self.config[name]
        if token is None:
            return None
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"tokenizer_config.json: {name}={token!r} is not in the vocabulary")
        return number

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text; special tokens written in it become their ids.

        Args:
            text: any.
            bos: begin as the tokenizer begins a text, with a `bos` token if it has one to add;
                never with two.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        begins = bool(self.config.get("add_bos_token")) or self._adds_bos
        if bos and begins and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    @functools.cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer's own post-processor puts a `bos` first."""
        with_ids = self.tokenizer.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and with_ids[:1] == [self.bos_id]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=skip_special)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation by the tokenizer's chat template.

        Args:
            messages: each with `role` and `content`, in order.
            add_generation_prompt: end where the assistant's next turn begins.

        Raises:
            ValueError: there is no template, or it fails or refuses the conversation.
        """
        import jinja2

        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat_template; use generate --raw, not chat")
        names = {name: self.config[name] or "" for name in NAMES}
        try:
            return (
                _environment()
                .from_string(self.chat_template)
                .render(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    strftime_now=(self.today or datetime.now()).strftime,
                    **names,
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template fails: {error}") from error

    def chat_ids(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation; the template says where a `bos` stands."""
        text = self.chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, bos=False)

    def stream(self) -> "StreamDecoder":
        """A decoder of one completion, token by token."""
        return StreamDecoder(self)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `load_tokenizer` reads."""
        folder = Path(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.eos_ids:
            text = json.dumps({"eos_token_id": list(self.eos_ids)}) + "\n"
            (folder / "generation_config.json").write_text(text, encoding="utf-8")


class StreamDecoder:
    """Text of a completion as its tokens come, never half a character.

    All pushes and the flush together are `decode` of all ids. A push decodes a short window only:
    the tokens since the last that ended in a whole character, and those before it that set the
    context (a space that a tokenizer drops at the start of a text).
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._decode = functools.partial(tokenizer.decode, skip_special=False)
        self._context: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._new.append(int(token))
        before, whole = self._decode(self._context), self._decode(self._context + self._new)
        certain = not whole.endswith(BROKEN) or len(self._new) > LONGEST
        if not certain or not whole.startswith(before):
            return ""
        self._context, self._new = self._new, []
        return whole[len(before) :]

    def flush(self) -> str:
        """The rest, an incomplete character at the end as U+FFFD."""
        before, whole = self._decode(self._context), self._decode(self._context + self._new)
        self._context, self._new = [], []
        return whole[len(before) :]


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face model folder, or of one of ours.

    Raises:
        ValueError: tokenizer.json is missing or damaged, another file is no JSON, or names a
            special token that the vocabulary lacks; the file is named.
    """
    folder = Path(folder)
    tokenizer = _read_tokenizer(folder)
    config = _read(folder / "tokenizer_config.json")
    for name, value in _read(folder / "special_tokens_map.json").items():
        config.setdefault(name, value)
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    config.setdefault("chat_template", _read(folder / "chat_template.json").get("chat_template"))
    if isinstance(config["chat_template"], list):  # several, by name
        by_name = {t["name"]: t["template"] for t in config["chat_template"]}
        config["chat_template"] = by_name.get("default")
    eos = _read(folder / "generation_config.json").get("eos_token_id")
    if eos is None:
        eos = _read(folder / "config.json").get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{folder}: eos_token_id={eos!r} must be a whole number or a list of them")
    try:
        return TextTokenizer(tokenizer, config, eos_ids=ids)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    packed = folder / "tokenizer.json.gz"
    try:
        if path.is_file() or not packed.is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        path = packed
        return tokenizers.Tokenizer.from_str(gzip.decompress(packed.read_bytes()).decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for every cause
        raise ValueError(
            f"{path}: is no tokenizer: {' '.join(str(error).split())[:200]}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _content(token: Any) -> str | None:
    """The text of a special token, written plainly or as an added token's fields."""
    return token.get("content") if isinstance(token, Mapping) else token


@functools.cache
def _environment():
    """The sandbox that templates run in, with the names they expect."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def as_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    return environment
