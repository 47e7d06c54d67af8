"""Every method of remapping on every kind of growth, and what becomes of the function:

    python benchmarks/remap_table.py [--write]

The largest difference of any MLM logit, in float64, between a small post-LN model and what each
method grows it to, beside what the method's report claims. The small model is sampled with a
fixed seed, with norms and biases far from 1 and 0, so that nothing is exact by chance. --write
renews the table in docs/remapping.md.
"""

import argparse
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write
from dwt_jax.models import bert
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.matmul import Policy
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs" / "remapping.md"
BEGIN, END = "<!-- begin: benchmarks/remap_table.py -->", "<!-- end -->"

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
NAMES = (*METHODS, "stack+hyperclone", "middle+net2net", "interleave+aki")


def random_params(seed: int = 0) -> bert.Params:
    """Float64 host arrays of SOURCE: matrices that preserve the scale of their input, norms and
    biases with a noise of 0.3."""
    random = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "bias"):
            return float(name == "scale") + 0.3 * random.normal(size=like.shape)
        scale = 0.5 if name == "embedding" else like.shape[-1] ** -0.5
        return scale * random.normal(size=like.shape)

    return jax.tree_util.tree_map_with_path(leaf, bert.abstract_params(SOURCE))


@functools.partial(jax.jit, static_argnums=1)
def logits(params: bert.Params, model: BertConfig, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    policy = Policy(np.dtype("float64"), np.dtype("float64"))
    hidden = bert.encode(params, model, tokens, segments, policy=policy)
    return lm_head_logits(params, model, hidden, policy=policy)


def probe_rows() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments) [2, 24]; the second row holds two documents."""
    tokens = np.random.default_rng(1).integers(0, SOURCE.vocab_size, (2, 24)).astype(np.int32)
    segments = np.ones((2, 24), np.int32)
    segments[1, 10:] = 2
    return tokens, segments


def compute() -> list[dict[str, Any]]:
    """{method, case, refused} or {method, case, exact, drift} for each method and case."""
    params, (tokens, segments) = random_params(), probe_rows()
    results: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        before = np.asarray(logits(params, SOURCE, tokens, segments))[..., : SOURCE.vocab_size]
        for case, sizes in CASES.items():
            target = dataclasses.replace(SOURCE, **sizes)
            for name in NAMES:
                entry: dict[str, Any] = {"method": name, "case": case}
                try:
                    grown, report = remap_params(params, SOURCE, target, name, jax.random.key(0, impl="rbg"))
                    after = np.asarray(logits(grown, target, tokens, segments))
                    drift = np.abs(after[..., : SOURCE.vocab_size] - before).max()
                    results.append({**entry, "exact": report.function_preserving, "drift": float(drift)})
                except UserError as error:
                    results.append({**entry, "refused": short(str(error))})
    return results


def short(refusal: str) -> str:
    """'lemon: hidden_size 64 → 96, expected … model.weighted_norm' as 'needs weighted_norm', where no
    setting of the model helps the size alone."""
    needed = re.search(r"expected .*model\.(\w+)", refusal)
    return f"needs {needed.group(1)}" if needed else refusal.partition(": ")[2].split(" ")[0]


def markdown(results: list[dict[str, Any]]) -> str:
    cells = {(entry["method"], entry["case"]): cell(entry) for entry in results}
    lines = ["| method | " + " | ".join(CASES) + " |", "|---" * (len(CASES) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(cells[name, case] for case in CASES) + " |" for name in NAMES]
    return "\n".join(lines)


def cell(entry: dict[str, Any]) -> str:
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    drift = entry["drift"]
    return f"**exact** {drift:.0e}" if entry["exact"] else f"{drift:.1f}"


def split_page(page: str) -> tuple[str, str, str]:
    """The text before the table, the table, and the text after it."""
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    assert begin, f"{DOCS} does not have the line {BEGIN}"
    assert end, f"{DOCS} does not have the line {END}"
    return before + begin, table.strip(), end + after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="renew the table in docs/remapping.md")
    options = parser.parse_args()
    table = markdown(compute())
    print(table)
    if options.write:
        before, _, after = split_page(DOCS.read_text())
        with atomic_write(DOCS) as partial:
            partial.write_text(f"{before}\n{table}\n{after}")


if __name__ == "__main__":
    main()
