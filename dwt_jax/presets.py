"""Named settings of the objective, as config values. Sources: the paper (Lee et al. 2023,
arXiv 2305.18239, section 4) and Knowledge Inheritance (Qin et al. 2022, arXiv 2105.13880)."""

_constant_one = {"kind": "constant", "value": 1.0}

PRESETS = {
    # alpha_h : alpha_s = 1 : 1, the paper's default.
    "paper_normal": {
        "alpha_hard": _constant_one,
        "alpha_soft": _constant_one,
        "temperature": _constant_one,
        "scale_by_temperature_squared": False,
    },
    # 1 : 4, the paper's "strong" teacher: faster at first, worse in the end.
    "paper_strong": {
        "alpha_hard": _constant_one,
        "alpha_soft": {"kind": "constant", "value": 4.0},
        "temperature": _constant_one,
        "scale_by_temperature_squared": False,
    },
    # 4 -> 1 over the run: the paper's advice, which it did not run.
    "paper_decay": {
        "alpha_hard": _constant_one,
        "alpha_soft": {"kind": "linear", "value": 4.0, "end": 1.0},
        "temperature": _constant_one,
        "scale_by_temperature_squared": False,
    },
    # (1 - alpha) CE + alpha t^2 KL, alpha from 1 to 0 at T_KI; here a quarter of the run, the
    # middle of the 18-28 % that it found best for weak teachers. Move `until` (of both) to change it.
    "knowledge_inheritance": {
        "alpha_hard": {"kind": "linear", "value": 0.0, "end": 1.0, "decay_end": 0.25},
        "alpha_soft": {"kind": "linear", "value": 1.0, "end": 0.0, "decay_end": 0.25},
        "temperature": {"kind": "constant", "value": 2.0},
        "scale_by_temperature_squared": True,
    },
}
