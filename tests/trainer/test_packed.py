"""The files that torchvision downloads, as it leaves them, and hostile ones of their names."""

import gzip
import io
import os
import pickle

import numpy as np
import pytest
import torch
from churn_trainer.config import Data
from churn_trainer.data import load_dataset, packed

ROWS = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
LABELS = [row % 10 for row in range(20)]


def load(name, path, **settings):
    return load_dataset(Data(name=name, path=str(path), **settings))


def old_pickle(content):
    """As Python 2 and numpy 1 wrote CIFAR: texts are bytes, names of modules are older."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core.multi", b"numpy.core.multi")


def write_cifar10(root, write=old_pickle, rows=ROWS, labels=LABELS):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {b"data": rows.reshape(len(rows), -1), b"labels": labels, b"batch_label": b"x"}
        (folder / name).write_bytes(write(batch))
    return folder


def write_idx(root, suffix="", dotted=False, rows=ROWS[:, 0, :28, :28], labels=LABELS):
    root.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for kind, array in (("images", rows), ("labels", np.array(labels, np.uint8))):
            shape = np.array(array.shape, ">u4").tobytes()
            content = bytes([0, 0, 8, array.ndim]) + shape + np.ascontiguousarray(array).tobytes()
            name = f"{part}-{kind}{'.' if dotted else '-'}idx{array.ndim}-ubyte{suffix}"
            (root / name).write_bytes(gzip.compress(content) if suffix else content)
    return root


def write_svhn(root, labels, parts=("train", "test")):
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for part in parts:
        rows = {"X": ROWS.transpose(2, 3, 1, 0), "y": np.array(labels, np.uint8)[:, None]}
        savemat(root / f"{part}_32x32.mat", rows)
    return root


# As downloaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [old_pickle, pickle.dumps])
def test_cifar_10_s_pickles(tmp_path, write):
    folder = write_cifar10(tmp_path, write)
    for path in (tmp_path, folder):
        dataset = load("cifar10", path)
        assert (dataset.test_start, dataset.classes) == (100, 10)
        assert torch.equal(dataset.fetch(torch.arange(100, 120)), torch.from_numpy(ROWS))
        assert dataset.labels.tolist() == LABELS * 6


def test_cifar_100_s_pickles_have_two_kinds_of_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    fine = [*range(80, 100)]
    for name in ("train", "test"):
        batch = {b"data": ROWS.reshape(20, -1), b"fine_labels": fine, b"coarse_labels": LABELS}
        (folder / name).write_bytes(old_pickle(batch))
    assert load("cifar100", tmp_path).labels.tolist() == fine * 2
    coarse = load("cifar100", tmp_path, label="coarse_label")
    assert (coarse.labels.tolist(), coarse.classes) == (LABELS * 2, 10)
    with pytest.raises(
        ValueError, match=r"data.label must be one of fine_label, coarse_label, got"
    ):
        load("cifar100", tmp_path, label="label")


def test_arrays_stored_by_columns_are_read_as_they_were(tmp_path):
    write_cifar10(tmp_path, rows=np.asfortranarray(ROWS.reshape(20, -1)))
    assert torch.equal(load("cifar10", tmp_path).fetch(torch.arange(20)), torch.from_numpy(ROWS))


@pytest.mark.parametrize("below", ["", "SVHN"])
def test_svhn_s_mat_files_and_their_label_ten(tmp_path, below):
    write_svhn(tmp_path / below, [1 + row % 10 for row in range(20)], ("train", "test", "extra"))
    dataset = load("svhn", tmp_path)
    assert dataset.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 4
    assert torch.equal(dataset.fetch(torch.arange(20)), torch.from_numpy(ROWS))
    assert load("svhn", tmp_path, train_part="extra").test_start == 20
    with pytest.raises(ValueError, match=r"data.train_part must be one of train, test, extra, got"):
        load("svhn", tmp_path, train_part="more")
    with pytest.raises(ValueError, match=r"must be another part than data.train_part, got 'test'"):
        load("svhn", tmp_path, train_part="test")


@pytest.mark.parametrize(
    ("name", "below"),
    [("mnist", "MNIST/raw"), ("mnist", ""), ("fashion-mnist", "FashionMNIST/raw")],
)
@pytest.mark.parametrize(("suffix", "dotted"), [("", False), (".gz", False), ("", True)])
def test_mnist_s_idx_files(tmp_path, name, below, suffix, dotted):
    write_idx(tmp_path / below, suffix, dotted)
    dataset = load(name, tmp_path)
    assert (dataset.shape, dataset.test_start) == ((3, 28, 28), 20)
    grey = torch.from_numpy(np.repeat(ROWS[:, :1, :28, :28], 3, axis=1))
    assert torch.equal(dataset.fetch(torch.arange(20, 40)), grey)
    assert dataset.labels.tolist() == LABELS * 2
    assert load(name, tmp_path, image_size=32).shape == (3, 32, 32)


# Files that are not what they should be -----------------------------------------------------------


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (np.load, "numpy.load"),
        (torch.load, "torch.serialization.load"),
    ],
)
def test_a_stranger_s_pickle_calls_nothing(tmp_path, function, name):
    batch = {b"data": Calls(function, "x"), b"labels": [0]}
    write_cifar10(tmp_path, lambda _: pickle.dumps(batch))
    message = (
        rf"data_batch_1 must be the file .* a pickle that calls {name}, which is not run; down"
    )
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path)


def test_a_stranger_s_pickle_leaves_no_trace(tmp_path):
    witness = tmp_path / "witness"
    content = pickle.dumps(Calls(open, str(witness), "w"))
    write_cifar10(tmp_path / "data", lambda _: content)
    with pytest.raises(ValueError, match="which is not run"):
        load("cifar10", tmp_path / "data")
    assert not witness.exists()
    pickle.load(io.BytesIO(content)).close()
    assert witness.exists()  # it would have shown


def test_numpy_unpickles_nothing_of_a_stranger_s(tmp_path):
    """Numpy takes a hostile type's word for where in memory its objects are."""
    objects = np.array([{"a": 1}], object)
    write_cifar10(tmp_path, lambda _: pickle.dumps({b"data": objects, b"labels": [0]}))
    with pytest.raises(ValueError, match=r"an array of 'O8', not of bytes; download it again"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # to be remembered as number 2^31 - 1
        old_pickle([1, 2]),
        old_pickle({b"labels": [1]}),
        old_pickle({b"data": 1, b"labels": [1]}),
        old_pickle({b"data": ROWS[:, 0], b"labels": ["x"]}),
        old_pickle({b"data": ROWS[:, 0, :9].copy(), b"labels": LABELS}),
        pickle.dumps({b"data": ROWS, b"labels": LABELS})[:-1000],
    ],
)
def test_other_pickles_are_named(tmp_path, content):
    write_cifar10(tmp_path, lambda _: content)
    with pytest.raises(ValueError, match=r"data_batch_1 must .*; download it again"):
        load("cifar10", tmp_path)


def test_a_missing_batch_is_named(tmp_path):
    (write_cifar10(tmp_path) / "data_batch_3").unlink()
    with pytest.raises(
        ValueError, match="must hold data_batch_3, got a folder without it; download"
    ):
        load("cifar10", tmp_path)


def test_too_few_labels_are_named(tmp_path):
    write_cifar10(tmp_path, labels=LABELS[:-1])
    with pytest.raises(
        ValueError, match="data_batch_1 must hold a label for each image, got 19 for"
    ):
        load("cifar10", tmp_path)


def test_files_without_columns_of_images_have_none_to_choose(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(
        ValueError, match=r"data.image must be left out of torchvision's files.*, got 'x'; drop it"
    ):
        load("cifar10", tmp_path, image="x")


def test_an_empty_file_is_named_with_the_reason(tmp_path):
    (write_cifar10(tmp_path) / "test_batch").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test_batch must be .*, got EOFError[^:]*; download it"):
        load("cifar10", tmp_path)


def test_another_data_set_s_labels_are_refused(tmp_path):
    write_cifar10(tmp_path, labels=[*LABELS[:-1], 12])
    with pytest.raises(ValueError, match="must have 10 classes, got 13; is it the right data set"):
        load("cifar10", tmp_path)
    for number, wrong in enumerate((-1, 100, 2**62, 0.5, "x", True)):
        root = tmp_path / str(number)
        write_cifar10(root, labels=[*LABELS[:-1], wrong])
        with pytest.raises(
            ValueError, match="labels that are no whole numbers from 0 to 99; downl"
        ):
            load("cifar10", root)


@pytest.mark.parametrize(
    ("labels", "content", "message"),
    [
        ([0] * 20, None, "labels 0 to 0, not 1 to 10"),
        ([11] * 20, None, "labels 11 to 11, not 1 to 10"),
        ([1] * 20, b"no .mat file", "be the file that torchvision downloads, got"),
        ([1] * 20, b"", "be the file that torchvision downloads, got"),
    ],
)
def test_other_mat_files_are_named(tmp_path, labels, content, message):
    write_svhn(tmp_path, labels)
    if content is not None:
        (tmp_path / "train_32x32.mat").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train_32x32.mat must .*{message}"):
        load("svhn", tmp_path)


def test_other_arrays_in_mat_files_are_named(tmp_path):
    from scipy.io import savemat

    savemat(tmp_path / "train_32x32.mat", {"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))})
    with pytest.raises(ValueError, match=r"X of float64 and shape \(32, 32, 3, 2\), not"):
        load("svhn", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no idx file of bytes in 3 dimensions"),
        (b"\0\0\x0d\3" + bytes(12), "no idx file of bytes in 3 dimensions"),
        (b"\0\0\x08\3" + b"\xff" * 12, "shape .4294967295, 4294967295, 4294967295., of more than"),
        (b"\0\0\x08\3" + b"\0\0\0\2" * 3 + bytes(7), "of another length than its shape"),
        (b"\0\0\x08\3" + b"\0\0\0\2" * 3 + bytes(9), "of another length than its shape"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_other_idx_files_are_named(tmp_path, content, message, suffix):
    write_idx(tmp_path, suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=rf"{path.name} must be the file .*{message}"):
        load("mnist", tmp_path)


def test_broken_archives_and_missing_labels_are_named(tmp_path):
    write_idx(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"ubyte.gz must be the file .*; download it again"):
        load("mnist", tmp_path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"ubyte.gz must be the file .*; download it again"):
        load("mnist", tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"no train-labels-idx1-ubyte.gz beside it; download"):
        load("mnist", tmp_path)


def test_every_packed_set_is_one_of_the_hub_s():
    from churn_trainer.data.hub import HUB

    for name, one in packed.PACKED.items():
        source = HUB[name]
        assert source.label in one.labels
        assert {source.train, source.test} <= one.parts.keys()
