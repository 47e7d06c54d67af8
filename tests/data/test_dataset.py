import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.config import Source
from dwt_jax.data import dataset
from dwt_jax.data.batch import Batch
from dwt_jax.data.prepare import prepare_data
from dwt_jax.errors import UserError
from helpers.prepared_data import data_config

LENGTH = 8


def write(directory: Path, sizes: list[list[int]]) -> np.ndarray:
    """A prepared directory with shards of sizes[source][shard] rows; all its tokens [rows, L].

    Written by hand, as docs/data.md describes it. Row r of the split holds r·L … r·L + L − 1.
    """
    (directory / "train").mkdir(parents=True)
    tokens = np.arange(sum(map(sum, sizes)) * LENGTH).astype(np.uint16).reshape(-1, LENGTH)
    sources, start = [], 0
    for source, shards in enumerate(sizes):
        entry = {"rows": sum(shards), "tokens": LENGTH * sum(shards), "documents": sum(shards), "shards": []}
        document = 0
        for number, size in enumerate(shards):
            name = f"{source:03d}-{number:05d}"
            shard = tokens[start : start + size]
            np.save(directory / "train" / f"{name}.tokens.npy", shard)
            np.save(directory / "train" / f"{name}.segments.npy", (shard % 2 + 1).astype(np.uint8))
            np.save(directory / "train" / f"{name}.documents.npy", np.arange(document, document + size))
            entry["shards"].append({"name": name, "rows": size})
            start, document = start + size, document + size
        sources.append(entry)
    (directory / "index.json").write_text(json.dumps({"splits": {"train": {"sources": sources}}}))
    return tokens


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Three sources of 650, 350 and 1000 rows in six shards."""
    directory = tmp_path_factory.mktemp("rows") / "three"
    return directory, write(directory, [[250, 250, 150], [350], [800, 200]])


def same(actual: Batch, expected: Batch) -> bool:
    return all(np.array_equal(getattr(actual, n), getattr(expected, n)) for n in ("tokens", "segment_ids"))


@given(st.lists(st.integers(0, 1999), max_size=50))
def test_read_rows(three, numbers):
    directory, tokens = three
    opened = dataset.open_dataset(directory, "train")
    rows = dataset.read_rows(opened, np.array(numbers, np.int64))
    assert rows.tokens.dtype == np.uint16
    assert rows.segment_ids.dtype == np.uint8
    np.testing.assert_array_equal(rows.tokens, tokens[numbers])
    np.testing.assert_array_equal(rows.segment_ids, tokens[numbers] % 2 + 1)


def test_row_counts_and_document_ids(three):
    opened = dataset.open_dataset(three[0], "train")
    assert dataset.num_rows(opened) == dataset.rows_per_epoch(opened) == 2000
    np.testing.assert_array_equal(dataset.first_document_ids(opened), np.arange(2000))


def test_tokens_per_row_is_the_mean_of_an_epoch(tokenizer_dir, texts, tmp_path):
    """Of a mixture of full rows and of rows with much padding."""
    (tmp_path / "text").mkdir()
    for name, documents in (("long", texts[:30]), ("short", texts[30:])):
        (tmp_path / "text" / name).write_text("\n".join(documents))
    sources = [
        Source(kind="text", path=str(tmp_path / "text" / "long"), documents="file"),
        Source(kind="text", path=str(tmp_path / "text" / "short"), documents="lines", weight=3),
    ]
    data = data_config(tokenizer_dir, *sources, row_mode="sentence", sequence_length=128)
    prepare_data(data, tmp_path / "out", workers=1)
    opened = dataset.open_dataset(tmp_path / "out", "train", [1, 3])
    rows = dataset.read_rows(opened, dataset.row_indices(opened, 0, 0, dataset.rows_per_epoch(opened)))
    assert opened.tokens_per_row == pytest.approx((rows.segment_ids > 0).sum() / len(rows.tokens))
    unweighted = dataset.open_dataset(tmp_path / "out", "train")
    assert abs(opened.tokens_per_row - unweighted.tokens_per_row) > 0.1


@pytest.mark.parametrize("number", [-1, 2000])
def test_read_rows_out_of_range_raises(three, number):
    with pytest.raises(IndexError, match="expected 0 to 1999"):
        dataset.read_rows(dataset.open_dataset(three[0], "train"), np.array([0, number]))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_row_indices_have_each_row_once_an_epoch(three, seed, epoch):
    opened = dataset.open_dataset(three[0], "train")
    rows = dataset.row_indices(opened, seed, epoch * 2000, (epoch + 1) * 2000)
    assert sorted(rows.tolist()) == list(range(2000))


@pytest.mark.parametrize("count", [1, 2, 3, 2**16, 2**16 + 1, 2**16 + 2])
def test_row_indices_have_each_row_once_for_any_size(tmp_path, count):
    """Powers of 4 and their neighbours are where ciphers over them go wrong."""
    write(tmp_path / "rows", [[count]])
    rows = dataset.row_indices(dataset.open_dataset(tmp_path / "rows", "train"), 7, count, 2 * count)
    assert np.array_equal(np.sort(rows), np.arange(count))


def test_row_indices_differ_between_epochs_and_seeds(three):
    opened = dataset.open_dataset(three[0], "train")
    orders = {
        tuple(dataset.row_indices(opened, seed, e * 2000, e * 2000 + 50))
        for seed in range(5)
        for e in range(5)
    }
    assert len(orders) == 25


def test_row_indices_are_uniform(three):
    """The row at a place is uniform over seeds: χ² of 10 tenths with 9 degrees of freedom."""
    opened = dataset.open_dataset(three[0], "train")
    tenths = np.array([dataset.row_indices(opened, seed, 0, 10) for seed in range(1000)]) // 200
    for position in range(10):
        counts = np.bincount(tenths[:, position], minlength=10)
        assert ((counts - 100) ** 2 / 100).sum() < 33.7  # p = 0.0001


@given(st.integers(0, 9), st.integers(0, 300), st.integers(0, 100))
def test_row_indices_do_not_depend_on_the_range(three, seed, start, count):
    opened = dataset.open_dataset(three[0], "train")
    stream = dataset.row_indices(opened, seed, 1800, 2300)  # over the end of an epoch
    np.testing.assert_array_equal(
        dataset.row_indices(opened, seed, 1800 + start, 1800 + start + count), stream[start : start + count]
    )


@given(st.integers(0, 30), st.lists(st.integers(0, 12), max_size=5), st.integers(1, 12))
def test_get_batch_is_the_same_for_any_partition(three, step, cuts, processes):
    opened = dataset.open_dataset(three[0], "train")
    full_batch = dataset.get_batch(opened, 5, step, 12)
    assert same(
        full_batch, dataset.read_rows(opened, dataset.row_indices(opened, 5, step * 12, step * 12 + 12))
    )
    ends = [0, *sorted(cuts), 12]
    contiguous = [slice(a, b) for a, b in itertools.pairwise(ends)]
    for parts in (contiguous, [slice(i, None, processes) for i in range(processes)]):
        for part in parts:
            expected = Batch(full_batch.tokens[part], full_batch.segment_ids[part])
            assert same(dataset.get_batch(opened, 5, step, 12, part), expected)


@pytest.mark.parametrize(
    ("weights", "times"),
    [
        ([1, 1, 1], (1, 1, 1)),
        ([2, 1, 1], (2, 1, 1)),
        ([1, 3, 2], (1, 3, 2)),
    ],
)
def test_integer_weights_repeat_each_row(three, weights, times):
    opened = dataset.open_dataset(three[0], "train", weights)
    length = dataset.rows_per_epoch(opened)
    assert length == np.dot([650, 350, 1000], weights)
    for epoch in range(3):
        counts = Counter(dataset.row_indices(opened, 1, epoch * length, (epoch + 1) * length).tolist())
        expected = dict(enumerate(np.repeat(times, [650, 350, 1000]).tolist()))
        assert counts == expected


def test_fractional_weights_cover_all_rows_over_several_epochs(three):
    opened = dataset.open_dataset(three[0], "train", [1, 1, 0.25])
    length = dataset.rows_per_epoch(opened)
    assert length == 650 + 350 + 250
    rows_by_epoch = [
        {row for row in dataset.row_indices(opened, 1, e * length, (e + 1) * length).tolist() if row >= 1000}
        for e in range(8)
    ]
    assert all(len(part) == 250 for part in rows_by_epoch)
    assert set.union(*rows_by_epoch[:4]) == set(range(1000, 2000)), "disjoint quarters"
    assert [sorted(part) for part in rows_by_epoch[:4]] == [sorted(part) for part in rows_by_epoch[4:]]


@pytest.mark.parametrize(("start", "stop", "prefetch"), [(0, 9, 2), (4, 9, 1), (3, 3, 2), (0, 40, 8)])
def test_batch_iterator_yields_steps_in_order(three, start, stop, prefetch):
    opened = dataset.open_dataset(three[0], "train")
    part = slice(2, 6)
    batches = list(dataset.batch_iterator(opened, 3, 8, start, stop, part, prefetch))
    assert len(batches) == stop - start
    for step, batch in zip(range(start, stop), batches, strict=True):
        assert same(batch, dataset.get_batch(opened, 3, step, 8, part))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 2, 3, 5, 9])
def test_batch_iterator_reads_each_row_of_the_stream_once(three, start, processes):
    """From any step on, the first of a stage or not, in any number of processes."""
    opened = dataset.open_dataset(three[0], "train")
    sizes = np.repeat([5, 12, 600], 3)
    stream = iter(dataset.row_indices(opened, 3, int(sizes[:start].sum()), int(sizes.sum())).tolist())
    parts = [{n: np.arange(i, n, processes) for n in set(sizes.tolist())} for i in range(processes)]
    readers = [dataset.batch_iterator(opened, 3, sizes, start, len(sizes), part) for part in parts]
    for size, batches in zip(sizes[start:].tolist(), zip(*readers, strict=True), strict=True):
        tokens = np.full((size, LENGTH), -1)
        for part, batch in zip(parts, batches, strict=True):
            tokens[part[size]] = batch.tokens
        rows = [next(stream) for _ in range(size)]
        np.testing.assert_array_equal(tokens, [three[1][row] for row in rows])
    assert next(stream, None) is None


def test_batch_iterator_of_equal_sizes_yields_the_constant_batch(three):
    opened = dataset.open_dataset(three[0], "train")
    batches = dataset.batch_iterator(opened, 3, np.full(9, 8), 2, 9)
    for step, batch in zip(range(2, 9), batches, strict=True):
        assert same(batch, dataset.get_batch(opened, 3, step, 8))


def test_batch_iterator_closes_early(three):
    """And an endless stream is no reason to hang."""
    opened = dataset.open_dataset(three[0], "train")
    stream = dataset.batch_iterator(opened, 3, 8, 0, 10**9)
    assert same(next(stream), dataset.get_batch(opened, 3, 0, 8))
    stream.close()


def test_batch_iterator_raises_errors_of_its_threads(three):
    opened = dataset.open_dataset(three[0], "train")
    with pytest.raises(Exception, match="expected 0 to 1999"):
        next(dataset.batch_iterator(dataclasses.replace(opened, sources=opened.sources + 9999), 3, 8, 0, 9))


@pytest.mark.parametrize(
    ("break_it", "arguments", "message"),
    [
        (lambda d: (d / "index.json").unlink(), ("train",), r"no split 'train' \(FileNotFoundError"),
        (lambda d: None, ("valid",), "no split 'valid'"),
        (lambda d: None, ("train", [1, 2]), "prepared from 1 sources, but data.sources has 2"),
        (lambda d: None, ("train", [0.01]), "no rows under the weights"),
        (lambda d: (d / "train" / "000-00001.tokens.npy").unlink(), ("train",), "00001.tokens.npy: "),
        (
            lambda d: (d / "train" / "000-00000.segments.npy").write_bytes(b"\x93NUMPY"),
            ("train",),
            "segments.npy: ",
        ),
        (
            lambda d: np.save(d / "train" / "000-00000.tokens.npy", np.zeros((2, 8))),
            ("train",),
            "holds 2 rows",
        ),
    ],
)
def test_open_dataset_reports_user_errors(tmp_path, break_it, arguments, message):
    write(tmp_path / "out", [[5, 5]])
    break_it(tmp_path / "out")
    with pytest.raises(UserError, match=message) as error:
        dataset.open_dataset(tmp_path / "out", *arguments)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "out") in str(error.value)


def test_open_dataset_raises_the_open_file_limit(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write(tmp_path / "many", [[1] * 40])
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        opened = dataset.open_dataset(tmp_path / "many", "train")
        assert dataset.num_rows(opened) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
