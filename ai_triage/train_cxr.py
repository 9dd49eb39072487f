"""Trains the chest radiograph model of `models/cxr_pneumonia` from scratch; `eval_cxr.py` then measures and writes it.

    python -m ai_triage.train_cxr ARCHIVE OUT [--epochs 18] [--seed 1]

ARCHIVE is the tar of Kermany et al. 2018; OUT receives `last.pt` after each epoch, from which a second run of the same
command goes on, and `log.jsonl`, a line per epoch. Two cores take one to two minutes an epoch. The network and the
preprocessing are read from the bundle's own `configs/inference.json`, so training and inference cannot drift apart.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ai_triage.cxr import read_bundle
from ai_triage.cxr_data import Radiograph, augmented, of_split, read_radiographs
from ai_triage.statistics import area_under_curve

BUNDLE = Path(__file__).parent / "models" / "cxr_pneumonia"

BATCH = 32
PEAK_LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.03
WARM_UP_SHARE = 0.1

Sample = tuple[torch.Tensor, float]


class Augmented(Dataset[Sample]):
    """The training images, changed anew in each epoch; seed, epoch and index decide the change, not the worker."""

    def __init__(self, radiographs: list[Radiograph], prepare: Callable[[Any], torch.Tensor], seed: int) -> None:
        """`prepare` is the bundle's preprocessing, [H,W] to [1,128,128]."""
        self.radiographs, self.prepare, self.seed, self.epoch = radiographs, prepare, seed, 0

    def __len__(self) -> int:
        """How many images."""
        return len(self.radiographs)

    def __getitem__(self, index: int) -> Sample:
        """One changed image and its label."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        radiograph = self.radiographs[index]
        return self.prepare(augmented(radiograph.pixels, rng)), float(radiograph.label)


def logits_of(network: torch.nn.Module, prepared: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Logits [N] float64 of prepared images [N,1,128,128]."""
    network.eval()
    with torch.inference_mode():
        parts = [network(part)[:, 0].float() for part in torch.split(prepared, 64)]
    return torch.cat(parts).double().numpy()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    warm_up = WARM_UP_SHARE * steps
    if step < warm_up:
        return PEAK_LEARNING_RATE * (step + 1) / warm_up
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(archive: Path, out: Path, *, epochs: int, seed: int, threads: int) -> None:
    """Trains for `epochs` epochs, going on from OUT/last.pt where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    network, prepare = read_bundle(BUNDLE)
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    radiographs = read_radiographs(archive)
    learn, validate = of_split(radiographs, "train"), of_split(radiographs, "validation")
    dataset = Augmented(learn, prepare, seed)
    held = torch.stack([prepare(radiograph.pixels.astype(np.float32)) for radiograph in validate])
    held_labels = np.array([radiograph.label for radiograph in validate])
    print(f"{len(learn)} images to learn from, {len(validate)} to validate on", flush=True)

    first = 0
    checkpoint = out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["epochs_done"])
        print(f"going on after epoch {first}", flush=True)
    batches = len(learn) // BATCH
    for epoch in range(first, epochs):
        started = time.monotonic()
        dataset.epoch = epoch
        order = torch.Generator().manual_seed(seed * 1000 + epoch)
        loader = DataLoader(dataset, BATCH, shuffle=True, generator=order, num_workers=1, drop_last=True)
        network.train()
        total = 0.0
        for index, (images, labels) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * batches + index, epochs * batches)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(images.to(memory_format=torch.channels_last))[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            total += float(loss.detach())
        auc = area_under_curve(held_labels, logits_of(network, held))
        line = {
            "epoch": epoch + 1,
            "loss": round(total / batches, 4),
            "validation_auc": round(auc, 4),
            "seconds": round(time.monotonic() - started, 1),
        }
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
        # Written beside and renamed: a run killed while saving goes on from the epoch before.
        partial = out / "last.partial"
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs_done": epoch + 1}
        torch.save(state, partial)
        partial.replace(checkpoint)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seed", type=int, default=1)
    # One thread beside one loader process: on a shared machine two threads wait for each other more than they compute.
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    train(
        arguments.archive,
        arguments.out,
        epochs=arguments.epochs,
        seed=arguments.seed,
        threads=arguments.threads,
    )


if __name__ == "__main__":
    main()
