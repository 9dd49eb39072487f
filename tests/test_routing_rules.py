"""Routing rules: the shipped file, what conditions mean, and every bad file refused with file, line and reason."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from routing.rules import DEFAULT_RULE, Rules, StudyFacts
from routing.rules_cli import try_rules
from routing.rules_file import load_rules, parse_rules
from storage.errors import ConfigurationError
from storage.vocabulary import Priority

SHIPPED = Path(__file__).parent.parent / "routing" / "rules.toml"

HEAD = """\
[triage]
modalities = ["ECG"]
deadline_s = 300

[default]
zh = "默认"
en = "default"
then = { specialty = "imaging", minutes = { stat = 60, urgent = 240, routine = 1440 } }
"""


def rule(name: str, when: str, then: str = "") -> str:
    return f"""
[[rule]]
name = "{name}"
zh = "规则"
en = "rule"
when = {{ {when} }}
then = {{ specialty = "{name}", minutes = {{ stat = 10, urgent = 20, routine = 30 }}{then} }}
"""


def parse(text: str) -> Rules:
    return parse_rules(text.encode(), "rules.toml")


@pytest.mark.parametrize(
    ("facts", "name", "specialty", "minutes", "asks"),
    [
        (StudyFacts("a", ("ECG",)), "ecg", "ecg", 30, True),
        (StudyFacts("a", ("CR",)), "radiograph", "imaging", 120, True),
        (StudyFacts("a", ("DX",), Priority.STAT), "radiograph", "imaging", 30, True),
        (StudyFacts("a", ("CT",)), "ct-mr", "imaging", 240, False),
        (StudyFacts("a", ("CT",), body_parts=("head",)), "head-ct", "imaging", 60, False),
        (StudyFacts("a", ("CT",), descriptions=("头颅平扫",)), "head-ct-by-description", "imaging", 60, False),
        (StudyFacts("a", ("CT",), Priority.STAT, ("BRAIN",)), "head-ct", "imaging", 30, False),
        (StudyFacts("a", ("US",)), "ultrasound", "ultrasound", 30, False),
        (StudyFacts("a", ("SM",)), "pathology", "pathology", 4320, False),
        (StudyFacts("a", ("OT",)), DEFAULT_RULE, "imaging", 1440, False),
        (StudyFacts("a", ()), DEFAULT_RULE, "imaging", 1440, False),
    ],
)
def test_the_shipped_rules_send_studies_to_their_readers(
    facts: StudyFacts, name: str, specialty: str, minutes: int, asks: bool
) -> None:
    decision = load_rules(SHIPPED).explain(facts)
    assert (decision.rule_name, decision.specialty) == (name, specialty)
    assert (decision.contract_minutes, decision.ask_models) == (minutes, asks)
    assert name in decision.zh and name in decision.en


def test_a_head_ct_is_at_least_urgent_and_says_so() -> None:
    rules = load_rules(SHIPPED)
    raised = rules.explain(StudyFacts("a", ("CT",), body_parts=("HEAD",)))
    assert raised.priority is Priority.URGENT and "raised to urgent" in raised.en
    assert rules.explain(StudyFacts("a", ("CT",), Priority.STAT, ("HEAD",))).priority is Priority.STAT


def test_the_first_rule_whose_conditions_all_hold_decides() -> None:
    rules = parse(
        HEAD
        + rule("both", 'modality = ["CT"], site = ["county-a"]')
        + rule("ct", 'modality = ["CT", "MR"]')
        + rule("sender", 'ae_title = ["CT_ROOM 2"]')
        + rule("stat", 'priority = ["stat"]')
        + rule("words", 'description = ["*chest?ct*"]')
    )

    def name(facts: StudyFacts) -> str:
        return rules.explain(facts).rule_name

    assert name(StudyFacts("county-a", ("CT",))) == "both"
    assert name(StudyFacts("county-b", ("SR", "ct"))) == "ct"
    assert name(StudyFacts("county-b", ("OT",), calling_ae_title="CT_ROOM 2")) == "sender"
    assert name(StudyFacts("county-b", ("OT",), Priority.STAT)) == "stat"
    assert name(StudyFacts("county-b", ("OT",), descriptions=("x", "Low dose CHEST-CT plain"))) == "words"
    decision = rules.explain(StudyFacts("county-b", ("OT",)))
    assert decision.rule_name == DEFAULT_RULE
    assert [(tried.rule_name, tried.failing) for tried in decision.tried] == [
        ("both", "modality"),
        ("ct", "modality"),
        ("sender", "ae_title"),
        ("stat", "priority"),
        ("words", "description"),
        (DEFAULT_RULE, None),
    ]


def test_a_rule_may_say_that_no_model_is_asked_or_for_how_long() -> None:
    rules = parse(
        HEAD
        + rule("quick", 'site = ["county-a"]', ', triage = ["CT"], triage_deadline_s = 20')
        + rule("none", 'site = ["county-b"]', ", triage = []")
    )
    quick = rules.explain(StudyFacts("county-a", ("CT",)))
    assert (quick.ask_models, quick.triage_deadline_s) == (True, 20)
    assert not rules.explain(StudyFacts("county-b", ("ECG",))).ask_models
    assert rules.explain(StudyFacts("county-c", ("ECG",))).ask_models


def test_the_version_is_the_digest_of_the_file() -> None:
    assert parse(HEAD).version == parse(HEAD).version
    assert parse(HEAD).version != parse(HEAD + "\n# changed\n").version


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[triage\n", 1, "Expected"),
        (HEAD + "\n[[rule]]\nname = 'a\n", 11, "Expected"),
        (HEAD.replace("300", "0"), 3, "greater than 0"),
        (HEAD.replace("routine = 1440", "routine = 30"), 8, "stat <= urgent <= routine"),
        (HEAD.replace('specialty = "imaging", ', ""), 8, "Field required"),
        (HEAD + "\nextra = 1\n", 10, "Extra inputs"),
        ("version = '3'\n" + HEAD, 1, "digest"),
        (HEAD + rule("a", 'modality = ["CT"]') + rule("b", 'modalty = ["CT"]'), 21, "Extra inputs"),
        (HEAD + rule("a", 'modality = ["CT"]') + rule("b", 'modality = ["c t!"]'), 21, "match pattern"),
        (HEAD + rule("a", "modality = []"), 14, "at least 1 item"),
        (HEAD + rule("a", 'priority = ["soon"]'), 14, "'stat', 'urgent' or 'routine'"),
        (HEAD + rule("A b", 'modality = ["CT"]'), 11, "match pattern"),
        (HEAD + rule("a", 'modality = ["CT"]') + rule("a", 'modality = ["MR"]'), 18, "is taken"),
        (HEAD + rule("default", 'modality = ["CT"]'), 11, "is taken"),
        (HEAD + rule("a", 'modality = ["CT"]') + rule("b", 'modality = ["CT"]'), 18, "never reached"),
        (HEAD + rule("a", "") + rule("b", 'modality = ["CT"]'), 18, "never reached"),
        (HEAD + rule("a", 'modality = ["CT"]', ', urgency = "high"'), 15, "'stat', 'urgent' or 'routine'"),
        (HEAD.partition("[default]")[0], 1, "default: Field required"),
        (
            HEAD + "[[rule]]\nname = 'a'\nzh = 'x'\nen = 'x'\n[rule.when]\nmodality = ['CT']\n[rule.then]\n"
            "specialty = 'x'\n[rule.then.minutes]\nstat = 'x'\nurgent = 2\nroutine = 3\n",
            18,
            "valid integer",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_the_reason(text: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    first = caught.value.reason.splitlines()[0]
    assert first.startswith(f"rules.toml:{line}: "), first
    assert reason in first


def test_every_fault_of_a_file_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(HEAD.replace("300", "0") + rule("a", "modality = []") + rule("b", 'sight = ["x"]'))
    lines = [fault.split(":")[1] for fault in caught.value.reason.splitlines()]
    assert lines == ["3", "14", "21"]


def test_a_file_in_another_encoding_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="6: not UTF-8"):
        parse_rules(HEAD.encode("gb18030"), "rules.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_rules(tmp_path / "nowhere.toml")


text = st.text(max_size=20)


@given(
    facts=st.builds(
        StudyFacts,
        site=text,
        modalities=st.lists(st.sampled_from(["CT", "MR", "ECG", "DX", "US", "SM", "", "?"])).map(tuple),
        priority=st.sampled_from(Priority),
        body_parts=st.lists(text).map(tuple),
        calling_ae_title=text,
        descriptions=st.lists(text).map(tuple),
    )
)
def test_every_study_gets_a_decision_that_is_never_less_urgent_than_asked(facts: StudyFacts) -> None:
    decision = load_rules(SHIPPED).explain(facts)
    assert list(Priority).index(decision.priority) <= list(Priority).index(facts.priority)
    assert decision.contract_minutes > 0
    assert decision.tried[-1].failing is None


def test_rules_can_be_tried_on_the_command_line(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    assert try_rules(SHIPPED, site="county-a", modality=["CT"], description=["Head"], console=console) == 0
    assert "head-ct-by-description" in out.getvalue() and "60 分钟内报告" in out.getvalue()
    bad = tmp_path / "bad.toml"
    bad.write_text(HEAD.replace("300", "0"))
    assert try_rules(bad, site="county-a", modality=["CT"], console=console) == 2
    assert f"{bad}:3: triage.deadline_s" in out.getvalue()
