"""The outside oracle of the money trials: true costs are the simulator's, and what Keyward says is held against them.

Every check gives findings, sentences that say what is wrong; none means that it holds. They take plain data, so that
test_money.py can show with forged books that each of them finds what it is for.
"""

import collections
import datetime
import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from decimal import Decimal
from urllib.parse import urlsplit

import audit
from harness import wait_for

NANODOLLARS = 1_000_000_000
DAY_MS = 86_400_000
MINUTE_MS = 60_000
ENDS = ("SETTLED", "VOIDED", "EXPIRED")
# What money, quotas and rates may answer.
LIMITS = {"cap_exhausted", "cap_reserved", "quota_exhausted", "rate_limited", "concurrency_limited"}
# A finding that would be told thousands of times is told this often.
TOLD = 20


def nanodollars(usd):
    """Dollars as text, exactly."""
    exact = Decimal(usd) * NANODOLLARS
    assert exact == int(exact), usd
    return int(exact)


def usd(amount):
    """Nanodollars as the API takes dollars."""
    return f"{Decimal(amount) / NANODOLLARS:f}"


def window_start(window, ms):
    """When the window that holds this Unix time began, in Unix milliseconds, UTC."""
    if window == "total":
        return 0
    if window == "day":
        return ms - ms % DAY_MS
    at = datetime.datetime.fromtimestamp(ms // 1000, datetime.UTC)
    return int(at.replace(day=1, hour=0, minute=0, second=0).timestamp()) * 1000


@dataclass(frozen=True)
class Party:
    """Who has caps: a key, a team, the organisation. caps: nanodollars by window; keys: whose costs are its own."""

    kind: str
    name: str
    caps: dict
    keys: frozenset

    def __str__(self):
        return f"{self.kind} {self.name}".strip()


# --- the world of a trial ------------------------------------------------------------------------------------------------


class World:
    """The keys of one trial on a stack, with those who answer for them."""

    def __init__(self, stack):
        self.stack, self.tokens, self.teams, self.caps, self.organisation_caps = stack, {}, {}, {}, {}

    def team(self, name, caps, **spec):
        self.stack.admin("PUT", f"/v1/teams/{name}", {**spec, "budgets": budgets(caps)})
        self.teams[name] = (caps, set())
        return name

    def organisation(self, caps, **spec):
        self.stack.admin("PATCH", "/v1/organisation", {**spec, "budgets": budgets(caps)})
        self.organisation_caps = caps

    def key(self, caps=None, team=None, **spec):
        """A key (id, token); caps: dollars as text by window."""
        if caps:
            spec["budgets"] = budgets(caps)
        if team is not None:
            spec["team"] = team
            key_id, token = self.stack.new_key(**spec)
            self.teams[team][1].add(key_id)
        else:
            key_id, token = self.stack.new_key(**spec)
        self.tokens[key_id], self.caps[key_id] = token, caps or {}
        return key_id, token

    def parties(self):
        def exact(caps):
            return {window: nanodollars(dollars) for window, dollars in caps.items()}

        found = [Party("key", key_id, exact(caps), frozenset([key_id])) for key_id, caps in self.caps.items()]
        found += [Party("team", name, exact(caps), frozenset(keys)) for name, (caps, keys) in self.teams.items()]
        if self.organisation_caps:
            found.append(Party("organisation", "", exact(self.organisation_caps), frozenset(self.tokens)))
        return found

    def figures(self, admin=None):
        """What Keyward says of each party now: {(kind, name): its document}."""
        get = admin or (lambda path: self.stack.admin("GET", path))
        found, cursor = {}, ""
        while cursor is not None:
            page = get(f"/v1/keys?limit=1000{cursor}")
            found |= {("key", key["id"]): key for key in page["data"] if key["id"] in self.tokens}
            cursor = f"&cursor={page['next_cursor']}" if page.get("next_cursor") else None
        found |= {("team", name): get(f"/v1/teams/{name}") for name in self.teams}
        if self.organisation_caps:
            found["organisation", ""] = get("/v1/organisation")
        return found

    def rest(self, timeout=60):
        """Waits until nothing is in flight, on either side."""
        self.stack.sim.quiet()
        wait_for("the keys at rest", lambda: all(figure.get("in_flight", 0) == 0 for figure in self.figures().values()), timeout, 0.1)

    def chains(self):
        return {key_id: audit.verify(self.stack.export(key_id)) for key_id in self.tokens}


def budgets(caps):
    return [{"usd": dollars, "window": window} for window, dollars in caps.items()]


def sums_of(figure):
    """{window: (start, spent, reserved)} of a key, team or organisation, as Keyward shows it."""
    found = {}
    if "spent_nanodollars" in figure:
        found["total"] = (None, figure["spent_nanodollars"], figure["reserved_nanodollars"])
    for window in figure.get("windows") or []:
        found[window["window"]] = (window["start"], window["spent_nanodollars"], window["reserved_nanodollars"])
    return found


# --- while it runs -------------------------------------------------------------------------------------------------------


class Kept:
    """GETs of JSON on one connection that is kept."""

    def __init__(self, base, headers=None):
        self.url, self.headers, self.connection = urlsplit(base), headers or {}, None

    def __call__(self, path):
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=10)
            self.connection.request("GET", path, headers=self.headers)
            answer = self.connection.getresponse()
            data = answer.read()
            if answer.status != 200:
                raise OSError(f"{path}: {answer.status} {data[:200]}")
            return json.loads(data)
        except (OSError, http.client.HTTPException):
            self.connection = None
            raise


def sample_findings(parties, true, figures, starts):
    """What is wrong at one moment. true: nanodollars by key as the provider had them just before Keyward gave its figures;
    starts: the windows that the trial began in, by party and window, filled in by the first sample."""
    for party in parties:
        cost = sum(true.get(key, 0) for key in party.keys)
        sums = sums_of(figures.get((party.kind, party.name), {}))
        for window, cap in party.caps.items():
            if window not in sums:
                yield f"{party} shows no {window} window"
                continue
            start, spent, reserved = sums[window]
            first = starts.setdefault((str(party), window), start) == start
            if first and cost > cap:
                yield f"{party}: really cost {cost} of {cap} a {window}"
            if spent + reserved > cap:
                yield f"{party}: spent {spent} + reserved {reserved} > {cap} a {window}"
            if min(spent, reserved) < 0:
                yield f"{party}: a negative figure, spent {spent}, reserved {reserved}"
        if party.caps and "total" in sums:
            _, spent, reserved = sums["total"]
            # What the provider charged by then had been admitted before, and is held or charged since.
            if cost > spent + reserved:
                yield f"{party}: the provider charged {cost}, spent {spent} + reserved {reserved} is less"


class Sampler:
    """Looks at both books several times a second. bounded: what is held and charged is never less than what it cost, which a
    provider that breaks its word makes untrue."""

    def __init__(self, world, every=0.1):
        self.world, self.every, self.over = world, every, threading.Event()
        self.samples, self.missed, self.findings, self.peak, self.most_used = 0, 0, [], 0, 0
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        provider = Kept(self.world.stack.sim.control)
        keyward = Kept(self.world.stack.admin_base, {"authorization": f"Bearer {self.world.stack.admin_token}"})
        starts = {}
        while not self.over.is_set():
            begun = time.monotonic()
            try:
                tags = provider("/control/tags")["tags"]
                figures = self.world.figures(keyward)
            except (OSError, http.client.HTTPException, ValueError):
                # The service may have been killed; that is the trial's business.
                self.missed += 1
            else:
                true = {key: tag["cost_nanodollars"] for key, tag in tags.items()}
                for finding in sample_findings(self.world.parties(), true, figures, starts):
                    if finding not in self.findings and len(self.findings) < TOLD:
                        self.findings.append(finding)
                self.peak = max(self.peak, sum(figure["in_flight"] for (kind, _), figure in figures.items() if kind == "key"))
                self.samples += 1
            self.over.wait(max(0.0, self.every - (time.monotonic() - begun)))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join(60)
        assert not self.thread.is_alive(), "the sampler hangs"


# --- when it is over -----------------------------------------------------------------------------------------------------


@dataclass
class Books:
    """Everything that is left behind: the chains, the provider's calls, Keyward's figures, what the clients got."""

    parties: list
    chains: dict
    calls: list
    figures: dict
    answers: list = field(default_factory=list)

    @staticmethod
    def of(world, answers=(), timeout=60):
        """Waits until all is at rest, then takes the books."""
        world.rest(timeout)
        calls = [call for call in world.stack.sim.ledger() if call["tag"] in world.tokens]
        return Books(world.parties(), world.chains(), calls, world.figures(), list(answers))

    def key_of(self):
        """The key of each admitted request."""
        return {entry["req"]: key for key, chain in self.chains.items() for entry in chain if entry["event"] == "ADMITTED"}

    def admitted_ms(self):
        return {entry["req"]: entry["time_ms"] for chain in self.chains.values() for entry in chain if entry["event"] == "ADMITTED"}

    def charges(self):
        """What each request was charged in the end: a late settlement corrects the charge of an expired hold."""
        return {entry["req"]: entry.get("charge", 0) for chain in self.chains.values() for entry in chain if entry["event"] in ENDS}

    def costs(self):
        """What the provider charged for each request, over all of its tries."""
        costs = collections.Counter()
        for call in self.calls:
            costs[req_of(call)] += call["cost_nanodollars"]
        return costs

    def true_of(self, party):
        return sum(call["cost_nanodollars"] for call in self.calls if call["tag"] in party.keys)


def req_of(call):
    return (call["client_request_id"] or "none").removeprefix("req_")


def few(findings):
    """Findings of one check, cut to what a person reads."""
    found = list(findings)
    return found[:TOLD] + ([f"... and {len(found) - TOLD} more of these"] if len(found) > TOLD else [])


def ends_findings(books, once=True):
    """Each admitted request has exactly one end; with once=False an expired hold may be settled late, once."""
    for key, chain in books.chains.items():
        admitted = collections.Counter(entry["req"] for entry in chain if entry["event"] == "ADMITTED")
        ends, refused = collections.defaultdict(list), {entry["req"] for entry in chain if entry["event"] == "REFUSED"}
        for entry in chain:
            if entry["event"] in ENDS:
                ends[entry["req"]].append(entry["event"])
        for req, times in admitted.items():
            allowed = [["SETTLED"], ["VOIDED"], ["EXPIRED"]] + ([] if once else [["EXPIRED", "SETTLED"]])
            if times != 1:
                yield f"{key}: {req} was admitted {times} times"
            if ends[req] not in allowed:
                yield f"{key}: {req} ended as {ends[req]}"
            if req in refused:
                yield f"{key}: {req} was admitted and refused"
        for req in ends.keys() - admitted.keys():
            yield f"{key}: {req} ended and was never admitted"


def provider_findings(books, clock_is_true=True):
    """Nothing reached the provider unadmitted, nor for another key, and each request was charged at least what it cost.
    clock_is_true: both clocks are this machine's."""
    key_of, admitted = books.key_of(), books.admitted_ms()
    voided = {entry["req"] for chain in books.chains.values() for entry in chain if entry["event"] == "VOIDED"}
    for call in books.calls:
        req = req_of(call)
        if req not in key_of:
            yield f"call {call['seq']} ({req}) reached the provider and is in no chain"
        elif key_of[req] != call["tag"]:
            yield f"call {call['seq']} for {call['tag']} is in the chain of {key_of[req]}"
        elif clock_is_true and admitted[req] * 1000 > call["started_unix_us"]:
            yield f"call {call['seq']} ({req}) reached the provider before it was admitted"
        if req in voided:
            yield f"{req} was voided and the provider saw it"
    charges = books.charges()
    for req, cost in books.costs().items():
        if req in charges and charges[req] < cost:
            yield f"{req} cost {cost} and was charged {charges[req]}"


def cap_findings(books, clock_is_true=True):
    """What was really charged in each window, and what Keyward charged to it, is within the cap. A request belongs to the
    window of its admission. On a clock that is stepped windows must not go backwards: a request that is admitted after one of a
    later window belongs to that window."""
    admitted, charges = books.admitted_ms(), books.charges()
    costs, by_arrival = books.costs(), {}
    for call in books.calls:
        by_arrival.setdefault(req_of(call), call["started_unix_us"])
    for party in books.parties:
        # In the order of their admission: that of the chain; over several chains as the provider saw them, whose clock is true.
        mine = [entry["req"] for key in party.keys for entry in books.chains[key] if entry["event"] == "ADMITTED"]
        if len(party.keys) > 1:
            mine.sort(key=lambda req: by_arrival.get(req, 0))
        for window, cap in party.caps.items():
            true, charged, latest = collections.Counter(), collections.Counter(), 0
            for req in mine:
                start = window_start(window, admitted[req])
                latest = start if clock_is_true else max(latest, start)
                true[latest] += costs[req]
                charged[latest] += charges.get(req, 0)
            for start in true:
                if true[start] > cap:
                    yield f"{party}: really cost {true[start]} of {cap} in the {window} of {start}"
                if charged[start] > cap:
                    yield f"{party}: was charged {charged[start]} of {cap} in the {window} of {start}"


def figure_findings(books):
    """At rest Keyward's figures are those of the chains: what was charged is spent, nothing is held."""
    charges, key_of = books.charges(), books.key_of()
    by_key = collections.Counter()
    for req, charge in charges.items():
        by_key[key_of.get(req)] += charge
    for party in books.parties:
        figure = books.figures.get((party.kind, party.name), {})
        charged = sum(by_key[key] for key in party.keys)
        for window, (_, spent, reserved) in sums_of(figure).items():
            if reserved:
                yield f"{party}: {reserved} stays reserved in the {window} window at rest"
            if window == "total" and spent != charged:
                yield f"{party}: shows {spent} spent, its chains say {charged}"
        if figure.get("in_flight"):
            yield f"{party}: {figure['in_flight']} in flight at rest"
        if figure.get("status") not in (None, "active"):
            yield f"{party} is {figure['status']}"


def refusal_findings(books, allowed=frozenset(LIMITS), unrecorded=frozenset(("policy_unavailable", "audit_unavailable"))):
    """Clients were refused for allowed reasons only, and every refusal and every answer is in the chain as the client saw it.
    unrecorded: reasons that the service could not write down."""
    events = {(entry["req"], entry["event"]): entry for chain in books.chains.values() for entry in chain if "req" in entry}
    for answer in books.answers:
        if answer.status is None:
            if not answer.left:
                yield f"{answer.key_id}: no answer: {answer.error}"
        elif answer.reason is not None:
            if answer.reason not in allowed:
                yield f"{answer.key_id}: {answer.req} was refused as {answer.reason}: {answer.body[:200]}"
            elif answer.reason not in unrecorded and events.get((answer.req, "REFUSED"), {}).get("code") != answer.reason:
                yield f"{answer.key_id}: the refusal of {answer.req} as {answer.reason} is not in its chain"
        elif (answer.req, "ADMITTED") not in events:
            yield f"{answer.key_id}: {answer.req} was answered with {answer.status} and not admitted"


def exact_findings(books):
    """Each request was charged what it cost, to the nanodollar: for demand that nobody cuts short."""
    charges, costs = books.charges(), books.costs()
    for req in charges.keys() | costs.keys():
        if charges.get(req, 0) != costs[req]:
            yield f"{req} cost {costs[req]} and was charged {charges.get(req, 0)}, not the same"


def all_findings(books, once=True, clock_is_true=True, allowed=frozenset(LIMITS)):
    """Every check of the books at rest."""
    return [*few(ends_findings(books, once)), *few(provider_findings(books, clock_is_true)), *few(cap_findings(books, clock_is_true)), *few(figure_findings(books)),
            *few(refusal_findings(books, allowed))]


# --- rates ---------------------------------------------------------------------------------------------------------------


def most_within(events, span_ms):
    """The largest sum of weights over any window of this length, both ends exclusive of each other; events: (ms, weight)."""
    events = sorted(events)
    first, total, most = 0, 0, 0
    for at, weight in events:
        total += weight
        while events[first][0] <= at - span_ms:
            total -= events[first][1]
            first += 1
        most = max(most, total)
    return most


def least_within(events, span_ms, begin_ms, end_ms):
    """The smallest sum of weights over the windows of this length that lie between begin and end; None if none does."""
    events, least = sorted(events), None
    # The sum changes where an event enters or leaves, and is least just after one has left.
    starts = [begin_ms, *(at + 1 for at, _ in events if begin_ms <= at + 1 <= end_ms - span_ms)]
    for start in starts:
        if start + span_ms <= end_ms:
            total = sum(weight for at, weight in events if start <= at < start + span_ms)
            least = total if least is None else min(least, total)
    return least


def exact_limiter(asked_ms, limit, span_ms):
    """When requests would be admitted by a limiter that forgets each one to the millisecond, given when they are asked."""
    admitted = collections.deque()
    taken = []
    for at in sorted(asked_ms):
        while admitted and admitted[0] <= at - span_ms:
            admitted.popleft()
        if len(admitted) < limit:
            admitted.append(at)
            taken.append(at)
    return taken


def most_in_flight(chain):
    """The most requests of one key that were admitted and not ended at once, by the order of its chain."""
    running, most = 0, 0
    for entry in chain:
        if entry["event"] == "ADMITTED":
            running += 1
        elif entry["event"] in ENDS:
            running -= 1
        most = max(most, running)
    return most


def mean_in_flight(chain, begin_ms, end_ms):
    """Requests in flight on average between two times, by the times of the chain."""
    area, running, last = 0, 0, begin_ms
    for entry in chain:
        at = min(max(entry["time_ms"], begin_ms), end_ms)
        if entry["event"] in ("ADMITTED", *ENDS):
            area += running * (at - last)
            last = at
            running += 1 if entry["event"] == "ADMITTED" else -1
    return (area + running * (end_ms - last)) / (end_ms - begin_ms)
