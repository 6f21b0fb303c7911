"""The rotation trials: a pool of keys, some of which are limited, spent or dead, and what reached the provider all the same.

The simulator's ledger judges: when a key's first bad answer was sent, what came to that key afterwards, and what it all cost.
Each trial gives what it found wrong and the figures it saw. test_rotation.py runs them small, soak_rotation.py at full size.
"""

import asyncio
import collections
import itertools
import json
import random
import statistics
import time

import openai
from bench import cpu_us
from demand import Ask, all_at_once, ask
from harness import wait_for
from money import Books, World, ends_findings, exact_findings, few, figure_findings, provider_findings, req_of
from trials import Trial

# A limit that outlasts every trial.
LONG_MS = 600_000
CLAUDE, GPT = "claude-haiku-4-5", "gpt-4o-mini"
# What takes a key out: the words of a fault, the state that it then stays in, and the first status that says so.
DEATHS = {
    "openai": {
        "rate_limited": ("status=429 retry_after=600", {"limited_for_ms": LONG_MS}, 429),
        "insufficient_quota": ("error=insufficient_quota", {"state": "insufficient_quota"}, 429),
        "unauthorized": ("status=401", {"state": "invalid"}, 401),
        "forbidden": ("status=403", {"state": "forbidden"}, 403),
    },
    "anthropic": {
        "rate_limited": ("status=429 retry_after=600", {"limited_for_ms": LONG_MS}, 429),
        "insufficient_quota": ("error=insufficient_quota", {"state": "insufficient_quota"}, 400),
        "billing": ("status=402", {"state": "insufficient_quota"}, 402),
        "unauthorized": ("status=401", {"state": "invalid"}, 401),
        "forbidden": ("status=403", {"state": "forbidden"}, 403),
    },
}


# --- reading the ledger ----------------------------------------------------------------------------------------------------


def tries_by_req(calls):
    """The calls of each request, in the order in which the provider saw them."""
    tries = collections.defaultdict(list)
    for call in sorted(calls, key=lambda call: call["seq"]):
        tries[req_of(call)].append(call)
    return tries


def too_late(calls, admitted_ms, over_us=None):
    """The calls for which a key was chosen that was known to be out: which Envoy knows, at the latest, when the request that met the key's
    error comes to another. A call's key is chosen after its request asked for admission, and after the answer before. admitted_ms: when
    requests asked; over_us: when the limits were over, at the earliest."""
    known, chosen = {}, {}
    for req, tries in tries_by_req(calls).items():
        chosen[tries[0]["seq"]] = admitted_ms.get(req, 0) * 1000
        for before, after in itertools.pairwise(tries):
            chosen[after["seq"]] = before["answered_unix_us"]
            if before["status"] >= 400:
                known[before["credential"]] = min(after["started_unix_us"], known.get(before["credential"], after["started_unix_us"]))
    return [call for call in calls if chosen[call["seq"]] > known.get(call["credential"], float("inf"))
            and (over_us is None or call["started_unix_us"] < over_us)]


def attempts_of(answer):
    """How many tries Keyward says that it took; one needs not be said."""
    return int(answer.headers.get("x-keyward-attempts", "1"))


def tries_findings(stack, books):
    """The chain has every try that the provider saw, with its credential and status, in order; no key was asked twice for one
    request, and all its tries were the same request."""
    names = {own: name for name, own in stack.credential_ids.items()}
    seen = tries_by_req(books.calls)
    for chain in books.chains.values():
        for entry in chain:
            if entry["event"] != "SETTLED":
                continue
            told = [(names.get(one["credential"], one["credential"]), one["status"]) for one in entry["tries"]]
            true = [(call["credential"], call["status"]) for call in seen[entry["req"]]]
            if told != true:
                yield f"{entry['req']}: its record has the tries {told}, the provider saw {true}"
            if sum(one["ms"] for one in entry["tries"]) > entry["ms"] + len(told):
                yield f"{entry['req']}: its tries took {[one['ms'] for one in entry['tries']]} ms, all of it {entry['ms']} ms"
    for req, calls in seen.items():
        keys = [call["credential"] for call in calls]
        if len(set(keys)) < len(keys):
            yield f"{req}: asked {keys}, one of them twice"
        for what in ("body_sha256", "path", "query", "model", "stream", "idempotency_key", "body_bytes"):
            # A key that the provider does not know is turned away before the body is looked at.
            known = [call for call in calls if what not in ("model", "stream") or call["status"] not in (401, 403)]
            if len({call[what] for call in known}) > 1:
                yield f"{req}: its tries differ in {what}: {[call[what] for call in calls]}"


def answers_findings(books, refusals=frozenset(), statuses=(200,)):
    """Every client was answered whole, by the model it asked for, and told how many tries it took; nothing of the tries that
    failed is in its headers. refusals: reasons that are right as well."""
    tries, ends = tries_by_req(books.calls), {entry["req"]: entry for chain in books.chains.values() for entry in chain if "req" in entry}
    for answer in books.answers:
        calls = tries[answer.req]
        if answer.reason in refusals:
            if answer.req not in ends:
                yield f"{answer.req}: refused as {answer.reason} and in no chain"
            continue
        if answer.status not in statuses or not answer.whole:
            yield f"{answer.key_id}: {answer.req} got {answer.status} {answer.reason or ''} {answer.error or ''} whole={answer.whole} {answer.body[:90]}"
        if answer.status != 200:
            continue
        if not calls or calls[-1]["status"] != 200 or calls[-1]["model"] != answer.ask.model:
            yield f"{answer.req}: answered 200, and the provider saw {[(call['model'], call['status']) for call in calls]}"
        if attempts_of(answer) != len(calls):
            yield f"{answer.req}: told {answer.headers.get('x-keyward-attempts')} attempts, the provider saw {len(calls)}"
        leaked = [name for name in answer.headers if name.startswith(("retry-after", "x-sim-")) or name == "x-should-retry"]
        if leaked:
            yield f"{answer.req}: answered 200 with {leaked}, which belong to a try that failed"
        sent = dict(answer.ask.headers).get("idempotency-key")
        if any(call["idempotency_key"] != sent for call in calls):
            yield f"{answer.req}: sent the idempotency key {sent}, the provider saw {[call['idempotency_key'] for call in calls]}"


def one_by_one_findings(answers, deltas, pace_ms):
    """Streams came as they were paced: in many pieces, the first of them long before the end."""
    for answer in answers:
        if answer.ask.stream and answer.status == 200:
            spread = answer.ended - answer.arrivals[0] if answer.arrivals else 0
            pieces = len({round(at, 3) for at in answer.arrivals})
            if pieces < deltas // 4 or spread < deltas * pace_ms / 1000 / 4:
                yield f"{answer.req}: a stream of {deltas} deltas, {pace_ms} ms apart, came in {pieces} pieces within {spread * 1000:.0f} ms"


def close(trial, world, answers, refusals=frozenset(), statuses=(200,), timeout=60):
    """Takes the books at rest and runs every check on them; gives the books."""
    stack, books = world.stack, Books.of(world, answers, timeout)
    for findings in (ends_findings(books), provider_findings(books), figure_findings(books), exact_findings(books), tries_findings(stack, books),
                     answers_findings(books, refusals, statuses)):
        trial.findings += few(findings)
    trial.findings += [f"the simulator complains: {what}" for what in stack.sim.totals()["violations"][:5]]
    tries = tries_by_req(books.calls)
    rotated = sum(len(calls) > 1 for calls in tries.values())
    trial.figures |= {"asked": len(answers), "served": sum(answer.status == 200 for answer in answers), "rotated": rotated,
                      "most tries": max(map(len, tries.values()), default=0)}
    return books


def first_piece_ms(answer):
    return (answer.arrivals[0] - answer.began) * 1000


def ms(values):
    return f"{statistics.median(values):.1f} ms" if values else "none"


def run(stack, asks, at_once=1, port=None, timeout=60.0):
    return asyncio.run(all_at_once(port or stack.listen_port, asks, at_once, timeout))


def names_of(stack, provider):
    return [credential["id"] for credential in stack.credentials if credential["provider"] == provider]


def provider_of(model):
    return "anthropic" if model.startswith("claude") else "openai"


# --- the trials ------------------------------------------------------------------------------------------------------------


def four_of_five(stack, requests=500, at_once=40, model=GPT):
    """All keys of the pool but one are limited for long; half of the requests are streamed. Everybody is served."""
    trial, world = Trial(f"all but one limited, {model}"), World(stack)
    key, names = world.key(), names_of(stack, provider_of(model))
    deltas, pace_ms = 30, 40
    limited = random.sample(names, len(names) - 1)
    for name in limited:
        stack.sim.patch(name, limited_for_ms=LONG_MS)
    paced = {"directive": f"tokens={deltas} per_delta=1 pace_ms={pace_ms}", "stream": True}
    asks = [Ask(key, model=model, headers=(("idempotency-key", f"once-{n}"),), **(paced if n % 2 else {"directive": "tokens=20"})) for n in range(requests)]
    answers = run(stack, asks, at_once)
    books = close(trial, world, answers)
    trial.findings += few(f"{call['credential']} was asked by call {call['seq']}, long after its 429"
                          for call in too_late(books.calls, books.admitted_ms()))
    trial.expect(any(call["credential"] in limited for call in books.calls), "no limited key was ever asked: nothing was tried")
    tries = tries_by_req(books.calls)
    if stack.rotation == "router":
        trial.findings += few(one_by_one_findings(answers, deltas, pace_ms))
    streams = [answer for answer in answers if answer.ask.stream and answer.arrivals]
    rotated = [first_piece_ms(answer) for answer in streams if len(tries[answer.req]) > 1]
    straight = [first_piece_ms(answer) for answer in streams if len(tries[answer.req]) == 1]
    trial.figures |= {"429s": sum(call["status"] == 429 for call in books.calls), "first piece, rotated": ms(rotated), "not rotated": ms(straight)}
    return trial


def first_token(stack, pairs=20, most_ms=1000, model=GPT):
    """Streams one after the other, every second one rotated once, on an idle machine: how much later its first piece comes."""
    trial, world = Trial("first token of a rotated stream"), World(stack)
    key = world.key()
    what = Ask(key, "tokens=10 per_delta=1 pace_ms=5", model=model, stream=True)
    answers = run(stack, [what] * 5)
    times = {False: [], True: []}
    for n in range(2 * pairs):
        rotates = n % 2 == 1
        if rotates:
            # Out for a moment only, so that no number of pairs empties the pool.
            stack.sim.fault("status=429 no_limit_headers=1 header=retry-after-ms:20", provider=provider_of(model))
        answer = run(stack, [what])[0]
        answers.append(answer)
        if answer.arrivals and attempts_of(answer) == (2 if rotates else 1):
            times[rotates].append(first_piece_ms(answer))
    close(trial, world, answers)
    trial.figures |= {"rotated": ms(times[True]), "not rotated": ms(times[False])}
    trial.expect(all(len(seen) == pairs for seen in times.values()),
                 f"{len(times[True])} streams rotated once, {len(times[False])} not at all, of {pairs} each")
    if all(times.values()):
        delay = statistics.median(times[True]) - statistics.median(times[False])
        trial.figures["delay"] = f"{delay:.1f} ms"
        trial.expect(delay <= most_ms, f"a rotated stream begins {delay:.1f} ms later")
    return trial


def no_hidden_cap(stack, requests=60, model=GPT):
    """One request needs every key of the pool, the last of which serves it; from then on all go there at once."""
    trial, world = Trial(f"a pool of {len(names_of(stack, provider_of(model)))}"), World(stack)
    key, names = world.key(), names_of(stack, provider_of(model))
    stack.sim.fault("status=429 retry_after=600 header=x-sim-limited:1", count=len(names) - 1, provider=provider_of(model))
    answers = run(stack, [Ask(key, model=model, stream=True, headers=(("idempotency-key", "once"),))])
    trial.expect(attempts_of(answers[0]) == len(names), f"told {answers[0].headers.get('x-keyward-attempts')} attempts of {len(names)}")
    answers += run(stack, [Ask(key, model=model, stream=n % 2 == 1) for n in range(requests)], 8)
    books = close(trial, world, answers)
    trial.expect(all(attempts_of(answer) == 1 for answer in answers[1:]), "a later request went to a key that had said that it is out")
    trial.expect(len({call["credential"] for call in books.calls}) == len(names), "not every key was asked")
    return trial


def dies(stack, kind, requests=40, at_once=4, model=GPT):
    """All keys of the pool but one go out as `kind` says, under one request; its client sees nothing of it, and they are not
    asked again."""
    provider = provider_of(model)
    trial, world = Trial(f"{provider}: {kind}"), World(stack)
    key, names = world.key(), names_of(stack, provider)
    words, changes, status = DEATHS[provider][kind]
    stack.sim.fault(f"{words} header=x-sim-limited:1", count=len(names) - 1, provider=provider)
    answers = run(stack, [Ask(key, model=model, headers=(("idempotency-key", "once"),))])
    calls = stack.sim.ledger()
    dead = [call["credential"] for call in calls if call["status"] == status]
    trial.expect(len(set(dead)) == len(names) - 1, f"the first request met {[call['status'] for call in calls]}")
    stack.sim.request("DELETE", "/control/faults")
    for name in dead:
        stack.sim.patch(name, **changes)
    answers += run(stack, [Ask(key, model=model, stream=n % 2 == 1) for n in range(requests)], at_once)
    books = close(trial, world, answers)
    again = [call["credential"] for call in books.calls[len(calls):] if call["credential"] in dead]
    trial.expect(not again, f"{again[:5]} were asked again")
    return trial


def all_rejected(stack, requests=5, model=GPT):
    """No key is any good: the client is not told that its own is bad, and the provider is left alone after that."""
    provider = provider_of(model)
    trial, world = Trial(f"{provider}: all rejected"), World(stack)
    key, names = world.key(), names_of(stack, provider)
    for name in names:
        stack.sim.patch(name, state="invalid")
    answers = run(stack, [Ask(key, model=model)])
    trial.expect((answers[0].status, answers[0].reason) == (502, "provider_credential_rejected"), f"answered {answers[0].status} {answers[0].reason}")
    trial.expect(len(stack.sim.ledger()) == len(names), f"{len(stack.sim.ledger())} calls of {len(names)} keys")
    before = stack.last_seq()
    answers += run(stack, [Ask(key, model=model)] * requests)
    trial.expect(stack.last_seq() == before, "keys that were rejected were asked again")
    close(trial, world, answers, refusals={"provider_credential_rejected", "pool_exhausted"})
    return trial


def overloaded(stack, model=GPT):
    """The provider has no room, which is no key's fault: passed on as it said it, not tried with the next key, and no key is out."""
    provider = provider_of(model)
    trial, world = Trial(f"{provider}: overloaded"), World(stack)
    key, names = world.key(), names_of(stack, provider)
    status, kind = (529, "overloaded_error") if provider == "anthropic" else (503, "server_error")
    for name in names:
        stack.sim.patch(name, state="overloaded")
    for stream in (False, True):
        before = stack.last_seq()
        answer = run(stack, [Ask(key, model=model, stream=stream)])[0]
        calls = stack.sim.ledger(before)
        if stream and not calls:
            # The provider is given a rest: said in the same way.
            trial.expect(answer.status == status, f"while it rests: {answer.status} {answer.reason}")
            continue
        trial.expect([call["status"] for call in calls] == [status], f"the provider saw {[(call['credential'], call['status']) for call in calls]}")
        trial.expect(answer.status == status and answer.reason is None, f"answered {answer.status} {answer.reason}")
        told = json.loads(answer.body)["error"]["type"] if answer.body.startswith(b"{") else answer.body[:100]
        trial.expect(told == kind, f"told {told}")
    for name in names:
        stack.sim.patch(name, state="ok")
    wait_for("the provider's recovery", lambda: run(stack, [Ask(key, model=model)])[0].status == 200, 40, 0.5)
    books = Books.of(world)
    for findings in (ends_findings(books), figure_findings(books), exact_findings(books), tries_findings(stack, books)):
        trial.findings += few(findings)
    trial.figures["calls"] = len(books.calls)
    return trial


def large_bodies(stack, mib=5, too_large_mib=11):
    """A large body is sent again byte for byte; one above the limit is refused, and nobody waits for ever."""
    trial, world = Trial("large bodies"), World(stack)
    key, names = world.key(), names_of(stack, "openai")
    answers = []
    for stream in (False, True):
        # A 429 that is sent before the whole body has been read is the harder case, but this provider reads first.
        stack.sim.fault("status=429 no_limit_headers=1 header=retry-after-ms:20", count=len(names) - 1, provider="openai")
        answers += run(stack, [Ask(key, picture=mib << 20, stream=stream)], timeout=60)
        trial.expect(attempts_of(answers[-1]) == len(names), f"{attempts_of(answers[-1])} attempts")
        time.sleep(0.1)
    answers += run(stack, [Ask(key, picture=mib << 20, directive=f"tokens={n}") for n in range(1, 9)], 8)
    before = stack.last_seq()
    refused = run(stack, [Ask(key, picture=too_large_mib << 20)], timeout=30)[0]
    trial.expect((refused.status, refused.reason) == (413, "body_too_large"), f"{too_large_mib} MiB: {refused.status} {refused.reason} {refused.error}")
    trial.expect(stack.last_seq() == before, f"{too_large_mib} MiB reached the provider")
    books = close(trial, world, answers)
    trial.expect(all(call["body_bytes"] > mib << 20 for call in books.calls), f"bodies of {[call['body_bytes'] for call in books.calls]} bytes")
    return trial


def all_limited(stack, soonest_ms=4000, model=GPT):
    """Every key is limited, one for a short time: refused with that time, without touching the provider, and served when it is over."""
    provider = provider_of(model)
    trial, world = Trial(f"{provider}: all limited"), World(stack)
    key, names = world.key(), names_of(stack, provider)
    soonest = random.choice(names)
    for name in names:
        if name != soonest:
            stack.sim.patch(name, limited_for_ms=LONG_MS)
    over = time.time() + soonest_ms / 1000
    stack.sim.patch(soonest, limited_for_ms=soonest_ms)
    answers = run(stack, [Ask(key, model=model)])
    trial.expect(len(stack.sim.ledger()) == len(names), f"{len(stack.sim.ledger())} calls of {len(names)} keys")
    before = stack.last_seq()
    answers += run(stack, [Ask(key, model=model, stream=n % 2 == 1) for n in range(40)], 8)
    in_time = max(answer.ended for answer in answers) < over
    trial.expect(not in_time or stack.last_seq() == before, "the provider was asked while every key was out")
    for answer in answers:
        if answer.ended < over:
            left = over - answer.ended
            trial.expect((answer.status, answer.reason) == (429, "pool_exhausted"), f"answered {answer.status} {answer.reason}")
            # Whole seconds, rounded up, of a limit that the provider itself tells in whole seconds.
            right = answer.retry_after is not None and left <= answer.retry_after + 0.05 and answer.retry_after <= left + (answer.ended - answer.began) + 2
            trial.expect(right, f"told to wait {answer.retry_after} s, {left:.2f} s before the first key is back")
            trial.expect(answer.headers.get("x-should-retry") != "false", "told not to try again")
    trial.expect(in_time, "the machine is too slow for this trial: the limit was over before all had been refused")
    # As the last one was told; never longer than the limit itself lasts, or a wrong figure would hang the trial.
    told = answers[-1].ended + (answers[-1].retry_after or 0)
    time.sleep(max(0.0, min(told, over + 2) - time.time()) + 0.1)
    again = run(stack, [Ask(key, model=model)])
    trial.expect(again[0].status == 200, f"told to wait, then {again[0].status} {again[0].reason}")
    books = close(trial, world, [*answers, *again], refusals={"pool_exhausted"})
    trial.expect([call["credential"] for call in books.calls[len(names):]] == [soonest], "not the key that was back first")
    return trial


def storm(stack, clients=200, limited_ms=2000, probes=1, cores=1.0):
    """Every key is limited for a while and many clients of the SDK ask at once, which retry as it does by default."""
    trial, world = Trial(f"storm of {clients}"), World(stack)
    (key_id, token), names = world.key(), names_of(stack, "openai")
    assert run(stack, [Ask((key_id, token))] * 8, 4)

    async def client(sdk, n):
        text = [{"role": "user", "content": "Hi [[sim tokens=10]]"}]
        if n % 2:
            return (await sdk.chat.completions.create(model=GPT, messages=text, user=key_id)).choices[0].message.content
        return [chunk async for chunk in await sdk.chat.completions.create(model=GPT, messages=text, user=key_id, stream=True)]

    async def crowd():
        async with openai.AsyncOpenAI(base_url=f"{stack.base}/v1", api_key=token) as sdk:
            # What the SDK loads at its first use takes longer than the limit lasts.
            await asyncio.gather(client(sdk, 0), client(sdk, 1))
            before, begun, cpu = stack.last_seq(), time.time(), [cpu_us(part) for part in (stack.envoy, stack.service)]
            for name in names:
                stack.sim.patch(name, limited_for_ms=limited_ms)
            return before, begun, cpu, await asyncio.gather(*(client(sdk, n) for n in range(clients)), return_exceptions=True)

    before, begun, cpu, came = asyncio.run(crowd())
    took = time.time() - begun
    used = [(cpu_us(part) - at) / 1e6 / took for part, at in zip((stack.envoy, stack.service), cpu)]
    failed = [result for result in came if isinstance(result, BaseException) or not result]
    trial.findings += few(f"a client gave up: {result!r}" for result in failed)
    books = close(trial, world, [])
    calls = [call for call in stack.sim.ledger(before) if call["tag"] == key_id]
    late = too_late(calls, books.admitted_ms(), int((begun + limited_ms / 1000) * 1e6))
    most = len(names) * (1 + probes)
    trial.expect(any(call["status"] == 429 for call in calls), "no key was ever limited: nothing was tried")
    trial.expect(len(late) <= most, f"the provider got {len(late)} requests on keys that cooled, {most} at most are right")
    trial.figures |= {"clients": clients, "429s": sum(call["status"] == 429 for call in calls), "while cooling": len(late), "at most": most,
                      "took": f"{took:.1f} s", "Envoy": f"{used[0]:.2f} cores", "service": f"{used[1]:.2f} cores"}
    if cores is not None:
        trial.expect(max(used) < cores, f"Envoy used {used[0]:.2f} cores, the service {used[1]:.2f}")
    return trial


def everywhere(fleet, kinds=("rate_limited", "insufficient_quota", "unauthorized"), requests=80, within=1.0):
    """A key that goes out under one request of one Envoy gets nothing more from any worker of either, a second later."""
    trial, world = Trial("two Envoys"), World(fleet)
    key, answers, out = world.key(), [], []
    for kind in kinds:
        words, changes, _ = DEATHS["openai"][kind]
        before = fleet.last_seq()
        fleet.sim.fault(words, provider="openai")
        answers += run(fleet, [Ask(key)], port=fleet.ports[len(out) % 2])
        hit = [call for call in fleet.sim.ledger(before) if call["status"] != 200]
        trial.expect(len(hit) == 1, f"{kind}: the provider saw {len(hit)} errors")
        if not hit:
            continue
        out.append(hit[0]["credential"])
        fleet.sim.patch(out[-1], **changes)
        time.sleep(max(0.0, hit[0]["answered_unix_us"] / 1e6 + within - time.time()))
        before = fleet.last_seq()
        for port in fleet.ports:
            answers += run(fleet, [Ask(key, stream=n % 2 == 1) for n in range(requests)], 16, port)
        again = [call["credential"] for call in fleet.sim.ledger(before) if call["credential"] in out]
        trial.expect(not again, f"{kind}: {len(again)} requests came to {sorted(set(again))} after {within} s")
    close(trial, world, answers)
    return trial


def killed(stack, hold_ttl=4):
    """Envoy is killed while the second try of a request runs: charged once, never less than it cost, and the records of others
    keep their tries. The stack's holds expire after hold_ttl seconds."""
    trial, world = Trial("Envoy killed in mid-rotation"), World(stack)
    key = world.key()
    stack.sim.fault("status=429 retry_after=600 first_ms=0", provider="openai")
    answers = run(stack, [Ask(key)])
    trial.expect(attempts_of(answers[0]) == 2, f"the first request took {attempts_of(answers[0])} attempts")
    stack.settled(key[0])

    async def kill_under(directive, stream):
        before = stack.last_seq()
        stack.sim.fault("status=429 retry_after=600 first_ms=0", provider="openai")
        running = asyncio.create_task(ask(stack.listen_port, Ask(key, directive, stream=stream), 30))

        def rotated():
            calls = stack.sim.ledger(before)
            return len(calls) == 2 and (calls[1]["answered_unix_us"] or not stream)

        try:
            await asyncio.to_thread(wait_for, "the second try", rotated)
        except TimeoutError:
            trial.expect(False, f"there was no second try: {[call['status'] for call in stack.sim.ledger(before)]}")
        stack.envoy.kill()
        stack.spawn_envoy()
        return await running

    lost = [asyncio.run(kill_under(*what)) for what in (("first_ms=20000", False), ("tokens=500 per_delta=1 pace_ms=40", True))]
    trial.expect(not any(answer.whole for answer in lost), "an answer came whole from an Envoy that was killed")
    answers += run(stack, [Ask(key, stream=n % 2 == 1) for n in range(20)], 4)
    stack.settled(key[0], timeout=hold_ttl + 20)
    books = Books.of(world, answers)
    for findings in (ends_findings(books, once=False), provider_findings(books), figure_findings(books), tries_findings(stack, books), answers_findings(books)):
        trial.findings += few(findings)
    ends = {entry["req"]: entry for entry in books.chains[key[0]] if entry["event"] in ("SETTLED", "EXPIRED", "VOIDED")}
    admitted = {entry["req"]: entry for entry in books.chains[key[0]] if entry["event"] == "ADMITTED"}
    costs, expired = books.costs(), [req for req, end in ends.items() if end["event"] == "EXPIRED"]
    trial.expect(len(expired) == len(lost), f"{len(expired)} holds expired, {len(lost)} requests were lost")
    for req, end in ends.items():
        if end["event"] == "SETTLED" and end["charge"] != costs[req]:
            trial.expect(False, f"{req} cost {costs[req]} and was charged {end['charge']}")
    for req in expired:
        tried = {stack.credential_ids[call["credential"]] for call in books.calls if req_of(call) == req}
        lent = {one["id"] for one in admitted[req]["credentials"]}
        trial.expect(len(tried) == 2 and tried <= lent, f"{req}: tried {tried}, the record has {lent}")
        trial.expect(costs[req] <= ends[req]["charge"] == admitted[req]["hold"], f"{req}: cost {costs[req]}, held and charged {ends[req]['charge']}")
    trial.figures |= {"killed": len(lost), "expired": len(expired), "settled": len(ends) - len(expired)}
    return trial
