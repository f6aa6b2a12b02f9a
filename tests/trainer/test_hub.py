"""Image sets of the Hugging Face Hub and in its formats."""

import importlib
import io
import pickle

import pytest
import torch
from churn_trainer.config import Data
from churn_trainer.data import images, load_dataset, split_rows
from image_files import colour_of, encoded, noise, picture, write_folder

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
    with pytest.raises(ValueError, match="Parquet files must be whole ones that can be read, got"):
        load_dataset(Data(name="cifar10", path=str(folder)))
    assert not witness.exists()
    pickle.load(io.BytesIO(pickle.dumps(Hostile(witness)))).close()
    assert witness.exists()  # it would have shown


# Parts and columns --------------------------------------------------------------------------------


def write_parts(root, **parts):
    """Parquet files of `datasets`: name -> columns."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for name, columns in parts.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(root)


def columns(count, first=0, label="label"):
    content = encoded(noise())
    return {
        "image": [{"bytes": content, "path": "x.png"}] * count,
        label: [(first + row) % 2 for row in range(count)],
    }


def hub(path, name="huggingface", **settings):
    return load_dataset(Data(name=name, path=str(path), image_size=8, **settings))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-latest", "test-latest"),
        ("Train", "TEST"),
        ("latest/training/0000", "latest/testing/0000"),
        ("greatest_train0", "greatest_test0"),
    ],
)
def test_parquet_files_are_parts_by_whole_words(tmp_path, hub_cache, train, test):
    write_parts(tmp_path, **{train: columns(6), test: columns(4), ".old/test": columns(9)})
    dataset = hub(tmp_path)
    assert (dataset.test_start, len(dataset.labels)) == (6, 10)


def test_a_parquet_file_in_both_parts_is_refused(tmp_path, hub_cache):
    write_parts(tmp_path, train=columns(6), test=columns(4), **{"train-and-test": columns(2)})
    with pytest.raises(ValueError, match=r"share no file, got .*/train-and-test.parquet in both"):
        hub(tmp_path)
    (tmp_path / "train-and-test.parquet").unlink()
    (tmp_path / "test-2.parquet").symlink_to(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match=r"share no file, got .*/test-2.parquet in both; name each"
    ):
        hub(tmp_path)


def test_parts_and_columns_can_be_chosen(tmp_path, hub_cache):
    rows = columns(6) | {"breed": ["pug", "lab", "pug", "elk", "pug", "lab"]}
    rows["photo"] = rows.pop("image")
    few = {name: values[:3] for name, values in rows.items()}
    write_parts(tmp_path, first_fold=rows, second_fold=few)
    chosen = {"train_part": "first_fold", "test_part": "second_fold", "image": "photo"}
    dataset = hub(tmp_path, **chosen)
    assert dataset.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    dataset = hub(tmp_path, **chosen, label="breed")
    assert (dataset.labels.tolist(), dataset.classes) == ([2, 1, 2, 0, 2, 1, 2, 1, 2], 3)
    with pytest.raises(
        ValueError, match=r"column 'image', got .*; rename it, or .* with data.image"
    ):
        hub(tmp_path, **(chosen | {"image": None}))
    with pytest.raises(
        ValueError, match=r"column 'race', got .*; rename it, or .* with data.label"
    ):
        hub(tmp_path, **chosen, label="race")
    with pytest.raises(
        ValueError, match=r"words first_fold and third in their names, .* got neither"
    ):
        hub(tmp_path, **(chosen | {"test_part": "third"}))


def test_saved_parts_can_be_chosen(cifar, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(str(cifar / "arrow"))
    parts["extra"] = parts["test"].select(range(10))
    parts.save_to_disk(tmp_path / "three")
    dataset = hub(tmp_path / "three", "cifar10", train_part="test", test_part="extra")
    assert (dataset.test_start, len(dataset.labels)) == (20, 30)
    with pytest.raises(
        ValueError, match=r"the part 'all', got .*; rename it, or .* data.test_part"
    ):
        hub(tmp_path / "three", "cifar10", test_part="all")
    parts["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"must have the part 'test', got \['train'\]; rename it"):
        hub(tmp_path / "one", "cifar10")


def test_folders_by_class_are_read_under_every_name(tmp_path, hub_cache):
    classes = tuple(map(str, range(10)))
    write_folder(tmp_path / "Train", classes, count=2)
    write_folder(tmp_path / "val", classes, count=1)
    dataset = hub(tmp_path, "cifar10")
    assert (dataset.test_start, len(dataset.labels)) == (20, 30)
    with pytest.raises(
        ValueError, match="must have 1000 classes, got 10; is it the right data set"
    ):
        hub(tmp_path, "imagenet")


@pytest.mark.parametrize("setting", ["image", "label"])
def test_folders_by_class_have_no_columns_to_choose(tmp_path, hub_cache, setting):
    write_folder(tmp_path / "train", ("a", "b"), count=2)
    write_folder(tmp_path / "test", ("a", "b"), count=1)
    message = rf"data.{setting} must be left out of folders of images by class.*, got 'x'; drop it"
    with pytest.raises(ValueError, match=message):
        hub(tmp_path, **{setting: "x"})


@pytest.mark.parametrize("binary", [True, False])
def test_bytes_without_metadata_are_images(tmp_path, hub_cache, binary):
    import pyarrow
    from pyarrow import parquet

    content = encoded(noise())
    image = [content] * 4 if binary else [{"bytes": content, "path": "x.png"}] * 4
    table = pyarrow.table({"image": image, "label": [0, 1, 0, 1]})
    for part in ("train", "test"):
        parquet.write_table(table, tmp_path / f"{part}.parquet")
    assert hub(tmp_path).fetch(torch.arange(8)).shape == (8, 3, 8, 8)


# Rows that cannot be used -------------------------------------------------------------------------


def test_rows_without_image_or_label_are_named_or_left_out(tmp_path, hub_cache):
    rows = columns(8)
    rows["image"][2] = None
    rows["image"][3] = {"bytes": b"no image", "path": None}
    rows["image"][4] = {"bytes": None, "path": str(tmp_path / "nowhere.png")}
    rows["label"][5], rows["label"][6] = None, -1
    write_parts(tmp_path, train=columns(4), test=rows)
    message = rf"{tmp_path} must hold images with labels, got 5 of 12 that cannot be used"
    with pytest.raises(ValueError, match=message) as error:
        hub(tmp_path)
    for line in (
        "row 2 of test must be the bytes of an image, got nothing",
        "row 3 of test must be an image, got something else",
        "row 4 of test cannot be read: No such file or directory",
        "row 5 of test has no label",
        "row 6 of test has no label",
    ):
        assert line in str(error.value)
    dataset = hub(tmp_path, skip_broken=True)
    assert (dataset.labels.tolist(), dataset.test_start) == ([0, 1, 0, 1, 0, 1, 1], 4)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"bytes": "text"}, "must be the bytes of an image, got a str"),
        ({"bytes": 1 << 40}, "must be the bytes of an image, got a int"),
        ({"path": 7}, "must be the bytes of an image, got nothing"),
        ({"path": "nowhere.png"}, "cannot be read: No such file or directory"),
        ({"path": "/dev/zero"}, "must be a file, got a pipe, device or folder"),
    ],
)
@pytest.mark.parametrize("limit", [images.IN_MEMORY_BYTES, 0])
def test_structures_that_hold_no_image_are_named(
    tmp_path, hub_cache, monkeypatch, stored, message, limit
):
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", limit)
    rows = {"image": [stored] * 2, "label": [0, 1]}
    write_parts(tmp_path, train=rows, test=rows)
    with pytest.raises(ValueError, match=f"got 4 of 4 .*row 0 of train {message}; row 1 of"):
        hub(tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", [0.5, 1.0], "column 'label' of .* must hold whole numbers or texts, got float"),
        ("label", [[0], [1]], "must hold whole numbers or texts, got list; name another with"),
        ("label", [None, None], "must hold whole numbers or texts, got nothing; name another"),
        ("label", [0, 10**12], r"from 0, got up to 1000000000000 in 4 rows; name another with"),
        ("image", [[[0, 1]], [[2, 3]]], "column 'image' of .* must hold image files, got .*list"),
        ("image", ["a.png", "b.png"], "column 'image' of .* must hold image files, got string"),
    ],
)
def test_columns_that_hold_something_else_are_named(tmp_path, hub_cache, column, values, message):
    rows = columns(2) | {column: values}
    write_parts(tmp_path, train=rows, test=rows)
    with pytest.raises(ValueError, match=message):
        hub(tmp_path)


def test_texts_of_the_test_part_alone_are_named(tmp_path, hub_cache):
    train, test = columns(2) | {"label": ["a", "b"]}, columns(2) | {"label": ["b", "\x1bc"]}
    write_parts(tmp_path, train=train, test=test)
    with pytest.raises(
        ValueError, match=r"every class in the training part, got \ufffdc in the te"
    ):
        hub(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_without_rows_is_named(tmp_path, hub_cache, monkeypatch, part):
    from pyarrow import parquet

    datasets = pytest.importorskip("datasets")
    full = datasets.Dataset.from_dict(columns(4))
    published = {"train": full, "test": full} | {part: full.select([])}
    with monkeypatch.context() as patched:
        patched.setattr("churn_trainer.data.hub._parts", lambda *_: published)
        with pytest.raises(ValueError, match=f"must have rows in the part '{part}', got none"):
            hub("some/set")
    write_parts(tmp_path, train=columns(4), test=columns(4))
    path = tmp_path / f"{part}.parquet"
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(ValueError, match=rf"got .*{part}.parquet \(no rows\); download them again"):
        hub(tmp_path)


def test_parts_that_name_their_classes_differently_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = datasets.DatasetDict()
    for part, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        parts[part] = datasets.Dataset.from_dict(columns(4), datasets.Features(features))
    parts.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="must name the same classes in both parts, got "):
        hub(tmp_path)


def test_broken_parquet_files_are_all_named(tmp_path, hub_cache):
    for name in ("train", "test"):
        write_parts(tmp_path, **{name: columns(4)})
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"got .*train.parquet \(.*; .*test.parquet \(.*; download"
    ):
        hub(tmp_path)


def test_labels_beyond_the_named_classes_are_named_by_row(tmp_path, hub_cache):
    import pyarrow
    from pyarrow import parquet

    datasets = pytest.importorskip("datasets")
    named = datasets.ClassLabel(names=["cat", "dog"])
    schema = datasets.Features({"image": datasets.Image(), "label": named}).arrow_schema
    rows = columns(4) | {"label": [0, 1, 2, 1]}
    for part in ("train", "test"):
        parquet.write_table(pyarrow.table(rows, schema=schema), tmp_path / f"{part}.parquet")
    with pytest.raises(
        ValueError, match=r"row 2 of train must have a label in \[0, 2\), got 2; row"
    ):
        hub(tmp_path)
    assert hub(tmp_path, skip_broken=True).labels.tolist() == [0, 1, 1] * 2


def test_svhn_s_label_ten_is_the_digit_zero(tmp_path, hub_cache):
    rows = columns(20) | {"label": [1 + row % 10 for row in range(20)]}
    write_parts(tmp_path, train=rows, test=rows)
    dataset = hub(tmp_path, "svhn")
    assert dataset.classes == 10
    assert dataset.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_images_of_tables_too_large_for_memory_are_read_when_used(cifar, hub_cache, monkeypatch):
    data = Data(name="cifar10", path=str(cifar / "arrow"))
    early = load_dataset(data)
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    late = load_dataset(data)
    assert not late.in_memory
    assert torch.equal(late.fetch(torch.arange(60)), early.fetch(torch.arange(60)))
