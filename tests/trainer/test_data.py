"""Data sets, their files and their splits."""

import sys
import time

import pytest
import torch
from churn_trainer.config import Data, Optimisation, Run, Synthetic
from churn_trainer.data import DATASETS, digits, hold_out, images, load_dataset, split_rows
from churn_trainer.data.dataset import Dataset
from image_files import colour_of, picture, write_folder
from PIL import Image
from small_study import batches

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


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("digits", "train_part"),
        ("gaussian", "skip_broken"),
        ("folder", "label"),
        ("folder", "image"),
    ],
)
def test_settings_that_a_data_set_has_no_use_for_are_refused(tmp_path, name, setting):
    write_folder(tmp_path)
    value = True if setting == "skip_broken" else "x"
    data = Data(name=name, path=str(tmp_path), image_size=8, **{setting: value})
    with pytest.raises(
        ValueError, match=rf"data.{setting} must be left out of {name}, .*; drop it"
    ):
        load_dataset(data)


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


def folder(path, **settings):
    return load_dataset(Data(name="folder", path=str(path), image_size=8, **settings))


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


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "testing"), ("TRAIN", "val"), ("train", "Valid")],
)
def test_parts_are_recognised_however_they_are_written(tmp_path, train, test):
    write_folder(tmp_path / train)
    write_folder(tmp_path / test, count=2)
    dataset = folder(tmp_path)
    assert (dataset.classes, dataset.test_start, len(dataset.labels)) == (2, 6, 10)


def test_of_several_parts_to_test_on_test_goes_first_and_any_can_be_chosen(tmp_path):
    for name, count in (("train", 3), ("val", 2), ("test", 1), ("fold 7", 4)):
        write_folder(tmp_path / name, count=count)
    sizes = {test: len(folder(tmp_path, test_part=test).labels) for test in (None, "val", "fold 7")}
    assert sizes == {None: 8, "val": 10, "fold 7": 14}
    dataset = folder(tmp_path, train_part="fold 7", test_part="train")
    assert (dataset.test_start, len(dataset.labels)) == (8, 14)
    with pytest.raises(ValueError, match=r"data.train_part must be a folder of .*, got 'all'; it"):
        folder(tmp_path, train_part="all")
    with pytest.raises(
        ValueError, match=r"another part than data.train_part, got '.*train' for both"
    ):
        folder(tmp_path, train_part="train", test_part="train")


@pytest.mark.parametrize("names", [("trainset", "testset"), ("fold 1", "fold 2", "fold 3")])
def test_parts_of_other_names_do_not_become_classes(tmp_path, names):
    for name in names:
        write_folder(tmp_path / name)
    message = r"must be classes, got .*, each with 'cat' and 'dog' in it, like parts; name two with"
    with pytest.raises(ValueError, match=message):
        folder(tmp_path)
    dataset = folder(tmp_path, train_part=names[0], test_part=names[1])
    assert (dataset.classes, dataset.test_start) == (2, 6)


def test_folders_with_the_names_of_parts_can_be_said_to_be_classes(tmp_path):
    for name in ("train", "bus"):
        write_folder(tmp_path / name, classes=("front", "side"))
    with pytest.raises(
        ValueError, match=r"or neither, got .*; a training part '.' says that all a"
    ):
        folder(tmp_path)
    assert folder(tmp_path, train_part=".").classes == 2
    (tmp_path / "train").rename(tmp_path / "tram")
    with pytest.raises(
        ValueError, match=r"like parts; .* say data.train_part '.' if they are clas"
    ):
        folder(tmp_path)
    assert folder(tmp_path, train_part=".").classes == 2


def test_a_class_that_is_a_link_to_nothing_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cow").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cow must lead to a folder, got a broken link; mend or"):
        folder(tmp_path)


def test_classes_may_have_folders_of_their_own(tmp_path):
    for name, inside in (("cat", ("front", "side")), ("dog", ("front", "back"))):
        write_folder(tmp_path / name, classes=inside)
    assert folder(tmp_path).classes == 2


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_file_in_both_parts_is_refused(tmp_path, link):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    path = tmp_path / "test" / "dog" / "other.png"
    getattr(path, link)(tmp_path / "train" / "dog" / "1.png")
    with pytest.raises(
        ValueError, match=r"share no file, got .*test/dog/other.png in both; remove"
    ):
        folder(tmp_path)


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
    with pytest.raises(ValueError, match=r"cat/0.png is gone; it was changed since .*: restore it"):
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

    with pytest.raises(ValueError, match=r"must be a folder of images, got none; name the folder"):
        load("")
    with pytest.raises(ValueError, match=r"got '.*nowhere', which is no folder; name"):
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
    write_folder(tmp_path / "both" / "Train")
    write_folder(tmp_path / "both" / "training")
    with pytest.raises(ValueError, match=r"one folder for a part, got Train and training; say whi"):
        load(tmp_path / "both")
    write_folder(tmp_path / "half" / "test", classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"same classes, got 2 and 2; in one only: cow, dog"):
        load(tmp_path / "half")
    bad = write_folder(tmp_path / "bad") / "cat" / "1.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1.png must be an image, got something else; remove"):
        load(tmp_path / "bad")


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


def test_torchvision_is_not_needed():
    assert "torchvision" not in sys.modules


def test_every_data_set_says_what_it_is():
    assert all(description for description, _ in DATASETS.values())
