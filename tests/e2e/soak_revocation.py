"""1,000 revocations under load, four workers and two Envoys: from the answer to DELETE to the last byte of the key's streams."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fleet import Fleet, percentile, revocations

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 1000


def line(name, values):
    print(f"{name}: p50 {percentile(values, 0.5) * 1000:.0f} ms, p99 {percentile(values, 0.99) * 1000:.0f} ms, max {max(values) * 1000:.0f} ms", flush=True)


def main():
    with Fleet(concurrency=4) as stack:
        last, end, streams, others = revocations(stack, COUNT, wave=50)
        told = [stream for stream in streams if stream.ended_by() in ("revoked", "this virtual key has been revoked")]
        line(f"{COUNT} revocations, {len(last)} streams: 204 to last byte", last)
        line("204 to the end of the connection", end)
        print(f"told why in the stream: {len(told)} of {len(streams)}; requests of other keys meanwhile: {len(others)}, "
              f"not whole: {sum(not result.whole for result in others)}")
        print(stack.both_stats("keyward_watch|keyward_vm_starts|keyward_streams_ended_total"))
        keys = {stream.key_id for stream in streams}
        for key_id in keys:
            stack.settled(key_id)
        wrong = [key_id for key_id in keys if [e["outcome"] for e in stack.audit(key_id) if e["event"] == "SETTLED"] != ["ended:revoked"] * 2]
        violations = stack.sim.totals()["violations"]
        print(f"keys whose chain does not say so: {len(wrong)}; violations: {len(violations)}")
        right = max(end) < 1 and len(told) == len(streams) and not wrong and not violations and all(result.whole for result in others)
    print("ok" if right else "FAILED")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
