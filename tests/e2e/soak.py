"""make soak: what takes too long for make test. Prints one line per check; exits 0 only if all hold."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Stack

FAILED = []


def check(name, right, seen):
    print(f"{'ok' if right else 'FAILED':<7}{name}: {seen}", flush=True)
    if not right:
        FAILED.append(name)


def long_answers(stack):
    """A stream of 60 s and an answer that is silent for 6 minutes both complete, and are charged what they cost."""
    key_id, token = stack.new_key("1.00")
    seen = {}

    def ask(name, directive, **more):
        begun = time.monotonic()
        status, _, body = stack.chat(token, directive, timeout=600, **more)
        seen[name] = status, body, time.monotonic() - begun

    threads = [
        threading.Thread(target=ask, args=("stream", "[[sim tokens=180 pace_ms=1000]]"), kwargs={"stream": True}),
        threading.Thread(target=ask, args=("silent", "[[sim silent_ms=365000]]")),
        threading.Thread(target=ask, args=("late", "[[sim first_ms=365000]]")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status, body, seconds = seen["stream"]
    check("a 60 s stream completes", status == 200 and b"[DONE]" in body and seconds > 55, f"{status}, {seconds:.0f} s")
    for name in ("silent", "late"):
        status, body, seconds = seen[name]
        check(f"a 6-minute {name} answer completes", status == 200 and b"usage" in body and seconds > 360, f"{status}, {seconds:.0f} s")
    stack.settled(key_id)
    stack.sim.quiet()
    cost, spent = stack.sim.totals()["overall"]["cost_nanodollars"], stack.key(key_id)["spent_nanodollars"]
    check("they are charged what they cost", cost == spent, f"{spent} of {cost} nanodollars")


def kills():
    """The crash tests again, with 20 kills each."""
    here = Path(__file__).parent
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", str(here / "test_crash.py")], env={**os.environ, "KILLS": "20"}, capture_output=True, text=True)
    check("20 kills of the service and of Envoy", result.returncode == 0, result.stdout.strip().splitlines()[-1])
    if result.returncode:
        print(result.stdout[-6000:])


def main():
    with Stack(concurrency=2) as stack:
        long_answers(stack)
    kills()
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
