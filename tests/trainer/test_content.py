"""A run's id covers what its data hold, and what was found out about them is trusted when safe."""

import dataclasses
import os
import time

import pytest
import torch
from churn_trainer.config import Data, Optimisation, Run
from churn_trainer.data import images, load_dataset, pinned, verdicts
from churn_trainer.found import NothingFinished
from churn_trainer.study import report_study, run_study
from churn_trainer.tasks import Ended
from churn_trainer.train import Options, train
from image_files import colour_of, encoded, picture, write_folder
from small_study import independent, small_study
from test_packed import ROWS, write_idx


@pytest.fixture
def data(tmp_path):
    write_folder(tmp_path / "data", count=20, suffix="bmp")
    return Data(name="folder", path=str(tmp_path / "data"), image_size=8)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Everything is too large for memory, and files count as settled at once."""
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(verdicts, "SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "churn-kernels" / "data"


def content(data):
    (run,) = pinned([Run(data=data)])
    return run.data.content


def small(data):
    return independent("baseline", 0, data=data, optimisation=Optimisation(epochs=1))


def change(path, colour=(9, 9, 9)):
    """Another image of the same size, length and time of change; gives back the first."""
    before, status = path.read_bytes(), path.stat()
    path.write_bytes(encoded(picture(colour), "BMP"))
    assert path.stat().st_size == len(before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return before


# The id -------------------------------------------------------------------------------------------


def test_changed_images_are_another_run(data, tmp_path):
    run, told = small(data), []
    (first,) = train([run], tmp_path / "runs", Options(), told.append)
    (same,) = train([run], tmp_path / "runs", Options(), told.append)
    assert first.path == same.path
    assert told[-1].kind == "skipped"
    path = tmp_path / "data" / "cat" / "3.bmp"
    before = change(path)
    (second,) = train([run], tmp_path / "runs", Options(), told.append)
    assert second.path != first.path
    assert second.done
    path.write_bytes(before)
    assert train([run], tmp_path / "runs")[0].path == first.path


def test_the_settings_of_a_run_name_its_content_and_refuse_another(data, tmp_path):
    (folder,) = train([small(data)], tmp_path / "runs")
    run = folder.run()
    assert run.data.content == load_dataset(data).content
    assert len(run.data.content) == 32
    assert [one.path for one in train([run], tmp_path / "runs")] == [folder.path]
    change(tmp_path / "data" / "cat" / "3.bmp")
    message = (
        rf"data.content must be that of .*, \w+, got {run.data.content}; the data are not those"
    )
    with pytest.raises(ValueError, match=message):
        train([run], tmp_path / "runs")
    with pytest.raises(ValueError, match=message):
        load_dataset(run.data)


class Recording:
    """Workers that do nothing."""

    count = 1

    def __init__(self):
        self.tasks = []

    def start(self, task, root, options):
        self.tasks.append(task)

    def wait(self):
        return [(self.tasks[-1], Ended())]

    def stop(self):
        pass


def test_a_study_trains_and_reports_the_data_as_they_are(data, tmp_path):
    study = small_study(methods=("baseline",), splits=1, data=data)
    study = dataclasses.replace(study, optimisation=Optimisation(epochs=1))
    workers = Recording()
    run_study(study, tmp_path / "study", workers)
    (task,) = workers.tasks
    assert {run.data.content for run in task.runs} == {content(data)}
    train(study.all_runs(), tmp_path / "runs")
    assert report_study(study, tmp_path / "runs").outcomes
    change(tmp_path / "data" / "cat" / "3.bmp")
    with pytest.raises(NothingFinished):
        report_study(study, tmp_path / "runs")


def test_a_study_reads_its_files_once_and_decodes_them_once_a_task(data, tmp_path, monkeypatch):
    survey, read = images.Pictures._survey, []

    def counting(self, take):
        read.append("read" if take is None else "decoded")
        return survey(self, take)

    monkeypatch.setattr(images.Pictures, "_survey", counting)
    methods, epoch = ("baseline", "skl", "l1"), Optimisation(epochs=1)
    (study,) = pinned([small_study(methods, splits=1, data=data, optimisation=epoch)])
    workers = Recording()
    run_study(study, tmp_path, workers)
    assert len(workers.tasks) == 3
    for task in workers.tasks:
        task.train(tmp_path, Options(), lambda event: None)
    report_study(study, tmp_path)
    assert read == ["read", *["decoded"] * (1 + 3)]


def test_ids_of_data_that_follow_from_settings_are_unchanged():
    assert pinned([Run()]) == [Run()]
    assert Run(data=Data(train_part="", skip_broken=False)).id == Run().id
    with pytest.raises(ValueError, match=r"data.content must be that of digits, None, got abc"):
        pinned([Run(data=Data(content="abc"))])


# The digest ---------------------------------------------------------------------------------------


def test_the_digest_is_of_labels_and_bytes_in_their_order(data, tmp_path):
    first = content(data)
    copy = tmp_path / "copy"
    write_folder(copy, count=20, suffix="bmp")
    assert content(dataclasses.replace(data, path=str(copy))) == first
    assert content(dataclasses.replace(data, image_size=5)) == first
    assert load_dataset(data).content == first
    seen = {first}
    one, other = copy / "cat" / "3.bmp", copy / "cat" / "5.bmp"
    for make in (
        lambda: one.rename(copy / "x") and other.rename(one) and (copy / "x").rename(other),
        lambda: one.unlink(),
        lambda: other.rename(copy / "dog" / "y.bmp"),
        lambda: (copy / "dog" / "0.bmp").write_bytes(b"broken"),
    ):
        make()
        seen.add(content(dataclasses.replace(data, path=str(copy), skip_broken=True)))
    assert len(seen) == 5


def test_where_the_test_part_begins_is_content(data, tmp_path):
    whole = content(data)
    for part, indices in (("train", range(10)), ("test", range(10, 20))):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "parts" / part / name).mkdir(parents=True)
            for index in indices:
                path = tmp_path / "parts" / part / name / f"{index}.bmp"
                picture(colour_of(label, index)).save(path)
    split = dataclasses.replace(data, path=str(tmp_path / "parts"))
    swapped = dataclasses.replace(split, train_part="test", test_part="train")
    assert len({whole, content(split), content(swapped)}) == 3


# What is remembered -------------------------------------------------------------------------------


def reads(monkeypatch):
    """Rows that are read from now on."""
    rows, examine = [], images.Pictures._examine

    def counting(pictures, row, take):
        rows.append(row)
        return examine(pictures, row, take)

    monkeypatch.setattr(images.Pictures, "_examine", counting)
    return rows


def test_large_sets_are_read_once_until_a_file_changes(data, tmp_path, cache, monkeypatch):
    rows = reads(monkeypatch)
    first = content(data)
    assert (len(rows), len(list(cache.iterdir()))) == (40, 1)
    assert load_dataset(data).content == content(data) == first
    assert len(rows) == 40
    time.sleep(0.05)  # a tick of the file system's clock, for which SETTLED_NS is otherwise
    change(tmp_path / "data" / "cat" / "3.bmp")
    assert content(data) != first
    assert len(rows) == 80


def test_torchvision_s_files_are_remembered_too(tmp_path, cache, monkeypatch):
    write_idx(tmp_path / "MNIST" / "raw")
    data = Data(name="mnist", path=str(tmp_path))
    rows = reads(monkeypatch)
    first = content(data)
    assert content(data) == first
    assert len(rows) == 40
    write_idx(tmp_path / "MNIST" / "raw", rows=ROWS[:, 1, :28, :28])
    assert content(data) != first


def test_broken_files_are_remembered_too(data, tmp_path, cache, monkeypatch):
    (tmp_path / "data" / "cat" / "3.bmp").write_bytes(b"broken")
    rows = reads(monkeypatch)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cat/3.bmp must be an image, got something else"):
            load_dataset(data)
    assert len(rows) == 40
    dataset = load_dataset(dataclasses.replace(data, skip_broken=True))
    assert len(dataset.labels) == 39
    assert len(rows) == 40
    assert dataset.fetch(torch.tensor([13]))[0, :, 0, 0].tolist() == list(colour_of(0, 4))


def test_files_that_have_just_changed_are_read_again(data, cache, monkeypatch):
    monkeypatch.setattr(verdicts, "SETTLED_NS", 10**12)
    rows = reads(monkeypatch)
    assert content(data) == content(data)
    assert len(rows) == 80
    assert not cache.exists()


@pytest.mark.parametrize("stored", [b"", b"{}", b"[1]", b'{"content": 1, "broken": 2}', b"\xff"])
def test_a_damaged_memory_is_none(data, cache, monkeypatch, stored):
    first = content(data)
    (path,) = cache.iterdir()
    path.write_bytes(stored)
    assert content(data) == first


def test_a_cache_that_cannot_be_written_costs_time_alone(data, cache):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"a file")
    assert content(data) == content(data)


def test_sets_that_fit_into_memory_are_read_at_every_start(data, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_dataset(data)
    content(data)
    assert not (tmp_path / "cache").exists()


def table_of(root, image):
    """A data set of four times the same image, as Parquet files without metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = {"image": pyarrow.array([image] * 4, kind), "label": [0, 1, 0, 1]}
    root.mkdir(exist_ok=True)
    for part in ("train", "test"):
        parquet.write_table(pyarrow.table(table), root / f"{part}.parquet")
    return Data(name="huggingface", path=str(root), image_size=8)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def test_tables_that_changed_behind_their_times_are_read_again(tmp_path, hub_cache):
    images = [encoded(picture((blue, 2, 3)), "BMP") for blue in (1, 4)]
    data = table_of(tmp_path / "table", {"bytes": images[0], "path": None})
    first = content(data)
    files = {path: path.stat() for path in (tmp_path / "table").iterdir()}
    table_of(tmp_path / "table", {"bytes": images[1], "path": None})
    for path, status in files.items():
        assert path.stat().st_size == status.st_size
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content(data) != first


@pytest.mark.parametrize("inside", [True, False])
def test_tables_are_remembered_if_all_images_are_inside(
    tmp_path, cache, hub_cache, monkeypatch, inside
):
    path = tmp_path / "x.bmp"
    picture((1, 2, 3)).save(path)
    image = {"bytes": path.read_bytes() if inside else None, "path": str(path)}
    data = table_of(tmp_path / "table", image)
    rows = reads(monkeypatch)
    first = content(data)
    change(path)
    assert (content(data) == first) == inside
    assert len(rows) == (8 if inside else 16)
