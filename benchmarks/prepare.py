"""`dwt prepare` beside `datasets.map` with the grouping of run_mlm, from the same text and tokenizer.

    python benchmarks/prepare.py                                   # 20 MB of made-up words
    python benchmarks/prepare.py --text=wiki.txt --tokenizer=vocab.txt --rounds=5

The peer is what transformers' examples/pytorch/language-modeling/run_mlm.py does: tokenize a document a row,
then concatenate and cut into rows. Variants take turns; each round starts without a cache. Documents
are divided by one empty line.
"""

import argparse
import importlib.util
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.data import synthetic
from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data import tokenizer, tokenizer_training
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.sources import iter_documents


def main() -> None:
    options = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many threads as processes, for both
    packages = ("tokenizers", "transformers", "datasets")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"no package {' '.join(missing)}, expected it: pip install {' '.join(missing)}")
    print(f"command   {shlex.join(sys.argv)}")
    print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(f"versions  python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = Path(options.text) if options.text else synthetic(folder / "text.txt", options.synthetic)
        source = Source(kind="text", path=str(path), blank_lines=1)
        tokenizer_path = folder / "tokenizer"
        if options.tokenizer:
            tokenizer.copy_tokenizer(options.tokenizer, tokenizer_path)
        else:
            trained = tokenizer_training.train_tokenizer(lambda: iter_documents(source), 8192, True, 20)
            tokenizer.save_tokenizer(trained, tokenizer_path, True)
        seconds: dict[str, list[float]] = {"dwt prepare": [], "datasets.map": []}
        tokens = {}
        for i in range(options.rounds):
            for name, prepare in (("dwt prepare", prepare_here), ("datasets.map", prepare_with_datasets)):
                began = time.perf_counter()
                tokens[name] = prepare(source, tokenizer_path, folder / f"{name} {i}", options)
                seconds[name].append(time.perf_counter() - began)
        megabytes = path.stat().st_size / 1e6
    for name, values in seconds.items():
        low, high = megabytes / max(values), megabytes / min(values)
        print(
            f"{name:12}  {megabytes / statistics.median(values):.2f} MB/s ({low:.2f} to {high:.2f}), "
            f"{tokens[name]:,} tokens in rows"
        )
    ours, theirs = (statistics.median(values) for values in seconds.values())
    print(f"dwt prepare is {theirs / ours:.2f} times as fast, {options.workers} processes each")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="", help="a text file; default: made-up words")
    parser.add_argument("--synthetic", type=float, default=20, metavar="MB", help="default %(default)s")
    parser.add_argument("--tokenizer", default="", help="directory or vocab.txt; default: train one")
    parser.add_argument("--length", type=int, default=128, help="positions a row (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one a core")
    return parser.parse_args()


def prepare_here(source: Source, tokenizer_path: Path, out: Path, options: argparse.Namespace) -> int:
    """Prepare into `out`. Returns the tokens in rows."""
    data = Data(
        sources=(source,), sequence_length=options.length, tokenizer=Tokenizer(path=str(tokenizer_path))
    )
    index = prepare_data(data, out, workers=options.workers)
    return sum(split["tokens"] for split in index["splits"].values())


def prepare_with_datasets(
    source: Source, tokenizer_path: Path, out: Path, options: argparse.Namespace
) -> int:
    """Prepare with `datasets`, its cache in `out`. Returns the tokens in rows."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    auto_tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)

    def documents() -> Iterator[dict[str, str]]:
        for text in iter_documents(source):
            yield {"text": text}

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return auto_tokenizer(examples["text"], return_special_tokens_mask=True, verbose=False)

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: [x for row in rows for x in row] for key, rows in examples.items()}
        total = len(joined["input_ids"]) // options.length * options.length
        cuts = range(0, total, options.length)
        return {key: [values[i : i + options.length] for i in cuts] for key, values in joined.items()}

    texts = datasets.Dataset.from_generator(documents, cache_dir=str(out), fingerprint=out.name)
    encoded = texts.map(tokenize, batched=True, num_proc=options.workers, remove_columns=["text"])
    rows = encoded.map(group, batched=True, num_proc=options.workers)
    return len(rows) * options.length


if __name__ == "__main__":
    main()
