"""Every recipe of the paper trains its own network, on a handful of rows in its data's format."""

from dataclasses import replace

import pytest
import torch
from churn_trainer.data import load_dataset
from churn_trainer.loop import fit
from churn_trainer.members import build_members
from churn_trainer.named_studies import recipes
from PIL import Image

# As on the Hugging Face Hub: columns, classes, test part, pixels, and the folder of its variant.
FORMATS = {
    "cifar10": ("img", "label", 10, "test", 32, "plain_text"),
    "cifar100": ("img", "fine_label", 100, "test", 32, "cifar100"),
    "svhn": ("image", "label", 10, "test", 32, "cropped_digits"),
    "imagenet": ("image", "label", 1000, "validation", 300, "data"),
    "inaturalist2018": ("image", "label", 8142, "validation", 300, "data"),
}
ROWS = {"train": 4, "test": 2}


def write_parquet(root, name):
    """A few rows of noise as the data set's own Parquet files."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    image, label, classes, test, pixels, folder = FORMATS[name]
    labels = datasets.ClassLabel(num_classes=classes)
    features = datasets.Features({image: datasets.Image(), label: labels})
    generator = torch.Generator().manual_seed(0)
    (root / folder).mkdir()
    for part, count in (("train", ROWS["train"]), (test, ROWS["test"])):
        noise = torch.randint(256, (count, pixels, pixels, 3), generator=generator).byte()
        rows = {
            image: [Image.fromarray(one.numpy()) for one in noise],
            label: [classes - 1 - row for row in range(count)],
        }
        part_rows = datasets.Dataset.from_dict(rows, features=features)
        part_rows.to_parquet(root / folder / f"{part}-00000-of-00001.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(recipes()))
def test_a_recipe_trains(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    study = recipes()[name]
    write_parquet(tmp_path, study.data.name)
    (variant,) = (one for one in study.methods if one.name == "skl-entropy")
    wanted = study.run(variant, 0, 0)
    run = replace(
        wanted,
        data=replace(wanted.data, path=str(tmp_path)),
        optimisation=replace(wanted.optimisation, epochs=1, batch_rows=4),
    )
    # Into no folder: of so few rows a trained network may well predict one class, which `train`
    # would record as diverged.
    told = []
    trained = fit([run], load_dataset(run.data), on_epoch=told.append)
    classes = FORMATS[study.data.name][2]
    assert trained.diverged == {}
    assert len(told) == 1
    assert float(told[0].cross_entropy) > 0.5
    assert trained.logits.shape == (1, ROWS["test"], classes)
    assert trained.logits.isfinite().all()
    assert trained.labels.tolist() == [[classes - 1 - row for row in range(ROWS["test"])]]
    before = build_members([run], (3, *[run.data.crop_size or 32] * 2), classes)
    for one, other in zip(trained.members.parameters(), before.parameters(), strict=True):
        assert not torch.equal(one, other)
