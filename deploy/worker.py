"""The worker process: `python -m dramatiq deploy.worker`. Brings the broker and every actor together."""

import dramatiq

import ai_triage.actors  # noqa: F401 - importing registers its actors
import routing.actors  # noqa: F401 - importing registers its actors
from ai_triage.untrusted import prepare_worker
from deploy.process import die_with_parent
from routing.rules_file import load_rules
from storage import logs
from storage.actors import Context, declare
from storage.broker import make_broker
from storage.settings import settings

MEMORY_LIMIT_BYTES = 4 * 1024**3  # the largest image that triage decodes takes 1.3 GB; more is an attack or a leak

# dramatiq forks its workers: one whose master was killed must not go on alone.
die_with_parent()
logs.configure("worker")
prepare_worker(MEMORY_LIMIT_BYTES)
load_rules(settings().rules_file)  # a bad rule stops the start, with file, line and reason
broker = make_broker(settings().broker_url)
dramatiq.set_broker(broker)
declare(broker, Context.of(settings()))
