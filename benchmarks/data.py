"""How fast text becomes rows, and rows become batches.

    python benchmarks/data.py                              # built-in corpus
    python benchmarks/data.py --text='corpus/*.txt.xz' --blank-lines=2 --tokenizer=vocab.txt
    python benchmarks/data.py --synthetic=50               # 50 MB of made-up words
    python benchmarks/data.py --row-mode=packed --rounds=0 # how full the rows are, without reading

Reading is timed in interleaved rounds next to what it replaced, one ArrayRecord record a row
read through Grain, over the same rows; medians, and their ratio.
"""

import argparse
import itertools
import logging
import platform
import shlex
import statistics
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from dwt_jax.config import Data, RowMode, Source, Tokenizer
from dwt_jax.data import packing, shards
from dwt_jax.data.dataset import PackedDataset, batch_iterator, get_batch, num_rows, open_dataset, read_rows
from dwt_jax.data.prepare import prepare_data
from dwt_jax.logs import logger

# An assumption, not a measurement: a student of 6 x 768 with a teacher of 4 layers trains on half a million
# positions a second on an H200. Each costs about 6 * 43M + 2 * 29M = 3.2e8 operations in the encoders, so
# that is 1.6e14 a second, a sixth of the bf16 peak (9.9e14); at 40 % of the peak it would be 1.2 million.
GPUS, POSITIONS_A_GPU = 8, 5e5


def main() -> None:
    options = parse()
    packages = ("numpy", "grain", "array_record", "tokenizers")
    print(f"command   {shlex.join(sys.argv)}")
    print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(
        f"versions  python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        index = time_prepare(options, folder)
        print_fill(folder, index)
        if options.rounds:
            time_reading(options, folder, index)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="", help="glob of text files; default: the built-in corpus")
    parser.add_argument("--blank-lines", type=int, default=1, help="empty lines between documents")
    parser.add_argument("--synthetic", type=float, default=0, metavar="MB", help="made-up text instead")
    parser.add_argument("--tokenizer", default="", help="directory or vocab.txt; default: train one")
    parser.add_argument("--vocab-size", type=int, default=8192, help="to train (default %(default)s)")
    parser.add_argument("--row-mode", choices=typing.get_args(RowMode), default=Data().row_mode)
    parser.add_argument("--length", type=int, default=128, help="positions a row (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="rows a batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="batches a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes of prepare; default: one a core")
    return parser.parse_args()


def time_prepare(options: argparse.Namespace, folder: Path) -> dict:
    """Prepare into folder/rows, without the training of the tokenizer in the time; the index."""
    source = Source()
    if options.synthetic:
        source = Source(kind="text", path=str(synthetic(folder / "text.txt", options.synthetic)))
    elif options.text:
        source = Source(kind="text", path=options.text, blank_lines=options.blank_lines)
    tokenizer_path = options.tokenizer or str(folder / "tokenizer")
    if not options.tokenizer:
        from dwt_jax.data import tokenizer, tokenizer_training
        from dwt_jax.data.sources import iter_documents

        began = time.perf_counter()
        trained = tokenizer_training.train_tokenizer(
            lambda: iter_documents(source), options.vocab_size, True, 20
        )
        tokenizer.save_tokenizer(trained, folder / "tokenizer", True)
        seconds = time.perf_counter() - began
        print(f"tokenizer trained in {seconds:.1f} s ({options.vocab_size} tokens, up to 20 MB)")
    data = Data(
        sources=(source,),
        sequence_length=options.length,
        row_mode=options.row_mode,
        tokenizer=Tokenizer(path=tokenizer_path),
    )
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    packing_seconds = 0.0

    def timed_pack(*arguments: typing.Any) -> tuple[packing.PackedRows, packing.Spans]:
        nonlocal packing_seconds
        began = time.thread_time()  # not the time of other processes: packing is done in one thread
        result = packing.pack_spans(*arguments)
        packing_seconds += time.thread_time() - began
        return result

    began = time.perf_counter()
    with mock.patch.object(shards, "pack_spans", timed_pack):
        index = prepare_data(data, folder / "rows", workers=options.workers or None)
    seconds = time.perf_counter() - began
    rows = index["splits"]["train"]["rows"] + index["splits"]["held_out"]["rows"]
    said = next(line for line in lines if line.endswith("done")).removeprefix("prepare: ")
    print(f"prepare   {said} ({seconds:.1f} s in all, {rows:,} rows)")
    print(f"packing   {packing_seconds:.2f} s of one core, {rows / packing_seconds:,.0f} rows/s")
    return index


def print_fill(folder: Path, index: dict) -> None:
    """How much of the training rows' positions is text, special tokens and padding."""
    opened, totals = open_dataset(folder / "rows", "train"), index["splits"]["train"]
    positions = totals["rows"] * index["sequence_length"]
    special = 2 * sum(int(segments.max(1).sum()) for segments in opened.segments)  # [CLS] and [SEP]
    print(
        f"rows      {index['row_mode']}, {index['sequence_length']} positions: "
        f"{(totals['tokens'] - special) / positions:.2%} text, {special / positions:.2%} special tokens, "
        f"{totals['padding']:.2%} padding"
    )


def synthetic(path: Path, megabytes: float) -> Path:
    """Documents of made-up words with Zipf's frequencies."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(draw.choice(letters, draw.integers(2, 10))) for _ in range(30_000)]
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            picked = np.minimum(draw.zipf(1.3, 20_000), len(words)) - 1
            sentences = (" ".join(words[i] for i in picked[at : at + 20]) for at in range(0, 20_000, 20))
            file.write(". ".join(s.capitalize() for s in sentences) + ".\n\n")
    return path


def time_reading(options: argparse.Namespace, folder: Path, index: dict) -> None:
    opened = open_dataset(folder / "rows", "train")
    records = write_records(opened, folder / "rows.array_record")
    readers: dict[str, tuple[Callable[[int], Iterator], int]] = {
        "batch(step), one thread": (
            lambda n: (get_batch(opened, 0, step, options.batch) for step in range(n)),
            options.steps,
        ),
        "batches(), prefetch 2": (
            lambda n: batch_iterator(opened, 0, options.batch, 0, n),
            options.steps,
        ),
        "one record a row, Grain": (
            lambda n: itertools.islice(record_batches(records, options), n),
            max(1, options.steps // 10),
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for round_ in range(options.rounds + 1):
        for name, (read, steps) in readers.items():
            began = time.perf_counter()
            for _ in read(steps):
                pass
            if round_:  # the first imports and warms the page cache
                speeds[name].append(steps * options.batch * options.length / (time.perf_counter() - began))
    median = {name: statistics.median(found) for name, found in speeds.items()}
    need = GPUS * POSITIONS_A_GPU
    print(
        f"reading   {options.batch} x {options.length} positions, medians of {options.rounds} rounds; "
        f"{GPUS} H200 are assumed to eat {need / 1e6:.0f}M positions/s"
    )
    for name, found in median.items():
        low, high = min(speeds[name]) / 1e6, max(speeds[name]) / 1e6
        spread = f"({low:.2f} to {high:.2f})"
        print(f"  {name:25} {found / 1e6:7.2f}M positions/s {spread}, {found / need:6.2f} of the need")
    slow = median.pop("one record a row, Grain")
    print(
        "  against one record a row: "
        + ", ".join(f"{name} {found / slow:.1f}x" for name, found in median.items())
    )


def write_records(opened: PackedDataset, path: Path) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for at in range(0, num_rows(opened), 4096):
        found = read_rows(opened, np.arange(at, min(at + 4096, num_rows(opened))))
        for tokens, segments in zip(found.tokens, found.segment_ids, strict=True):
            writer.write(tokens.tobytes() + segments.tobytes())
    writer.close()
    return path


def record_batches(path: Path, options: argparse.Namespace) -> Iterator:
    """What most Grain pipelines do: a record a row, shuffled, decoded, batched, read by threads."""
    import grain

    def decode(record: bytes) -> dict[str, np.ndarray]:
        tokens = np.frombuffer(record, np.uint16, options.length)
        return {"tokens": tokens, "segments": np.frombuffer(record, np.uint8, offset=tokens.nbytes)}

    source = grain.sources.ArrayRecordDataSource(str(path))
    dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(decode)
    return iter(dataset.to_iter_dataset().batch(options.batch, drop_remainder=True))


if __name__ == "__main__":
    main()
