# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling's filters (DeepSeek-R1, 2501.12948, section 2.3.3): functions over texts.

"We sample multiple responses and retain only the correct ones", and leave out "chain-of-thought
with mixed languages, long paragraphs, and code blocks"; n-grams shared with evaluation sets are
left out as in the paper's data section. A filter returns a mask and what it counted, and knows of
no other: `funnel` puts them in order.

The paper gives no numbers but n = 10. The others here are arguments; their defaults were chosen on
R1's own traces (experiments/log/013) and are deviations of ours.
"""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from r1jax.rl.rewards.language import SCRIPTS, word_scripts

# A character of a script without spaces between words, or a run of letters and digits.
_SINGLE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{_SINGLE}]|(?:(?![{_SINGLE}])[^\W_])+")
PARAGRAPHS = re.compile(r"\n[ \t\r]*\n")
FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


class Filtered(NamedTuple):
    """What a filter found of B texts.

    Attributes:
        keep: bool [B].
        counts: what it saw, by name.
    """

    keep: np.ndarray
    counts: dict[str, float]


def keep_correct(reward_B: Sequence[float], *, least: float = 1.0) -> Filtered:
    """Those whose reward is at least `least`; NaN is not."""
    keep = np.asarray(reward_B, np.float64) >= least
    return Filtered(keep, {"correct": int(keep.sum())})


def one_language(
    texts: Sequence[str], *, language: str | None = None, least: float = 0.9
) -> Filtered:
    """Those with at least a share of their words in one language, told by script.

    What a word is says `rewards.language`: formulas, code and single Latin letters are none. A text
    without words mixes nothing and is kept.

    Args:
        texts: B texts.
        language: a key of `SCRIPTS`; None: the language that most of the text is in.
        least: the share, in [0, 1].

    Raises:
        ValueError: an unknown language, or `least` out of range.
    """
    _in_unit(least, "least")
    if language is not None and language not in SCRIPTS:
        raise ValueError(f"{language=} must be one of {sorted(SCRIPTS)}")
    languages = SCRIPTS.values() if language is None else (SCRIPTS[language],)
    shares = np.array([_one_language_share(text, languages) for text in texts], np.float64)
    return _found("mixed", shares < least)


def short_paragraphs(texts: Sequence[str], *, longest: int = 400) -> Filtered:
    """Those without a paragraph of more than `longest` words (Chinese, Japanese: characters).

    Paragraphs are set apart by empty lines.
    """
    most = [max(len(WORDS.findall(p)) for p in PARAGRAPHS.split(text)) for text in texts]
    return _found("long", np.array(most, np.int64) > longest)


def without_code(texts: Sequence[str]) -> Filtered:
    """Those without a line that opens or closes a fenced block of code."""
    return _found("with_code", np.array([bool(FENCE.search(t)) for t in texts], bool))


def distinct(
    texts: Sequence[str], groups: Sequence[Hashable], *, among: np.ndarray | None = None
) -> Filtered:
    """The first of texts that are the same within a group (a question), but for case and spaces.

    Args:
        texts: B texts.
        groups: B names; equal texts of two groups are both kept.
        among: bool [B], those that count; the others are not kept. All where None.

    Returns:
        `Filtered`, counting repeats to the letter (`exact`) and those that differ in case or white
        space alone (`normalised`).
    """
    keep = np.zeros(len(texts), bool)
    exact, normal = set(), set()
    counts = {"exact": 0, "normalised": 0}
    for i, (text, group) in enumerate(zip(texts, groups, strict=True)):
        if among is not None and not among[i]:
            continue
        # Punctuation is not dropped: 1 + 1 and 1 - 1 are different mathematics.
        same = group, " ".join(normal_text(text).split())
        if (group, text) in exact:
            counts["exact"] += 1
        elif same in normal:
            counts["normalised"] += 1
        else:
            keep[i] = True
        exact.add((group, text))
        normal.add(same)
    return Filtered(keep, counts)


@dataclasses.dataclass(frozen=True)
class NGrams:
    """What evaluation sets say, to look for in training data.

    Attributes:
        n: words in a window.
        windows: every n words in a row.
        whole: questions of fewer than n words.
    """

    n: int
    windows: frozenset[str]
    whole: frozenset[str]


def ngrams_of(questions: Iterable[str], solutions: Iterable[str] = (), *, n: int = 10) -> NGrams:
    """The n-grams of evaluation sets.

    Args:
        questions: those shorter than n words are looked for as whole texts: inside other texts a
            few words ("compute sin 60") stand by chance.
        solutions: reference solutions; those shorter than n words are left out.
        n: words in a window, 10 in the paper.
    """
    if n < 1:
        raise ValueError(f"{n=} must be at least 1")
    windows, whole = set(), set()
    for text in questions:
        words = normal_words(text)
        windows.update(_windows(words, n))
        if 0 < len(words) < n:
            whole.add(" ".join(words))
    for text in solutions:
        windows.update(_windows(normal_words(text), n))
    return NGrams(n, frozenset(windows), frozenset(whole))


def overlap(text: str, evaluation: NGrams) -> str | None:
    """The first words that a text shares with evaluation sets, or None."""
    words = normal_words(text)
    if len(words) < evaluation.n:
        joined = " ".join(words)
        return joined if joined in evaluation.whole else None
    found = (w for w in _windows(words, evaluation.n) if w in evaluation.windows)
    return next(found, None)


def clean(texts: Sequence[str], evaluation: NGrams) -> Filtered:
    """Those that share no n-gram with the evaluation sets, and are none of their short questions.

    DeepSeek-R1, supplementary section on decontamination: any text with a matching 10-gram goes.
    """
    return _found(
        "overlapping", np.array([overlap(t, evaluation) is not None for t in texts], bool)
    )


def capped(groups: Sequence[Hashable], most: int, *, among: np.ndarray) -> Filtered:
    """The first `most` of each group, of those in `among` (bool [B])."""
    keep, seen = np.zeros(len(groups), bool), Counter()
    for i in np.flatnonzero(among):
        seen[groups[i]] += 1
        keep[i] = seen[groups[i]] <= most
    return Filtered(keep, {"over_cap": int(among.sum() - keep.sum())})


def balanced(
    sources: Sequence[str], shares: Mapping[str, float], *, among: np.ndarray, seed: int = 0
) -> Filtered:
    """As many as possible of those in `among` such that each source has its share.

    The source that falls shortest decides: kept of source s is ⌊N · share_s⌋ with
    N = min_s count_s / share_s. Which ones of a source are kept is drawn.

    Args:
        sources: B names.
        shares: of every source in `among`, on any positive scale; a source that is wanted and has
            none at all leaves nothing.
        among: bool [B].
        seed: of the draw.

    Raises:
        ValueError: a source in `among` without a share, or a share that is not positive.
    """
    places = {name: [] for name in shares}
    for i in np.flatnonzero(among):
        if sources[i] not in places:
            raise ValueError(f"source {sources[i]!r} has no share; shares are {dict(shares)}")
        places[sources[i]].append(i)
    if not shares or not all(0 < share < float("inf") for share in shares.values()):
        raise ValueError(f"shares must be positive numbers, got {dict(shares)}")
    whole = min(len(places[name]) / share for name, share in shares.items())
    rng, keep = np.random.default_rng(seed), np.zeros(len(sources), bool)
    for name, share in shares.items():
        drawn = rng.permutation(len(places[name]))[: int(whole * share + 1e-9)]
        keep[np.array(places[name], np.int64)[drawn]] = True
    return Filtered(keep, {"out_of_balance": int(among.sum() - keep.sum())})


class Funnel(NamedTuple):
    """Filters one after the other.

    Attributes:
        keep: bool [B], what passes all.
        steps: of each filter: how many it saw, dropped, and would have dropped of all.
    """

    keep: np.ndarray
    steps: dict[str, dict[str, float]]


def funnel(filters: Mapping[str, Filtered]) -> Funnel:
    """What passes every filter; a text is counted at the first that drops it."""
    masks = [f.keep for f in filters.values()]
    if not masks:
        raise ValueError("funnel needs at least one filter, got none")
    left, steps = np.ones_like(masks[0]), {}
    for name, (keep, counts) in filters.items():
        seen, left = left, left & keep
        steps[name] = {
            "seen": int(seen.sum()),
            "dropped": int((seen & ~keep).sum()),
            "dropped_of_all": int((~keep).sum()),
            **counts,
        }
    return Funnel(left, steps)


def normal_text(text: str) -> str:
    """Compatibility characters made plain (full-width letters, ligatures), lower case."""
    return unicodedata.normalize("NFKC", text).casefold()


def normal_words(text: str) -> list[str]:
    """Letters and digits in runs, lower case; Chinese and Japanese characters one by one."""
    return WORDS.findall(normal_text(text))


def _windows(words: Sequence[str], n: int) -> Iterator[str]:
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def _one_language_share(text: str, languages: Collection[Collection[str]]) -> float:
    scripts = Counter(word_scripts(text))
    if not scripts:
        return 1.0
    # A script that is no known language's is a language by itself.
    known = set().union(*SCRIPTS.values())
    alone = [{s} for s in scripts if s not in known] if len(languages) > 1 else []
    best = max(sum(scripts[s] for s in members) for members in (*languages, *alone))
    return best / scripts.total()


def _found(name: str, wrong: np.ndarray) -> Filtered:
    return Filtered(~wrong, {name: int(wrong.sum())})


def _in_unit(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1]")
