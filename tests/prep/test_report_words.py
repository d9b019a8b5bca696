"""The report's percentages and judgements, by themselves."""

import pytest

from prep.inspect.checks import check_rejected
from prep.inspect.stats import Rejection, Summary
from shared.sanitize import visible
from shared.wording import percent


@pytest.mark.parametrize(
    ("part", "whole", "wanted"),
    [
        (0, 5, "0%"),
        (5, 5, "100%"),
        (1, 10**6, "<0.1%"),
        (99_999, 100_000, ">99.9%"),
        (1, 8, "12.5%"),
    ],
)
def test_shares_never_hide_a_rest(part, whole, wanted):
    assert percent(part, whole) == wanted


def test_visible_cuts_before_it_spells_out():
    assert visible("a\tb\nc") == "a b c"
    assert visible("x" * 500, 10) == "x" * 9 + "…"
    assert visible("\u2066a\u0000") == "[U+2066]a[U+0000]"


@pytest.mark.parametrize(
    ("rejected", "level", "told"),
    [
        ({"where": 90}, "good", "Every row that the filters leave is in the cache. The filters"),
        ({"where": 80, "smaller than --min-size": 8, "no caption": 1}, "look", "1 of 12 rows (8.3"),
        ({"no caption": 60, "where": 10}, "bad", "60 of 90 rows (66.7%), mostly for: no caption."),
    ],
)
def test_what_a_filter_rejects_is_no_damage(rejected, level, told):
    reasons = [Rejection(reason, count) for reason, count in rejected.items()]
    written = 100 - sum(rejected.values())
    summary = Summary("", "", {}, {}, read=100, written=written, rejected=reasons)
    check = check_rejected(summary)
    assert check.level == level
    assert told in check.detail
