"""How fast text becomes rows, and rows become batches.

    python benchmarks/data.py                              # built-in corpus
    python benchmarks/data.py --text='corpus/*.txt.xz' --blank-lines=2 --tokenizer=vocab.txt
    python benchmarks/data.py --synthetic=50               # 50 MB of made-up words

Reading is timed in interleaved rounds next to what it replaced, one ArrayRecord record a row
read through Grain, over the same rows; medians, and their ratio.
"""

import argparse
import itertools
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data.dataset import PackedDataset, batch_iterator, get_batch, num_rows, open_dataset, read_rows
from dwt_jax.data.prepare import prepare_data

# An assumption, not a measurement: a student of 6 x 768 with a teacher of 4 layers trains on half a million
# tokens a second on an H200. Each token costs about 6 * 43M + 2 * 29M = 3.2e8 operations in the encoders, so
# that is 1.6e14 a second, a sixth of the bf16 peak (9.9e14); at 40 % of the peak it would be 1.2 million.
GPUS, TOKENS_A_GPU = 8, 5e5


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
        time_reading(options, folder, index)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="", help="glob of text files; default: the built-in corpus")
    parser.add_argument("--blank-lines", type=int, default=1, help="empty lines between documents")
    parser.add_argument("--synthetic", type=float, default=0, metavar="MB", help="made-up text instead")
    parser.add_argument("--tokenizer", default="", help="directory or vocab.txt; default: train one")
    parser.add_argument("--length", type=int, default=128, help="tokens a row (default %(default)s)")
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
    data = Data(
        sources=(source,), sequence_length=options.length, tokenizer=Tokenizer(path=options.tokenizer)
    )
    if not options.tokenizer:
        from dwt_jax.data import tokenizer
        from dwt_jax.data.sources import iter_documents

        began = time.perf_counter()
        trained = tokenizer.train_tokenizer(lambda: iter_documents(source), 8192, True, sample_megabytes=20)
        tokenizer.save_tokenizer(trained, folder / "tokenizer", True)
        print(f"tokenizer trained in {time.perf_counter() - began:.1f} s (8192 tokens, up to 20 MB)")
        data = Data(
            sources=(source,), sequence_length=options.length, tokenizer=Tokenizer(str(folder / "tokenizer"))
        )
    lines: list[str] = []
    began = time.perf_counter()
    index = prepare_data(data, folder / "rows", workers=options.workers or None, log=lines.append)
    seconds = time.perf_counter() - began
    rows = index["splits"]["train"]["rows"] + index["splits"]["held_out"]["rows"]
    said = next(line for line in lines if line.endswith("done")).removeprefix("prepare: ")
    print(f"prepare   {said} ({seconds:.1f} s in all, {rows:,} rows)")
    return index


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
    need = GPUS * TOKENS_A_GPU
    print(
        f"reading   {options.batch} x {options.length} tokens a batch, medians of {options.rounds} rounds; "
        f"{GPUS} H200 are assumed to eat {need / 1e6:.0f}M tokens/s"
    )
    for name, found in median.items():
        low, high = min(speeds[name]) / 1e6, max(speeds[name]) / 1e6
        spread = f"({low:.2f} to {high:.2f})"
        print(f"  {name:25} {found / 1e6:7.2f}M tokens/s {spread}, {found / need:6.2f} of the need")
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
