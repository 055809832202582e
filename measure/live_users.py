"""`python -m measure.live_users`: Locust users who ask a served language model until they are ended, a line an answer.

In a process of its own, because Locust patches Python. A line is the status, 0 where there was no answer, and the
version that answered.
"""

from __future__ import annotations

import argparse
import signal

import gevent
from locust import HttpUser, constant_pacing, task
from locust.env import Environment

_TOKENS = 8  # of an answer
_PROMPTS = ("Return the number of", "Raised when a", "The with statement", "Print the names of")
_EVERY_S = 0.1  # a user asks, or as soon as it has its answer
_ASK_S = 30.0


class AskingUser(HttpUser):  # type: ignore[misc]  # locust is untyped here
    """Who looks at what became of it is the parent."""

    model = ""
    wait_time = constant_pacing(_EVERY_S)
    asked = 0

    @task  # type: ignore[untyped-decorator]  # locust is untyped here
    def ask(self) -> None:
        self.asked += 1
        prompt = _PROMPTS[self.asked % len(_PROMPTS)]
        body = {"model": self.model, "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0}
        answer = self.client.post("/v1/completions", json=body, timeout=_ASK_S)
        try:
            print(answer.status_code, answer.headers.get("x-trireme-version", ""), flush=True)
        except BrokenPipeError:  # who counts them is gone
            self.environment.runner.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description="Locust users of a served language model")
    parser.add_argument("gateway", help="http://host:port")
    parser.add_argument("model")
    parser.add_argument("--users", type=int, default=2)
    arguments = parser.parse_args()
    AskingUser.model = arguments.model
    runner = Environment(user_classes=[AskingUser], host=arguments.gateway).create_local_runner()
    gevent.signal_handler(signal.SIGTERM, runner.quit)
    runner.start(arguments.users, spawn_rate=arguments.users)
    runner.greenlet.join()


if __name__ == "__main__":
    main()
