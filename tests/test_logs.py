"""Logs say what happened and to which row; an exception's text, which may quote a patient, stays out."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import structlog

from storage import logs
from storage.errors import ConfigurationError

_SPEAKS = """
import asyncio, logging, socket, threading, warnings
import uvicorn
from storage import logs

logs.configure("test")
NAME = "Zhang^San"

async def app(scope, receive, send):
    raise ValueError(NAME)

async def serve():
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(b"GET /" + NAME.encode() + b" HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
    await reader.read()
    writer.close()
    server.should_exit = True
    await serving

def fail():
    raise ValueError(NAME)

asyncio.run(serve())
logging.getLogger("pydicom").warning("Invalid value %s", NAME)
logging.getLogger("other").log(35, OSError(98, NAME))
warnings.warn(NAME)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What `configure` sets for a whole process, put back."""
    hooks = sys.excepthook, threading.excepthook
    yield
    sys.excepthook, threading.excepthook = hooks
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logs.LibraryHandler):
            logging.getLogger().removeHandler(handler)
    structlog.reset_defaults()


def test_an_unexpected_error_is_logged_with_its_type_and_place_and_without_its_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("test")
    log = structlog.get_logger().bind()
    try:
        raise ValueError("Zhang^San is not a number")
    except ValueError:
        log.exception("job.bug", job_id=7)
    line = capsys.readouterr().out
    facts = json.loads(line)
    assert (facts["action"], facts["job_id"], facts["error"]) == ("job.bug", 7, "ValueError")
    assert any("test_logs.py" in frame for frame in facts["frames"])
    assert "Zhang" not in line


def test_what_libraries_warnings_threads_and_the_process_itself_say_is_one_json_line_each_without_words() -> None:
    done = subprocess.run([sys.executable, "-c", _SPEAKS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr == ""
    assert "Zhang" not in done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["action"], line.get("logger"), line.get("error")) for line in lines] == [
        ("library.said", "uvicorn.error", "ValueError"),
        ("library.said", "pydicom", None),
        ("library.said", "other", None),
        ("library.warned", None, None),
        ("thread.ended", None, "ValueError"),
        ("process.ended", None, "ValueError"),
    ]
    assert lines[2]["errno"] == "EADDRINUSE" and lines[3]["category"] == "UserWarning"
    assert all(line["process"] == "test" for line in lines)
    assert any(frame.endswith(" app") for frame in lines[0]["frames"])


def test_only_the_reason_of_our_own_errors_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("test")
    try:
        raise ConfigurationError("rules.toml, line 3: no such specialty")
    except ConfigurationError:
        structlog.get_logger().exception("process.ended")
    assert json.loads(capsys.readouterr().out)["reason"] == "rules.toml, line 3: no such specialty"


def test_the_text_of_a_workers_process_that_its_starter_waits_for_stays(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("test")
    logging.getLogger("dramatiq.WorkerProcess(0)").warning("Worker process is ready for action.")
    logging.getLogger("dramatiq.worker").warning("Zhang^San")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "Worker process is ready for action." and "text" not in second
