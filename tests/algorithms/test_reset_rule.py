import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.algorithms import ResetRule

few = settings(deadline=None, max_examples=60)
FIGURE = st.one_of(st.none(), st.just(math.nan), st.floats(0, 1).map(lambda x: round(x, 2)))
STEPS = st.lists(st.tuples(FIGURE, FIGURE), max_size=40)
RULES = st.builds(
    dict,
    patience=st.integers(0, 3),
    min_delta=st.sampled_from([0.0, 0.05]),
    drop_tol=st.sampled_from([None, 0.0, 0.2]),
    every=st.integers(0, 7),
    kl_spike=st.sampled_from([None, 1.5, 4.0]),
)


def run(rule, validations=(), kls=()):
    """The reasons by step."""
    steps = max(len(validations), len(kls))
    found = {}
    for i in range(steps):
        validation = validations[i] if i < len(validations) else None
        kl = kls[i] if i < len(kls) else None
        if reason := rule.observe(i + 1, validation=validation, kl=kl):
            found[i + 1] = reason
    return found


def test_every():
    assert run(ResetRule(every=3), [None] * 10) == dict.fromkeys((3, 6, 9), "every 3 steps")


def test_patience_counts_evaluations_without_improvement():
    values = [0.40, None, 0.42, 0.42, math.nan, 0.425, None, 0.41, 0.41, 0.43]
    found = run(ResetRule(patience=3, min_delta=0.01), values)
    text = "validation 0.41 has not improved on 0.42 by 0.01 in 3 evaluations"
    assert found == {8: text}  # then .41 is the best, .41 does not improve on it and .43 does
    assert run(ResetRule(patience=2), [0.5, 0.5, 0.5, 0.5, 0.5]).keys() == {3, 5}


def test_improvements_too_small_each_add_up():
    """The mark to beat stays until it is beaten by min_delta, so a slow rise is no stall."""
    assert run(ResetRule(patience=3, min_delta=0.01), [0.4 + 0.006 * i for i in range(30)]) == {}


def test_a_fall():
    found = run(ResetRule(drop_tol=0.05), [0.42, 0.37, 0.36, 0.36, 0.30])
    assert found == {
        3: "validation fell by 0.06 from 0.42",
        5: "validation fell by 0.06 from 0.36",
    }


def test_a_spike_of_the_kl_is_judged_by_the_median_since_the_reset():
    kls = [1.0, 9.0, 1.0, 1.2, 1.0, math.nan, 1.9, 2.3, 9.0, 2.0, 2.0, 2.0, 2.0, 3.9, 4.1]
    found = run(ResetRule(kl_spike=2.0), kls=kls)
    assert found == {
        8: "KL 2.3 above 2 times 1.1, the steps' median",
        15: "KL 4.1 above 2 times 2, the steps' median",
    }
    assert run(ResetRule(kl_spike=2.0), kls=[0.0] * 6 + [5.0]) == {}  # no scale to judge by yet
    # KL that grows as t^2 from a fresh reference stays within 4 times its median.
    assert run(ResetRule(kl_spike=4.0), kls=[t * t for t in range(1, 200)]) == {}


@few
@given(RULES, STEPS)
def test_what_is_off_or_not_a_number_never_resets(options, steps):
    rule = ResetRule(**options)
    nothing = ResetRule()
    for step, (validation, kl) in enumerate(steps, 1):
        assert nothing.observe(step, validation=validation, kl=kl) is None
        best, stalled, kls = rule.best, rule.stalled, list(rule.kls)
        reason = rule.observe(step, validation=None, kl=math.inf)
        if reason is None:
            assert (rule.best, rule.stalled, rule.kls) == (best, stalled, kls)
        else:
            assert reason.startswith("every") and options["every"]


@few
@given(RULES, STEPS)
def test_a_reset_starts_anew_from_the_newest_validation(options, steps):
    rule, newest, last = ResetRule(**options), None, 0
    for step, (validation, kl) in enumerate(steps, 1):
        if validation is not None and not math.isnan(validation):
            newest = validation
        reason = rule.observe(step, validation=validation, kl=kl)
        assert rule.newest == newest
        if reason is not None:
            assert (rule.best, rule.stalled, rule.last_reset, rule.kls) == (newest, 0, step, [])
            last = step
        elif newest is not None:
            assert rule.best >= newest - options["min_delta"] - 1e-12
        assert not options["every"] or step - last < options["every"]
        assert not options["patience"] or rule.stalled < options["patience"]


@few
@given(RULES, STEPS, st.integers(1, 20))
def test_a_resumed_rule_says_the_same(options, steps, cut):
    rule, again = ResetRule(**options), ResetRule(**options)
    for step, (validation, kl) in enumerate(steps, 1):
        if step == cut:
            again.load_state_dict(json.loads(json.dumps(rule.state_dict(), allow_nan=False)))
        reason = rule.observe(step, validation=validation, kl=kl)
        if step >= cut:
            assert again.observe(step, validation=validation, kl=kl) == reason
    if len(steps) >= cut:
        assert again.state_dict() == rule.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": -1}, "patience = -1"),
        ({"patience": 1.5}, "patience = 1.5"),
        ({"every": True}, "every = True"),
        ({"min_delta": -0.1}, "min_delta = -0.1"),
        ({"drop_tol": math.nan}, "drop_tol = nan"),
        ({"kl_spike": 1.0}, "kl_spike = 1.0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ResetRule(**options)
