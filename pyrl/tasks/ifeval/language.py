"""Which language a text is in, told by its script, or by its commonest words. Deterministic."""

from __future__ import annotations

from collections.abc import Callable

from pyrl.tasks.ifeval.text import words

#: Share of the letters that must be of the language's script.
SCRIPT_SHARE = 0.8
#: Share of the words that must be among the language's commonest.
COMMON_SHARE = 0.15

#: code → ranges of code points. Languages that share a script are not told apart here: "ru" is any
#: Cyrillic text, "ar" any Arabic, "hi" any Devanagari.
_SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "ar": ((0x0600, 0x06FF), (0x0750, 0x077F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "bn": ((0x0980, 0x09FF),),
    "el": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "gu": ((0x0A80, 0x0AFF),),
    "he": ((0x0590, 0x05FF),),
    "hi": ((0x0900, 0x097F),),
    "ja": ((0x3040, 0x30FF), (0x3400, 0x9FFF)),
    "kn": ((0x0C80, 0x0CFF),),
    "ko": ((0xAC00, 0xD7AF), (0x1100, 0x11FF)),
    "ml": ((0x0D00, 0x0D7F),),
    "pa": ((0x0A00, 0x0A7F),),
    "ru": ((0x0400, 0x04FF),),
    "ta": ((0x0B80, 0x0BFF),),
    "te": ((0x0C00, 0x0C7F),),
    "th": ((0x0E00, 0x0E7F),),
    "zh": ((0x3400, 0x9FFF),),
}
_KANA = ((0x3040, 0x30FF),)

_COMMON = {
    "de": """
        der die das und ist nicht ein eine einen dem den des mit für auf von zu im sich es wir sie
        ich auch als wie bei aus nach oder aber wenn dass werden wird sind hat haben kann um am
    """,
    "en": """
        the of and to in is that it was for on are with as be at this have from or by but not they
        you we he she his her their an which will can there has had were when all if so
    """,
    "es": """
        el la los las de que y en un una es por con para no se del al lo como más pero sus le ya o
        este sí porque esta entre cuando muy sin sobre también me hasta hay donde su son
    """,
    "fr": """
        le la les de des du et en un une est que qui dans pour pas sur plus par avec ce il elle ne
        se au aux nous vous ils sont mais ou cette son ses leur comme être tout fait été
    """,
    "it": """
        il lo la gli le di che e un una è per con non si del della dei delle al alla sono come più
        ma nel nella anche da questo questa ha suo sua perché quando molto ci i o se
    """,
    "pt": """
        o a os as de que e em um uma é por com para não se do da dos das no na ao mais como mas
        seu sua ou ser quando muito nos já está também só pelo pela até isso ela ele são
    """,
}
_COMMON_WORDS = {code: frozenset(text.split()) for code, text in _COMMON.items()}

#: code → English name.
LANGUAGES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "gu": "Gujarati",
    "he": "Hebrew",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "kn": "Kannada",
    "ko": "Korean",
    "ml": "Malayalam",
    "pa": "Punjabi",
    "pt": "Portuguese",
    "ru": "Russian",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "zh": "Chinese",
}


def _of(ranges: tuple[tuple[int, int], ...]) -> Callable[[str], bool]:
    return lambda character: any(low <= ord(character) <= high for low, high in ranges)


def is_language(text: str, code: str) -> bool:
    """Whether the text is in the language `code` of LANGUAGES.

    With a script of its own: ≥ 80% of the letters are of that script; Japanese has kana, in Chinese
    at most one letter in twenty is. Otherwise a vote: ≥ 80% of the letters are Latin, ≥ 15% of the
    words are among the language's commonest forty, and more than are among any other's.
    """
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return False
    if code in _SCRIPTS:
        own = sum(map(_of(_SCRIPTS[code]), letters))
        kana = sum(map(_of(_KANA), letters)) if code in ("ja", "zh") else 0
        if (code == "ja" and not kana) or (code == "zh" and 20 * kana > len(letters)):
            return False
        return own >= SCRIPT_SHARE * len(letters)
    if sum(ord(c) < 0x250 for c in letters) < SCRIPT_SHARE * len(letters):
        return False
    found = words(text)
    votes = {other: sum(w in common for w in found) for other, common in _COMMON_WORDS.items()}
    own = votes.pop(code)
    return own >= COMMON_SHARE * len(found) and own > max(votes.values())
