"""The message broker, by URL: Valkey or Redis (`redis://`), or RabbitMQ (`amqp://`).

A message is the id of a job and the name of its actor; everything else is in PostgreSQL, so the broker may lose all it
has. Dramatiq's Retries middleware is left out: the job table retries, in one layer (design §4.9). So is Prometheus's:
workers count through their own exporter.
"""

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import dramatiq
import pika.exceptions
import redis
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import Middleware, ShutdownNotifications, TimeLimit

from storage.errors import ConfigurationError, LinkError

QUEUES = ("triage-urgent", "triage", "route", "return", "maintenance")
"""The queues of the design, whether or not an actor of this process has them as its own."""

# A server that accepts and then says nothing must not hold the transaction of the relay open.
_REDIS_LIMITS = {"socket_timeout": "30", "socket_connect_timeout": "5"}
_RABBITMQ_LIMITS = {"blocked_connection_timeout": "30", "socket_timeout": "5", "connection_attempts": "1"}


def make_broker(url: str) -> dramatiq.Broker:
    """A broker with the design's queues. Connects when first used. Raises ConfigurationError for another scheme."""
    middleware: list[Middleware] = [TimeLimit(), ShutdownNotifications()]
    scheme = urlsplit(url).scheme
    broker: dramatiq.Broker
    if scheme in {"redis", "rediss"}:
        broker = RedisBroker(  # type: ignore[no-untyped-call]
            url=_with_limits(url, _REDIS_LIMITS), middleware=middleware
        )
    elif scheme in {"amqp", "amqps"}:
        # Confirmed delivery: a publication that the server did not take raises, and the job stays unpublished.
        broker = RabbitmqBroker(url=_with_limits(url, _RABBITMQ_LIMITS), middleware=middleware, confirm_delivery=True)
    else:
        raise ConfigurationError(f"Broker address begins with {scheme!r}: it must be redis(s):// or amqp(s)://")
    for queue in QUEUES:
        broker.declare_queue(queue)
    return broker


def _with_limits(url: str, limits: dict[str, str]) -> str:
    """The address with our time limits, where it does not set its own."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query=urlencode(limits | dict(parse_qsl(parts.query)))))


def publish(broker: dramatiq.Broker, *, job_id: int, queue: str, actor: str) -> None:
    """Put one job's message on its queue. Raises LinkError if the broker did not take it."""
    message: dramatiq.Message[None] = dramatiq.Message(
        queue_name=queue, actor_name=actor, args=(job_id,), kwargs={}, options={}
    )
    try:
        broker.declare_queue(queue)
        broker.enqueue(message)
    except (redis.RedisError, pika.exceptions.AMQPError, BrokerConnectionError, OSError) as error:
        raise LinkError(f"The broker did not take a message: {type(error).__name__}") from error
