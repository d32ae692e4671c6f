"""What becomes of mutated golden stores: refused, read as before, or read as something plausible.

Anything else is a bug, and is printed with its seed: another error, other samples where digests
should have told, a process that dies, a mutation that takes 30 seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from benchmarks.figures import machine, print_figure
from tests.fuzzing import GOOD, run


def main() -> int:
    """Run and print the figures; 1 if there was a bug."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    started, slowest = time.monotonic(), 0.0
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    end = options.first + options.mutations
    for result in run(options.first, end, workers=options.workers):
        outcomes[result["outcome"]] += 1
        kinds[f"{result.get('kind')}: {result['outcome']}"] += 1
        slowest = max(slowest, result.get("seconds", 0.0))
        if result["outcome"] not in GOOD:
            print(result, file=sys.stderr, flush=True)
    bad = sum(count for name, count in outcomes.items() if name not in GOOD)
    print_figure(
        "fuzz.bad",
        bad,
        "mutated stores neither refused nor read right",
        mutations=sum(outcomes.values()),
        first_seed=options.first,
        outcomes=dict(sorted(outcomes.items())),
        by_kind=dict(sorted(kinds.items())),
        slowest_s=slowest,
        seconds=round(time.monotonic() - started, 1),
        machine=machine(),
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
