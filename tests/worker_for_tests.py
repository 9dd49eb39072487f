"""A worker with actors that misbehave on purpose: `python -m dramatiq tests.worker_for_tests`. Like deploy/worker.py.

Effects are events without a study; what a test must see from outside is a file in the folder YUANZHEN_TEST_FOLDER.
"""

import os
import signal
import time
from pathlib import Path

import dramatiq

import routing.actors  # noqa: F401 - importing registers its actors
from storage import jobs, logs
from storage.actors import Context, actor, declare
from storage.broker import make_broker
from storage.settings import settings
from storage.transitions import SYSTEM, note_outside_study

FOLDER = Path(os.environ["YUANZHEN_TEST_FOLDER"])


def _effect(context: Context, job: jobs.StartedJob) -> None:
    with context.database.centre() as session:
        note_outside_study(session, job.site_id, "test.effect", subject="job", subject_id=job.subject_id, actor=SYSTEM)
        jobs.finish(session, job.id)


@actor("have_effect", queue="maintenance")
def have_effect(context: Context, job: jobs.StartedJob) -> None:
    """Have the effect at once."""
    _effect(context, job)


@actor("wait_then_have_effect", queue="maintenance")
def wait_then_have_effect(context: Context, job: jobs.StartedJob) -> None:
    """Say who works, and wait until the test lets it go on."""
    (FOLDER / f"running-{os.getpid()}").touch()
    while not (FOLDER / "go").exists():
        time.sleep(0.02)
    _effect(context, job)


@actor("kill_the_worker", queue="maintenance")
def kill_the_worker(_context: Context, _job: jobs.StartedJob) -> None:
    """What a decoder that runs out of memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


logs.configure("worker")
broker = make_broker(settings().broker_url)
dramatiq.set_broker(broker)
declare(broker, Context.of(settings()))
(FOLDER / f"ready-{os.getpid()}").touch()
