"""Growth methods by name."""

import re

from dwt_jax.remap import depth_maps
from dwt_jax.remap.methods import METHODS


def test_method_docstring_says_whether_function_is_preserved():
    for name, method in METHODS.items():
        text = method.__doc__ if name not in depth_maps.DEPTH_MAPS else depth_maps.__doc__
        assert re.search(r"[Pp]reserves?\s+the\s+function", text), name
        assert re.search(r"20\d\d", method.__doc__) or name == "prefix", name
