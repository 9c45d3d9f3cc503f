"""What the checks know about text: words, sentences, paragraphs, and whether it is an answer.

Every function is linear in the text's length, whatever the text holds.
"""

from __future__ import annotations

import itertools
import re

from pyrl.tasks.instructions.text import FUNCTION_WORDS

#: A longer answer is none: it bounds the time of a check. Of 32k tokens hardly any answer has more.
MOST_CHARACTERS = 200_000
#: Fewest words of a generated prompt's answer; a kind that asks for something short has its own.
FEWEST_WORDS = 15
#: Up to so many words, half of them must be distinct; longer texts need half of these.
DISTINCT_SPAN = 60
#: Texts of prose have at least so many different function words.
FEWEST_FUNCTION_WORDS = 3
#: Of their words, at least this share are function words: of ordinary prose nearly half.
FUNCTION_SHARE = 0.2
#: Words in a row that count as copied when the prompt has them too.
COPIED = 5

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
#: Scripts without spaces: each character counts as a word.
_DENSE = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_぀-ヿ㐀-鿿]+(?:['’][^\W_぀-ヿ㐀-鿿]+)*")
_ITEM = re.compile(r"(?:[-*+•]|\d{1,3}[.)])[ \t]+")
_CLOSERS = "\"'”’»)]}*_"
_ENDS = (".", "!", "?", "…", "。", "！", "？", "।", "؟")
_SHORT = ("mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "vs.", "e.g.", "i.e.", "p.s.", "p.p.s.")


def words(text: str) -> list[str]:
    """Runs of letters and digits, apostrophes inside kept and straightened, in lower case. A hyphen
    separates; a character of Chinese or Japanese is a word of its own."""
    pattern = _WORD if text.isascii() else _DENSE
    return [w.replace("’", "'") for w in pattern.findall(text.lower())]


def count_words(text: str) -> int:
    """len(words(text))"""
    return len(words(text))


def occurrences(text: str, phrase: str) -> int:
    """How often the words of `phrase` stand in a row in the text, in any case; 0 for no words."""
    wanted = "".join(f" {w} " for w in words(phrase))
    return "".join(f" {w} " for w in words(text)).count(wanted) if wanted else 0


def lines(text: str) -> list[str]:
    """The lines that are not blank, without the white space around them."""
    return [line for line in map(str.strip, text.splitlines()) if line]


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, blank ones left out."""
    found: list[str] = []
    for blank, group in itertools.groupby(text.splitlines(), lambda line: not line.strip()):
        if not blank:
            found.append("\n".join(group).strip())
    return found


def parts(text: str, marker: str) -> list[str]:
    """What lines of nothing but `marker` separate; an empty part at either end is dropped."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == marker:
            found.append([])
        else:
            found[-1].append(line)
    texts = ["\n".join(part).strip() for part in found]
    return texts[(not texts[0]) : len(texts) - (len(texts) > 1 and not texts[-1])]


def sentences(text: str) -> int:
    """How many sentences there are: words up to a `.`, `!` or `?` (of any script here) that ends a
    token, or up to the end of a paragraph. List markers and a few abbreviations end none."""
    found = 0
    for paragraph in paragraphs(text):
        open_words = False
        for line in lines(paragraph):
            for token in _ITEM.sub("", line, count=1).split():
                open_words = open_words or any(map(str.isalnum, token))
                bare = token.rstrip(_CLOSERS)
                if open_words and bare.endswith(_ENDS) and bare.lower() not in _SHORT:
                    found, open_words = found + 1, False
        found += open_words
    return found


def items(text: str) -> list[str]:
    """The texts of the bullets: lines that begin with "* " or "- " and go on."""
    return [line[2:].strip() for line in lines(text) if line[:2] in ("* ", "- ")]


def copied(text: list[str], source: list[str], span: int = COPIED) -> float:
    """The share of the text's rows of `span` words that the source has too; 0 where it has none."""
    rows = [tuple(text[i : i + span]) for i in range(len(text) - span + 1)]
    known = {tuple(source[i : i + span]) for i in range(len(source) - span + 1)}
    return sum(row in known for row in rows) / max(len(rows), 1)


def is_answer(text: str, prompt: str, *, least: int = 1, prose: bool = False) -> bool:
    """Whether there is something to judge: an instruction such as "no commas" must not pay for
    nothing.

    The text has at least `least` words and at most MOST_CHARACTERS characters, of its first words
    half are distinct (of n ≤ 60: n/2; of more: 30), and less than half of it is the prompt's.
    prose: it also has three different function words of English, and they are a fifth of all words.
    A heap of content words has not; one with enough function words strewn in cannot be told.
    """
    if len(text) > MOST_CHARACTERS:
        return False
    found = words(text)
    distinct = set(found)
    return (
        len(found) >= max(least, 1)
        and 2 * len(distinct) >= min(len(found), DISTINCT_SPAN)
        and (not prose or _is_english(found))
        and copied(found, words(prompt)) < 0.5
    )


def _is_english(found: list[str]) -> bool:
    """Enough function words: different ones, and as a share of all."""
    grammar = [w for w in found if w in FUNCTION_WORDS]
    return len(set(grammar)) >= FEWEST_FUNCTION_WORDS and len(grammar) >= FUNCTION_SHARE * len(
        found
    )
