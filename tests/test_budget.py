"What a reader of `14b_budget` should not see: known answers, sums over every row, odd records; error rates are in `test_error_rates`"
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from time import process_time

import numpy as np
import pytest

from retrain_nb.records import INSUFFICIENT, PASS, DataError, SettingsError, as_json, from_json
from retrain_nb.stages.budget import Budget, Holdout, Ladder, Use, budget_left, climb, level, lond_share, rotated, spent
from retrain_nb.windows import iso

ANSWERS = Path(__file__).parent/"known_answers"
FIRST = datetime(2013, 1, 1, tzinfo=UTC)
ROWS = Holdout(digest="rows")


def span(start, days, digest=""): return Holdout(start=iso(FIRST + timedelta(days=start)), end=iso(FIRST + timedelta(days=start + days)), digest=digest)


def use(name, holdout=ROWS, alpha=0.001, shipped=False): return Use(decision=str(name), holdout=holdout, alpha=alpha, shipped=shipped)


def test_lond_gives_the_published_levels():
    known = json.loads((ANSWERS/"online_fdr.json").read_text())
    budget, levels, rejected = Budget(rule="lond", alpha=0.05), [], []
    for i, p in enumerate(known["p"]):
        levels.append(level(budget, ROWS))
        rejected.append(int(p <= levels[-1]))
        budget = budget.after(use(i, alpha=levels[-1], shipped=bool(rejected[-1])))
    assert levels == pytest.approx(known["lond"]["alphai_published"], abs=6e-11)
    assert levels == pytest.approx(known["lond"]["alphai"], rel=2e-9)
    assert rejected == known["lond"]["R"]


@pytest.mark.parametrize("step, name", [(None, "free"), (0.05, "fixed_eta_0_05")])
def test_the_ladder_gives_the_known_trace(step, name):
    known = json.loads((ANSWERS/"ladder.json").read_text())
    losses = [(np.array(s) != np.array(known["y"])).astype(float) for s in known["submissions"]]
    shown = [ladder.shown for ladder in accumulate(losses, climb, initial=Ladder(step=step))][1:]
    assert shown == pytest.approx([t[name] for t in known["trace"]], abs=1e-12)
    assert [x.mean() for x in losses] == pytest.approx([t["holdout_loss"] for t in known["trace"]], abs=1e-12)


def test_shares_of_lond_never_sum_to_more_than_all():
    assert sum(map(lond_share, range(1, 200_000))) < 1


# --- Sums over every row ---

@pytest.mark.parametrize("rule", ["spending", "lond"])
def test_no_row_ever_decides_for_more_than_alpha(rule):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        budget, paid, decided = Budget(rule=rule, alpha=0.05, decisions=int(rng.integers(1, 6)), least=1e-6), np.zeros(140), 0
        for i in range(40):
            start, days = int(rng.integers(0, 110)), int(rng.integers(1, 30))
            rows = span(start, days)
            ships = sum(u.shipped for u in budget.uses if u.holdout.shares(rows))
            alpha = level(budget, rows)
            if not alpha:
                assert budget_left(budget, rows).outcome == INSUFFICIENT
                continue
            decided += 1
            paid[start:start + days] += alpha/(1 + ships if rule == "lond" else 1)
            budget = budget.after(use(i, rows, alpha, bool(rng.random() < 0.2) if rule == "lond" else False))
        assert decided > 5 and paid.max() <= 0.05*(1 + 1e-9)


def test_what_is_spent_is_the_sum_over_the_row_that_decided_most():
    rng = np.random.default_rng(0)
    for _ in range(50):
        uses = [(int(rng.integers(0, 40)), int(rng.integers(1, 15)), float(rng.uniform(1e-4, 1e-2))) for _ in range(12)]
        budget, start, days = Budget(uses=tuple(use(i, span(s, d), a) for i, (s, d, a) in enumerate(uses))), int(rng.integers(0, 40)), int(rng.integers(1, 15))
        slow = max(sum(a for s, d, a in uses if s <= t < s + d) for t in range(start, start + days))
        assert spent(budget, span(start, days)) == pytest.approx(slow, rel=1e-12)


def test_rotation_keeps_the_newest_rows_that_can_decide_and_all_of_them():
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(80):
        budget = Budget(decisions=2, uses=tuple(use(i, span(int(rng.integers(0, 40)), int(rng.integers(1, 15))), 0.025) for i in range(10)))
        start, days = int(rng.integers(0, 40)), int(rng.integers(2, 15))
        slow = next((s for s in range(start, start + days) if level(budget, span(s, start + days - s)) > 0), None)
        rest = rotated(budget, span(start, days))
        assert (rest and rest.start) == (None if slow is None else span(slow, 1).start)
        found += slow not in (None, start)
    assert found > 5


def test_what_is_advised_helps():
    budget = Budget(decisions=2, uses=(use(1, span(0, 14), 0.025), use(2, span(7, 14), 0.025), use(3, span(7, 14), 0.025)))
    told = budget_left(budget, span(10, 14)).reason
    assert "begin the test rows at 2013-01-22, which leaves 3 of 14 days" in told and "up to 2013-02-05" in told
    assert level(budget, span(21, 3)) > 0 and level(budget, span(21, 14)) > 0 and not level(budget, span(20, 14))
    assert "that no decision has looked at" in budget_left(Budget(decisions=1, uses=(use(1, alpha=0.05),)), ROWS).reason


def test_advice_that_would_not_help_is_not_given():
    told = budget_left(Budget(decisions=1, uses=(use(1, alpha=0.05),)), span(0, 7)).reason
    assert "record its start and end" in told and "wait" not in told


def test_ten_years_of_daily_decisions_are_told_in_no_time():
    budget = Budget(decisions=5000, scope="life", least=1e-7, uses=tuple(use(i, span(i, 14), 1e-6) for i in range(3650)))
    start = process_time()
    assert level(budget, span(3650, 14)) > 0 and level(replace(budget, scope="rows"), span(3650, 14)) > 0
    assert process_time() - start < 2


# --- What counts as the same rows ---

@pytest.mark.parametrize("one, other, same", [
    (span(0, 7), span(7, 7), False), (span(0, 7), span(6, 7), True), (span(0, 7, "a"), span(0, 7, "b"), True), # A corrected snapshot holds the same rows
    (Holdout(digest="a"), Holdout(digest="b"), False), (Holdout(digest="a"), Holdout(digest="a"), True),
    (span(0, 7, "a"), span(20, 7, "a"), True), (Holdout(digest="a"), span(0, 7), True), (Holdout(digest="a"), span(0, 7, "b"), False)])
def test_rows_are_shared_unless_it_is_known_that_they_are_not(one, other, same):
    assert one.shares(other) == other.shares(one) == same
    assert (spent(Budget(uses=(use(1, one, 0.01),)), other) > 0) == same


def test_a_life_counts_decisions_on_whatever_rows():
    budget = Budget(decisions=3, scope="life")
    for week in range(3):
        rows = span(7*week, 7)
        assert level(budget, rows) == pytest.approx(0.05/3)
        budget = budget.after(use(week, rows, level(budget, rows)))
    assert budget_left(budget, span(100, 7)).outcome == INSUFFICIENT
    assert budget_left(Budget(decisions=3, uses=budget.uses), span(100, 7)).outcome == PASS


def test_the_last_share_is_not_lost_to_rounding():
    for decisions in (3, 7, 49, 52, 365):
        budget = Budget(decisions=decisions)
        for i in range(decisions): budget = budget.after(use(i, alpha=level(budget, ROWS)))
        assert all(u.alpha == pytest.approx(0.05/decisions) for u in budget.uses) and not level(budget, ROWS)


def test_a_level_that_was_too_high_is_paid_by_those_who_come_after():
    assert level(Budget(uses=(use(1, alpha=0.0495),)), ROWS) == pytest.approx(0.0005)
    assert level(Budget(rule="lond", uses=(use(1, alpha=0.05, shipped=True),)), ROWS) == 0 # All of it, though it shipped
    assert level(Budget(rule="lond", uses=(use(1, alpha=0.2, shipped=True),)), ROWS) == 0


def test_the_budget_is_what_the_records_say_in_any_form():
    budget = Budget(decisions=4, uses=(use(1, span(0, 7)), use(2, span(3, 7), shipped=True)))
    again = Budget(decisions=4, uses=from_json(tuple[Use, ...], json.loads(json.dumps(as_json(budget.uses)))))
    assert again == budget and budget_left(again, span(1, 3)) == budget_left(budget, span(1, 3))
    assert Budget(decisions=4, uses=[*budget.uses, *budget.uses]) == budget # Told twice, counted once


# --- Odd input ---

@pytest.mark.parametrize("make, error, says", [
    (lambda: Holdout(), DataError, "are not told"), (lambda: Holdout(start="2013-01-01"), DataError, "are not told"),
    (lambda: Holdout(end="2013-01-01", digest="a"), DataError, "are not told"), (lambda: use(1, alpha=0.0), DataError, "at level 0.0"),
    (lambda: use(1, alpha=1.0), DataError, "at level 1.0"), (lambda: Budget(alpha=0.5), SettingsError, "alpha 0.5"),
    (lambda: Budget(alpha=float("nan")), SettingsError, "alpha nan"), (lambda: Budget(rule="hope"), SettingsError, "rule 'hope'"),
    (lambda: Budget(scope="week"), SettingsError, "scope 'week'"), (lambda: Budget(least=0.01), SettingsError, "least 0.01"),
    (lambda: Budget(uses=(use(1), use(1, shipped=True))), DataError, "told in two ways"),
    (lambda: Holdout(start="2013-01-02", end="2013-01-01"), SettingsError, "holds no time")])
def test_odd_records_are_refused_by_name(make, error, says):
    with pytest.raises(error, match=says): make()


@pytest.mark.parametrize("losses, says", [([], "missing or infinite"), ([0.1, np.nan], "missing or infinite"), ([np.inf, 0], "missing or infinite")])
def test_the_ladder_shows_nothing_of_a_model_that_is_not_sane(losses, says):
    with pytest.raises(DataError, match=says): climb(Ladder(), np.array(losses))


def test_the_ladder_follows_a_true_gain_and_not_noise():
    rng = np.random.default_rng(0)
    base = rng.normal(0.6, 0.3, 4000)
    held = climb(Ladder(), base)
    climbed = sum(climb(held, base + rng.normal(0, 0.3, 4000)) is not held for _ in range(400))
    assert climbed <= 0.159*400 + 3*(0.159*0.841*400)**0.5 # One standard error: one in six of equal models
    assert all(climb(held, base + rng.normal(-0.03, 0.3, 4000)).shown < held.shown for _ in range(100))
