"""Students initialized from a smaller model's weights (`init.*`, docs/remapping.md).

The paper's third study (Lee et al. 2023, section 3.3): a 6-layer student of a 4-layer teacher,
initialized with the paper's remapping (`paper_pr`) or at random (`paper`):

    dwt train --config=configs/paper.py:teacher4 --workdir=runs/teacher4
    dwt train --config=configs/remapping.py:paper_pr --workdir=runs/pr

Any method at the sizes of configs/small_bert.py, without distillation:

    dwt train --config=configs/small_bert.py:2x64 --workdir=runs/teacher
    dwt train --config=configs/remapping.py:hyperclone --workdir=runs/grown

Width methods double the hidden size, depth methods the layers; `masked` grows both with gates.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

WIDTH_METHODS = ("random", "fna", "net2net", "aki", "center_tile", "hyperclone", "lemon")
DEPTH_METHODS = ("repeat_last", "stack", "stack_top", "interleave", "nearest", "middle", "prefix", "ligo")


def get_config(run: str = "hyperclone") -> ConfigDict:
    if run in ("paper", "paper_pr"):
        config = sibling_config(__file__, "paper").get_config("student")
        config.teacher = {"path": "runs/teacher4"}
        config.distill = {"preset": "paper_normal"}
        config.init = {"method": "fna"} if run == "paper_pr" else {}
        return config
    if run not in (*WIDTH_METHODS, *DEPTH_METHODS, "masked"):
        methods = ", ".join(WIDTH_METHODS + DEPTH_METHODS)
        raise ValueError(f"no run {run!r}, expected one of paper, paper_pr, {methods}, masked")
    config = sibling_config(__file__, "small_bert").get_config("2x128")
    if run in DEPTH_METHODS:
        config.model.update(num_hidden_layers=4, hidden_size=64, num_attention_heads=2, intermediate_size=256)
    if run == "masked":
        config.model.update(num_hidden_layers=3, gated_layers=True, weighted_norm=True)
    config.init = {"method": run, "from": "runs/teacher"}
    return config
