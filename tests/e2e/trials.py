"""The money trials: each makes a world, lays demand on it, and gives what it found wrong with the figures it saw.

test_money.py runs them small, soak_money.py at full size. A trial bounds itself in requests and in time.
"""

import asyncio
import datetime
import itertools
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from demand import Ask, all_at_once, ask, patient
from harness import Stack
from money import (LIMITS, MINUTE_MS, Books, Sampler, World, all_findings, exact_limiter, few, least_within, mean_in_flight, most_in_flight,
                   most_within, req_of, usd)


# Refusals that say nothing about limits: the service was not there in time.
OVERLOADED = frozenset(("policy_unavailable",))


@dataclass
class Trial:
    """What came of one: findings say what is wrong, figures what was seen."""

    name: str
    findings: list = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    def expect(self, right, what):
        if not right:
            self.findings.append(what)

    def expect_few_overloaded(self, answers):
        """A busy machine may keep the service from answering in time; that must stay an exception."""
        overloaded = sum(answer.reason in OVERLOADED for answer in answers)
        self.figures["overloaded"] = overloaded
        self.expect(overloaded * 100 <= len(answers), f"{overloaded} of {len(answers)} were refused because the service did not answer in time")

    def row(self):
        seen = "  ".join(f"{name} {value}" for name, value in self.figures.items())
        return f"{'ok' if not self.findings else 'FAILED':<7}{self.name:<34}{seen}"

    def close(self, world, sampler, answers, **checks):
        """Takes the books and runs every check on them; gives the books."""
        books = Books.of(world, answers)
        self.findings += all_findings(books, **checks)
        if sampler is not None:
            self.findings += sampler.findings
            self.expect(sampler.samples >= 5, f"only {sampler.samples} samples were taken")
            self.figures |= {"samples": sampler.samples, "peak in flight": sampler.peak}
        violations = world.stack.sim.totals()["violations"]
        self.findings += [f"the simulator complains: {what}" for what in violations[:5]]
        served = sum(answer.status == 200 for answer in answers)
        self.figures |= {"asked": len(answers), "served": served}
        return books


def shares(books, kind):
    """How much of their caps the parties of a kind have really used, in percent: the least, over all windows."""
    found = [100 * books.true_of(party) / cap for party in books.parties if party.kind == kind for cap in party.caps.values()]
    return f"{min(found):.1f}-{max(found):.1f} %" if found else "none"


def price_of(world, what):
    """What a request like this one really costs, in nanodollars, and the hold that Keyward has for it; by a key without limits."""
    key = world.key()
    answer = asyncio.run(ask(world.stack.listen_port, Ask(**{**what, "key": key})))
    assert answer.status == 200, answer
    world.rest()
    hold = next(entry["hold"] for entry in world.stack.audit(key[0]) if entry["event"] == "ADMITTED")
    return next(call["cost_nanodollars"] for call in world.stack.sim.ledger() if call["tag"] == key[0]), hold


# --- caps under concurrency ------------------------------------------------------------------------------------------------


def crowd(stack, requests=2000, at_once=200, meanwhile=None):
    """One key, a cap for about half of what is asked. meanwhile: what else is done to the key, by its id."""
    trial, world = Trial("one key, a crowd"), World(stack)
    what = {"directive": "tokens=60 first_ms=100", "max_tokens": 100}
    each, _ = price_of(world, what)
    key = world.key({"total": usd(each * requests // 2)})
    with Sampler(world, 0.05) as sampler:
        if meanwhile is not None:
            meanwhile(key[0])
        answers = asyncio.run(all_at_once(stack.listen_port, (Ask(key, **what) for _ in range(requests)), at_once))
        books = trial.close(world, sampler, answers)
    trial.figures["of the cap"] = shares(books, "key")
    trial.expect(0 < trial.figures["served"] < requests, f"{trial.figures['served']} of {requests} were served")
    return trial


def multitude(stack, keys=200, each=50, teams=20, per_second=600, answer_ms=6000):
    """Many keys in teams, each with many requests at once; caps of some keys, of half of the teams and of the organisation bite."""
    trial, world = Trial("keys, teams, organisation"), World(stack)
    what = {"directive": f"tokens=60 first_ms={answer_ms}", "max_tokens": 80}
    cost, _ = price_of(world, {**what, "directive": "tokens=60"})
    # Each kind of party by another window: all of them hold at once.
    world.organisation({"month": usd(cost * keys * each * 55 // 100)})
    for n in range(teams):
        world.team(f"team-{n}", {"day": usd(cost * keys // teams * each * (3 if n % 2 else 20) // 10)})
    made = [world.key({"total": usd(cost * each * (4 if n % 4 == 0 else 20) // 10)}, team=f"team-{n % teams}") for n in range(keys)]

    async def arrive():
        tasks = []
        begun = time.monotonic()
        for n, (_, key) in enumerate(itertools.product(range(each), made)):
            await asyncio.sleep(max(0.0, begun + n / per_second - time.monotonic()))
            tasks.append(asyncio.create_task(ask(stack.listen_port, Ask(key, **what), 60 + answer_ms / 1000)))
        return await asyncio.gather(*tasks)

    with Sampler(world, 0.3) as sampler:
        answers = asyncio.run(arrive())
        books = trial.close(world, sampler, answers, allowed=LIMITS | OVERLOADED)
    trial.expect_few_overloaded(answers)
    trial.figures |= {kind: shares(books, kind) for kind in ("key", "team", "organisation")}
    reasons = {answer.reason for answer in answers if answer.status != 200}
    trial.expect(reasons & {"cap_reserved", "cap_exhausted"}, f"no cap did bite: {reasons}")
    return trial


def mixture(key, n):
    """The nth request of a mixture in which everything ends in its own way."""
    streamed = {"stream": True, "more": {"stream_options": {"include_usage": True}}}
    kinds = [
        {"directive": "tokens=30", "max_tokens": 100},
        {"directive": "tokens=60 per_delta=5 pace_ms=10", "max_tokens": 200, **streamed},
        {"directive": "tokens=60 per_delta=1 pace_ms=4", "max_tokens": 200, "stream": True},
        # Clients that leave: in the middle of a stream, before the headers, and while they ask.
        {"directive": "tokens=90 per_delta=3 pace_ms=30", "max_tokens": 300, "leave_bytes": 600, **streamed},
        {"directive": "tokens=90 per_delta=7 pace_ms=30", "max_tokens": 300, "stream": True, "leave": 0.15},
        {"directive": "tokens=40 first_ms=400", "max_tokens": 80, "leave": 0.1},
        {"directive": "tokens=40 first_ms=300", "leave": 0.002},
        # Providers that break off.
        {"directive": "tokens=80 per_delta=4 pace_ms=5 cut_after_bytes=1500", "max_tokens": 200, "stream": True},
        {"directive": "tokens=80 per_delta=4 pace_ms=5 reset_after_bytes=900", "max_tokens": 200, **streamed},
        {"directive": "tokens=80 cut_after_bytes=100", "max_tokens": 200},
        {"directive": "tokens=80 pace_ms=5 error_midstream=1", "max_tokens": 200, "stream": True},
        {"directive": "tokens=30 no_usage=1", "max_tokens": 60, "stream": True},
        {"directive": "tokens=30 no_usage=1", "max_tokens": 60},
        {"directive": "tokens=25", "max_tokens": 80, "n": 3},
        {"directive": "tokens=25 pace_ms=5", "max_tokens": 80, "n": 3, **streamed},
        # No limit of the caller's own.
        {"directive": "tokens=50"},
        {"directive": "tokens=50 pace_ms=5", "stream": True},
        {"model": "claude-haiku-4-5", "directive": "tokens=30", "max_tokens": 200},
        {"model": "claude-haiku-4-5", "directive": "tokens=60 pace_ms=10 per_delta=4", "stream": True, "max_tokens": 200},
        {"model": "claude-haiku-4-5", "directive": "tokens=60 pace_ms=20", "stream": True, "max_tokens": 200, "leave": 0.12},
        # Output that nobody sees.
        {"model": "o4-mini", "directive": "tokens=20 reasoning=150", "max_tokens": 400},
        {"model": "o4-mini", "directive": "tokens=30 reasoning=100 pace_ms=20", "max_tokens": 400, "stream": True, "leave": 0.1},
        {"model": "gpt-5-mini", "directive": "tokens=30 reasoning=100 cut_after_bytes=700", "max_tokens": 400, "stream": True},
        {"model": "text-embedding-3-small", "directive": "tokens=1", "pad": 200},
        {"directive": "tokens=30 unicode=1 split=7", "max_tokens": 200, "stream": True},
        {"directive": "tokens=9", "max_tokens": 50, "pad": 4000},
        # The first requires a longer wait than clients of the kind have.
        {"directive": "tokens=20 silent_ms=500", "max_tokens": 60, "leave": 0.2},
    ]
    return Ask(key, **kinds[n % len(kinds)])


# A mixed client may be told these as well; the last when a provider breaks off before it says anything.
MIXED = frozenset(LIMITS | {"provider_unreachable"})


def mixed(stack, keys=10, seconds=40, clients=60, cap="0.004"):
    """All kinds of ends at once, on keys of two teams whose caps bite."""
    trial, world = Trial("all kinds of ends"), World(stack)
    for n, dollars in enumerate(("1.00", usd(int(float(cap) * keys * 0.3 * 1e9)))):
        world.team(f"team-{n}", {"total": dollars})
    made = [world.key({"total": cap, "day": "1.00"}, team=f"team-{n % 2}") for n in range(keys)]
    answers, over = [], time.monotonic() + seconds

    async def lay():
        def asks(client):
            # Clients start at different places of the mixture, and each key meets every kind.
            return (mixture(made[(client + turn) % keys], client * 5 + turn) for turn in itertools.count())
        await asyncio.gather(*(patient(stack.listen_port, asks(n), lambda: over, answers.append, longest=0.3) for n in range(clients)))

    with Sampler(world) as sampler:
        asyncio.run(lay())
        books = trial.close(world, sampler, answers, allowed=MIXED)
    ends = {call["ended"] for call in books.calls}
    trial.figures |= {"left by client": sum(answer.left for answer in answers), "broken by provider": sum(call["ended"] == "fault" for call in books.calls),
                      "key": shares(books, "key"), "team": shares(books, "team")}
    trial.expect({"complete", "client_gone", "fault"} <= ends, f"the simulator saw only {ends}")
    trial.expect(any(answer.reason in LIMITS for answer in answers), "no cap did bite")
    return trial


# --- no needless refusal ---------------------------------------------------------------------------------------------------


def no_needless_refusal(stack, requests=400, clients=24, seconds=40, beyond=6.0):
    """Holds of several times the cost, demand that goes on for a while after the first refusal: the caps must be used."""
    trial, world = Trial("no needless refusal"), World(stack)
    what = {"directive": "tokens=100 first_ms=150", "max_tokens": 600}
    each, hold = price_of(world, what)
    trial.figures["hold/cost"] = f"{hold / each:.1f}"
    trial.expect(hold >= 4 * each, f"the hold {hold} is less than 4 times the cost {each}: the trial proves nothing")
    world.team("shared", {"total": usd(each * requests)})
    alone = world.key({"total": usd(each * requests)})
    mates = [world.key({"total": usd(each * requests)}, team="shared") for _ in range(4)]
    answers, latest = [], time.monotonic() + seconds
    ends = {}

    def until(party):
        """A fixed time after the first refusal that the party met."""
        return lambda: min(latest, ends.get(party, latest))

    async def client(key, party):
        def took(answer):
            answers.append(answer)
            if answer.status != 200:
                ends.setdefault(party, time.monotonic() + beyond)

        await patient(stack.listen_port, itertools.repeat(Ask(key, **what)), until(party), took)

    async def lay():
        await asyncio.gather(*(client(alone, "alone") for _ in range(clients)), *(client(mates[n % 4], "shared") for n in range(clients)))

    with Sampler(world) as sampler:
        asyncio.run(lay())
        books = trial.close(world, sampler, answers)
    for party in books.parties:
        if party.name in (alone[0], "shared"):
            used = 100 * books.true_of(party) / party.caps["total"]
            trial.figures["key used" if party.kind == "key" else "team used"] = f"{used:.2f} %"
            trial.expect(used >= 95, f"{party}: only {used:.2f} % of the cap is used, and there was demand for {beyond} s after the first refusal")
    trial.expect(len(ends) == 2, f"the demand ended before a cap was met: {list(ends)}")
    return trial


def fair_clamps(stack, at_once=32, dollars="25.00", model="claude-opus-4-6", max_tokens=64_000):
    """$25 left, $25 per million output tokens, 32 parallel requests for 64k each: all are served, none with crumbs."""
    trial, world = Trial("32 requests share $25"), World(stack)
    key = world.key({"total": dollars})
    what = Ask(key, "tokens=20 first_ms=2500", model, max_tokens)
    with Sampler(world, 0.05) as sampler:
        answers = asyncio.run(all_at_once(stack.listen_port, [what] * at_once, at_once))
        trial.close(world, sampler, answers)
    limits = sorted(answer.output_limit for answer in answers if answer.status == 200)
    refused = [answer.reason for answer in answers if answer.status != 200]
    trial.figures |= {"refused": len(refused), "least limit": limits[0], "largest": limits[-1], "ratio": f"{limits[0] / limits[-1]:.2f}"}
    trial.expect(not refused, f"{len(refused)} of {at_once} were refused: {set(refused)}")
    trial.expect(limits[0] * 4 >= limits[-1], f"the smallest clamp {limits[0]} is less than a quarter of the largest {limits[-1]}")
    trial.expect(sampler.peak == at_once, f"only {sampler.peak} were in flight together")
    return trial


def honest_retry_after(stack, rounds=4, answer_s=3.0, meanwhile=None):
    """After a history of requests of some seconds: who is refused as cap_reserved and waits as told, gets through. meanwhile: what
    happens after that history, given the World and a request of the key as an Ask."""
    trial, world = Trial("retry-after of cap_reserved"), World(stack)
    what = {"directive": f"tokens=20 first_ms={int(answer_s * 1000)}", "max_tokens": 40, "pad": 20_000}
    # Takes as long as all of them: whose history the service goes by is its own affair.
    each, hold = price_of(world, what)
    key = world.key({"total": usd(10 * hold + 6 * each)})
    port, told, right = stack.listen_port, [], 0
    answers = asyncio.run(all_at_once(port, [Ask(key, **what)] * 6, 3))
    if meanwhile is not None:
        meanwhile(world, Ask(key, **what))
    for n in range(rounds):
        world.rest()
        # Room for three holds and a half: the fourth request has to wait for the first to end.
        cap = stack.key(key[0])["spent_nanodollars"] + 3 * hold + hold // 2
        stack.admin("PATCH", f"/v1/keys/{key[0]}", {"budgets": [{"usd": usd(cap), "window": "total"}]})
        world.caps[key[0]] = {"total": usd(cap)}
        # From asking when all three have just begun to asking when the first is nearly through.
        spread = answer_s * (0.1 + 0.7 * n / max(1, rounds - 1)) / 3

        async def meet(spread=spread):
            running = []
            for _ in range(3):
                running.append(asyncio.create_task(ask(port, Ask(key, **what))))
                await asyncio.sleep(spread)
            refused = await ask(port, Ask(key, **what))
            again = None
            # A wait that is always long enough because it is always a minute is no answer, and is not waited for.
            if refused.retry_after is not None and refused.retry_after <= answer_s + 2:
                await asyncio.sleep(refused.retry_after - (time.time() - refused.ended))
                again = await ask(port, Ask(key, **what))
            return refused, again, await asyncio.gather(*running)

        refused, again, others = asyncio.run(meet())
        answers += [refused, *others, *([again] if again else [])]
        trial.expect(refused.reason == "cap_reserved", f"round {n}: the fourth request was answered {refused.status} {refused.reason}")
        told.append(refused.retry_after)
        served = again is not None and again.status == 200
        right += served
        trial.expect(served, f"round {n}: told to wait {refused.retry_after} s, then {again and (again.status, again.reason)}")
    trial.close(world, None, answers, clock_is_true=meanwhile is None)
    trial.figures |= {"told": told, "right": f"{right} of {rounds}"}
    return trial


# --- rates and quotas --------------------------------------------------------------------------------------------------------


def rates(stack, seconds=6.0, rpm=60, tpm=12_000, in_flight=8, rps=None, slow_ms=400):
    """Each rate with more demand than it allows, for so long. Only over more than a minute can it be seen that the allowed is
    also given."""
    trial, world = Trial("rpm, tpm, in flight"), World(stack)
    each = {"directive": "tokens=100", "max_tokens": 150}
    by_requests = world.key(rates={"rpm": rpm})
    by_tokens = world.key(rates={"tpm": tpm})
    by_flight = world.key(rates={"max_in_flight": in_flight})
    answers, begun = [], time.monotonic()
    over = begun + seconds
    rps = rps or 3 * rpm / min(seconds, 60)

    async def steadily(key, what, per_second):
        """Open loop: refused or not, the next request comes when it is due."""
        tasks, n = [], 0
        while time.monotonic() < over:
            tasks.append(asyncio.create_task(ask(stack.listen_port, Ask(key, **what))))
            n += 1
            await asyncio.sleep(max(0.0, begun + n / per_second - time.monotonic()))
        answers.extend(await asyncio.gather(*tasks))

    async def eagerly(key, what):
        while time.monotonic() < over:
            answer = await ask(stack.listen_port, Ask(key, **what))
            answers.append(answer)
            if answer.status != 200:
                await asyncio.sleep(0.02)

    async def lay():
        slow = {"directive": f"tokens=10 first_ms={slow_ms}", "max_tokens": 50}
        await asyncio.gather(steadily(by_requests, {"directive": "tokens=5", "max_tokens": 20}, rps), steadily(by_tokens, each, rps),
                             *(eagerly(by_flight, slow) for _ in range(in_flight * 3)))

    began_ms = int(time.time() * 1000)
    asyncio.run(lay())
    ended_ms = int(time.time() * 1000)
    books = trial.close(world, None, answers)
    for limit, check in ((rpm, requests_findings), (tpm, tokens_findings)):
        trial.findings += check(trial, books, (by_requests if limit == rpm else by_tokens)[0], limit, began_ms, ended_ms)
    trial.findings += flight_findings(trial, books, by_flight[0], in_flight, began_ms, ended_ms)
    for answer in answers:
        if answer.reason in ("rate_limited", "concurrency_limited") and not 0 < (answer.retry_after or 0) <= 60:
            trial.expect(False, f"{answer.reason} with retry-after {answer.headers.get('retry-after')}")
            break
    return trial


def requests_findings(trial, books, key, rpm, began_ms, ended_ms):
    admitted = [(entry["time_ms"], 1) for entry in books.chains[key] if entry["event"] == "ADMITTED"]
    most = most_within(admitted, MINUTE_MS)
    least = least_within(admitted, MINUTE_MS, began_ms + MINUTE_MS, ended_ms)
    # What the demand would have got of a limiter without any error: demand that comes in bursts leaves gaps of its own.
    ideal = [(at, 1) for at in exact_limiter([int(answer.began * 1000) for answer in books.answers if answer.key_id == key], rpm, MINUTE_MS)]
    best = least_within(ideal, MINUTE_MS, began_ms + MINUTE_MS, ended_ms)
    trial.figures["rpm"] = f"{least if least is not None else '-'}..{most} of {rpm}" + (f" (exactly {best})" if best is not None else "")
    if most > rpm:
        yield f"{most} requests were admitted within a minute, {rpm} are allowed"
    if most < rpm:
        yield f"only {most} of {rpm} requests were admitted in any minute"
    if least is not None and least < best * 0.98:
        yield f"in one minute of demand only {least} of {rpm} requests were admitted, an exact limiter would have admitted {best}"


def tokens_findings(trial, books, key, tpm, began_ms, ended_ms):
    """By the simulator's own count, at the times of admission; and at its own times, less the way from one to the other."""
    admitted = books.admitted_ms()
    calls = [call for call in books.calls if call["tag"] == key]
    used = [(admitted[req_of(call)], call["prompt_tokens"] + call["completion_tokens"]) for call in calls]
    most, least = most_within(used, MINUTE_MS), least_within(used, MINUTE_MS, began_ms + MINUTE_MS, ended_ms)
    slack = max(call["started_unix_us"] // 1000 - admitted[req_of(call)] for call in calls)
    seen = most_within([(call["started_unix_us"] // 1000, tokens) for call, (_, tokens) in zip(calls, used)], MINUTE_MS - slack)
    trial.figures["tpm"] = f"{least if least is not None else '-'}..{most} of {tpm}"
    if max(most, seen) > tpm:
        yield f"{most} tokens were used within a minute, {seen} by the provider's clock, {tpm} are allowed"
    if most < tpm * 0.8:
        yield f"only {most} of {tpm} tokens were used in any minute"
    if least is not None and least < tpm * 0.8:
        yield f"in one minute of demand only {least} of {tpm} tokens were used"


def flight_findings(trial, books, key, limit, began_ms, ended_ms):
    most = most_in_flight(books.chains[key])
    # The first second fills it, the last one drains it.
    mean = mean_in_flight(books.chains[key], began_ms + 1000, ended_ms - 1000)
    seen = [call for call in books.calls if call["tag"] == key and call["ended"] == "complete"]
    running = sorted([(call["started_unix_us"], 1) for call in seen] + [(call["ended_unix_us"], -1) for call in seen])
    at_once = max(itertools.accumulate(step for _, step in running))
    within = [max(0, min(call["ended_unix_us"], (ended_ms - 1000) * 1000) - max(call["started_unix_us"], (began_ms + 1000) * 1000)) for call in seen]
    by_provider = sum(within) / 1000 / (ended_ms - began_ms - 2000)
    trial.figures["in flight"] = f"mean {mean:.2f}, most {most} of {limit}; provider: mean {by_provider:.2f}, most {at_once}"
    if max(most, at_once) > limit:
        yield f"{most} requests were in flight at once by the chain, {at_once} by the provider, {limit} are allowed"
    # A free place is taken at the next try: over short times that gap is seen.
    if ended_ms - began_ms > MINUTE_MS and mean < limit * 0.98:
        yield f"{mean:.2f} requests were in flight on average, {limit} are allowed and there was demand"


def quotas(stack, requests=25, tokens=6_000):
    """Quotas are exact under concurrency: so many requests, and never more tokens."""
    trial, world = Trial("quotas"), World(stack)
    what = {"directive": "tokens=60 first_ms=50", "max_tokens": 100}
    counted = world.key(quotas=[{"requests": requests, "window": "day"}])
    weighed = world.key(quotas=[{"tokens": tokens, "window": "total"}])
    asks = [Ask(key, **what) for _ in range(requests * 4) for key in (counted, weighed)]
    answers = asyncio.run(all_at_once(stack.listen_port, asks, 30))
    # Tokens that were held at their bound and not used are free again.
    world.rest()
    answers += asyncio.run(all_at_once(stack.listen_port, [Ask(weighed, **what)] * requests * 2, 3))
    books = trial.close(world, None, answers)
    served = sum(answer.status == 200 and answer.key_id == counted[0] for answer in answers)
    used = sum(call["prompt_tokens"] + call["completion_tokens"] for call in books.calls if call["tag"] == weighed[0])
    trial.figures |= {"requests": f"{served} of {requests}", "tokens": f"{used} of {tokens}"}
    trial.expect(served == requests, f"{served} requests were served, the quota is {requests}")
    trial.expect(tokens * 0.8 <= used <= tokens, f"{used} tokens were used, the quota is {tokens}")
    return trial


# --- shadow, and a provider that breaks its word ----------------------------------------------------------------------------


def shadow(stack, requests=60):
    """Everything of a shadow key is recorded, and nothing is refused or cut."""
    trial, world = Trial("shadow"), World(stack)
    key = world.key(enforce="shadow", budgets=[{"usd": "0.00001", "window": "day"}], quotas=[{"requests": 1, "tokens": 10, "window": "total"}],
                    rates={"rpm": 1, "tpm": 10, "max_in_flight": 1})
    asks = [Ask(key, "tokens=50 first_ms=50", max_tokens=200 if n % 2 else None) for n in range(requests)]
    answers = asyncio.run(all_at_once(stack.listen_port, asks, 20))
    # Shadow is the stated exception to the cap: the World was not told of it, so that only the books are checked.
    books = trial.close(world, None, answers)
    figure = books.figures["key", key[0]]
    true = sum(books.costs().values())
    trial.expect(trial.figures["served"] == requests, f"{trial.figures['served']} of {requests} were served")
    trial.expect(len(books.calls) == requests, f"the provider saw {len(books.calls)} of {requests}")
    trial.expect(figure["spent_nanodollars"] == true, f"really cost {true}, recorded {figure['spent_nanodollars']}")
    would = {entry["req"] for entry in books.chains[key[0]] if entry["event"] == "WOULD_REFUSE"}
    trial.expect(len(would) == requests, f"{len(would)} of {requests} are written down as refused but for the shadow")
    clamped = {answer.headers.get("x-keyward-max-tokens") for answer in answers} - {None}
    trial.expect(not clamped, f"answers of a shadow key were clamped: {clamped}")
    trial.figures |= {"would be refused": len(would), "refused": requests - trial.figures["served"], "recorded of true cost": f"{100 * figure['spent_nanodollars'] / max(1, true):.1f} %"}
    return trial


def runaway(stack):
    """A provider that goes on beyond its limit: all of it is charged, the key is frozen, and no more goes out."""
    trial, world = Trial("a provider breaks its word"), World(stack)
    answers = []
    for stream in (False, True):
        key = world.key({"total": "1.00"})
        what = Ask(key, "tokens=4000 per_delta=40 pace_ms=2 runaway=1", max_tokens=100, stream=stream, more={"stream_options": {"include_usage": True}} if stream else {})
        answers.append(asyncio.run(ask(stack.listen_port, what)))
        world.rest()
        spent, true = stack.key(key[0])["spent_nanodollars"], sum(call["cost_nanodollars"] for call in stack.sim.ledger() if call["tag"] == key[0])
        name = "streamed" if stream else "buffered"
        trial.expect(spent >= true, f"{name}: cost {true}, charged {spent}")
        status = stack.key(key[0])["status"]
        trial.figures[name] = f"charged {spent} of {true}, {status}"
        hold = next(entry["hold"] for entry in stack.audit(key[0]) if entry["event"] == "ADMITTED")
        trial.expect(true <= hold or status == "frozen", f"{name}: cost {true}, held {hold}, and the key is {status}")
        before = stack.last_seq()
        again = asyncio.run(ask(stack.listen_port, Ask(key)))
        trial.expect(status != "frozen" or (again.status != 200 and stack.last_seq() == before), f"{name}: a frozen key was served: {again.status}")
    trial.figures["asked"] = len(answers) * 2
    return trial


# --- kills -------------------------------------------------------------------------------------------------------------------


def kills(times=5, keys=8, clients=50, hold_ttl=12, seed=None):
    """The service or Envoy is killed at random moments, under mixed load whose caps bite."""
    seed = seed if seed is not None else random.randrange(1 << 32)
    chance = random.Random(seed)
    trial = Trial("kill -9")
    trial.figures["seed"] = seed
    with Stack(concurrency=2, hold_ttl=hold_ttl) as stack:
        world = World(stack)
        world.team("tight", {"total": usd(times * 4_000_000)})
        world.team("wide", {"total": "5.00"})
        made = [world.key({"total": usd(times * (2_000_000 if n % 4 < 2 else 50_000_000))}, team="tight" if n % 2 else "wide") for n in range(keys)]
        answers, over = [], threading.Event()
        killed = {"service": 0, "envoy": 0}

        async def client(n):
            for turn in itertools.count():
                if over.is_set():
                    return
                answer = await ask(stack.listen_port, mixture(made[(n + turn) % keys], n * 5 + turn), 30)
                answers.append(answer)
                if answer.status != 200 and not answer.left:
                    await asyncio.sleep(0.1)

        def kill_some():
            for _ in range(times):
                time.sleep(chance.uniform(0.2, 1.2))
                part = chance.choice(("service", "envoy"))
                killed[part] += 1
                if part == "service":
                    stack.service.kill()
                    time.sleep(chance.uniform(0.0, 0.5))
                    stack.start_service()
                else:
                    stack.envoy.kill()
                    stack.spawn_envoy()
            time.sleep(1.0)

        async def lay():
            await asyncio.gather(*(client(n) for n in range(clients)))

        # The clients have a thread of their own, and the killing this one: restarts keep nobody from asking.
        with Sampler(world) as sampler, ThreadPoolExecutor(1) as laying:
            load = laying.submit(asyncio.run, lay())
            try:
                kill_some()
            finally:
                over.set()
            load.result()
            trial.findings += broken_findings(answers)
            answered = [answer for answer in answers if answer.status is not None]
            # What an Envoy that is gone had in flight is charged when its hold expires.
            books = Books.of(world, answered, hold_ttl + 60)
            trial.findings += [*all_findings(books, once=False, allowed=MIXED | OVERLOADED), *sampler.findings]
        expired = sum(entry["event"] == "EXPIRED" for chain in books.chains.values() for entry in chain)
        trial.figures |= {**killed, "asked": len(answers), "served": sum(answer.status == 200 for answer in answers), "holds expired": expired,
                          "samples": sampler.samples, "key": shares(books, "key"), "team": shares(books, "team")}
        trial.expect(stack.sim.totals()["violations"] == [], "the simulator complains")
        trial.expect(sampler.samples > times, f"only {sampler.samples} samples")
    return trial


def broken_findings(answers):
    """A client may be cut off by a kill; nobody may hang."""
    hung = [answer for answer in answers if answer.error and "Timeout" in answer.error]
    return few(f"{answer.key_id}: no answer within 30 s" for answer in hung)


# --- clocks --------------------------------------------------------------------------------------------------------------------


class Clock:
    """The wall clock of a service alone, to be stepped."""

    def __init__(self, directory):
        """Raises CalledProcessError if the machine has no C compiler."""
        self.library, self.file = directory / "clock.so", directory / "clock"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(self.library), str(Path(__file__).with_name("clock.c"))], check=True)
        self.file.write_bytes(struct.pack("=q", 0))

    def env(self):
        return {"LD_PRELOAD": str(self.library), "TEST_CLOCK": str(self.file)}

    def set(self, unix):
        """The clock says `unix` from now on, and runs. Written in place: the service has the file mapped."""
        with open(self.file, "r+b") as file:
            file.write(struct.pack("=q", int(unix - time.time())))

    def step(self, seconds):
        with open(self.file, "r+b") as file:
            offset = struct.unpack("=q", file.read(8))[0]
            file.seek(0)
            file.write(struct.pack("=q", offset + seconds))


def unix(*date):
    return int(datetime.datetime(*date, tzinfo=datetime.UTC).timestamp())


class Clocked:
    """A trial on a service with a clock of its own, that starts at a date; keys for each window, and patient clients for each."""

    def __init__(self, name, date, requests, clients):
        self.trial, self.requests, self.clients, self.answers = Trial(name), requests, clients, []
        self.directory = Path(tempfile.mkdtemp(prefix="keyward-clock-"))
        self.clock = Clock(self.directory)
        self.clock.set(unix(*date))
        self.stack = Stack(concurrency=2, service_env=self.clock.env(), admit_timeout_ms=8000)

    def __enter__(self):
        self.stack.__enter__()
        try:
            self.world = World(self.stack)
            self.what = {"directive": "tokens=60 first_ms=100", "max_tokens": 250}
            self.each, _ = price_of(self.world, self.what)
            cap = usd(self.each * self.requests)
            self.world.team("daily", {"day": cap})
            self.keys = {window: self.world.key({window: cap}) for window in ("day", "month", "total")}
            self.keys["team's day"] = self.world.key(team="daily")
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *why):
        self.stack.__exit__(*why)
        shutil.rmtree(self.directory, ignore_errors=True)

    def demand(self, seconds, *steps):
        """Demand on every key for so long; steps: (second, by how much the clock is stepped then)."""
        begun = time.monotonic()

        async def stepping():
            for at, by in steps:
                await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
                self.clock.step(by)

        async def lay():
            asks = [itertools.repeat(Ask(key, **self.what)) for key in self.keys.values() for _ in range(self.clients)]
            clients = (patient(self.stack.listen_port, one, lambda: begun + seconds, self.answers.append, longest=0.3) for one in asks)
            await asyncio.gather(stepping(), *clients)

        asyncio.run(lay())
        self.world.rest()

    def used(self):
        """How many caps' worth each key has really cost."""
        tags = self.stack.sim.get("/control/tags")["tags"]
        return {name: tags.get(key[0], {"cost_nanodollars": 0})["cost_nanodollars"] / (self.each * self.requests) for name, key in self.keys.items()}

    def expect_used(self, when, **expected):
        """What each key must have used by now, in caps: at most that, and at least a tenth less than it."""
        used = self.used()
        for name, caps in expected.items():
            name = name.replace("team", "team's day")
            self.trial.expect(caps * 0.9 <= used[name] <= caps, f"{when}: the {name} cap was used {used[name]:.3f} times, not {caps}")
        self.trial.figures[when] = "/".join(f"{used[name]:.2f}" for name in self.keys)


def clock_steps(requests=60, clients=6, seconds=8.0, hour=3600):
    """The clock goes an hour on and back while requests are in flight: that frees nothing."""
    with Clocked("clock +-1 h", (2027, 3, 15, 12, 0), requests, clients) as clocked:
        trial = clocked.trial
        rated = clocked.world.key(rates={"rpm": 20})
        clocked.keys["minute"] = rated
        with Sampler(clocked.world) as sampler:
            clocked.demand(seconds / 2, (0.3, hour), (0.6, -hour), (0.9, -hour), (1.2, hour), (2.0, hour), (2.5, -hour))
            clocked.demand(seconds / 2, (0.5, hour), (1.0, -hour), (1.5, -hour), (2.5, hour))
            clocked.expect_used("caps used", day=1, month=1, total=1, team=1)
            books = trial.close(clocked.world, sampler, clocked.answers, clock_is_true=False)
        calls = [(call["started_unix_us"] // 1000, 1) for call in books.calls if call["tag"] == rated[0]]
        trial.figures["rpm"] = f"{most_within(calls, MINUTE_MS)} of 20"
        trial.expect(most_within(calls, MINUTE_MS) == 20, f"{len(calls)} requests in a minute of the true clock, 20 are allowed")
    return trial


def midnights(requests=40, clients=6, seconds=5.0):
    """The clock goes over the end of a day that is also the end of a month, back, and over it again: each window is new once."""
    with Clocked("clock over midnight, back and forth", (2027, 3, 31, 23, 50), requests, clients) as clocked:
        trial = clocked.trial
        clocked.demand(seconds)
        clocked.expect_used("before", day=1, month=1, total=1, team=1)
        # In the middle of the demand, so that holds are in flight across the step.
        clocked.demand(seconds, (0.5, 1200))
        clocked.expect_used("after", day=2, month=2, total=1, team=2)
        clocked.demand(seconds / 2, (0.3, -1200))
        clocked.expect_used("back", day=2, month=2, total=1, team=2)
        clocked.demand(seconds / 2, (0.3, 1200))
        clocked.expect_used("again", day=2, month=2, total=1, team=2)
        clocked.demand(seconds, (0.3, 86_400))
        clocked.expect_used("next day", day=3, month=2, total=1, team=3)
        trial.close(clocked.world, None, clocked.answers, clock_is_true=False)
    return trial
