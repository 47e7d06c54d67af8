"""Every method of remapping on every kind of growth, and what becomes of the function, in two tables:

    python benchmarks/remap_table.py [--write]

The largest difference of any logit, in float64, between a small post-LN model (a decoder with RMSNorm) and
what each method grows it to, beside what the method's report claims. The small model is sampled with a
fixed seed, with norms and biases far from 1 and 0, so that nothing is exact by chance. --write
renews the tables in docs/remapping.md.
"""

import argparse
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write
from dwt_jax.models import family
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.llama import Config as LlamaConfig
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs" / "remapping.md"

SOURCE = BertConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=128,
    max_position_embeddings=32,
)
WIDE = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 192}
TWICE = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
MORE = {**WIDE, "num_hidden_layers": 6, "vocab_size": 600, "max_position_embeddings": 64}
GATES, WEIGHTS = {"gated_layers": True}, {"weighted_norm": True}

CASES: dict[str, dict[str, Any]] = {
    "4 → 6 layers": {"num_hidden_layers": 6},
    "… gated": {"num_hidden_layers": 6, **GATES},
    "width 64 → 128": TWICE,
    "heads of twice the size": {"hidden_size": 128, "intermediate_size": 256},
    "width 64 → 96": WIDE,
    "… weighted norm": {**WIDE, **WEIGHTS},
    "MLP 128 → 160": {"intermediate_size": 160},
    "everything": MORE,
    "… gated, weighted": {**MORE, **GATES, **WEIGHTS},
}
DECODER = LlamaConfig(
    model_type="qwen3",
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_position_embeddings=32,
)
DECODER_CASES: dict[str, dict[str, Any]] = {
    "4 → 6 layers": {"num_hidden_layers": 6},
    "width 64 → 128": {"hidden_size": 128},
    "width 64 → 96": {"hidden_size": 96},
    "width 64 → 77": {"hidden_size": 77},
    "heads 4 → 8": {"num_attention_heads": 8},
    "… and key-value heads 2 → 4": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "key-value heads 2 → 4": {"num_key_value_heads": 4},
    "MLP 128 → 160": {"intermediate_size": 160},
    "all but the layers": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 192,
        "vocab_size": 600,
    },
}


class Table(NamedTuple):
    """One table of docs/remapping.md."""

    begin: str  # the line before it
    source: ModelConfig
    cases: dict[str, dict[str, Any]]


END = "<!-- end -->"
TABLES = (
    Table("<!-- begin: benchmarks/remap_table.py -->", SOURCE, CASES),
    Table("<!-- begin: benchmarks/remap_table.py, decoder -->", DECODER, DECODER_CASES),
)
NAMES = (*METHODS, "stack+hyperclone", "middle+net2net", "interleave+aki")


def random_params(source: ModelConfig, seed: int = 0) -> Params:
    """Float64 host arrays of a model: matrices that preserve the scale of their input, norms and
    biases with a noise of 0.3."""
    random = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "bias"):
            return float(name == "scale") + 0.3 * random.normal(size=like.shape)
        scale = 0.5 if name == "embedding" else like.shape[-1] ** -0.5
        return scale * random.normal(size=like.shape)

    return jax.tree_util.tree_map_with_path(leaf, family(source).abstract_params(source))


@functools.partial(jax.jit, static_argnums=1)
def logits(params: Params, model: ModelConfig, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    policy = Policy(np.dtype("float64"), np.dtype("float64"))
    hidden = family(model).encode(params, model, tokens, segments, policy=policy)
    return lm_head_logits(params, model, hidden, policy=policy)


def probe_rows() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments) [2, 24]; the second row holds two documents."""
    tokens = np.random.default_rng(1).integers(0, SOURCE.vocab_size, (2, 24)).astype(np.int32)
    segments = np.ones((2, 24), np.int32)
    segments[1, 10:] = 2
    return tokens, segments


def compute(table: Table) -> list[dict[str, Any]]:
    """{method, case, refused} or {method, case, exact, drift} for each method and case."""
    source = table.source
    params, (tokens, segments) = random_params(source), probe_rows()
    results: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        before = np.asarray(logits(params, source, tokens, segments))[..., : source.vocab_size]
        for case, sizes in table.cases.items():
            target = dataclasses.replace(source, **sizes)
            for name in NAMES:
                entry: dict[str, Any] = {"method": name, "case": case}
                try:
                    grown, report = remap_params(params, source, target, name, jax.random.key(0, impl="rbg"))
                    after = np.asarray(logits(grown, target, tokens, segments))
                    drift = np.abs(after[..., : source.vocab_size] - before).max()
                    results.append({**entry, "exact": report.function_preserving, "drift": float(drift)})
                except UserError as error:
                    results.append({**entry, "refused": short(str(error))})
    return results


def short(refusal: str) -> str:
    """'lemon: hidden_size 64 → 96, expected … model.weighted_norm' as 'needs weighted_norm', where no
    setting of the model helps the size alone."""
    needed = re.search(r"expected .*model\.(\w+)", refusal)
    return f"needs {needed.group(1)}" if needed else refusal.partition(": ")[2].split(" ")[0]


def markdown(table: Table, results: list[dict[str, Any]]) -> str:
    cells = {(entry["method"], entry["case"]): cell(entry) for entry in results}
    lines = ["| method | " + " | ".join(table.cases) + " |", "|---" * (len(table.cases) + 1) + "|"]
    lines += [
        f"| `{name}` | " + " | ".join(cells[name, case] for case in table.cases) + " |" for name in NAMES
    ]
    return "\n".join(lines)


def cell(entry: dict[str, Any]) -> str:
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    drift = entry["drift"]
    return f"**exact** {drift:.0e}" if entry["exact"] else f"{drift:.1f}"


def split_page(page: str, table: Table) -> tuple[str, str, str]:
    """The text before the table, the table, and the text after it."""
    before, begin, rest = page.partition(table.begin)
    text, end, after = rest.partition(END)
    assert begin, f"{DOCS} does not have the line {table.begin}"
    assert end, f"{DOCS} does not have the line {END}"
    return before + begin, text.strip(), end + after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="renew the tables in docs/remapping.md")
    options = parser.parse_args()
    for table in TABLES:
        text = markdown(table, compute(table))
        print(f"{text}\n")
        if options.write:
            before, _, after = split_page(DOCS.read_text(), table)
            with atomic_write(DOCS) as partial:
                partial.write_text(f"{before}\n{text}\n{after}")


if __name__ == "__main__":
    main()
