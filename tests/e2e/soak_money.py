"""make soak-money: the money trials at full size. Prints one table of figures; exits 0 only if all of them hold.

True costs and token counts are the simulator's, never Keyward's. With names as arguments only those trials are run.
"""

import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import trials
from harness import Stack


def on_own_stack(trial, **size):
    """A trial on a system of its own: what the organisation has spent is that trial's alone."""
    def run():
        with Stack(concurrency=2) as stack:
            return trial(stack, **size)
    return run


TRIALS = {
    "crowd": on_own_stack(trials.crowd, requests=2000, at_once=200),
    "multitude": on_own_stack(trials.multitude, keys=200, each=50, teams=20, per_second=250, answer_ms=12_000),
    "mixed": on_own_stack(trials.mixed, keys=10, seconds=60, clients=80, cap="0.02"),
    "no-needless-refusal": on_own_stack(trials.no_needless_refusal, requests=1500, clients=40, seconds=90, beyond=8.0),
    "fair-clamps": on_own_stack(trials.fair_clamps),
    "retry-after": on_own_stack(trials.honest_retry_after, rounds=8, answer_s=4.0),
    "rates": on_own_stack(trials.rates, seconds=200.0, rpm=300, tpm=60_000, rps=15, slow_ms=400),
    "quotas": on_own_stack(trials.quotas, requests=200, tokens=40_000),
    "clock-steps": lambda: trials.clock_steps(requests=300, clients=10, seconds=40.0),
    "midnights": lambda: trials.midnights(requests=150, clients=8, seconds=8.0),
    "shadow": on_own_stack(trials.shadow, requests=500),
    "runaway": on_own_stack(trials.runaway),
    "kills": lambda: trials.kills(times=50, clients=60, hold_ttl=20),
}


def attempt(name, run):
    """A trial that falls over has failed as well, and the others go on."""
    begun = time.monotonic()
    try:
        trial = run()
    except Exception as why:
        traceback.print_exc()
        trial = trials.Trial(name, [f"fell over: {why!r}"])
    trial.figures["took"] = f"{time.monotonic() - begun:.0f} s"
    for finding in trial.findings[:40]:
        print(f"  {name}: {finding}", file=sys.stderr)
    print(trial.row(), flush=True)
    return trial


def main():
    wanted = sys.argv[1:] or list(TRIALS)
    unknown = set(wanted) - set(TRIALS)
    if unknown:
        sys.exit(f"there is no trial {', '.join(sorted(unknown))}; there are {', '.join(TRIALS)}")
    done = [attempt(name, TRIALS[name]) for name in wanted]
    print("\nmoney and limits, true figures from the simulator's books")
    for trial in done:
        print(trial.row())
    sys.exit(1 if any(trial.findings for trial in done) else 0)


if __name__ == "__main__":
    main()
