"""The worker process: `python -m dramatiq deploy.worker`. Brings the broker and every actor together."""

import ai_triage.actors  # noqa: F401 - importing registers its actors
import dramatiq
import routing.actors  # noqa: F401 - importing registers its actors
from routing.rules_file import load_rules

from storage import logs
from storage.actors import Context, declare
from storage.broker import make_broker
from storage.settings import settings

logs.configure("worker")
load_rules(settings().rules_file)  # a bad rule stops the start, with file, line and reason
broker = make_broker(settings().broker_url)
dramatiq.set_broker(broker)
declare(broker, Context.of(settings()))
