"""Problems from rows of data sets, in the shapes that these have in common use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_TEXTS = ("prompt", "question", "problem")
_TESTS = ("tests", "test_cases", "input_output", "verification_info")


def problem_of_row(row: Mapping[str, Any], most: int) -> tuple[str, str, list[dict[str, Any]]]:
    """(statement, function, tests) of a row; function "" = programs that read and print.

    The statement is the string `prompt`, `question` or `problem`. The tests, perhaps as a string
    of JSON, are

    - a list of {"input", "output"} under `tests` or `test_cases` (also inside `verification_info`),
      each perhaps with a `fn_name`, or
    - {"inputs": [...], "outputs": [...], "fn_name": ...} under `tests` or `input_output`, or in the
      row itself.

    With a `fn_name`, an input is the list of arguments, and an output that is a list of one element
    is also met by that element. Without, lists are lines.
    most: how many tests are kept, the first ones; 0 = all. ValueError for another shape.
    """
    statement = next((row[k] for k in _TEXTS if row.get(k)), None)
    if not isinstance(statement, str):
        raise ValueError(f"no text under any of {', '.join(_TEXTS)}")
    found: Any = next((row[k] for k in _TESTS if row.get(k)), row)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise ValueError(f"its tests are not JSON: {error}") from None
    function = row.get("fn_name")
    if isinstance(found, Mapping) and "test_cases" in found:
        found = found["test_cases"]
    if isinstance(found, Mapping):
        function = found.get("fn_name") or function
        pairs = _zipped(found)
    elif isinstance(found, Sequence):
        pairs = []
        for i, test in enumerate(found):
            if not isinstance(test, Mapping) or not {"input", "output"} <= test.keys():
                raise ValueError(f"test {i} has no input and output: {str(test)[:100]}")
            function = test.get("fn_name") or function
            pairs.append((test["input"], test["output"]))
    else:
        raise ValueError(f"its tests are a {type(found).__name__}")
    if not pairs:
        raise ValueError("it has no tests")
    kept = pairs[:most] if most else pairs
    make = _of_function if function else _of_program
    return statement, str(function or ""), [make(i, *pair) for i, pair in enumerate(kept)]


def _zipped(found: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    inputs, outputs = found.get("inputs"), found.get("outputs")
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence):
        raise ValueError(f"no tests under any of {', '.join(_TESTS)}, and no inputs and outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    return list(zip(inputs, outputs, strict=True))


def _of_program(i: int, given: Any, output: Any) -> dict[str, Any]:
    lines = []
    for what in (given, output):
        if isinstance(what, Sequence) and not isinstance(what, str):
            what = "\n".join(map(str, what)) + "\n"
        if not isinstance(what, str):
            raise ValueError(f"test {i}: expected text or lines, got {type(what).__name__}")
        lines.append(what)
    return {"input": lines[0], "output": lines[1]}


def _of_function(i: int, given: Any, output: Any) -> dict[str, Any]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"test {i}: the input {str(given)[:100]!r} is no list of arguments")
    single = isinstance(output, Sequence) and not isinstance(output, str) and len(output) == 1
    try:
        json.dumps([list(given), output])
    except (TypeError, ValueError) as error:
        raise ValueError(f"test {i}: not JSON values: {error}") from None
    return {"input": list(given), "output": output, **({"single": True} if single else {})}
