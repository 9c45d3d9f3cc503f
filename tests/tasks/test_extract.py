"""What is taken from a completion."""

import pytest

from pyrl.tasks.extract import after_thinking, last_boxed, last_code_block, last_tag


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{x} and \boxed{unclosed", "x"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\fbox{7}", "7"),
        (r"{\boxed{5}}}", "5"),
        ("no box, {braces}", None),
        (r"\boxed 4", None),
        ("", None),
        ("\\", None),
        (r"\boxed{" * 3, None),
        (r"\boxed{}", ""),
    ],
)
def test_boxed(text, inside):
    assert last_boxed(text) == inside


def test_a_megabyte_of_nesting_takes_linear_time():
    deep = r"\boxed{" * 200_000
    assert last_boxed(deep) is None
    assert last_boxed(deep + "1" + "}" * 200_000).endswith("}")
    assert last_tag("<answer>" * 200_000, "answer") is None
    assert last_code_block("```\n" * 300_001) == ""


def test_tag_and_thoughts():
    text = "<think>maybe <answer>1</answer></think> <answer> 2 </answer> or <answer>3"
    assert last_tag(text, "answer") == "2"
    assert after_thinking(text).strip().startswith("<answer> 2")
    assert after_thinking("plain") == "plain"
    assert last_tag("</answer><answer>", "answer") is None


@pytest.mark.parametrize(
    ("text", "languages", "block"),
    [
        ("```python\na\n```\n```\nb\n```", (), "b\n"),
        ("```python\na\n```\n```\nb\n```", ("python", "py"), "a\n"),
        ("```python\na\n```\n```text\nb\n```", (), "b\n"),
        ("```Python\na\n```", ("python",), "a\n"),
        ("```\nb\n```", ("python",), "b\n"),
        ("```c\nb\n```", ("python",), None),
        ("````python\n```\na\n````", ("python",), "```\na\n"),
        ("```python\nnever closed", ("python",), None),
        ("```python\n```", ("python",), ""),
        ("none", (), None),
    ],
)
def test_code_block(text, languages, block):
    assert last_code_block(text, languages) == block
