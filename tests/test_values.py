"Faults of the lowest floor: values without a canonical form, moments outside the calendar, settings that say nothing usable"

import pytest

from retrain_nb.digest import canonical, digest_code
from retrain_nb.records import DataError, SettingsError, UsageError
from retrain_nb.settings import parse_settings
from retrain_nb.windows import parse_time


def nested(depth):
    value = []
    for _ in range(depth): value = [value]
    return value


ROUND: list = []
ROUND.append(ROUND)


@pytest.mark.parametrize("value", ["\ud800", {"\ud800": 1}, nested(100_000), ROUND, {1: 2}, b"x", 2**53, float("inf")], ids=lambda v: type(v).__name__)
def test_what_has_no_canonical_form_is_refused_in_words(value):
    with pytest.raises(DataError, match="no canonical JSON"): canonical(value)


def late(frame, *, limit=3):
    "Is left out"
    kept = [x for x in frame if x > limit]
    return f"{kept!r:>10}" + str(None)[1:2]


def test_code_has_the_same_digest_in_every_python():
    # 3.12 and 3.13 each changed what `ast.dump` writes; this digest was computed in 3.11, 3.12 and 3.13
    assert digest_code(late) == "f8703e4a54e1697f6ef33a1e7b18f7c9749a3f0f91732ba2f93b81bf945c8a24"


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:00:00-05:00", "yesterday", ""])
def test_what_is_no_moment_in_utc_is_refused(text):
    with pytest.raises(UsageError, match="is not a moment in time"): parse_time(text)


@pytest.mark.parametrize(("line", "where"), [
    ("margins = log_loss nan", r"\[gates\] margins.log_loss"), ("margins = log_loss inf", r"\[gates\] margins.log_loss"),
    ("margins = log_loss 0.01, auc 0.01, log_loss 5", r"\[gates\] margins.*there twice: log_loss"), ("min_gain = inf", r"\[gates\] min_gain"),
    ("[run]\ntimeout_minutes = inf", r"\[run\] timeout_minutes"), ("[trainer]\nparams = learning_rate nan", r"\[trainer\] params.learning_rate"),
    ("[window]\nholdout_days = 1e9", r"\[window\] holdout_days"), ("[window]\ndays = inf", r"\[window\] days")])
def test_a_number_that_no_run_can_use_is_refused_where_it_stands(line, where, small_settings):
    text = small_settings.replace("margins = log_loss 0.01, auc 0.01", line) if line.startswith("margins") else small_settings + line
    with pytest.raises(SettingsError, match=where): parse_settings(text)


@pytest.mark.parametrize("mark", [" # ", " ; ", "  # ", "\t#"])
def test_a_comment_may_stand_behind_a_value_or_where_none_is_given(mark, small_settings):
    settings = parse_settings(small_settings.replace("name = flights", f"name = flights{mark}of 2013").replace("[source]", f"artifacts ={mark}a folder\n[source]"))
    assert (settings.workbench.name, settings.workbench.artifacts) == ("flights", "")
    assert parse_settings(small_settings.replace("name = flights", "name = C#;1")).workbench.name == "C#;1"
