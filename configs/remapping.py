"""Students that start from a smaller model's weights (`init.*`, docs/remapping.md).

The paper's third study (Lee et al. 2023, section 3.3): 6 layers from a 4-layer teacher that also
distils, with its remapping (`paper_pr`) and from random weights (`paper`):

    dwt train --config=configs/paper.py:teacher4 --workdir=runs/teacher4
    dwt train --config=configs/remapping.py:paper_pr --workdir=runs/pr

Any method at the demo's size, from the demo's teacher, without distillation:

    dwt train --config=configs/demo.py:teacher --workdir=runs/teacher
    dwt train --config=configs/remapping.py:hyperclone --workdir=runs/grown

Methods of width double it, those of depth double the layers, `masked` grows both behind gates.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

WIDER = ("random", "fna", "net2net", "aki", "hyperclone", "lemon")
DEEPER = ("repeat_last", "stack", "stack_top", "interleave", "middle", "prefix", "ligo")


def get_config(run: str = "hyperclone") -> ConfigDict:
    if run in ("paper", "paper_pr"):
        config = sibling_config(__file__, "paper").get_config("student")
        config.teacher = {"path": "runs/teacher4"}
        config.distill = {"preset": "paper_normal"}
        config.init = {"method": "fna"} if run == "paper_pr" else {}
        return config
    if run not in (*WIDER, *DEEPER, "masked"):
        raise ValueError(
            f"no run {run!r}, expected one of paper, paper_pr, {', '.join(WIDER + DEEPER)}, masked"
        )
    config = sibling_config(__file__, "demo").get_config("student")
    if run in DEEPER:
        config.model.update(num_hidden_layers=4, hidden_size=64, num_attention_heads=2, intermediate_size=256)
    if run == "masked":
        config.model.update(num_hidden_layers=3, gated_layers=True, weighted_norm=True)
    config.init = {"method": run, "from": "runs/teacher"}
    return config
