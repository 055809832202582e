"""The process: the gateway's options, and those of the store."""

from __future__ import annotations

import argparse

from online.doorway.sink import StoreSink
from runtime.gateway.__main__ import main, make_parser


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m online.doorway")
    parser.add_argument("--feedback-database", required=True, help="sqlite:////path/to/feedback.db, or postgresql://…")
    parser.add_argument("--sample-share", type=float, default=0.0, help="of answers whose texts are kept too, 0 to 1")
    parser.add_argument("--sample-redact", help="module:function; what it returns is kept instead of a text")
    return parser


def _open(arguments: argparse.Namespace) -> StoreSink:
    return StoreSink(arguments.feedback_database, arguments.sample_share, arguments.sample_redact, arguments.model)


if __name__ == "__main__":
    main(_parser(), _open)
