"Faults of the lowest floor: values without a canonical form, moments outside the calendar, settings that say nothing usable"

import pytest

from retrain_nb.digest import canonical, digest_code
from retrain_nb.records import DataError


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
