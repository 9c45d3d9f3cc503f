"""Every kind of instruction: texts that keep it, texts that break it, and hostile ones."""

import json

import pytest

from pyrl.tasks.ifeval import KINDS
from pyrl.tasks.ifeval.language import LANGUAGES, is_language
from pyrl.tasks.ifeval.text import (
    MOST_CHARACTERS,
    is_answer,
    occurrences,
    paragraphs,
    parts,
    sentences,
    words,
)

TABLE = "Look:\n| a | b |\n|---|:-:|\n| c | d |\n"
#: kind → [(parameters, texts that keep it, texts that break it)]
CASES = {
    "words_min": [({"n": 3}, ["one two three", "it's a well-known"], ["", "one two", "it's one"])],
    "words_max": [({"n": 3}, ["one two three"], ["one two three four", "a well-known fact"])],
    "words_range": [({"low": 2, "high": 3}, ["one two", "a b c"], ["one", "a b c d"])],
    "sentences_min": [
        (
            {"n": 2},
            ["Hi. Ho!", "One?\n\nTwo", "A (b). C", "He left. 3 stayed."],
            ["Hi", "Mr. Fox ran.", "e.g. this.", ". . . !", "1. one thing", "a.b.c"],
        )
    ],
    "sentences_max": [({"n": 1}, ["Hi there.", "Dr. No left"], ["Hi. Ho.", "Hi!\n\nHo!"])],
    "lines": [({"n": 2}, ["a\nb", "a\n\n\nb\n"], ["a", "a\nb\nc"])],
    "questions": [({"n": 1}, ["So? Yes."], ["So.", "So?? ", "So? Why?"])],
    "paragraph_opening": [
        (
            {"n": 2, "which": 2, "word": "once"},
            ["A b.\n\nOnce more.", "A\nb.\n\n\n*Once* more."],
            ["A b.\nOnce more.", "Once.\n\nA.", "A.\n\nOnces", "A.\n\nOnce.\n\nB."],
        )
    ],
    "include": [
        ({"words": ["cat", "hot dog"]}, ["A Cat; hot DOG!"], ["cats, hot dog", "cat hot", ""])
    ],
    "frequency": [
        ({"word": "cat", "n": 2}, ["cat cat", "Cat, no CAT."], ["cat", "cats cat", "catcat"]),
        ({"word": "cat", "n": 1, "relation": "at most"}, ["", "cat"], ["cat cat"]),
    ],
    "avoid": [({"words": ["cat", "dog"]}, ["cats and birds"], ["A CAT.", "the dog-house"])],
    "letter_min": [({"letter": "m", "n": 2}, ["Mum", "am I me"], ["me", "nun"])],
    "letter_max": [({"letter": "m", "n": 1}, ["me", "nun"], ["Mum"])],
    "lowercase": [({}, ["no capitals, 1 é"], ["No", "123", ""])],
    "uppercase": [({}, ["ALL OF IT: 1 É"], ["ALL of it", "123", ""])],
    "capitals": [
        ({"n": 2, "relation": "at least"}, ["NO WAY", "a NO-NO"], ["NO A I", "No Way", "P.S. NO"]),
        ({"n": 1, "relation": "at most"}, ["NO I", "none"], ["NO NO"]),
        ({"n": 1, "relation": "exactly"}, ["NO A"], ["none", "NO NO"]),
    ],
    "no_commas": [({}, ["none; here"], ["one, here", "一，二", "a、b"])],
    "paragraphs": [
        (
            {"n": 2},
            ["a b c\n***\nd e f", "a b c\n\n ***\n\nd e f\n***"],
            ["a b c", "a b c *** d e f", "a b c\n***\nd", "a b c\n***\nd e f\n***\ng h i"],
        )
    ],
    "bullets": [
        ({"n": 2}, ["Two:\n* a\n* b", "- a\n - b"], ["* a", "* a\n* b\n* c", "* a\n* ", "*a\n*b"])
    ],
    "numbered": [
        (
            {"n": 2},
            ["So:\n1. a\n2. b", "1) a\n2) b"],
            ["1. a", "1. a\n1. b", "2. a\n1. b", "1.\n2."],
        )
    ],
    "sections": [
        (
            {"n": 2, "name": "PART"},
            ["PART 1\na\nPART 2\nb", "# Part 1: a\n**Part 2** b"],
            ["PART 1\na", "PART 1\nPART 2\nb", "PART 2\na\nPART 1\nb", "PART 1\na\nPART 12\nb"],
        ),
        ({"n": 1, "name": "S", "relation": "at least"}, ["S 1 a\nS 2 b"], ["T 1 a"]),
    ],
    "title": [({}, ["<<A b>>\nText"], ["<<>> text", ">>a<<", "<A b>", "<<a\nb>>", "<< - >>"])],
    "placeholders": [
        ({"n": 2}, ["[a] and [b c]"], ["[a] and [a]", "[a] [ ]", "[a\nb] [c]", "[[]]"])
    ],
    "highlights": [
        (
            {"n": 2},
            ["*a* and *b c*", "**a** and *b*"],
            ["*a* *a*", "* a\n* b\n", "*a* ** **", "******", "*a\nb* *c*"],
        )
    ],
    "quoted": [
        ({}, ['"All of it."', "“So.”", '"A "b" c"'], ["no", '"', '""', '"a" b', '"a" and "b"x'])
    ],
    "postscript": [
        (
            {"mark": "P.S."},
            ["Text\nP.S. one more"],
            ["P.S. one more", "Text\nP.S. one", "a P.S. b c"],
        )
    ],
    "opening": [({"phrase": "So it is."}, ["So it is. Yes"], ["So it is.", "so it is. Yes", "So"])],
    "ending": [({"phrase": "The end."}, ["A. The end."], ["The end.", "A. The end. B", "The end"])],
    "json": [
        (
            {"keys": ["a"]},
            ['{"a": 1}', '```json\n{"a": [2]}\n```', '```\n{"a": "x", "b": 1}\n```'],
            ["", "{", '{"b": 1}', '{"a": ""}', '["a"]', 'So: {"a": 1}', "[" * 100_000, "NaN"],
        ),
        ({}, ['{"a": 1}', "[1]"], ["{}", "1", "[]", "9" * 10_000]),
    ],
    "repeat": [({"text": "Do it."}, ["Do it. Done"], ["Do it.", "do it. Done", "Done. Do it."])],
    "two_answers": [
        (
            {},
            ["a b c\n******\nd e f"],
            [
                "a b c",
                "a b c\n******\na b c",
                "a b c\n******\nd",
                "a b c\n******\nd e f\n******\ng h i",
            ],
        )
    ],
    "numbers": [({"n": 2}, ["1 and 2.5", "on 3/4", "1,000 at 9:30"], ["one 2", "1 2 3", ""])],
    "replies": [
        (
            {"options": ["Yes.", "No."], "first": True},
            ["Yes. Because", "No. I"],
            ["Well. Yes.", "Yes. No.", "", "yes."],
        ),
        ({"options": ["Yes.", "No."]}, ["Well. Yes."], ["Yes. No."]),
    ],
    "table": [
        (
            {"columns": 2, "rows": 1},
            [TABLE],
            [
                TABLE + "| e | f |",
                TABLE.replace("c", " "),
                TABLE.replace("---", "--"),
                "| a | b |",
                "",
            ],
        )
    ],
    "language": [
        (
            {"language": "de"},
            ["Das ist nicht der Weg, und wir sind hier."],
            ["The way is not that."],
        )
    ],
}

TEXTS = {
    "ar": "الشمس تشرق في الصباح وتغرب في المساء",
    "bn": "সূর্য সকালে ওঠে এবং সন্ধ্যায় অস্ত যায়",
    "de": "Die Sonne geht am Morgen auf und am Abend geht sie wieder unter, aber nicht heute.",
    "el": "Ο ήλιος ανατέλλει το πρωί και δύει το βράδυ",
    "en": "The sun comes up in the morning and goes down in the evening, but not today.",
    "es": "El sol sale por la mañana y se pone por la tarde, pero no en el norte de la isla.",
    "fr": "Le soleil se lève le matin et se couche le soir, mais pas dans le nord de la Norvège.",
    "gu": "સૂર્ય સવારે ઊગે છે અને સાંજે આથમે છે",
    "he": "השמש זורחת בבוקר ושוקעת בערב",
    "hi": "सूरज सुबह उगता है और शाम को डूबता है",
    "it": "Il sole sorge la mattina e tramonta la sera, ma non nel nord della Norvegia.",
    "ja": "太陽は朝に昇り、夕方に沈みます",
    "kn": "ಸೂರ್ಯ ಬೆಳಿಗ್ಗೆ ಉದಯಿಸುತ್ತಾನೆ",
    "ko": "해는 아침에 뜨고 저녁에 집니다",
    "ml": "സൂര്യൻ രാവിലെ ഉദിക്കുന്നു",
    "pa": "ਸੂਰਜ ਸਵੇਰੇ ਚੜ੍ਹਦਾ ਹੈ",
    "pt": "O sol nasce de manhã e não se põe no norte da ilha, mas é uma exceção dos dias.",
    "ru": "Солнце встаёт утром и заходит вечером",
    "ta": "சூரியன் காலையில் உதிக்கிறது",
    "te": "సూర్యుడు ఉదయం ఉదయిస్తాడు",
    "th": "ดวงอาทิตย์ขึ้นในตอนเช้า",
    "zh": "太阳早上升起，晚上落下",
}


def test_every_kind_is_in_the_table():
    assert CASES.keys() == KINDS.keys()
    assert len(KINDS) >= 25


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_keep_it_and_texts_that_break_it(kind):
    for parameters, kept, broken in CASES[kind]:
        for text in kept:
            assert KINDS[kind].check(parameters, text) is True, (kind, parameters, text)
        for text in broken:
            assert KINDS[kind].check(parameters, text) is False, (kind, parameters, text)


def test_languages_are_told_apart():
    assert TEXTS.keys() == LANGUAGES.keys()
    for code, text in TEXTS.items():
        assert [c for c in LANGUAGES if is_language(text, c)] == [code]
        assert not is_language("", code) and not is_language("1 2 3 ...", code)
    assert not is_language("Солнце " + TEXTS["en"], "ru")
    assert not is_language("xyz qqq zzz the", "de")


def test_words_sentences_and_parts():
    assert words("It’s A-1: naïve_x") == ["it's", "a", "1", "naïve", "x"]
    assert words("我们 go") == ["我", "们", "go"]
    assert occurrences("a a a b", "a a") == 1 and occurrences("x", "...") == 0
    assert paragraphs("a\nb\n \nc\n") == ["a\nb", "c"] and paragraphs("") == []
    assert parts("", "***") == [] == parts("***", "***")
    assert sentences('He said "No." Then he left') == 2
    assert sentences("太阳。 月亮。") == 2


def test_what_is_no_answer():
    prompt = "Write a short story about lighthouses in a friendly tone. Do not use commas."
    good = "The lighthouse stood on a rock and every night its lamp turned over the dark sea."
    assert is_answer(good, prompt, least=15, prose=True)
    for text in ("", "  ", "...", "lighthouse " * 30, prompt, prompt * 5, good[:40], "a " * 50_000):
        assert not is_answer(text, prompt, least=15, prose=True), text[:50]
    assert not is_answer(" ".join(f"lamp{i}" for i in range(40)), prompt, least=15, prose=True)
    assert not is_answer(good + "x" * 200_000, prompt)


PIECES = (
    *("a", "A", " ", "\n", ".", "*", "* ", "***\n", "******\n", "[", "]", "<<", ">>", "<", "|"),
    *("|-", '"', "`", "```\n", "1. ", "1", ",", "?", "{", '{"a":', "PART 1", "P.S. ", "\x00"),
    *(
        "١",
        "我",
        "’a",
        "a’",
        "-",
        "\u0301",
        "\U0001f600",
        "\r",
        "\u2028",
        "#",
        "# ",
        "_",
        "!)",
        "“",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_text_is_judged_whatever_is_repeated(kind):
    """Were a check quadratic in the text, this would take hours."""
    for parameters, _, _ in CASES[kind]:
        for piece in PIECES:
            text = piece * (MOST_CHARACTERS // len(piece))
            assert KINDS[kind].check(parameters, text + "\x01") in (True, False)


def test_json_of_any_depth_or_size_is_judged():
    for text in ("[" * 10**6, '{"a":' * 10**5, "[" * 900 + "]" * 900, json.dumps(["x"] * 10**5)):
        assert KINDS["json"].check({}, text) in (True, False)
