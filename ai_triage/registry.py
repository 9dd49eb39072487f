"""The models of a directory: each checked against its digest before anything of it is interpreted.

`configs/inference.json` of a MONAI bundle names classes to build, so a bundle is code: it is trusted only as the
administrator installed it, which the digest in its `triage.toml` proves. Nothing here imports torch or onnxruntime.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from ai_triage.cxr import ChestRadiographModel
from ai_triage.ecg_rhythm import EcgRhythmModel
from ai_triage.interface import ModelCard, TriageModel
from ai_triage.model_file import FILE_NAME, ModelFile, read_model_file
from storage.errors import ConfigurationError

DEFAULT_DIRECTORY = Path(__file__).parent / "models"

_KINDS: dict[str, Callable[[ModelCard, Path, tuple[Path, ...]], TriageModel]] = {
    "monai_chest_radiograph": ChestRadiographModel,
    "openecg_rhythm": EcgRhythmModel,
}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_digest(directory: Path) -> str:
    """SHA-256 over the sorted `<relative path> <SHA-256>` lines of every file of a directory but its `triage.toml`."""
    lines = sorted(
        f"{path.relative_to(directory).as_posix()} {file_digest(path)}\n"
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).as_posix() != FILE_NAME
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _packaged(directory: Path, model_file: ModelFile) -> tuple[Path, ...]:
    found: list[Path] = []
    for file in model_file.packaged_files:
        spec = importlib.util.find_spec(file.package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(
                f"{directory / FILE_NAME}: packaged_files: package {file.package!r} is not installed; "
                "install yuanzhen[triage]"
            )
        path = Path(spec.submodule_search_locations[0]) / file.path
        if not path.is_file() or file_digest(path) != file.sha256:
            raise ConfigurationError(
                f"{directory / FILE_NAME}: packaged_files: {file.package}/{file.path} is missing or has another digest "
                "than the evidence was measured with"
            )
        found.append(path)
    return tuple(found)


def load_model(directory: Path) -> TriageModel:
    """The model of one directory.

    Raises:
        ConfigurationError: a wrong `triage.toml`, or files with another digest than it states.
    """
    model_file = read_model_file(directory)
    digest = files_digest(directory)
    if digest != model_file.files_sha256:
        raise ConfigurationError(
            f"{directory / FILE_NAME}: files_sha256: the files have the digest {digest}, not the one stated; "
            "another file is another model and needs its own evidence"
        )
    packaged = _packaged(directory, model_file)
    # The card's digest covers triage.toml too: another operating point is another model.
    identity = hashlib.sha256(f"{digest}\n{file_digest(directory / FILE_NAME)}\n".encode()).hexdigest()
    return _KINDS[model_file.kind](model_file.card(identity), directory, packaged)


def load_models(directory: Path = DEFAULT_DIRECTORY) -> tuple[TriageModel, ...]:
    """Every model under a directory, in name order.

    Raises:
        ConfigurationError: one of them is wrong, or two have the same name; none is used then.
    """
    if not directory.is_dir():
        raise ConfigurationError(f"{directory}: no such directory of triage models")
    models = tuple(load_model(path) for path in sorted(directory.iterdir()) if (path / FILE_NAME).is_file())
    names = [model.card.name for model in models]
    if len(set(names)) != len(names):
        raise ConfigurationError(f"{directory}: two models have the same name: {', '.join(sorted(names))}")
    return models
