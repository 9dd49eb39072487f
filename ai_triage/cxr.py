"""The chest radiograph model: a MONAI bundle with one output, run on one frontal image of a child of 1 to 5 years.

Its last layers are ReLU, global average and one linear unit, so the logit is exactly the mean over the feature map of
the linear unit applied to each cell: the heat map shows that sum's terms, and needs no gradient.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from ai_triage.facts import body_part_of, view_of
from ai_triage.images import grey_image
from ai_triage.interface import ModelCard, StudyFacts, Suitability, TriageResult
from storage.errors import ConfigurationError, MalformedDataSetError

_THREADS = 1  # workers scale by starting more of them


class ChestRadiographModel:
    """A `TriageModel` over a bundle: `configs/inference.json` and `models/model.pt` (a state dictionary, fp16)."""

    def __init__(self, card: ModelCard, directory: Path, packaged: tuple[Path, ...]) -> None:
        """Nothing is loaded until the first run. `packaged` is empty: the bundle is whole in its directory."""
        if packaged:
            raise ConfigurationError(f"{directory}: a MONAI bundle has its weights in its own directory")
        self._card = card
        self._directory = directory
        self._loading = threading.Lock()  # a worker runs several threads
        self._network: Any = None
        self._prepare: Callable[[NDArray[np.float32]], Any] | None = None

    @property
    def card(self) -> ModelCard:
        """Who the model is."""
        return self._card

    def suits(self, facts: StudyFacts, datasets: Sequence[Dataset]) -> Suitability:
        """A frontal chest image of a patient whose age is known and within the evidence."""
        by_age = self._card.accepts.age_suits(facts)
        if not by_age.accepted:
            return by_age
        if not any(self._is_chest(dataset, facts) for dataset in datasets):
            return Suitability(False, "检查部位不是胸部或未注明 / the body part is not the chest, or is not stated")
        if not self._frontal(facts, datasets):
            return Suitability(
                False, "不是正位片，或未注明投照体位 / not a frontal (AP or PA) view, or the view is not stated"
            )
        return Suitability(True)

    def run(self, datasets: Sequence[Dataset]) -> TriageResult:
        """The highest probability among the frontal images, and the heat map of that image. See `TriageModel.run`."""
        import torch

        started = time.monotonic()
        frontal = self._frontal(None, datasets)
        if not frontal:
            raise MalformedDataSetError("No frontal image among the data sets")
        network, prepare = self._loaded()
        best: tuple[float, Dataset, Any] | None = None
        for dataset in frontal:
            with torch.inference_mode():
                features = network.features(prepare(grey_image(dataset))[None])
                logit = float(network.class_layers(features)[0, 0])
            if best is None or logit > best[0]:
                best = (logit, dataset, features[0])
        assert best is not None  # noqa: S101 - frontal is not empty; says so to the type checker
        logit, chosen, features = best
        temperature = float(self._card.calibration["temperature"])
        probability = 1.0 / (1.0 + float(np.exp(-logit / temperature)))
        finding = self._card.operating_points[0].finding(probability)
        return TriageResult(
            findings=(finding,),
            input_uids=(str(chosen.SOPInstanceUID),),
            seconds=time.monotonic() - started,
            heat_map=heat_map(network, features),
        )

    def _is_chest(self, dataset: Dataset, facts: StudyFacts | None) -> bool:
        stated = body_part_of(dataset) or (facts.body_part_examined.upper() if facts else "")
        return stated in self._card.accepts.body_parts

    def _frontal(self, facts: StudyFacts | None, datasets: Sequence[Dataset]) -> list[Dataset]:
        # In run() the study was found suitable: an image that does not state the part is of the study's part.
        return [
            dataset
            for dataset in datasets
            if view_of(dataset) in self._card.accepts.views
            and (self._is_chest(dataset, facts) or (facts is None and not body_part_of(dataset)))
        ]

    def _loaded(self) -> tuple[Any, Callable[[NDArray[np.float32]], Any]]:
        with self._loading:
            if self._network is None or self._prepare is None:
                import torch

                torch.set_num_threads(_THREADS)
                network, self._prepare = read_bundle(self._directory)
                state = torch.load(self._directory / "models" / "model.pt", map_location="cpu", weights_only=True)
                network.load_state_dict({name: value.to(_kind(value)) for name, value in state.items()})
                self._network = network.eval()
            return self._network, self._prepare


def _kind(value: Any) -> Any:
    import torch

    return torch.float32 if value.is_floating_point() else value.dtype  # stored as fp16, computed as fp32


def read_bundle(directory: Path) -> tuple[Any, Callable[[NDArray[np.float32]], Any]]:
    """The bundle's network (weights not loaded) and preprocessing, float32 [H,W] to tensor [1,S,S]."""
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_config(directory / "configs" / "inference.json")
    return parser.get_parsed_content("network_def"), parser.get_parsed_content("preprocessing")


def heat_map(network: Any, features: Any) -> NDArray[np.float32]:
    """What each cell of the feature map [C,h,w] adds to the logit, negatives cut, float32 [h,w] scaled to 0..1."""
    import torch

    with torch.inference_mode():
        weight = network.class_layers.out.weight[0]
        terms = torch.einsum("c,chw->hw", weight, torch.relu(features)).clamp(min=0).numpy()
    top = float(terms.max())
    return np.asarray(terms / top if top > 0 else terms, dtype=np.float32)
