"""Answers that are made to break a scorer, each with its reward; nothing is left running."""

import math
import time

import psutil
import pytest

from pyrl.tasks import Scorer, get_task
from pyrl.tasks.protocol import user_prompt

DEADLINE = 5.0


def boxed(text):
    return rf"\boxed{{{text}}}"


INJECTED = "__import__('os').system('touch {}')"

#: completion, reward where the reference is 42.
NUMBER = [
    # Size and nesting: beyond 400 characters an answer is only compared as it is.
    ("x" * 1_000_000, 0), (boxed("4" * 1_000_000), 0), (boxed("42") + " " * 1_000_000, 1),
    ("4 " * 500_000 + boxed("42"), 1), ("\n" * 1_000_000 + "42", 1), ("answer " * 150_000, 0),
    ("answer: " * 120_000, 0), ("#" * 1_000_000, 0), ("$" * 1_000_000, 0),
    ("</think>" * 100_000, 0),
    (r"\frac{" * 10_000, 0), (boxed(r"\frac{" * 10_000 + "}" * 10_000), 0), ("(" * 10_000, 0),
    (boxed("(" * 10_000 + "42" + ")" * 10_000), 0), ("{" * 10_000 + "}" * 10_000, 0),
    (r"\boxed{" * 100_000 + "42" + "}" * 100_000, 0), (r"\boxed{" * 100_000, 0),
    (r"\boxed{" * 5 + "42" + "}" * 5, 1), (boxed("(" * 50 + "42" + ")" * 50), 1),
    (boxed(r"\sqrt{" * 60 + "42" + "}" * 60), 0), ("\\" * 1_000_001, 0), ("```" * 100_000, 0),
    # Powers and factorials that no memory holds.
    (boxed("9^9^9^9"), 0), (boxed("9**9**9**9"), 0), (boxed("10^{10^{10}}"), 0),
    (boxed("((9^9)^9)^9"), 0), (boxed("(((9!)!)!)!"), 0), (boxed("9!!!!!!!!"), 0),
    (boxed("1e999999999"), 0), (boxed("1e999"), 0), (boxed(r"42 \times 10^{999}"), 0),
    (boxed("42e0"), 1), (boxed(r"\binom{10^9}{10^8}"), 0), (boxed("0." + "0" * 300 + "1"), 0),
    # Digits and signs of other scripts: decimal digits count, look-alikes do not.
    (boxed("４２"), 1), (boxed("४२"), 1), (boxed("𝟜𝟚"), 1), (boxed("٤٢"), 1), (boxed("⁴²"), 0),
    (boxed("④②"), 0), (boxed("四十二"), 0), (boxed("XLII"), 0), (boxed("4\u200b2"), 1),
    (boxed("42\x00"), 0), ("\x00\x01\xff\ud800", 0), (boxed("\ud800"), 0), ("\u202e24", 0),
    # How many answers there are.
    ("", 0), (" \n\t", 0), (boxed(""), 0), (boxed(" "), 0), (boxed(r"\text{}"), 0),
    (boxed("41") + boxed("42"), 1), (boxed("42") + boxed("41"), 0), (boxed("42") + boxed(""), 0),
    (boxed("41, 42"), 0), (boxed("42 or 43"), 0), (boxed("42, 42"), 0), (boxed("x=41, y=42"), 0),
    (r"\boxed 42", 0), (r"\boxed{42", 0), ("<think>" + boxed("41") + "</think>42", 1),
    (boxed(r"1, 2, 3, \ldots, 99"), 0), (boxed("0-99"), 0), (boxed("*"), 0), (boxed(".*"), 0),
    # No values.
    (boxed("NaN"), 0), (boxed("nan"), 0), (boxed("inf"), 0), (boxed("oo"), 0), (boxed("zoo"), 0),
    (boxed(r"\infty"), 0), (boxed("1/0"), 0), (boxed(r"\frac{0}{0}"), 0), (boxed("42/0"), 0),
    (boxed("None"), 0), (boxed("True"), 0), (boxed("x"), 0), (boxed("42x"), 0), (boxed("i"), 0),
    # The value, unfinished or otherwise written.
    (boxed("40+2"), 0), (boxed("84/2"), 0), (boxed(r"\sqrt{1764}"), 0), (boxed("x=42"), 1),
    (boxed("x=y=42"), 1), (boxed("40+2=42"), 1), (boxed("43=42"), 0), (boxed("42 halves"), 0),
    (boxed("42 tenths"), 0), (boxed("42 point five"), 0), (boxed("42 less one"), 0),
    (boxed("42=42"), 1), (boxed("42.0"), 1),
    (boxed("042"), 1), (boxed("+42"), 1), (boxed("-42"), 0), (boxed("--42"), 0), (boxed("42%"), 1),
    (boxed("4200%"), 0), (boxed("42!"), 0), (boxed(r"42\text{ apples, or more}"), 0),
    (boxed(r"\{42\}"), 0), (boxed("[42]"), 0), (boxed("(42, 0)"), 0), (boxed("42 million"), 0),
    ("The answer is 42, I hope you like it.", 0), ("The answer is 42. Have a nice day", 1),
    # Code in the place of an answer.
    (boxed(INJECTED), 0), (INJECTED, 0), ("$" + INJECTED + "$", 0), (boxed("exec('42')"), 0),
    (boxed("lambda: 42"), 0), (boxed("{{42}}"), 1), (boxed("${42}"), 1), (boxed("%s%n"), 0),
    (boxed(r"\input{/etc/passwd}"), 0), (boxed("'; DROP TABLE answers; --"), 0),
]  # fmt: skip

#: reference, answer, reward: what reaches the symbolic parser.
SYMBOLIC = [
    (r"x+\sqrt{2}", r"\sqrt{2}+x", 1), (r"x+\sqrt{2}", INJECTED, 0), (r"x+1", "9^9^9^9+x", 0),
    ("x+1", "exit()+x", 0), ("x+1", "x.__class__", 0), ("x+1", r"\frac{x^2-1}{x-1}", 1),
    ("x+1", r"\frac{1}{0}", 0), ("x+1", "(x" + "+1" * 150 + ")-149", 1),
    ("x+1", r"\sqrt" * 80 + "x", 0), ("x+1", "x" * 350, 0), ("x+1", "x^" * 150 + "x", 0),
    ("x+1", "a" * 1_000_000, 0), ("x+1", r"\left" * 90, 0), ("x+1", r"\begin{matrix}" * 20, 0),
    (r"\frac{\pi}{4}", r"\pi/4", 1), (r"\frac{\pi}{4}", "0.785", 0), (r"\frac{\pi}{4}", "oo", 0),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}", 1),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", 0),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3\end{pmatrix}", 0),
    (r"\{1,\sqrt2\}", r"\{\sqrt{2}, 1\}", 1), (r"\{1,\sqrt2\}", r"\{\}", 0), ("(1,2)", "(2,1)", 0),
    ("[0,1)", "[0,1]", 0), (r"(-\infty,\sqrt{4})", r"(-\infty, 2)", 1), (r"\emptyset", "nan", 0),
    (r"\sqrt{2}", "1.41", 0), (r"\sqrt{2}", r"2^{\frac12}", 1), (r"\sqrt{2}", "४", 0),
    (r"x^2+1", "x²+1", 1), ("5", r"\begin{cases}5\end{cases}", 0),
]  # fmt: skip


def children():
    """The scoring processes, without the tracker that multiprocessing keeps."""
    all_of_them = psutil.Process().children(recursive=True)
    return {p.pid for p in all_of_them if "resource_tracker" not in " ".join(p.cmdline())}


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(psutil.pid_exists, pids))


def scored(task, items):
    """Rewards and errors, by a process that is gone afterwards."""
    before = children()
    with Scorer(task, deadline=DEADLINE) as scorer:
        scores = scorer.score(items)
        processes = children() - before
    assert processes and gone(processes)
    return scores


def test_a_number(tmp_path):
    task, mark = get_task("mathematics", verifier="symbolic"), tmp_path / "mark"
    prompt = user_prompt("p", "What is 40 + 2?", answer="42")
    items = [(prompt, text.replace(INJECTED, INJECTED.format(mark))) for text, _ in NUMBER]
    for score, (text, reward) in zip(scored(task, items), NUMBER, strict=True):
        assert (score.reward, score.error) == (reward, None), text[:80]
    assert not mark.exists()
    strings = get_task("mathematics", verifier="string")  # the same, in this process
    assert strings.trusted
    assert [strings.score(prompt, text) for text, _ in NUMBER] == [r for _, r in NUMBER]


def test_an_expression(tmp_path):
    task, mark = get_task("mathematics", verifier="symbolic"), tmp_path / "mark"
    items = [
        (
            user_prompt("p", "?", answer=reference),
            boxed(answer.replace(INJECTED, INJECTED.format(mark))),
        )
        for reference, answer, _ in SYMBOLIC
    ]
    for score, row in zip(scored(task, items), SYMBOLIC, strict=True):
        assert (score.reward, score.error) == (row[2], None), row
    assert not mark.exists()


@pytest.mark.slow  # waits for a deadline, and for a second process
def test_what_hangs_costs_its_own_sample_only():
    """sympy needs longer than the deadline to simplify this; the next answer is scored again."""
    task = get_task("mathematics", verifier="symbolic")
    prompt = user_prompt("p", "?", answer="x+1")
    hang = boxed(r"\frac{(x+y+z+1)^{900}-1}{(x+y+z)^{900}}")
    before = children()
    with Scorer(task, deadline=2.0) as scorer:
        lost, kept = scorer.score([(prompt, hang), (prompt, boxed("1+x"))])
        processes = children() - before
    assert math.isnan(lost.reward) and "longer than its 2 s" in lost.error
    assert (kept.reward, kept.error) == (1.0, None)
    assert gone(processes)


def test_stem():
    task = get_task("stem")
    choice = user_prompt("c", "?", options=["water", "air", "fire"], right=1)
    number = user_prompt("n", "?", value="5", unit="m/s", tolerance=0.01)
    text = user_prompt("t", "?", texts=["helium"])
    rows = [
        (choice, boxed("B"), 1), (choice, boxed("Ｂ"), 1), (choice, boxed("A and B"), 0),
        (choice, boxed("В"), 0),  # Cyrillic
        (choice, boxed("ABC"), 0), (choice, boxed("B" * 1_000_000), 0),
        (choice, "B) " * 300_000, 0),
        (choice, "(" * 1_000_000, 0), (choice, "(B" * 300_000, 0), (choice, boxed("B|A"), 0),
        (choice, boxed("not B"), 0), (choice, "", 0), (choice, "\ud800", 0), (choice, "Z", 0),
        *((number, boxed(text), 0) for text in (
            "5 or 7", "5, 7, 8", "5 7 8", "5+4", "5*2", "5^2", r"5 \times 10", "5-100", "5 not",
            "5!", "5, seven", "5 m/s or seven", "5 million", "7 m/s = 5 m/s", "10/2", "minus 5",
            r"\frac{5}{1}", "5 m/s - 1", "5 kg", "5(7)", "5 million m/s")),
        *((number, boxed(text), 1) for text in (
            "5 m/s to the east", "10/2 = 5 m/s", r"5~\mathrm{m\,s^{-1}}", r"5\ \frac{m}{s}",
            "5 Meters per Second", "v = d/t = 5 m/s = 18 km/h", "5 (m/s)")),
        (number, boxed("5"), 1), (number, boxed("５ m/s"), 1), (number, boxed("5e999 m"), 0),
        (number, boxed("nan"), 0), (number, boxed("9^9^9^9"), 0),
        (number, boxed("5" + "m" * 350), 1),
        (number, boxed("5" + " m/s" * 90), 0), (number, boxed("5 m" + "^9" * 190), 0),
        (number, boxed("5 " + "m/" * 190), 0), (number, "5" * 1_000_000, 0), (number, "1/0", 0),
        (text, "Helium.", 1), (text, boxed("ｈｅｌｉｕｍ"), 1), (text, "helium" * 100_000, 0),
        (text, "a " * 500_000, 0), (text, "\x00", 0), (text, boxed("the helium"), 1),
    ]  # fmt: skip
    with Scorer(task) as scorer:
        scores = scorer.score([(prompt, completion) for prompt, completion, _ in rows])
    for score, row in zip(scores, rows, strict=True):
        assert (score.reward, score.error) == (row[2], None), (row[0].id, row[1][:80])
    assert task.trusted
