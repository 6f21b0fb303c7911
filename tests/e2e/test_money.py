"""Money and limits hold: the trials of soak_money.py at a size for every day, and that their oracle finds what it is for."""

import asyncio
import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import trials
from demand import Answer, Ask, all_at_once
from harness import Stack
from money import (Books, Party, all_findings, exact_findings, exact_limiter, least_within, mean_in_flight, most_in_flight, most_within, nanodollars,
                   sample_findings, usd, window_start)


def passes(trial):
    """A trial without findings; what it saw stands in the output of `pytest -s`."""
    print("\n" + trial.row())
    assert not trial.findings, "\n".join([trial.row(), *trial.findings[:40]])


@pytest.fixture
def own():
    """A system for one trial: what the organisation has spent is that trial's alone."""
    with Stack(concurrency=2, admit_timeout_ms=8000) as stack:
        yield stack


# --- the trials, small -----------------------------------------------------------------------------------------------------


def test_a_crowd_on_one_key_stays_within_its_cap(own):
    passes(trials.crowd(own, requests=500, at_once=100))


def test_caps_of_keys_teams_and_the_organisation_hold_together(own):
    passes(trials.multitude(own, keys=24, each=25, teams=4, per_second=200, answer_ms=1000))


def test_caps_hold_however_requests_end(own):
    passes(trials.mixed(own, keys=4, seconds=8, clients=30, cap="0.006"))


def test_no_money_is_left_while_there_is_demand(own):
    passes(trials.no_needless_refusal(own, requests=150, clients=12, seconds=20, beyond=3.0))


def test_parallel_requests_share_what_is_left(own):
    passes(trials.fair_clamps(own))


def test_the_retry_after_of_reserved_money_is_right(own):
    passes(trials.honest_retry_after(own, rounds=2, answer_s=2.0))


def kill_envoy(world, request):
    """Leaves holds behind, which expire after a long time."""
    def kill(stack):
        time.sleep(0.5)
        stack.envoy.kill()
        stack.spawn_envoy()

    with ThreadPoolExecutor(1) as laying:
        load = laying.submit(lambda: asyncio.run(all_at_once(world.stack.listen_port, [request] * 6, 6)))
        kill(world.stack)
        load.result()


def restart(world, _):
    world.rest()
    world.stack.service.terminate()
    world.stack.start_service()


@pytest.mark.parametrize("meanwhile", [
    kill_envoy,
    restart,
])
def test_the_retry_after_stays_right(meanwhile):
    with Stack(concurrency=2, hold_ttl=12, admit_timeout_ms=8000) as stack:
        passes(trials.honest_retry_after(stack, rounds=1, answer_s=3.0, meanwhile=meanwhile))


def test_the_retry_after_stays_right_when_the_clock_is_stepped(tmp_path):
    clock = trials.Clock(tmp_path)

    def step(world, request):
        with ThreadPoolExecutor(1) as laying:
            load = laying.submit(lambda: asyncio.run(all_at_once(world.stack.listen_port, [request], 1)))
            time.sleep(0.5)
            clock.step(3600)
            load.result()

    with Stack(concurrency=2, service_env=clock.env()) as stack:
        passes(trials.honest_retry_after(stack, rounds=1, answer_s=1.5, meanwhile=step))


def test_rates_are_never_exceeded(own):
    passes(trials.rates(own))


def test_quotas_are_exact(own):
    passes(trials.quotas(own))


def test_a_shadow_key_is_recorded_and_never_refused(own):
    passes(trials.shadow(own))


def test_a_provider_that_breaks_its_word_freezes_the_key(own):
    passes(trials.runaway(own))


def test_a_stepped_clock_frees_nothing():
    passes(trials.clock_steps(requests=40, clients=4, seconds=6.0))


def test_each_window_is_new_once_whatever_the_clock_does():
    passes(trials.midnights(requests=25, clients=4, seconds=6.0))


def test_caps_hold_through_kills():
    passes(trials.kills(times=5, clients=30, hold_ttl=8))


def test_a_cap_that_does_not_hold_is_found_out(own):
    """The same trial on a key whose cap is taken away behind its back: the trial must fail, in the sample and in the books."""
    trial = trials.crowd(own, requests=300, at_once=50, meanwhile=lambda key: own.admin("PATCH", f"/v1/keys/{key}", {"budgets": []}))
    for told in ("was charged", "reserved", "300 of 300 were served"):
        assert any(told in finding for finding in trial.findings), (told, trial.findings)


# --- the oracle itself -------------------------------------------------------------------------------------------------------

NOON = 1_794_916_800_000


def entry(event, req, seconds=0.0, **more):
    return {"event": event, "req": req, "time_ms": NOON + int(seconds * 1000), **more}


def call(req, key, cost, seconds=0.1, **more):
    return {"seq": 1, "client_request_id": f"req_{req}", "tag": key, "cost_nanodollars": cost, "started_unix_us": int((NOON / 1000 + seconds) * 1e6), **more}


def figure(spent, reserved=0, in_flight=0, start=NOON - 43_200_000):
    window = {"window": "day", "start": start, "spent_nanodollars": spent, "reserved_nanodollars": reserved}
    return {"spent_nanodollars": spent, "reserved_nanodollars": reserved, "in_flight": in_flight, "status": "active", "windows": [window]}


def answer(key, req, status=200, reason=None):
    headers = {"x-keyward-request-id": f"req_{req}", **({"x-keyward-reason": reason} if reason else {})}
    return Answer(Ask((key, "vk_")), 0.0, 1.0, status, headers)


def honest():
    """Books in which all is right: two keys of a team, three requests and a refusal."""
    parties = [Party("key", "a", {"total": 100, "day": 100}, frozenset("a")), Party("key", "b", {"total": 100}, frozenset("b")),
               Party("team", "t", {"day": 170}, frozenset("ab"))]
    chains = {
        "a": [entry("ADMITTED", "1"), entry("ADMITTED", "2", 1), entry("SETTLED", "1", 2, charge=60), entry("REFUSED", "4", 3, code="cap_exhausted"),
              entry("EXPIRED", "2", 4, charge=40)],
        "b": [entry("ADMITTED", "3", 1), entry("SETTLED", "3", 5, charge=70), entry("ADMITTED", "5", 6), entry("VOIDED", "5", 7)],
    }
    calls = [call("1", "a", 60), call("2", "a", 30, 1.1), call("3", "b", 70, 1.1)]
    figures = {("key", "a"): figure(100), ("key", "b"): figure(70), ("team", "t"): figure(170)}
    answers = [answer("a", "1"), answer("a", "2"), answer("b", "3"), answer("a", "4", 429, "cap_exhausted")]
    return Books(parties, chains, calls, figures, answers)


def test_honest_books_have_no_findings():
    assert all_findings(honest()) == []


def lower(party, window, cap):
    def forge(books):
        books.parties = [Party(p.kind, p.name, {**p.caps, window: cap} if str(p) == party else p.caps, p.keys) for p in books.parties]
    return forge


FORGED = [
    ("a key's cap is a nanodollar less", lower("key a", "total", 99), "key a: was charged 100 of 99 in the total"),
    ("a team's cap is a nanodollar less", lower("team t", "day", 169), "team t: was charged 170 of 169 in the day"),
    ("the provider charged more than the cap", lambda books: books.calls[2].update(cost_nanodollars=101), "key b: really cost 101 of 100"),
    ("a request cost more than it was charged", lambda books: books.calls[0].update(cost_nanodollars=61), "1 cost 61 and was charged 60"),
    ("a second try cost as well", lambda books: books.calls.append(call("1", "a", 1)), "1 cost 61 and was charged 60"),
    ("a charge is not in the sum", lambda books: books.figures["key", "b"].update(figure(69)), "key b: shows 69 spent, its chains say 70"),
    ("something stays reserved", lambda books: books.figures["team", "t"].update(figure(170, 1)), "team t: 1 stays reserved"),
    ("something stays in flight", lambda books: books.figures["key", "a"].update(figure(100, 0, 1)), "key a: 1 in flight at rest"),
    ("a key was frozen", lambda books: books.figures["key", "a"].update(status="frozen"), "key a is frozen"),
    ("a request never ended", lambda books: books.chains["a"].pop(), "a: 2 ended as []"),
    ("a request ended twice", lambda books: books.chains["a"].append(entry("SETTLED", "2", 5, charge=40)), "a: 2 ended as ['EXPIRED', 'SETTLED']"),
    ("a request ended and never began", lambda books: books.chains["b"].pop(2), "b: 5 ended and was never admitted"),
    ("a request was admitted twice", lambda books: books.chains["b"].insert(0, entry("ADMITTED", "3")), "b: 3 was admitted 2 times"),
    ("nobody admitted a request", lambda books: books.calls.append(call("9", "a", 0)), "(9) reached the provider and is in no chain"),
    ("a request was written down late", lambda books: books.calls[0].update(started_unix_us=(NOON - 1) * 1000), "reached the provider before it was admitted"),
    ("a request is in another key's chain", lambda books: books.calls[2].update(tag="a"), "for a is in the chain of b"),
    ("the provider saw what was voided", lambda books: books.calls.append(call("5", "b", 0, 6.1)), "5 was voided and the provider saw it"),
    ("a refusal has another reason", lambda books: books.answers.append(answer("a", "4", 503, "policy_unavailable")), "4 was refused as policy_unavailable"),
    ("a refusal was not written down", lambda books: books.chains["a"].pop(3), "the refusal of 4 as cap_exhausted is not in its chain"),
    ("an answer was never admitted", lambda books: books.answers.append(answer("a", "8")), "8 was answered with 200 and not admitted"),
    ("a client got no answer", lambda books: books.answers.append(Answer(Ask(("a", "vk_")), 0.0, error="reset")), "a: no answer: reset"),
]


@pytest.mark.parametrize(("forge", "told"), [pytest.param(forge, told, id=what.replace(" ", "-")) for what, forge, told in FORGED])
def test_forged_books_are_found_out(forge, told):
    books = copy.deepcopy(honest())
    forge(books)
    found = all_findings(books)
    assert any(told in finding for finding in found), found


def test_a_charge_that_is_not_the_cost_is_found_out():
    """Only where every answer comes to its end: honest books may charge more than a cut stream has cost."""
    books = honest()
    assert list(exact_findings(books)) == ["2 cost 30 and was charged 40, not the same"]
    books.calls[1]["cost_nanodollars"] = 40
    assert list(exact_findings(books)) == []
    books.calls.append(call("9", "a", 1))
    assert list(exact_findings(books)) == ["9 cost 1 and was charged 0, not the same"]


def test_a_late_settlement_is_one_only_where_it_is_expected():
    books = honest()
    books.chains["a"].append(entry("SETTLED", "2", 5, charge=30))
    books.figures["key", "a"], books.figures["team", "t"] = figure(90), figure(160)
    assert all_findings(books, once=False) == []
    books.chains["a"].append(entry("SETTLED", "2", 6, charge=30))
    assert any("2 ended as" in finding for finding in all_findings(books, once=False))


def test_windows_that_go_back_give_nothing_back():
    """Spent before midnight, after it, and again on a clock that was put back: the last belongs to the later day."""
    def books(*days):
        chain = [entry("ADMITTED", str(n), day * 86_400) for n, day in enumerate(days)] + [entry("SETTLED", str(n), 0, charge=60) for n in range(len(days))]
        return Books([Party("key", "a", {"day": 60}, frozenset("a"))], {"a": chain}, [call(str(n), "a", 60, n) for n in range(len(days))],
                     {("key", "a"): figure(60 * len(days))})

    assert all_findings(books(0, 1), clock_is_true=False) == []
    assert any("really cost 120 of 60 in the day" in finding for finding in all_findings(books(0, 1, 0), clock_is_true=False))


@pytest.mark.parametrize(("true", "shown", "told"), [
    ({"a": 100}, figure(60, 40, 1), None),
    ({"a": 101}, figure(60, 41, 1), "really cost 101 of 100 a day"),
    ({"a": 10}, figure(60, 41, 1), "spent 60 + reserved 41 > 100 a day"),
    ({"a": 100}, figure(60, 39, 1), "the provider charged 100, spent 60 + reserved 39 is less"),
    ({}, figure(-1, 5), "a negative figure"),
    ({}, {**figure(0), "windows": []}, "shows no day window"),
])
def test_a_wrong_moment_is_seen(true, shown, told):
    party = Party("key", "a", {"day": 100}, frozenset("a"))
    found = list(sample_findings([party], true, {("key", "a"): shown}, {}))
    assert any(told in finding for finding in found) if told else found == [], found


def test_a_new_window_has_its_own_cost():
    party, starts = Party("key", "a", {"day": 100}, frozenset("a")), {}
    assert list(sample_findings([party], {"a": 90}, {("key", "a"): {"windows": figure(90)["windows"]}}, starts)) == []
    tomorrow = {"windows": figure(50, start=NOON + 43_200_000)["windows"]}
    assert list(sample_findings([party], {"a": 140}, {("key", "a"): tomorrow}, starts)) == []


def test_rates_are_counted_over_every_window():
    events = [(0, 1), (10, 2), (59_999, 4), (60_000, 8), (60_010, 16)]
    assert most_within(events, 60_000) == 28, "a request leaves the window sixty seconds after it came"
    assert least_within([(0, 1), (30_000, 1), (60_000, 1), (90_000, 1)], 60_000, 0, 120_000) == 2
    assert least_within([(0, 1), (30_000, 1), (61_000, 1), (90_000, 1)], 60_000, 0, 120_000) == 1
    assert least_within([(0, 1)], 60_000, 0, 59_999) is None
    assert exact_limiter([0, 10, 20, 59_999, 60_000, 60_009, 60_010], 2, 60_000) == [0, 10, 60_000, 60_010]
    chain = [entry("ADMITTED", "1", 0), entry("ADMITTED", "2", 1), entry("SETTLED", "1", 2), entry("ADMITTED", "3", 2), entry("VOIDED", "3", 4),
             entry("EXPIRED", "2", 4)]
    assert most_in_flight(chain) == 2
    assert mean_in_flight(chain, NOON, NOON + 4000) == 1.75


def test_windows_begin_at_midnight_utc():
    last_of_march = 1_806_537_599_999
    assert window_start("day", last_of_march) == 1_806_451_200_000 and window_start("day", last_of_march + 1) == last_of_march + 1
    assert window_start("month", last_of_march) == 1_803_859_200_000 and window_start("month", last_of_march + 1) == last_of_march + 1
    assert window_start("total", last_of_march) == 0
    assert (nanodollars("0.000000001"), usd(25_000_000_001)) == (1, "25.000000001")
