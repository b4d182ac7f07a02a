"""What is trained on when: epochs, buckets of aspect ratios, whole words, the middle of pictures."""

from pathlib import Path

import pytest
import torch
from toy_training import settings

from nested_attention.training.entries import Entry
from nested_attention.training.pictures import bucket_sizes, cover, nearest_bucket
from nested_attention.training.samples import Plan


def test_few_pictures_of_an_aspect_join_the_nearest():
    entries = [Entry(Path(f"{i}.png"), "", (64, 64)) for i in range(9)] + [Entry(Path("wide.png"), "", (128, 64))]
    for batch, buckets in ((1, 2), (2, 2), (4, 1)):
        plan = Plan(entries, settings(Path("anywhere"), batch=batch), 1)
        assert len(plan.buckets) == buckets
        drawn = [row.entry for number in range(plan.batches_per_epoch) for row in plan.rows(number)]
        assert set(drawn) == set(range(10)) and max(map(drawn.count, drawn)) <= 2


def test_each_epoch_trains_on_every_entry():
    entries = [Entry(Path(f"{i}.png"), "", (100 + 40 * (i % 3), 120)) for i in range(17)]
    config = settings(Path("anywhere"), seed=3)
    plan = Plan(entries, config, 1)
    assert len(plan.buckets) == 3
    for epoch in range(3):
        numbers = range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch)
        batches = [plan.rows(number) for number in numbers]
        assert all(len({row.bucket for row in rows}) == 1 for rows in batches)
        assert {row.entry for rows in batches for row in rows} == set(range(17))
    again = Plan(entries, config, 1)
    assert plan.rows(11) == again.rows(11)
    assert len({row.seed for number in range(20) for row in plan.rows(number)}) == 40


def test_only_the_whole_word_is_the_subject():
    config = settings(Path("anywhere"))
    assert config.subject_caption("personal items of a Person, a person") == "personal items of a <person>, a person"
    for caption in ("a photo of <Person>", "a photo of Person", "a photo of <person>"):
        assert config.subject_caption(caption) == "a photo of <person>"
    assert config.subject_caption("a person's portrait, <Person>") == "a person's portrait, <person>"
    with pytest.raises(ValueError, match="'a personal trainer' holds neither <person> nor the word person"):
        config.subject_caption("a personal trainer")


def test_buckets_are_of_the_pictures_aspects():
    """By the factor between two: 0.685 is nearer to 448 : 576 (0.778) than to 384 : 640 (0.6), and lying likewise."""
    sizes = bucket_sizes(512)
    assert sizes == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    cases = {(3000, 2900): (512, 512), (90, 60): (640, 384), (685, 1000): (448, 576), (1000, 685): (576, 448)}
    assert {size: nearest_bucket(size, sizes) for size in cases} == cases
    assert nearest_bucket((50, 50), [(64, 64), (128, 128), (96, 96)]) == (128, 128)


def test_a_picture_that_is_too_long_keeps_its_middle():
    picture = torch.rand(1, 90, 30, 3)
    assert torch.equal(cover(picture, (30, 30)), picture[:, 30:60])
    lying = picture.transpose(1, 2)
    assert torch.equal(cover(lying, (30, 30)), lying[:, :, 30:60])
