"""`triage.toml`, the file that makes a directory a triage model: a wrong one is refused, with its reason."""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ai_triage.interface import RESEARCH_ONLY, Accepts, Coded, ModelCard, OperatingPoint
from storage.errors import ConfigurationError

FILE_NAME = "triage.toml"
_SHA256 = r"^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Coded(_Part):
    value: str = Field(min_length=1)
    scheme: str = Field(min_length=1)
    meaning: str = Field(min_length=1, max_length=64)  # PS3.5 6.2: LO


class _Accepts(_Part):
    modalities: tuple[str, ...] = Field(min_length=1)
    sop_class_uids: tuple[str, ...] = Field(min_length=1)
    body_parts: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    age_years: tuple[float, float] | None = None
    age_may_be_unknown: bool = False
    max_instances: int = Field(default=8, ge=1, le=64)


class _Finding(_Part):
    code: str = Field(pattern=r"^[a-z0-9_]+$")
    coded: _Coded
    text_zh: str = Field(min_length=1)
    text_en: str = Field(min_length=1)
    threshold: float = Field(gt=0, lt=1)
    minutes_earlier: int = Field(ge=0, le=24 * 60)


class _PackagedFile(_Part):
    """A weight file that rests in an installed distribution and not in the model's directory."""

    package: str
    path: str
    sha256: str = Field(pattern=_SHA256)


class ModelFile(_Part):
    """The whole of `triage.toml`."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    kind: Literal["monai_chest_radiograph", "openecg_rhythm"]
    title_zh: str = Field(min_length=1)
    title_en: str = Field(min_length=1)
    status: Literal["research only", "cleared"] = RESEARCH_ONLY  # type: ignore[assignment]
    intended_use: str = Field(min_length=1)
    files_sha256: str = Field(pattern=_SHA256)  # over every file of the directory but triage.toml; see registry.py
    packaged_files: tuple[_PackagedFile, ...] = ()
    accepts: _Accepts
    findings: tuple[_Finding, ...] = Field(min_length=1)
    calibration: dict[str, Any]
    evidence: tuple[dict[str, Any], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _codes_differ(self) -> "ModelFile":
        codes = [finding.code for finding in self.findings]
        if len(set(codes)) != len(codes):
            raise ValueError("two findings have the same code")
        return self

    def card(self, sha256: str) -> ModelCard:
        """The card of the model whose files have this digest."""
        return ModelCard(
            name=self.name,
            version=self.version,
            sha256=sha256,
            title_zh=self.title_zh,
            title_en=self.title_en,
            status=self.status,
            intended_use=self.intended_use,
            accepts=Accepts(**self.accepts.model_dump()),
            operating_points=tuple(
                OperatingPoint(**{**finding.model_dump(), "coded": Coded(**finding.coded.model_dump())})
                for finding in self.findings
            ),
            calibration=self.calibration,
            evidence=self.evidence,
        )


def read_model_file(directory: Path) -> ModelFile:
    """Read and check `triage.toml` of a model directory.

    Raises:
        ConfigurationError: the file is missing, is not TOML, or a key is wrong: names file, key and reason.
    """
    path = directory / FILE_NAME
    try:
        return ModelFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: there is no {FILE_NAME}, so this is not a triage model") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or '(file)'}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(f"{path}: {faults}") from error
