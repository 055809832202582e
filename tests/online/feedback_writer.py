"""A process that writes feedback from several threads and says on stdout what was acknowledged, until it is killed."""

from __future__ import annotations

import os
import sys
import threading

from online.feedback.samples import Correction, ServedRequest
from online.feedback.store import FeedbackStore

THREADS = 6


def main(url: str, run: str) -> None:
    store = FeedbackStore(url)

    def write(thread: int) -> None:
        for number in range(1_000_000):  # the parent ends it long before
            key = f"{run}-{thread}-{number}"
            store.note_served(ServedRequest(request_id=key, model="m", version=1))
            store.add(Correction(request_id=key, text=f"text of {key}"))
            os.write(1, f"{key}\n".encode())

    for thread in range(THREADS):
        threading.Thread(target=write, args=(thread,)).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
