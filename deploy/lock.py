"""Write `requirements.lock`: every installed version, exactly, for `pip install -r`.

Local versions (`torch 2.13.0+cpu`) are cut to the public one, which matches them and can be had anywhere.
"""

import re
from importlib import metadata

_HEADER = """\
# Every Python package, exactly. Made by `make lock` from the virtual environment; do not edit.
# To change something: .venv/bin/pip install PACKAGE==VERSION, run the tests, then `make lock`.
# Keep torch at its pin: a looser one can bring gigabytes of CUDA to a machine without a GPU.
"""
_LEFT_OUT = {"pip", "yuanzhen"}


def render() -> str:
    """The lock file's text, sorted by name."""
    pins: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in _LEFT_OUT:
            pins[name] = distribution.version.partition("+")[0]
    return _HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


if __name__ == "__main__":
    print(render(), end="")
