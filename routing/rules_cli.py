"""`yuanzhen rules test`: what the rules file would do with a study that is described on the command line."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from routing.rules import StudyFacts
from routing.rules_file import parse_rules
from storage.errors import ConfigurationError
from storage.vocabulary import Priority


def try_rules(
    rules_file: Path,
    *,
    site: str,
    modality: list[str],
    priority: Priority = Priority.ROUTINE,
    body_part: list[str] | None = None,
    ae_title: str = "",
    description: list[str] | None = None,
    console: Console | None = None,
) -> int:
    """Print each rule tried, the condition it failed on, and the decision in both languages.

    Returns the exit status: 0, or 2 if the file is bad (its file, line and reason are printed).
    """
    out = console or Console()
    facts = StudyFacts(
        site=site,
        modalities=tuple(modality),
        priority=priority,
        body_parts=tuple(body_part or ()),
        calling_ae_title=ae_title,
        descriptions=tuple(description or ()),
    )
    try:
        decision = parse_rules(rules_file.read_bytes(), str(rules_file)).explain(facts)
    except (OSError, ConfigurationError) as error:
        out.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    table = Table("规则 rule", "结果 outcome")
    for tried in decision.tried:
        table.add_row(tried.rule_name, "适用 decides" if tried.failing is None else f"不符 fails on {tried.failing}")
    out.print(table)
    out.print(decision.zh, markup=False, soft_wrap=True)
    out.print(decision.en, markup=False, soft_wrap=True)
    asked = f"询问模型，{decision.triage_deadline_s} 秒 models are asked, for {decision.triage_deadline_s} s"
    out.print(asked if decision.ask_models else "不询问模型 no model is asked", markup=False, soft_wrap=True)
    out.print(f"rules version {decision.rules_version}", markup=False)
    return 0
