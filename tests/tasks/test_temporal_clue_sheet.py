"""Answer sheets: what is read, what it scores; the prompt; the command."""

import pytest

from pyrl.tasks.temporal_clue.sheet import LONGEST_ANSWER, read_sheet, score_sheet

ANSWERS = {"A": "Ada Thornbury", "B": "11:30 PM", "C": "Map Room", "D": "Fire Poker"}
PERFECT = "A. Ada Thornbury\nB. 11:30 PM\nC. Map Room\nD. Fire Poker"


@pytest.mark.parametrize(
    ("completion", "reward", "legacy"),
    [
        (PERFECT, 1.0, 0.75),  # the public pattern has no digits
        (PERFECT.lower(), 1.0, 0.0),  # and takes capital letters only
        (PERFECT.replace("\n", "\r\n"), 1.0, 0.75),
        ("", 0.0, 0.0),
        ("no answers at all", 0.0, 0.0),
        ("A. Ada Thornbury", 0.25, 0.25),
        ("A. Ada Thornbury.", 0.25, 0.0),
        ("A. ada  THORNBURY", 0.25, 0.0),
        ("**A.** Ada Thornbury\n**B. 11:30 pm**", 0.5, 0.0),
        ('- `A. Ada Thornbury`\n> **C**. "Map Room"', 0.5, 0.25),
        ("* A. [Ada Thornbury]\n  D.Fire Poker", 0.5, 0.0),
        ("A. “Ada Thornbury”", 0.25, 0.0),
        ("A. Hugo Pembroke\nA. Ada Thornbury", 0.25, 0.25),  # the last one counts
        ("A. Ada Thornbury\nA. Hugo Pembroke", 0.0, 0.0),
        ("A. Ada Thornbury\nA.", 0.0, 0.25),  # an empty answer takes the earlier one back
        ("so A. Ada Thornbury", 0.0, 0.25),  # not a line of its own
        ("A. Ada Thornbury, I think\n**C.** Map Room (surely)", 0.5, 0.25),
        ("A. Ada Thornbury or Hugo Pembroke", 0.0, 0.0),
        ("A. The Ada Thornbury", 0.0, 0.0),
        ("A: Ada Thornbury\n(C) Map Room", 0.0, 0.0),
        ("<think>A. Hugo Pembroke</think>" + PERFECT, 1.0, 0.75),
        ("<think>" + PERFECT + "</think>\nI do not know.", 0.0, 0.75),
        ("B. １１:３０ PM", 0.0, 0.0),  # digits of another alphabet
        ("E. Ada Thornbury\nZ. Map Room", 0.0, 0.0),
        ("A. Ada Thornbury\0", 0.0, 0.25),
        ("\ud800A. Ada Thornbury\nC. Map Room", 0.25, 0.5),
    ],
)
def test_scores(completion, reward, legacy):
    assert score_sheet(ANSWERS, completion) == reward
    assert score_sheet(ANSWERS, completion, legacy=True) == legacy


@pytest.mark.parametrize(
    "unit", ["A", "A. ", "*", "**A**", "A.*", "\n", "A\n", "A. Ada ", " ", "[A] ", "</think>", "\0"]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_megabyte_is_read_in_linear_time(unit, legacy):
    """Quadratic time would take hours for these: that they end is the check."""
    text = unit * (2**20 // len(unit))
    assert score_sheet(ANSWERS, text, legacy=legacy) == 0
    assert score_sheet(ANSWERS, f"{text}\n{PERFECT}", legacy=legacy) > 0.7
    assert all(len(answer) <= LONGEST_ANSWER for answer in read_sheet(text).values())


def test_bad_answers_are_named():
    for bad, message in [
        ({}, "expected at least one"),
        ({"a": "x"}, "'a' is no letter"),
        ({"AB": "x"}, "'AB' is no letter"),
        ({"A": "..."}, r"answers\['A'\]='...'"),
        ({"A": 3}, r"answers\['A'\]=3"),
        ({"A": "x" * 99}, r"answers\['A'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_sheet(bad, "A. x")
