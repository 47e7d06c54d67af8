"""Presets of `distill`, as config values.

Sources: the paper (Lee et al. 2023, arXiv 2305.18239, section 4) and Knowledge Inheritance
(Qin et al. 2022, arXiv 2105.13880).
"""

from typing import Any

_constant_one = {"kind": "constant", "value": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    # alpha_h : alpha_s = 1 : 1, the paper's default.
    "paper_normal": {
        "alpha_hard": _constant_one,
        "alpha_soft": _constant_one,
        "temperature": _constant_one,
        "scale_by_temperature_squared": False,
    },
    # 1 : 4, the paper's "strong" teacher: a lower loss early in training, a higher one at the end.
    "paper_strong": {
        "alpha_hard": _constant_one,
        "alpha_soft": {"kind": "constant", "value": 4.0},
        "temperature": _constant_one,
        "scale_by_temperature_squared": False,
    },
    # 4 -> 1 over the run: recommended by the paper, which has no result for it.
    "paper_decay": {
        "alpha_hard": _constant_one,
        "alpha_soft": {"kind": "linear", "value": 4.0, "end": 1.0},
        "temperature": _constant_one,
        "scale_by_temperature_squared": False,
    },
    # (1 - alpha) CE + alpha t^2 KL, with alpha from 1 to 0 at T_KI. T_KI is a quarter of the run: the
    # middle of the 18-28 % that worked best for weak teachers. Change `decay_end` of both to move it.
    "knowledge_inheritance": {
        "alpha_hard": {"kind": "linear", "value": 0.0, "end": 1.0, "decay_end": 0.25},
        "alpha_soft": {"kind": "linear", "value": 1.0, "end": 0.0, "decay_end": 0.25},
        "temperature": {"kind": "constant", "value": 2.0},
        "scale_by_temperature_squared": True,
    },
    # 4 -> 0 over the first half: a weak teacher helps early and harms late (docs/recipe.md).
    "early_decay": {
        "alpha_hard": _constant_one,
        "alpha_soft": {"kind": "linear", "value": 4.0, "end": 0.0, "decay_end": 0.5},
        "temperature": _constant_one,
        "scale_by_temperature_squared": False,
    },
}
