"""`make bench-feedback`: rows a second into the feedback store by many threads, against one commit a row.

Both write the same rows to SQLite with full sync, in turns, in one folder. The ratio is what counts: a disk's own pace
moves by the minute.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from online.feedback.samples import Correction, ServedRequest
from online.feedback.store import FeedbackStore

ROUNDS = 5
TURN_S = 2.0
SERVED = 60_000  # requests that feedback may be about; more than a turn can take


def rows_a_second(store: FeedbackStore, keys: count[int], threads: int) -> float:
    """Each thread waits for its row before it writes the next."""
    end = time.monotonic() + TURN_S

    def write(_: int) -> int:
        written = 0
        while time.monotonic() < end and (key := next(keys)) < SERVED:
            written += store.add(Correction(request_id=str(key), text="a sentence of forty characters, or about"))
        return written

    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(write, range(threads)))
    return written / (time.monotonic() - started)


def _serve(url: str) -> None:
    store = FeedbackStore(url)
    for first in range(0, SERVED, 5000):
        keys = range(first, first + 5000)
        for future in [store.note_served(ServedRequest(request_id=str(key), model="m", version=1)) for key in keys]:
            future.result()
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build"))
    parser.add_argument("--threads", type=int, default=64)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=arguments.folder) as name:
        stores = [
            FeedbackStore(f"sqlite:///{name}/group.db"),
            FeedbackStore(f"sqlite:///{name}/single.db", largest_batch=1),
        ]
        _serve(f"sqlite:///{name}/group.db")
        _serve(f"sqlite:///{name}/single.db")
        keys = [count(), count()]
        pairs = []
        for number in range(ROUNDS):
            pairs.append(
                [rows_a_second(store, key, arguments.threads) for store, key in zip(stores, keys, strict=True)]
            )
            print(
                f"round {number + 1}: group commit {pairs[-1][0]:,.0f} rows/s, single rows {pairs[-1][1]:,.0f} rows/s"
            )
        for store in stores:
            store.close()
    together, alone = (median(pair[side] for pair in pairs) for side in (0, 1))
    ratio = median(pair[0] / pair[1] for pair in pairs)
    print(
        f"{arguments.threads} threads, median: {together:,.0f} rows/s against {alone:,.0f}, {ratio:.1f} times as many"
    )


if __name__ == "__main__":
    main()
