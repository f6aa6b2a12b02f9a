"""What a minibatch holds: order, standardised inputs, crops and flips."""

import math

import pytest
import torch
from churn_trainer.config import Data, Optimisation, Run, Seeds
from churn_trainer.data import load_dataset
from churn_trainer.data.batches import Batches, augment, hash_integers, moments
from churn_trainer.data.dataset import Dataset
from small_study import batches, small_run

CPU = torch.device("cpu")

# Minibatches --------------------------------------------------------------------------------------


def test_an_epoch_s_minibatches_are_its_training_rows_in_the_order_s_order():
    run = small_run()
    source = batches(run)
    assert source.steps == 2
    for epoch in (0, 1):
        parts = [source.train(2 * epoch + step) for step in (0, 1)]
        assert [part[1].shape for part in parts] == [(1, 32), (1, 28)]
        assert [part[2] for part in parts] == [32, 28]
        labels = torch.cat([part[1] for part in parts], dim=1)[0]
        wanted = source.dataset.labels[source.train_rows[0]]
        assert labels.sort().values.tolist() == wanted.sort().values.tolist()
        assert not torch.equal(labels, wanted)
    first = batches(run).train(3)
    again = source.train(3)
    assert torch.equal(first[0], again[0])
    other = batches(small_run(seeds=Seeds(order=1))).train(3)
    assert not torch.equal(first[1], other[1])


def test_inputs_are_standardised_with_the_training_rows_of_their_run():
    source = batches(small_run(), small_run(seeds=Seeds(split=1)))
    inputs = torch.cat([source.train(step)[0] for step in (0, 1)], dim=1)
    assert inputs.shape == (2, 60, 1, 8, 8)
    torch.testing.assert_close(inputs.mean(dim=1), torch.zeros(2, 1, 8, 8), rtol=0, atol=1e-5)
    deviation = inputs.std(dim=1, correction=0)
    assert ((deviation - 1).abs().lt(1e-4) | deviation.eq(0)).all()
    test = source.held_out(source.test_rows[:, :5])
    rows = source.dataset.fetch(source.test_rows[1, :5])
    train = source.dataset.fetch(source.train_rows[1])
    mean, scale = train.mean(0), train.std(0, correction=0)
    torch.testing.assert_close(test[1], (rows - mean) / torch.where(scale > 0, scale, 1.0))


def test_moments_over_pixels_and_constant_features():
    images = torch.tensor([[0.0, 2.0], [4.0, 2.0]])[:, :, None, None].expand(2, 2, 3, 3)
    mean, scale = moments(images, (0, 2, 3))
    assert mean.flatten().tolist() == [2, 2]
    assert scale.flatten().tolist() == [2, 1]
    assert mean.shape == (2, 1, 1)


def test_processes_share_a_minibatch():
    whole = batches(small_run()).train(1)
    parts = [batches(small_run(), rank=rank, ranks=2).train(1) for rank in (0, 1)]
    assert torch.equal(torch.stack([part[0] for part in parts], dim=2).flatten(1, 2), whole[0])
    assert [part[2] for part in parts] == [28, 28]


# Augmentation -------------------------------------------------------------------------------------

IMAGES = torch.arange(6 * 2 * 5 * 7).reshape(6, 2, 5, 7)


def by_hand(image, top, left, mirrored, padding, height, width):
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(-1) if mirrored else crop


@pytest.mark.parametrize(
    ("padding", "size", "flip"), [(2, 0, True), (0, 3, False), (1, 5, True), (0, 0, True)]
)
def test_every_crop_is_one_that_can_be_cut_by_hand(padding, size, flip):
    draws = hash_integers(torch.arange(6))
    data = Data(crop_padding=padding, crop_size=size, flip=flip)
    height, width = (size or 5), (size or 7)
    for image, crop in zip(IMAGES, augment(IMAGES, draws, data), strict=True):
        options = [
            (top, left, mirrored)
            for top in range(5 + 2 * padding - height + 1)
            for left in range(7 + 2 * padding - width + 1)
            for mirrored in ([False, True] if flip else [False])
        ]
        cuts = (by_hand(image, *option, padding, height, width) for option in options)
        assert any(torch.equal(crop, cut) for cut in cuts)


def test_crops_and_flips_are_uniform():
    draws = hash_integers(torch.arange(8000))
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 0] = 1
    crops = augment(image.expand(8000, 1, 3, 3), draws, Data(crop_padding=1, flip=True))
    seen = crops.sum(dim=(0, 1)) / 8000
    # Rows: at 0, 1, 2 equally. Columns: at -1, 0, 1 equally, mirrored 3, 2, 1 as often.
    wanted = torch.tensor([1 / 6, 1 / 3, 1 / 6]) / 3
    torch.testing.assert_close(seen, wanted.expand(3, 3), rtol=0, atol=0.02)


def test_a_row_s_augmentation_depends_on_seed_epoch_and_row_alone():
    noise = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    data = Data(crop_padding=4, flip=True)
    dataset = Dataset(
        "noise", torch.arange(40) % 2, 2, (3, 32, 32), noise.__getitem__, is_image=True
    )

    def rows_of(run, epoch, **options):
        source = batches(run, dataset=dataset, **options)
        found = {}
        for step in range(epoch * source.steps, (epoch + 1) * source.steps):
            inputs = source.train(step)[0][0]
            place = (step % source.steps) * source.batch_rows
            order = source._order[0, place : place + source.batch_rows][source.rank :: source.ranks]
            found |= dict(zip(order.tolist(), inputs, strict=True))
        return found

    run = Run(data=data)
    first = rows_of(run, 1)
    small_batches = Run(
        data=data, optimisation=Optimisation(batch_rows=7), seeds=Seeds(order=9, initialisation=3)
    )
    for row, image in rows_of(small_batches, 1, ranks=2, rank=1).items():
        assert torch.equal(image, first[row])
    later, reseeded = rows_of(run, 2), rows_of(Run(data=data, seeds=Seeds(augmentation=1)), 1)
    for others in (later, reseeded):
        different = sum(not torch.equal(others[row], first[row]) for row in first)
        assert different > len(first) // 2


def test_test_images_are_cut_in_the_middle():
    values = torch.arange(4 * 3 * 6 * 6).float().reshape(4, 3, 6, 6)
    dataset = Dataset(
        "x", torch.tensor([0, 1, 0, 1]), 2, (3, 6, 6), values.__getitem__, True, test_start=2
    )
    data = Data(crop_size=4)
    source = Batches([Run(data=data)], dataset, CPU)
    assert source.shape == (3, 4, 4)
    plain = Batches([Run()], dataset, CPU).held_out(source.test_rows)
    assert torch.equal(source.held_out(source.test_rows), plain[..., 1:5, 1:5])
    padded = Batches([Run(data=Data(crop_size=8, crop_padding=1))], dataset, CPU)
    assert torch.equal(padded.held_out(source.test_rows)[..., 1:7, 1:7], plain)


def test_crops_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match=r"crop_size must fit into the padded image, got 11 for in"
    ):
        load_dataset(Data(crop_size=11, crop_padding=1))
    with pytest.raises(ValueError, match=r"must be left out of gaussian, .* are no images; drop"):
        load_dataset(Data(name="gaussian", flip=True))


def test_hashes_look_random_and_broadcast():
    bits = hash_integers(torch.arange(100)[:, None], torch.arange(50))
    assert bits.shape == (100, 50)
    assert bits.unique().numel() == 5000
    ones = sum(((bits >> place) & 1).float().mean() for place in range(64)) / 64
    assert float(ones) == pytest.approx(0.5, abs=0.01)
    assert int(hash_integers(torch.tensor(0))) == int(hash_integers(torch.tensor([0, 5]))[0])
    assert math.isfinite(float(bits.double().mean()))
