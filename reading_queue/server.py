"""`python -m reading_queue.server`: the pages, by uvicorn, where settings() says."""

import structlog
import uvicorn

from reading_queue.app import create_app
from storage import logs
from storage.errors import ConfigurationError
from storage.settings import settings

_STOP_S = 2  # live streams are cut then; browsers come back by themselves


def main() -> None:
    """Serve until SIGTERM. Raises ConfigurationError if the pages' files are not set up."""
    logs.configure("web")
    chosen = settings()
    for needed in ("js/htmx.min.js", "js/echarts.min.js", "webfonts/400.css"):
        if not (chosen.assets_dir / needed).is_file():
            raise ConfigurationError(f"{chosen.assets_dir / needed} is missing: run `make setup`")
    structlog.get_logger().info("web.starting", host=chosen.web_host, port=chosen.web_port)
    uvicorn.run(
        create_app(chosen),
        host=chosen.web_host,
        port=chosen.web_port,
        log_config=None,  # its loggers' records go the way of storage/logs.py
        log_level="warning",
        access_log=False,  # addresses carry search words, which are patients' names
        server_header=False,
        timeout_graceful_shutdown=_STOP_S,
    )


if __name__ == "__main__":
    main()
