"""What scoring knows about English text: words, topics, and whether it is one plain sentence."""

from __future__ import annotations

import re

#: Grammar that hardly any sentence of five words does without; a heap of keywords does.
_FUNCTION_WORDS = """
    a an the this that these those my your his her its our their some many every each all no i
    you he she it we they there who which what where when while as if than because is are was
    were be been being am has have had do does did can could will would may might must should of
    in on at to for from with by about into over under through after before between near like
    without and or but so not during across against among around above below behind beside
    beyond along inside outside since until although though off out up down onto upon within any
    few more most much other another both either neither how why whose whom me him us them one
    only just very too also such even still never always often sometimes usually once again here
    now then shall cannot can't don't doesn't didn't isn't aren't wasn't weren't won't it's
    that's there's let
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

#: The vocabulary of the instructions themselves: an answer that needs it talks about its task
#: ('The word "river" is in this sentence about cats.') instead of doing it.
META_WORDS = frozenset(
    ("word", "words", "sentence", "sentences", "write", "letter", "letters", "exclamation")
)

MIN_WORDS = 5
MAX_WORDS = 40
_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")
_ODD = re.compile(r"[^A-Za-zÀ-ÖØ-öø-ÿ0-9 ,;:.!?'\"’‘“”()\-–—&%$]")
_BREAK = re.compile(r"[.!?][\"'”’)]*\s")
_END = re.compile(r"[A-Za-z0-9%)\"'”’][.!?][\"'”’)]?$")


def words(text: str) -> list[str]:
    """The words in order, lower case, apostrophes straightened."""
    return [w.lower().replace("’", "'") for w in _WORD.findall(text)]


def is_sentence(text: str) -> bool:
    """True for one finished, plain sentence.

    It has 5 to 40 words, at least four fifths of them distinct and two of them different function
    words; ordinary characters on one line; exactly one `.`, `!` or `?` that ends a sentence,
    the last character but for a closing quote or bracket. So text that was cut off, a list of
    keywords, repetition, and a second sentence do not pass. Quotes and brackets are in pairs. It
    must not talk about its own instructions (META_WORDS).
    """
    text = text.strip()
    found = words(text)
    distinct = set(found)
    return (
        MIN_WORDS <= len(found) <= MAX_WORDS
        and 5 * len(distinct) >= 4 * len(found)
        and len(distinct & FUNCTION_WORDS) >= 2
        and not distinct & META_WORDS
        and _ODD.search(text) is None
        and text.count('"') % 2 == 0
        and text.count("“") == text.count("”")
        and text.count("(") == text.count(")")
        and _BREAK.search(text) is None
        and _END.search(text) is not None
    )


def mentions(text: str, topic: str) -> bool:
    """True if `topic`, in singular or plural, is among the words (`cats`: cat, cats, cat's)."""
    stem = topic.removesuffix("s")
    forms = {stem, stem + "s", stem + "'s", stem + "s'"}
    return any(w in forms for w in words(text))


def copies(text: str, prompt: str, length: int = 5) -> bool:
    """True if `length` words in a row were copied from the prompt."""
    source, found = words(prompt), words(text)
    runs = {tuple(source[i : i + length]) for i in range(len(source) - length + 1)}
    return any(tuple(found[i : i + length]) in runs for i in range(len(found) - length + 1))
