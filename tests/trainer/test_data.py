"""Data sets, their files and their splits."""

import importlib
import io
import pickle
import sys
import time

import pytest
import torch
from churn_trainer.config import Data, Optimisation, Run, Synthetic
from churn_trainer.data import DATASETS, digits, hold_out, images, load_dataset, split_rows
from churn_trainer.data.dataset import Dataset
from PIL import Image
from small_study import batches


def picture(colour, width=32, height=32):
    return Image.new("RGB", (width, height), colour)


def colour_of(label, index):
    return (20 * label, index, 255 - index)


# Digits and splits --------------------------------------------------------------------------------


def test_digits_are_the_bundled_images():
    dataset = digits()
    rows = dataset.fetch(torch.arange(1797))
    assert rows.shape == (1797, 1, 8, 8)
    assert rows.dtype == torch.float32
    assert dataset.labels.unique().tolist() == list(range(dataset.classes)) == list(range(10))


def test_splits_are_stratified_disjoint_and_their_own():
    dataset, data = digits(), Data(train_rows=100)
    parts = [split_rows(dataset, data, seed) for seed in range(3)]
    for train, test in parts:
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(1797))
        assert len(train) == 100
        assert ((dataset.labels[train].bincount(minlength=10) - 10).abs() <= 1).all()
    assert not torch.equal(parts[0][0], parts[1][0])
    assert torch.equal(split_rows(dataset, data, 1)[0], parts[1][0])
    assert len(split_rows(dataset, Data(), 0)[0]) == 300


def test_own_test_rows_stay_test_rows():
    data = Data(name="prototypes", synthetic=Synthetic(train_rows=100, test_rows=40))
    dataset = load_dataset(data)
    train, test = split_rows(dataset, data, 3)
    assert (train.tolist(), test.tolist()) == (list(range(100)), list(range(100, 140)))
    few, same = split_rows(dataset, Data(train_rows=50), 3)
    assert torch.equal(same, test)
    assert few.max() < 100
    assert (dataset.labels[few].bincount() == 5).all()


@pytest.mark.parametrize("rows", [9, 1788])
def test_a_split_that_leaves_a_class_out_is_refused(rows):
    message = rf"train_rows must be in \[10, 1787\], got {rows}; every class needs rows on both"
    with pytest.raises(ValueError, match=message):
        split_rows(digits(), Data(train_rows=rows), 0)


def test_a_class_of_one_row_cannot_be_split():
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 2])
    dataset = Dataset("x", rows, 3, (1,), lambda rows: rows[:, None].float(), is_image=False)
    with pytest.raises(ValueError, match=r"must leave every class rows on both .*; remove classes"):
        split_rows(dataset, Data(train_rows=5), 0)


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, 0, 1]])
def test_labels_out_of_range_are_refused(labels):
    message = rf"labels of x must be in \[0, 2\), got {min(labels)} to {max(labels)}; rows without"
    with pytest.raises(ValueError, match=message):
        Dataset("x", torch.tensor(labels), 2, (1,), lambda rows: rows, is_image=False)


def test_unknown_data_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"data.name must be one of digits, .* you mean 'cifar10'"):
        load_dataset(Data(name="cifar"))
    with pytest.raises(ValueError, match=r"got '0000'; `churn-train data` describes them"):
        load_dataset(Data(name="0000"))


# Synthetic ----------------------------------------------------------------------------------------


def test_multi_view_rows_show_their_features_in_two_patches_each():
    settings = Synthetic(
        classes=4, dimension=16, noise=0, off_class=0, single_view_share=0.5, train_rows=400
    )
    dataset = load_dataset(Data(name="multi-view", synthetic=settings))
    rows = dataset.fetch(torch.arange(1400))
    assert rows.shape == (1400, settings.patches, 16)
    energy = rows.sum(dim=1).norm(dim=1)
    shown = (rows.norm(dim=2) > 0).sum(dim=1)
    assert set(shown.tolist()) == {2, 4}
    assert float((shown == 2).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert ((energy[shown == 2] >= 1 - 1e-5) & (energy[shown == 2] < 2 + 1e-5)).all()
    # One class's rows span its two features; those of different classes are orthogonal.
    summed = rows.sum(dim=1)
    for label in range(4):
        own, others = summed[dataset.labels == label], summed[dataset.labels != label]
        assert torch.linalg.matrix_rank(own, rtol=1e-4) == 2
        assert float((own @ others.T).abs().max()) < 1e-4


def test_multi_view_s_other_patches_hold_weak_features_of_other_classes():
    settings = Synthetic(classes=3, dimension=8, noise=0, off_class=0.4, single_view_share=0)
    rows = load_dataset(Data(name="multi-view", synthetic=settings)).fetch(torch.arange(2000))
    strengths = rows.norm(dim=2).sort(dim=1).values
    assert float(strengths.min()) >= 0
    weak = (rows.norm(dim=2) < 0.4).sum(dim=1)
    assert (weak >= settings.patches - 4).all()


def test_multi_view_needs_room_for_its_features():
    settings = Synthetic(classes=10, dimension=19)
    with pytest.raises(ValueError, match=r"dimension must be at least 20, .* got 19; raise it or"):
        load_dataset(Data(name="multi-view", synthetic=settings))


def test_gaussian_inputs_are_normal_and_their_labels_a_function_without_noise():
    settings = Synthetic(classes=5, dimension=20, noise=0, train_rows=3000)
    dataset = load_dataset(Data(name="gaussian", synthetic=settings))
    rows = dataset.fetch(torch.arange(4000))
    assert float(rows.mean()) == pytest.approx(0, abs=0.02)
    assert float(rows.std()) == pytest.approx(1, abs=0.02)
    assert dataset.labels.unique().numel() == 5
    noisy = load_dataset(Data(name="gaussian", synthetic=Synthetic(5 - 5, 5, 20, 3000, noise=2.0)))
    assert torch.equal(noisy.fetch(torch.arange(9)), rows[:9])
    changed = float((noisy.labels != dataset.labels).float().mean())
    assert 0.2 < changed < 0.9


def test_prototypes_have_thousands_of_classes_and_equal_shares():
    settings = Synthetic(classes=3000, dimension=8, noise=0, train_rows=6000, test_rows=3000)
    dataset = load_dataset(Data(name="prototypes", synthetic=settings))
    assert (dataset.labels[:6000].bincount() == 2).all()
    rows = dataset.fetch(torch.arange(9000))
    order = dataset.labels.argsort()
    assert torch.equal(rows[order].view(3000, 3, 8)[:, 0], rows[order].view(3000, 3, 8)[:, 2])


@pytest.mark.parametrize("name", ["multi-view", "gaussian", "prototypes"])
def test_drawn_data_follow_from_their_seed(name):
    one, same, other = (
        load_dataset(Data(name=name, synthetic=Synthetic(seed=seed))).fetch(torch.arange(5))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# Image folders ------------------------------------------------------------------------------------


def write_folder(root, classes=("cat", "dog"), count=3, width=32, height=32, suffix="png"):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(colour_of(label, index), width, height).save(root / name / f"{index}.{suffix}")
    return root


def test_a_folder_of_images_by_class(tmp_path):
    write_folder(tmp_path)
    dataset = load_dataset(Data(name="folder", path=str(tmp_path), image_size=32))
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.shape == (3, 32, 32)
    assert dataset.test_start == 0
    rows = dataset.fetch(torch.tensor([4, 0]))
    assert rows.dtype == torch.uint8
    assert rows[:, :, 5, 7].tolist() == [list(colour_of(1, 1)), list(colour_of(0, 0))]


def test_a_folder_with_its_own_test_part(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=2, suffix="jpeg")
    data = Data(name="folder", path=str(tmp_path), image_size=16)
    dataset = load_dataset(data)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert split_rows(dataset, data, 0)[1].tolist() == [6, 7, 8, 9]
    assert dataset.fetch(torch.arange(10)).shape == (10, 3, 16, 16)


def test_images_too_many_for_memory_are_read_when_used(tmp_path, monkeypatch):
    write_folder(tmp_path, count=9)
    data = Data(name="folder", path=str(tmp_path), image_size=8, flip=True)
    early = load_dataset(data)
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    late = load_dataset(data)
    assert (early.in_memory, late.in_memory) == (True, False)
    rows = torch.tensor([5, 2])
    assert torch.equal(late.fetch(rows), early.fetch(rows))
    # Minibatches that are read ahead are the ones that are asked for, in whatever order.
    run = Run(data=data, optimisation=Optimisation(batch_rows=4))
    one, other = batches(run, dataset=early), batches(run, dataset=late)
    for step in (0, 1, 2, 7, 3, 4):
        for part, same in zip(one.train(step), other.train(step), strict=True):
            assert torch.equal(torch.as_tensor(part), torch.as_tensor(same))
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(FileNotFoundError):
        late.fetch(torch.tensor([0]))


def test_squares_keep_the_middle_and_small_ones_their_pixels():
    left, right = picture((200, 0, 0), 20, 40), picture((0, 0, 200), 20, 40)
    wide = Image.new("RGB", (80, 40))
    wide.paste(left, (0, 0))
    wide.paste(picture((0, 100, 0), 40, 40), (20, 0))
    wide.paste(right, (60, 0))
    square = images.to_square(wide, 20)
    assert square.shape == (3, 20, 20)
    assert square[1].min() > 60  # only the middle is left
    noise = torch.randint(256, (6, 6, 3), generator=torch.Generator().manual_seed(0)).byte()
    same = images.to_square(Image.fromarray(noise.numpy()), 6)
    assert torch.equal(torch.from_numpy(same.copy()), noise.permute(2, 0, 1))
    grey = images.to_square(Image.new("L", (6, 6), 9), 6)
    assert grey.shape == (3, 6, 6)
    assert (grey == 9).all()


def test_wrong_folders_are_explained(tmp_path):
    def load(path, size=8):
        return load_dataset(Data(name="folder", path=str(path), image_size=size))

    with pytest.raises(ValueError, match=r"data.path must be a folder of images, got ''; it needs"):
        load("")
    with pytest.raises(ValueError, match=r"data.path must be a folder of images, got '.*nowhere'"):
        load(tmp_path / "nowhere")
    write_folder(tmp_path / "good")
    with pytest.raises(ValueError, match=r"image_size must be above 0 for a folder, got 0; say"):
        load(tmp_path / "good", size=0)
    write_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(ValueError, match=r"folder for each of two classes or more, got 1; is it"):
        load(tmp_path / "one")
    (tmp_path / "good" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold images of its class, got none in 'empty'"):
        load(tmp_path / "good")
    write_folder(tmp_path / "half" / "train")
    with pytest.raises(ValueError, match=r"must have train/ and one of test, .* or neither, got"):
        load(tmp_path / "half")
    write_folder(tmp_path / "half" / "test", classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"same classes, got 2 and 2; in one only: cow, dog"):
        load(tmp_path / "half")
    bad = write_folder(tmp_path / "bad") / "cat" / "1.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1.png must be an image, got something else; remove"):
        load(tmp_path / "bad")


# Hugging Face datasets ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A data set of CIFAR-10's columns, in both formats that `datasets` writes."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("hub")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class {label}" for label in range(10)]),
        }
    )

    def part(count):
        rows = {
            "img": [picture(colour_of(row % 10, row)) for row in range(count)],
            "label": [row % 10 for row in range(count)],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    parts = datasets.DatasetDict({"train": part(40), "test": part(20)})
    parts.save_to_disk(root / "arrow")
    (root / "parquet").mkdir()
    for name, rows in parts.items():
        rows.to_parquet(root / "parquet" / f"{name}-00000-of-00001.parquet")
    return root


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_local_hugging_face_folder(cifar, kind, hub_cache):
    data = Data(name="cifar10", path=str(cifar / kind))
    dataset = load_dataset(data)
    assert dataset.shape == (3, 32, 32)
    assert dataset.classes == 10
    train, test = split_rows(dataset, data, 0)
    assert (len(train), len(test)) == (40, 20)
    rows = torch.tensor([3, 45])
    assert dataset.labels[rows].tolist() == [3, 5]
    assert dataset.fetch(rows)[:, :, 9, 9].tolist() == [
        list(colour_of(3, 3)),
        list(colour_of(5, 5)),
    ]


def test_of_several_variants_in_a_folder_the_right_one_is_read(cifar, hub_cache, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(str(cifar / "arrow")).rename_column("img", "image")
    for variant, count in (("cropped_digits", 12), ("full_numbers", 5)):
        (tmp_path / "svhn" / variant).mkdir(parents=True)
        for name, rows in parts.items():
            some = rows.select(range(count))
            some.to_parquet(tmp_path / "svhn" / variant / f"{name}-00000-of-00001.parquet")
    dataset = load_dataset(Data(name="svhn", path=str(tmp_path / "svhn")))
    assert (dataset.test_start, len(dataset.labels)) == (12, 24)


def test_hugging_face_data_that_does_not_fit_is_explained(cifar, hub_cache, tmp_path):
    arrow = str(cifar / "arrow")
    with pytest.raises(
        ValueError, match=r"must have a column 'image', got \['img', 'label'\]; ren"
    ):
        load_dataset(Data(name="svhn", path=arrow))
    with pytest.raises(ValueError, match=r"must have the part 'validation', got \['test', 'train"):
        load_dataset(Data(name="imagenet", path=arrow))
    with pytest.raises(
        ValueError, match=r"data.path must name a folder .* inaturalist2018, got ''"
    ):
        load_dataset(Data(name="inaturalist2018"))
    with pytest.raises(ValueError, match=r"image_size must be above 0 for huggingface, got 0"):
        load_dataset(Data(name="huggingface", path=arrow))
    with pytest.raises(ValueError, match=r"must hold dataset_dict.json, or Parquet .* got neither"):
        load_dataset(Data(name="cifar10", path=str(tmp_path)))
    with pytest.raises(
        ValueError, match=r"data set 'no/such' must be a folder or a name on the Hub"
    ):
        load_dataset(Data(name="cifar10", path="no/such"))


def test_validation_rows_are_drawn_by_class_out_of_the_training_rows():
    rows = split_rows(digits(), Data(), 0)[0]
    kept, held = hold_out(digits(), rows, 50, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == rows.tolist()
    assert held.tolist() == sorted(held.tolist())
    assert digits().labels[held].bincount().tolist() == [5] * 10
    assert torch.equal(hold_out(digits(), rows, 50, 0)[1], held)
    assert not torch.equal(hold_out(digits(), rows, 50, 1)[1], held)
    assert [len(part) for part in hold_out(digits(), rows, 0, 0)] == [300, 0]
    for count in (9, 291):
        message = rf"validation_rows must be 0 or in \[10, 290\], got {count}; every class"
        with pytest.raises(ValueError, match=message):
            hold_out(digits(), rows, count, 0)
    labels = torch.tensor([0, 0, 0, 0, 1])
    lone = Dataset("lone", labels, 2, (1,), labels[:, None].float().__getitem__, is_image=False)
    with pytest.raises(ValueError, match=r"validation_rows 2 must leave every class .*; take more"):
        hold_out(lone, torch.arange(5), 2, 0)


def test_without_a_network_the_hub_s_data_end_at_once(tmp_path, monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    asked = []

    class NoNetwork:
        def head(self, address, timeout):
            asked.append((address, timeout))
            raise OSError("no route")

    monkeypatch.setattr(hub.utils, "get_session", NoNetwork)
    began = time.monotonic()
    message = r"'uoft-cs/cifar10' must be a folder .*; check the name and the connection, or downl"
    with pytest.raises(ValueError, match=message):
        load_dataset(Data(name="cifar10"))
    assert time.monotonic() - began < 5  # it is asked once; its own retries take half a minute
    assert asked == [(hub.constants.ENDPOINT, 5.0)]
    assert not datasets.config.HF_HUB_OFFLINE
    assert not hub.constants.HF_HUB_OFFLINE


def test_a_class_count_that_does_not_match_is_explained(cifar, hub_cache, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(str(cifar / "arrow")).rename_column("label", "fine_label")
    parts.save_to_disk(tmp_path / "renamed")
    with pytest.raises(ValueError, match=r"must have 100 classes, got 10; is it the right data"):
        load_dataset(Data(name="cifar100", path=str(tmp_path / "renamed")))


def test_a_missing_package_names_the_command(monkeypatch):
    def refuse(name, package=None):
        if name == "datasets":
            raise ImportError(name)
        return real(name, package)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", refuse)
    message = r"needs the package datasets, .*; pip install 'churn-kernels\[trainer\]'"
    with pytest.raises(ValueError, match=message):
        load_dataset(Data(name="cifar10"))


class Hostile:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_stranger_s_files_run_no_code(tmp_path, hub_cache):
    witness = tmp_path / "witness"
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    (folder / "train.pkl").write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(ValueError, match=r"must hold dataset_dict.json, or Parquet files"):
        load_dataset(Data(name="cifar10", path=str(folder)))
    write_folder(tmp_path / "images")
    (tmp_path / "images" / "cat" / "0.png").write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(ValueError, match="must be an image, got something else"):
        load_dataset(Data(name="folder", path=str(tmp_path / "images"), image_size=8))
    for name in ("train", "test"):
        (folder / f"{name}.parquet").write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(ValueError, match="that can be read, got"):
        load_dataset(Data(name="cifar10", path=str(folder)))
    assert not witness.exists()
    pickle.load(io.BytesIO(pickle.dumps(Hostile(witness)))).close()
    assert witness.exists()  # it would have shown


def test_torchvision_is_not_needed():
    assert "torchvision" not in sys.modules


def test_every_data_set_says_what_it_is():
    assert all(description for description, _ in DATASETS.values())
