"""SIGKILL at random moments for processes of a running stack: what the demonstration must survive."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from deploy.stack import read_state

_PAUSE_S = (1.0, 4.0)


class Chaos:
    """Kills named services of the stack under `var` until stopped; each kill is one line of `say`."""

    def __init__(self, var: Path, names: tuple[str, ...], say: Callable[[str], None], seed: int | None = None) -> None:
        self._var = var
        self._names = names
        self._say = say
        self._random = random.Random(seed)  # noqa: S311 - not a secret
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self.kills: dict[str, int] = {}

    def __enter__(self) -> "Chaos":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End; the supervisor brings back what was killed last."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._random.uniform(*_PAUSE_S)):
            name = self._random.choice(self._names)
            pid = read_state(self._var).get("services", {}).get(name, {}).get("pid")
            if pid is None:
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.kills[name] = self.kills.get(name, 0) + 1
            self._say(f"  SIGKILL {name}")
