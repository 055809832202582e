"""`make clients`: clients that others wrote, each as its users have it, against served models. Exit 1 for any fault."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from builders.__main__ import run
from measure.clients.served import serving

CLIENTS = (
    "openai", "langchain", "llama_index", "litellm", "cohere", "tritonclient", "perf_analyzer", "lm_eval",
    "schemathesis",
)  # fmt: skip
_SECONDS = 240  # of one client
# Some fetch lists of prices or models, or send what they were asked, unless they are told not to.
_QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false", "DO_NOT_TRACK": "1",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="clients by others against served models")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--python", type=Path, required=True, help="of the environment that the clients are in")
    parser.add_argument("--only", nargs="*", choices=CLIENTS, default=CLIENTS)
    arguments = parser.parse_args()
    faults = 0
    print(f"{'client':<30} {'version':<10} {'asked':<40} result", flush=True)
    with tempfile.TemporaryDirectory(prefix="trireme-clients-") as scratch, serving(arguments.build_dir) as served:
        facts = Path(scratch) / "served.json"
        served.write(facts)
        for name in arguments.only:
            faults += _client(arguments.python, name, facts)
    print(f"\n{faults} faults" if faults else "\nno fault")
    sys.exit(1 if faults else 0)


def _client(python: Path, name: str, facts: Path) -> int:
    """Prints a line for each question; how many had a wrong answer, or none."""
    root = Path(__file__).parents[2]
    command = [str(python), "-m", "measure.clients.one", name, str(facts)]
    with tempfile.TemporaryFile("w+") as told:
        # `-m` finds this package in the folder that it is started from.
        environment = {**os.environ, **_QUIET}
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=told, text=True, env=environment)
        assert process.stdout is not None
        try:
            out, _ = process.communicate(timeout=_SECONDS)
            ended = f"ended with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            ended = f"not done after {_SECONDS} s"
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"client"')]
        for line in lines:
            shown = f"FAULT: {line['fault']}" if "fault" in line else line["result"]
            print(f"{line['client']:<30} {line['version']:<10} {line['asked']:<40} {shown}", flush=True)
        faults = sum("fault" in line for line in lines)
        if ended or not lines:
            print(f"{name:<30} {'':<10} {'':<40} FAULT: {ended or 'asked nothing'}", flush=True)
            faults += 1
        if faults:
            told.seek(0)
            print(told.read()[-4000:], file=sys.stderr)
        return faults


if __name__ == "__main__":
    run(main)
