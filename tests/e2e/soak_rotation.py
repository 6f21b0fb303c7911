"""make soak-rotation: the rotation trials at full size. Prints one row of figures for each; exits 0 only if all of them hold.

What reached the provider, when, and at what cost are the simulator's figures, never Keyward's. With names as arguments only
those trials are run; ROTATION=callout lets the gate repeat the tries.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import rotation
from fleet import Fleet
from harness import Stack, pool
from rotation import CLAUDE, GPT
from soak_money import attempt

ROTATION = os.environ.get("ROTATION", "router")


def on_own_stack(trial, keys, *args, kind=Stack, concurrency=2, options=None, model=GPT, **size):
    """A trial on a system of its own, with a pool of so many keys."""
    def run():
        with kind(concurrency=concurrency, credentials=pool(keys, rotation.provider_of(model)), rotation=ROTATION, **options or {}) as stack:
            return trial(stack, *args, **({} if model == GPT else {"model": model}), **size)
    return run


TRIALS = {
    "four-of-five": on_own_stack(rotation.four_of_five, 5, requests=500, at_once=40),
    "four-of-five-anthropic": on_own_stack(rotation.four_of_five, 5, model=CLAUDE, requests=500, at_once=40),
    "first-token": on_own_stack(rotation.first_token, 5, pairs=100, most_ms=10),
    "pool-of-12": on_own_stack(rotation.no_hidden_cap, 12, requests=500),
    "pool-of-40": on_own_stack(rotation.no_hidden_cap, 40, requests=500),
    **{f"{rotation.provider_of(model)}-{kind}": on_own_stack(rotation.dies, 5, kind, model=model, requests=300, at_once=40)
       for model in (GPT, CLAUDE) for kind in rotation.DEATHS[rotation.provider_of(model)]},
    "storm": on_own_stack(rotation.storm, 5, clients=200),
    "two-envoys": on_own_stack(rotation.everywhere, 5, kind=Fleet, concurrency=4, requests=400),
    "killed": on_own_stack(rotation.killed, 5, options={"hold_ttl": 4}),
}


def main():
    wanted = sys.argv[1:] or list(TRIALS)
    unknown = set(wanted) - set(TRIALS)
    if unknown:
        sys.exit(f"there are no trials {sorted(unknown)}, but {list(TRIALS)}")
    trials = [attempt(name, TRIALS[name]) for name in wanted]
    failed = sum(bool(trial.findings) for trial in trials)
    print(f"{len(trials) - failed} of {len(trials)} trials hold")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
