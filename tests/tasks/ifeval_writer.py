"""Writes texts that keep a prompt's instructions, to show that they can be kept together."""

import itertools
import json

from pyrl.tasks.ifeval.vocabulary import POSTSCRIPTS

#: None has a letter that `letter_max` limits, or is a word to avoid.
FILLER = """
    the sea and all land is there as she said to her at noon so it ends in a rain then an old man
    sat on that hill to rest until it is late under one moon
""".replace(" one ", " ").split()

FOREIGN = {
    "ar": "الشمس تشرق في الصباح وتغرب في المساء ثم يأتي القمر وتظهر النجوم فوق البحر الكبير هناك",
    "de": "die Sonne geht am Morgen auf und sie wird dann nicht mehr so hell wie ein Licht",
    "el": "Ο ήλιος ανατέλλει το πρωί και δύει βράδυ ενώ μετά έρχεται φεγγάρι πάνω από θάλασσα",
    "es": "el sol sale por la mañana y se pone en una isla del norte como más tarde lo hace",
    "fr": "le soleil se lève dans la ville et il est plus beau que les autres pour nous",
    "hi": "सूरज सुबह उगता है और शाम को डूबता है फिर चाँद आता है और तारे समुद्र के ऊपर दिखते हैं",
    "ja": "太陽は 朝に昇り 夕方に沈みます 月も出ます 星が海の上で光る 山へ行こう",
    "ko": "해는 아침에 뜨고 저녁에 집니다 그리고 밤엔 달이 뜹니다 "
    "별은 위에서 빛나고 우리는 또 집에 가요",
    "ru": "Солнце встаёт утром и заходит вечером а потом приходит луна над большим морем и городом",
    "zh": "太阳 早上升起 晚上落下 月亮出来 星星在海面发光 我们回家去",
}


def drafts(data):
    """Texts of several lengths; one of them should keep all the instructions."""
    told = {i["kind"]: i for i in data["instructions"]}
    for size, count in itertools.product(range(10, 341, 10), range(1, 17)):
        yield _draft(data["topic"], told, size, count)


def _draft(topic, told, size, count):
    tokens = _tokens(topic, told)
    if "json" in told:
        return json.dumps({k: " ".join(tokens + FILLER) for k in told["json"]["keys"]})
    if "language" in told:
        sample = FOREIGN[told["language"]["language"]].split()
        tokens += sample if len(sample) > 10 else "".join(sample)
    else:
        tokens += itertools.islice(itertools.cycle(FILLER), max(size - len(tokens), 5))
    text = _shaped(told, tokens, count)
    if "questions" in told:
        text += " so?" * told["questions"]["n"]
    if "title" in told:
        text = f"<<so it is>>\n{text}"
    if "table" in told:
        row = "|" + " a |" * told["table"]["columns"] + "\n"
        text += "\n" + row + row.replace(" a ", "---") + row * told["table"]["rows"]
    listed = told.keys() & {"bullets", "numbered", "sections", "table"}
    gap = "\n" if listed else " "  # lists begin on lines of their own
    if "replies" in told:
        text = f"{told['replies']['options'][0]}{gap}{text}"
    if "opening" in told:
        text = f"{told['opening']['phrase']}{gap}{text}"
    if "repeat" in told:
        text = f"{told['repeat']['text']}{gap}{text}"
    if "postscript" in told:
        assert told["postscript"]["mark"] in POSTSCRIPTS
        text += f"\n{told['postscript']['mark']} so it is"
    if "ending" in told:
        text += f" {told['ending']['phrase']}"
    if "quoted" in told:
        text = f'"so it is:\n{text}"' if listed else f'"{text}"'
    if "lowercase" in told:
        text = text.lower()
    return text.upper() if "uppercase" in told else text


def _tokens(topic, told):
    """The words that the instructions ask for."""
    found = [topic] if topic else []
    found += told.get("include", {}).get("words", [])
    found += [told["frequency"]["word"]] * told["frequency"]["n"] if "frequency" in told else []
    found += (
        [told["letter_min"]["letter"] * told["letter_min"]["n"]] if "letter_min" in told else []
    )
    found += ["AB"] * told["capitals"]["n"] if "capitals" in told else []
    found += ["7"] * told["numbers"]["n"] if "numbers" in told else []
    letters = "abcdefghi"
    found += [f"[{x}x]" for x in letters[: told.get("placeholders", {}).get("n", 0)]]
    found += [f"*{x}x*" for x in letters[: told.get("highlights", {}).get("n", 0)]]
    return found


def _shaped(told, tokens, count):
    """The words as `count` sentences, in the units that are asked for."""
    for kind, joint in (("paragraphs", "\n***\n"), ("paragraph_opening", "\n\n"), ("lines", "\n")):
        if kind in told:
            texts = _dealt(tokens, told[kind]["n"])
            if "which" in told[kind]:
                texts[told[kind]["which"] - 1].insert(0, told[kind]["word"])
            return joint.join(" ".join(t) + "." for t in texts)
    if "two_answers" in told:
        return "\n******\n".join(" ".join(t) for t in _dealt(tokens, 2))
    if "sections" in told:
        name, texts = told["sections"]["name"], _dealt(tokens, told["sections"]["n"])
        return "\n".join(f"{name} {i}\n{' '.join(t)}" for i, t in enumerate(texts, 1))
    if "bullets" in told:
        return "\n".join(f"* {' '.join(t)}" for t in _dealt(tokens, told["bullets"]["n"]))
    if "numbered" in told:
        texts = _dealt(tokens, told["numbered"]["n"])
        return "\n".join(f"{i}. {' '.join(t)}" for i, t in enumerate(texts, 1))
    return " ".join(" ".join(t) + "." for t in _dealt(tokens, count))


def _dealt(tokens, count):
    """`count` runs of the tokens, as equal as can be."""
    edges = [len(tokens) * i // count for i in range(count + 1)]
    return [tokens[a:b] for a, b in itertools.pairwise(edges)]
