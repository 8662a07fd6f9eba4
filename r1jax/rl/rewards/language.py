# SPDX-License-Identifier: Apache-2.0
"""The language consistency reward: how much of the chain of thought is in the asked language.

The rule is one of scripts, not of dictionaries. What is counted is words:

  * a run of letters of one alphabet is one word, of the script of its letters (Latin, Cyrillic,
    Greek, Arabic, …; combining marks, apostrophes and hyphens inside a run belong to it);
  * a character of Han, Hiragana, Katakana, Hangul or Thai is a word by itself.

Not counted: code between backticks, LaTeX (formulas in `$…$`, `\\(…\\)`, `\\[…\\]`, commands with
their names), the tags of templates, URLs, digits, punctuation, symbols, and single Latin or Greek
letters, which are variables in any language (save the English words "a" and "I").

So "en" is Latin script: French counts as English. "zh" is Han characters: Kanji count as Chinese.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from r1jax.data.template import Template, parse

# The scripts of a language, by the first word of Unicode character names.
SCRIPTS = {
    "en": {"LATIN"},
    "zh": {"CJK"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA"},
    "ko": {"HANGUL"},
    "ru": {"CYRILLIC"},
    "el": {"GREEK"},
    "ar": {"ARABIC"},
    "hi": {"DEVANAGARI"},
    "th": {"THAI"},
}
BY_CHARACTER = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI"}
VARIABLES = {"LATIN", "GREEK"}
ENGLISH_LETTERS = {"a", "A", "I"}
# Each alternative stops at the next mark of its own kind: linear in the text.
IGNORED = re.compile(
    r"```[^`]*```|`[^`\n]*`"
    r"|\$\$[^$]*\$\$|\$[^$\n]*\$"
    r"|\\\((?:[^\\\n]|\\[^()\n])*\\\)|\\\[(?:[^\\]|\\[^\[\]])*\\\]"
    r"|\\[A-Za-z]+"
    r"|https?://\S+"
    r"|</?[A-Za-z_]{1,32}>"
)
RUN = re.compile(r"[^\W\d_]+(?:['’\-\u0300-\u036f]+[^\W\d_]+)*")


@functools.lru_cache(1 << 16)
def script(character: str) -> str:
    """The script of a letter: the first word of its Unicode name ("LATIN", "CJK", …)."""
    name = unicodedata.name(character, "UNKNOWN").removeprefix("FULLWIDTH ")
    return name.partition(" ")[0]


def word_scripts(text: str) -> list[str]:
    """The script of each word of a text, in order, by the rule at the head of this file."""
    scripts = []
    for found in RUN.finditer(IGNORED.sub(" ", text)):
        previous = None
        run = found.group()
        for character in run:
            if not character.isalpha():
                continue
            current = script(character)
            if current in BY_CHARACTER or current != previous:
                scripts.append(current)
            previous = current
        if len(run) == 1 and previous in VARIABLES and run not in ENGLISH_LETTERS:
            scripts.pop()
    return scripts


def language_share(text: str, language: str) -> float:
    """Words of the language / all words of the text; 0 for a text without words.

    Raises:
      ValueError: a language that is not in `SCRIPTS`.
    """
    if language not in SCRIPTS:
        raise ValueError(f"{language=} must be one of {sorted(SCRIPTS)}")
    scripts = word_scripts(text)
    return sum(s in SCRIPTS[language] for s in scripts) / max(len(scripts), 1)


def language_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    language: str,
    template: Template,
) -> np.ndarray:
    """R = words in the target language / all words, of the chain of thought.

    DeepSeek-R1 (2501.12948), section 2.3.2, eq. of the language consistency reward. A chain of
    thought without a word (empty, or formulas alone) earns 0, so that silence is not consistency.

    Args:
      prompts: B prompts; not read.
      completions: B texts; of a malformed one, what stands where the reasoning should.
      answers: B references; not read.
      language: a key of `SCRIPTS`, "en" and "zh" among them.
      template: the tags of the completions.

    Returns:
      float32 [B] in [0, 1].

    Raises:
      ValueError: an unknown language.

    Deviation: the paper does not say what a word is. Here it is told by script; two languages of
    one script are not told apart.
    """
    shares = [language_share(parse(text, template).reasoning, language) for text in completions]
    return np.array(shares, np.float32)
