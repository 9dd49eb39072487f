"""Routing rules: which specialty reads a study, how urgent it is, by when, and whether models are asked. Pure.

Rules stand in order; the first whose conditions all hold decides. `[default]` takes what no rule takes, under the name
`default`, so that such studies are read and seen. `routing/rules_file.py` reads the file and says where it is wrong.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.vocabulary import Priority

DEFAULT_RULE = "default"
_BY_URGENCY = (Priority.STAT, Priority.URGENT, Priority.ROUTINE)
_LONGEST_MIN = 31 * 24 * 60

Code = Annotated[str, Field(pattern=r"^[A-Z0-9_ ]{1,16}$")]  # PS3.5 6.2: CS
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Minutes = Annotated[int, Field(gt=0, le=_LONGEST_MIN)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
Some = Field(default=None, min_length=1)


@dataclass(frozen=True, slots=True)
class StudyFacts:
    """What rules may ask of a study. `descriptions`: of the study and its series."""

    site: str
    modalities: tuple[str, ...]
    priority: Priority = Priority.ROUTINE
    body_parts: tuple[str, ...] = ()
    calling_ae_title: str = ""
    descriptions: tuple[str, ...] = ()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class When(_Part):
    """Conditions, all of which must hold; of each list one entry is enough. What is left out always holds."""

    modality: tuple[Code, ...] | None = Some
    body_part: tuple[Code, ...] | None = Some
    site: tuple[Name, ...] | None = Some
    priority: tuple[Priority, ...] | None = Some
    ae_title: tuple[Annotated[str, Field(min_length=1, max_length=16)], ...] | None = Some
    description: tuple[Text, ...] | None = Some  # patterns with * and ?, upper and lower case alike

    def first_failing(self, facts: StudyFacts) -> str | None:
        """The name of the first condition that does not hold; None if all hold."""
        present: dict[str, set[str]] = {
            "modality": {text.upper() for text in facts.modalities},
            "body_part": {text.upper() for text in facts.body_parts},
            "site": {facts.site},
            "priority": {facts.priority},
            "ae_title": {facts.calling_ae_title},
        }
        for condition, values in present.items():
            wanted = getattr(self, condition)
            if wanted is not None and values.isdisjoint(wanted):
                return condition
        if self.description is not None and not any(
            fnmatchcase(text.casefold(), pattern.casefold())
            for text in facts.descriptions
            for pattern in self.description
        ):
            return "description"
        return None

    @property
    def is_empty(self) -> bool:
        """Whether it holds for every study."""
        return all(value is None for value in self.__dict__.values())


class Contract(_Part):
    """Minutes from receipt at the gateway to the report, by priority."""

    stat: Minutes
    urgent: Minutes
    routine: Minutes

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.stat <= self.urgent <= self.routine:
            raise ValueError("a more urgent case may not be promised later: stat <= urgent <= routine")
        return self

    def of(self, priority: Priority) -> int:
        """Minutes promised for this priority."""
        return {Priority.STAT: self.stat, Priority.URGENT: self.urgent, Priority.ROUTINE: self.routine}[priority]


class Then(_Part):
    """What happens to a study."""

    specialty: Name
    minutes: Contract
    urgency: Priority | None = None  # at least this urgent, whatever the county asked
    triage: tuple[Code, ...] | None = None  # in place of [triage] modalities; empty: no model is asked
    triage_deadline_s: Annotated[int, Field(gt=0, le=86_400)] | None = None


class Rule(_Part):
    """One rule."""

    name: Name
    zh: Text
    en: Text
    when: When
    then: Then


class Default(_Part):
    """What happens to a study that no rule takes."""

    zh: Text
    en: Text
    then: Then


class Triage(_Part):
    """Which modalities have a model to wait for, and for how long the worklist says so."""

    modalities: tuple[Code, ...]
    deadline_s: Annotated[int, Field(gt=0, le=86_400)]


@dataclass(frozen=True, slots=True)
class Tried:
    """One rule on the way to the decision; `failing` None: it decided."""

    rule_name: str
    failing: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a study, and why."""

    rule_name: str
    rules_version: str
    specialty: str
    priority: Priority
    contract_minutes: int
    ask_models: bool
    triage_deadline_s: int
    zh: str
    en: str
    tried: tuple[Tried, ...]


class Rules(_Part):
    """The whole file. `version` is the digest of its bytes, set by the reader."""

    version: str = ""
    triage: Triage
    default: Default
    rule: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _each_can_decide(self) -> Self:
        names: set[str] = set()
        for index, rule in enumerate(self.rule):
            if rule.name in names or rule.name == DEFAULT_RULE:
                raise ValueError(f"rule {index + 1}: the name {rule.name!r} is taken")
            names.add(rule.name)
            for earlier in self.rule[:index]:
                if earlier.when.is_empty or earlier.when == rule.when:
                    raise ValueError(f"rule {index + 1}: never reached, {earlier.name!r} takes every such study")
        return self

    def explain(self, facts: StudyFacts) -> Decision:
        """Decide about a study and say which rule decided, in both languages."""
        tried: list[Tried] = []
        for rule in self.rule:
            failing = rule.when.first_failing(facts)
            tried.append(Tried(rule.name, failing))
            if failing is None:
                return self._decision(rule.name, rule.zh, rule.en, rule.then, facts, tried)
        tried.append(Tried(DEFAULT_RULE, None))
        return self._decision(DEFAULT_RULE, self.default.zh, self.default.en, self.default.then, facts, tried)

    def _decision(self, name: str, zh: str, en: str, then: Then, facts: StudyFacts, tried: list[Tried]) -> Decision:
        priority = min(facts.priority, then.urgency or facts.priority, key=_BY_URGENCY.index)
        modalities = self.triage.modalities if then.triage is None else then.triage
        minutes = then.minutes.of(priority)
        raised_zh = raised_en = ""
        if priority is not facts.priority:
            raised_zh, raised_en = f"，按规则升为 {priority}", f", raised to {priority}"
        return Decision(
            rule_name=name,
            rules_version=self.version,
            specialty=then.specialty,
            priority=priority,
            contract_minutes=minutes,
            ask_models=not {text.upper() for text in facts.modalities}.isdisjoint(modalities),
            triage_deadline_s=then.triage_deadline_s or self.triage.deadline_s,
            zh=f"规则“{name}”：{zh}；队列 {then.specialty}，{minutes} 分钟内报告{raised_zh}",
            en=f"Rule “{name}”: {en}; queue {then.specialty}, report within {minutes} min{raised_en}",
            tried=tuple(tried),
        )
