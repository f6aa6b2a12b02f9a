"""Image files of every kind: what is opened, how it looks, what is refused and how that is said."""

import os
import re

import numpy as np
import pytest
import torch
from churn_trainer.cli import app
from churn_trainer.config import Data
from churn_trainer.data import decode, images, load_dataset
from churn_trainer.data.decode import open_image, to_square
from image_files import (
    BROKEN,
    EPS,
    colour_of,
    encoded,
    gradient,
    is_upright,
    noise,
    picture,
    turned,
    write_folder,
)
from PIL import EpsImagePlugin, Image
from typer.testing import CliRunner


def folder(path, size=8, **settings):
    return load_dataset(Data(name="folder", path=str(path), image_size=size, **settings))


def saved(root, rows, **columns):
    """A data set of `datasets` whose two parts have the same rows, as `save_to_disk` writes it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    features |= columns
    part = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(root)
    return str(root)


# Pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")],
)
def test_sixteen_bits_keep_their_upper_eight(form, dtype):
    image = Image.fromarray(gradient().astype(dtype))
    square = to_square(open_image(encoded(image, form)), 256)
    assert (square == (gradient() >> 8)).all()


def test_grey_and_colour_of_sixteen_bits_look_alike():
    header = b"P6 256 256 65535\n"
    colours = header + np.repeat(gradient()[..., None], 3, axis=2).astype(">u2").tobytes()
    grey = encoded(Image.fromarray(gradient()))
    one, other = (to_square(open_image(content), 256).astype(int) for content in (grey, colours))
    assert abs(one - other).max() <= 1


def test_twelve_bits_use_their_own_range():
    packed = np.zeros((2, 3), np.uint8)
    packed[0], packed[1] = (0xFF, 0xF0, 0x00), (0x80, 0x08, 0x00)  # two numbers of 12 bits each
    header = b"II*\0\x08\0\0\0"
    entries = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, 1, 12),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8 + 2 + 9 * 12 + 4),
        (277, 3, 1, 1),
        (278, 3, 1, 2),
        (279, 4, 1, packed.size),
    ]
    numbers = b"".join(
        tag.to_bytes(2, "little")
        + kind.to_bytes(2, "little")
        + count.to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for tag, kind, count, value in entries
    )
    content = header + len(entries).to_bytes(2, "little") + numbers + bytes(4) + packed.tobytes()
    assert to_square(open_image(content), 2)[0].tolist() == [[255, 0], [128, 128]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bits_of_every_mode_are_read(mode):
    image = picture((255, 255, 255)).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    assert (to_square(open_image(encoded(image, form)), 32) == 255).all()


def test_a_palette_with_transparency_keeps_its_colours():
    image = picture((0, 0, 255)).convert("P")
    content = encoded(image, transparency=bytes(range(256)))
    assert to_square(open_image(content), 32)[:, 0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_upright_wherever_they_come_from(form, tmp_path):
    content = turned(form)
    for name in ("a", "b"):
        (tmp_path / "files" / name).mkdir(parents=True)
        (tmp_path / "files" / name / f"x.{form.lower()}").write_bytes(content)
    path = saved(tmp_path / "hub", {"image": [{"bytes": content}] * 2, "label": [0, 1]})
    for dataset in (
        folder(tmp_path / "files", 16),
        load_dataset(Data(name="huggingface", path=path, image_size=16)),
    ):
        assert all(is_upright(square) for square in dataset.fetch(torch.arange(2)))


def test_exif_that_cannot_be_read_turns_nothing():
    content = encoded(noise(), exif=b"Exif\0\0no EXIF at all")
    assert torch.equal(
        torch.from_numpy(to_square(open_image(content), 32).copy()),
        torch.from_numpy(np.asarray(noise()).copy()).permute(2, 0, 1),
    )


def test_an_image_of_one_row_does_not_fill_the_memory():
    message = "sides that are more alike, got 40000 x 1, or 2560000 x 64 as scaled"
    with pytest.raises(ValueError, match=message):
        to_square(picture((1, 2, 3), 40_000, 1), 64)
    assert to_square(picture((1, 2, 3), 4_000, 1), 64)[:, 9, 9].tolist() == [1, 2, 3]


# Files that are counted ---------------------------------------------------------------------------


def test_every_suffix_of_the_formats_is_counted(tmp_path):
    write_folder(tmp_path, count=1)
    names = {"a.jfif": "JPEG", "b.pgm": "PPM", "c.JPG": "JPEG", "d.pnm": "PPM", "e.Tiff": "TIFF"}
    for name, form in names.items():
        picture((9, 9, 9)).save(tmp_path / "cat" / name, form)
    assert folder(tmp_path).labels.tolist() == [0] * 6 + [1]
    assert {".jfif", ".pgm", ".jpeg", ".webp", ".bmp", ".gif", ".tif"} <= decode.SUFFIXES


def test_hidden_files_and_folders_are_no_data(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path / "cat" / ".thumbnails")
    (tmp_path / "cat" / "._0.png").write_bytes(b"of another system")
    (tmp_path / "cat" / "@eaDir" / "0.png").mkdir(parents=True)
    picture((1, 1, 1)).save(tmp_path / "cat" / "@eaDir" / "0.png" / "small.png")
    for name in (".ipynb_checkpoints", ".git", "__MACOSX"):
        (tmp_path / name).mkdir()
        picture((1, 1, 1)).save(tmp_path / name / "0.png")
    dataset = folder(tmp_path)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.classes == 2


def test_linked_folders_are_entered_once(tmp_path):
    write_folder(tmp_path / "elsewhere", count=2)
    write_folder(tmp_path / "here", count=1)
    (tmp_path / "here" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "here" / "cat" / "loop").symlink_to(tmp_path / "here" / "cat")
    assert folder(tmp_path / "here").labels.tolist() == [0, 0, 0, 1]


# What cannot be used ------------------------------------------------------------------------------


def write_broken(root):
    """A good folder with every kind of broken file in it."""
    write_folder(root)
    for name, (content, _) in BROKEN.items():
        (root / "cat" / f"{name}.png").write_bytes(content)
    (root / "dog" / "link.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "dog" / "pipe.png")
    with (root / "dog" / "large.png").open("wb") as file:
        file.truncate(decode.LARGEST_FILE + 1)
    return root


OTHERS = {
    "dog/link.png": "cannot be read: No such file or directory",
    "dog/pipe.png": "must be a file, got a pipe, device or folder",
    "dog/large.png": f"must have at most {decode.LARGEST_FILE} bytes, got",
}


@pytest.mark.parametrize("limit", [images.IN_MEMORY_BYTES, 0])
def test_all_broken_files_are_named_before_training(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", limit)
    write_broken(tmp_path)
    with pytest.raises(ValueError, match=f"got {len(BROKEN) + 3} of .* cannot be used") as error:
        folder(tmp_path)
    said = str(error.value)
    for name, (_, reason) in BROKEN.items():
        assert re.search(rf"{tmp_path}/cat/{name}.png {reason}", said), said
    for name, reason in OTHERS.items():
        assert f"{tmp_path}/{name} {reason}" in said
    assert said.endswith("or leave them out with data.skip_broken (--data-skip-broken)")
    assert "\n" not in said


@pytest.mark.parametrize("limit", [images.IN_MEMORY_BYTES, 0])
def test_broken_files_are_left_out_on_demand(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", limit)
    write_broken(tmp_path)
    dataset = folder(tmp_path, skip_broken=True)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert f"{len(BROKEN) + 3} left out" in dataset.title
    assert dataset.fetch(torch.tensor([4, 0]))[:, :, 3, 3].tolist() == [
        list(colour_of(1, 1)),
        list(colour_of(0, 0)),
    ]


def test_test_rows_stay_apart_when_some_are_left_out(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", count=2)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "test" / "dog" / "0.png").write_bytes(b"")
    dataset = folder(tmp_path, skip_broken=True)
    assert (dataset.labels.tolist(), dataset.test_start) == ([0, 0, 1, 1, 1, 0, 0, 1], 5)
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match="must have rows to train and to test on, got 5 of 10 that"
    ):
        folder(tmp_path, skip_broken=True)


def test_so_many_broken_files_are_not_all_named(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_NAMED", 2)
    write_folder(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"0.png must .*; .*1.png must [^;]*; and 4 more; remove"):
        folder(tmp_path)


def test_names_that_would_write_over_the_terminal_are_cleaned(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cat" / "\x1b[2J\n0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cat/\ufffd\[2J\ufffd0.png must be"):
        folder(tmp_path)


def test_a_file_that_changes_during_training_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    dataset = folder(write_folder(tmp_path))
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cat/0.png must be an image, .*; it was changed since"):
        dataset.fetch(torch.tensor([0]))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path)

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=r"folder must be readable, got: .*Permission denied: '.*cat"
    ):
        folder(tmp_path)


def test_the_command_names_broken_files_and_promises_nothing(tmp_path):
    write_folder(tmp_path / "data", count=20)
    (tmp_path / "data" / "cat" / "1.png").write_bytes(encoded(noise())[:-400])
    command = [
        "train",
        "--out",
        str(tmp_path / "out"),
        "--data",
        "folder",
        "--data-image-size",
        "8",
    ]
    done = CliRunner().invoke(app, [*command, "--data-path", str(tmp_path / "data")])
    assert done.exit_code == 2
    assert "cat/1.png must be a whole image" in done.stderr
    assert "same command" not in done.stderr
    assert "Traceback" not in done.stderr


# External programs --------------------------------------------------------------------------------


@pytest.fixture
def ghostscript(monkeypatch):
    """Calls that Pillow makes for EPS files."""
    calls = []

    def call(*args, **options):
        calls.append(args)
        raise OSError("no Ghostscript here")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", call)
    return calls


def test_no_image_starts_an_external_program(tmp_path, ghostscript):
    (write_folder(tmp_path / "files") / "cat" / "1.png").write_bytes(EPS)
    with pytest.raises(ValueError, match=r"cat/1.png must be an image, got something else"):
        folder(tmp_path / "files")
    rows = {"image": [{"bytes": EPS}, {"bytes": encoded(noise())}], "label": [0, 1]}
    path = saved(tmp_path / "hub", rows)
    with pytest.raises(
        ValueError, match="row 0 of train must be an image, got something else; row"
    ):
        load_dataset(Data(name="huggingface", path=path, image_size=8))
    assert not ghostscript
    (tmp_path / "x.eps").write_bytes(EPS)
    with pytest.raises(OSError, match="no Ghostscript"), Image.open(tmp_path / "x.eps") as image:
        image.load()
    assert len(ghostscript) == 1  # it would have shown


def test_other_columns_are_never_opened(tmp_path, ghostscript):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": encoded(noise())}] * 2,
        "label": [0, 1],
        "mask": [{"bytes": EPS}] * 2,
    }
    path = saved(tmp_path / "hub", rows, mask=datasets.Image())
    dataset = load_dataset(Data(name="huggingface", path=path, image_size=8))
    assert dataset.fetch(torch.arange(4)).shape == (4, 3, 8, 8)
    assert not ghostscript
