"""Logs say what happened and to which row; an exception's text, which may quote a patient, stays out."""

import json

import pytest
import structlog

from storage import logs


def test_an_unexpected_error_is_logged_with_its_type_and_place_and_without_its_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("test")
    log = structlog.get_logger().bind()
    try:
        raise ValueError("Zhang^San is not a number")
    except ValueError:
        log.exception("job.bug", job_id=7)
    line = capsys.readouterr().out
    facts = json.loads(line)
    assert (facts["action"], facts["job_id"], facts["error"]) == ("job.bug", 7, "ValueError")
    assert any("test_logs.py" in frame for frame in facts["frames"])
    assert "Zhang" not in line
    structlog.reset_defaults()
