"""The model interface: cards, triage.toml, digests, lazy loading, and the figures that evidence is made of.

Left out: whether a model is any good. That is in the evidence each card carries, and is measured again (where the
shared data is at hand) in test_triage_ecg.py and test_triage_cxr.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ai_triage.evidence import write_evidence
from ai_triage.facts import age_years, view_of
from ai_triage.interface import Accepts, StudyFacts
from ai_triage.registry import DEFAULT_DIRECTORY, load_model, load_models
from ai_triage.statistics import (
    area_under_curve,
    auc_with_interval,
    calibration_error,
    fitted_temperature,
    sensitivity_specificity,
    threshold_at_specificity,
)
from storage.errors import ConfigurationError
from tests.triage_material import computed_radiograph


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A directory of models that a test may spoil."""
    return Path(shutil.copytree(DEFAULT_DIRECTORY, tmp_path / "models"))


def _spoil(copied: Path, before: str, after: str, model: str = "cxr_pneumonia") -> None:
    path = copied / model / "triage.toml"
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_the_two_models_that_come_with_us_load_with_evidence_and_are_research_only() -> None:
    models = load_models()
    assert [model.card.name for model in models] == ["cxr_pneumonia", "ecg_rhythm"]
    for model in models:
        card = model.card
        assert card.research_only
        assert len(card.sha256) == 64
        assert all(0 < point.threshold < 1 for point in card.operating_points)
        assert any("auc" in table and "auc_95" in table for table in card.evidence)


def test_the_chest_model_shows_the_baselines_beside_its_own_figure() -> None:
    (card,) = (model.card for model in load_models() if model.card.name == "cxr_pneumonia")
    measures = {table["measure"]: table for table in card.evidence}
    assert "baseline: size of the JPEG file alone" in measures
    assert "baseline: standard deviation of the pixels alone" in measures
    assert (
        measures["pneumonia, images as they are"]["auc_95"][0]
        > measures["baseline: size of the JPEG file alone"]["auc_95"][1]
    )


def test_loading_the_models_imports_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys, ai_triage.actors; from ai_triage.registry import load_models; load_models();"
        "sys.exit(' '.join({'torch', 'monai', 'onnxruntime', 'openecg'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_weights_of_all_models_are_small_enough_to_commit() -> None:
    sizes = [path.stat().st_size for path in DEFAULT_DIRECTORY.rglob("*") if path.is_file()]
    assert sum(sizes) <= 16 * 1024 * 1024


def test_changed_weights_are_refused_before_anything_of_them_is_used(copied: Path) -> None:
    with (copied / "cxr_pneumonia" / "models" / "model.pt").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ConfigurationError, match=r"files_sha256.*another file is another model"):
        load_model(copied / "cxr_pneumonia")


def test_a_file_added_beside_the_weights_is_refused(copied: Path) -> None:
    (copied / "ecg_rhythm" / "extra.py").write_text("print()")
    with pytest.raises(ConfigurationError, match="files_sha256"):
        load_model(copied / "ecg_rhythm")


def test_a_packaged_weight_file_with_another_digest_is_refused(copied: Path) -> None:
    _spoil(copied, 'path = "models/codec_v6_int8.onnx"', 'path = "models/codec_v5_int8.onnx"', "ecg_rhythm")
    with pytest.raises(ConfigurationError, match=r"codec_v5_int8\.onnx is missing or has another digest"):
        load_model(copied / "ecg_rhythm")


def test_a_model_whose_package_is_not_installed_says_what_to_install(copied: Path) -> None:
    _spoil(copied, 'package = "openecg"', 'package = "no_such_package"', "ecg_rhythm")
    with pytest.raises(ConfigurationError, match=r"no_such_package.*yuanzhen\[triage\]"):
        load_model(copied / "ecg_rhythm")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("threshold = 0.", "threshold = 9.", r"triage\.toml: findings\.0\.threshold: .*less than 1"),
        ('status = "research only"', 'status = "approved"', r"triage\.toml: status"),
        ('modalities = ["CR", "DX"]', "modalities = []", r"accepts\.modalities"),
        ('version = "1.0.0"', 'version = "1"', r"triage\.toml: version"),
        ('kind = "monai_chest_radiograph"', 'kind = "pickle"', r"triage\.toml: kind"),
        ("max_instances = 8", "max_instances = 8\nmax_frames = 3", r"accepts\.max_frames: Extra inputs"),
        ("[accepts]", "[accepts", r"triage\.toml: not TOML"),
    ],
)
def test_a_wrong_triage_file_is_refused_with_file_key_and_reason(
    copied: Path, before: str, after: str, said: str
) -> None:
    _spoil(copied, before, after)
    with pytest.raises(ConfigurationError, match=said):
        load_models(copied)


def test_a_directory_without_a_triage_file_is_no_model_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no triage\.toml"):
        load_model(tmp_path)
    with pytest.raises(ConfigurationError, match="no such directory"):
        load_models(tmp_path / "nowhere")
    assert load_models(tmp_path) == ()


def test_two_models_of_one_name_are_refused(copied: Path) -> None:
    shutil.copytree(copied / "ecg_rhythm", copied / "ecg_rhythm_again")
    with pytest.raises(ConfigurationError, match="two models have the same name"):
        load_models(copied)


def test_another_operating_point_is_another_digest(copied: Path) -> None:
    before = load_model(copied / "ecg_rhythm").card.sha256
    _spoil(copied, "minutes_earlier = 15", "minutes_earlier = 16", "ecg_rhythm")
    assert load_model(copied / "ecg_rhythm").card.sha256 != before


def test_evidence_is_written_below_the_marker_and_loads_again(copied: Path) -> None:
    where = copied / "cxr_pneumonia"
    write_evidence(where, [{"measure": "a “quoted” one", "n": 3, "auc": 0.5}], {"temperature": 2.25, "threshold": 0.4})
    card = load_model(where).card
    assert card.evidence == ({"measure": "a “quoted” one", "n": 3, "auc": 0.5},)
    assert card.operating_points[0].threshold == 0.4
    assert card.calibration["temperature"] == 2.25


def test_a_model_is_asked_by_modality_and_body_part() -> None:
    accepts = Accepts(("CR", "DX"), (), body_parts=("CHEST",))
    assert accepts.asks_for(StudyFacts("a", ("CR",), "CHEST"))
    assert accepts.asks_for(StudyFacts("a", ("DX", "SR"), ""))  # a part that is not stated is looked at more closely
    assert not accepts.asks_for(StudyFacts("a", ("CR",), "EXTREMITY"))
    assert not accepts.asks_for(StudyFacts("a", ("CT",), "CHEST"))
    assert not accepts.asks_for(StudyFacts("a", (), ""))


@pytest.mark.parametrize(
    ("age", "accepted"), [(None, False), (0.99, False), (1.0, True), (5.99, True), (6.0, False), (64.0, False)]
)
def test_age_is_an_accepted_input(age: float | None, accepted: bool) -> None:
    suitability = Accepts(("CR",), (), age_years=(1, 6)).age_suits(StudyFacts("a", ("CR",), "CHEST", age))
    assert suitability.accepted is accepted
    assert accepted or "1 to 5 years" in suitability.reason
    assert accepted or "1 至 5 岁" in suitability.reason


def test_an_unknown_age_is_accepted_only_where_the_model_says_so() -> None:
    adults = Accepts(("ECG",), (), age_years=(18, 120), age_may_be_unknown=True)
    assert adults.age_suits(StudyFacts("a", ("ECG",))).accepted
    refused = adults.age_suits(StudyFacts("a", ("ECG",), age_years=0.5))
    assert not refused.accepted
    assert "18 years and older" in refused.reason


@pytest.mark.parametrize(
    ("age", "born", "studied", "years"),
    [
        ("003Y", "", "", 3.0),
        ("018M", "", "", 1.5),
        ("010D", "19400305", "20040826", 10 / 365.25),
        ("", "19400305", "20040826", 64.48),
        ("3 years", "20200101", "20230101", 3.0),
        ("", "2020", "20230101", None),
        ("", "20200231", "20230101", None),
        ("", "20240101", "20230101", None),
        ("", "", "", None),
    ],
)
def test_age_comes_from_the_age_string_or_the_dates_or_is_unknown(
    age: str, born: str, studied: str, years: float | None
) -> None:
    found = age_years(age, born, studied)
    assert found == (None if years is None else pytest.approx(years, abs=0.01))


@pytest.mark.parametrize(
    ("view", "description", "expected"),
    [
        ("AP", "", "AP"),
        ("LL", "", "LATERAL"),
        ("", "Chest PA", "PA"),
        ("", "胸部 侧位", "LATERAL"),
        ("", "胸部后前位", "PA"),
        ("", "CHEST", ""),
        ("RAO", "PA", "RAO"),
    ],
)
def test_the_view_is_what_is_stated_and_never_guessed(view: str, description: str, expected: str) -> None:
    dataset = computed_radiograph(np.zeros((4, 4), np.uint8), view=view)
    dataset.SeriesDescription = description
    assert view_of(dataset) == expected


def test_auc_agrees_with_scikit_learn_with_and_without_ties() -> None:
    rng = np.random.default_rng(3)
    for scores in (rng.normal(size=300), rng.integers(0, 5, 300).astype(float)):
        labels = (rng.random(300) < 0.3).astype(np.int64)
        assert area_under_curve(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    with pytest.raises(ValueError, match="both classes"):
        area_under_curve(np.ones(3, np.int64), np.zeros(3))


def test_an_interval_drawn_by_patient_is_wider_when_patients_repeat() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat((rng.random(60) < 0.5).astype(np.int64), 10)
    scores = labels + np.repeat(rng.normal(0, 1.2, 60), 10)
    images = auc_with_interval(labels, scores, [str(i) for i in range(600)], rounds=300)
    patients = auc_with_interval(labels, scores, [str(i // 10) for i in range(600)], rounds=300)
    assert images.value == patients.value
    assert patients.low < images.low < images.value < images.high < patients.high


def test_a_threshold_keeps_the_specificity_asked_for() -> None:
    rng = np.random.default_rng(5)
    labels = (rng.random(500) < 0.5).astype(np.int64)
    scores = rng.normal(labels, 1.0)
    for wanted in (0.5, 0.9, 0.95):
        sensitivity, specificity = sensitivity_specificity(
            labels, scores, threshold_at_specificity(labels, scores, wanted)
        )
        assert wanted <= specificity < wanted + 0.02
        assert 0 < sensitivity < 1


def test_the_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, 4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    temperature = fitted_temperature(labels, logits * 3)
    assert temperature == pytest.approx(3.0, rel=0.1)
    calm = 1 / (1 + np.exp(-logits * 3 / temperature))
    assert calibration_error(labels, calm) < calibration_error(labels, 1 / (1 + np.exp(-logits * 3)))
