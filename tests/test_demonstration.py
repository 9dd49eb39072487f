"""The main job, end to end: real studies through a real stack of its own, as `yuanzhen demo --json` does it.

Left out: the same under SIGKILL (`yuanzhen demo --chaos`), whose length is up to chance.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import assets

ROOT = Path(__file__).resolve().parent.parent


def test_real_studies_go_the_whole_way_and_every_fact_about_them_holds(tmp_path: Path) -> None:
    if not (ROOT / assets.CACHE / "assets" / "complete.txt").exists():
        pytest.skip("set-up has not run here: make setup")
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "demo", "--json"],
        cwd=ROOT,
        env={**os.environ, "YUANZHEN_VAR_DIR": str(tmp_path / "var")},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    assert facts["ok"] and not facts["problems"]
    assert all(study["digests_equal"] and study["events_in_chain"] for study in facts["studies"])
    assert facts["report"]["signature_valid"] and facts["report"]["covers_whole_document"]
    moved = [study["label"] for study in facts["studies"] if study["case"]["due_at"] < study["case"]["contract_due_at"]]
    assert moved == ["12-lead ECG, AF"]
    outcomes = {study["label"]: study["case"]["triage"] for study in facts["studies"]}
    assert outcomes["chest CR"] == "not_for_model", "an adult is outside the evidence of the chest model"
    assert outcomes["head CT"] == "no_model"
