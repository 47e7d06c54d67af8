"""grid.json: a study and its runs, so that a report needs none of the config files."""

from dataclasses import fields
from pathlib import Path

from dwt_jax.config_loader import construct, to_dict
from dwt_jax.errors import UserError
from dwt_jax.runs.run_dir import read_json, write_json
from dwt_jax.study.sweep import Grid, Job, Place, problems

NAME = "grid.json"


def write(grid: Grid, jobs: tuple[Job, ...], workdir: Path) -> None:
    places = [{f.name: getattr(job, f.name) for f in fields(Place)} for job in jobs]
    for place in places:
        place["workdir"] = place["workdir"].relative_to(workdir).as_posix()
    write_json(workdir / NAME, {"grid": to_dict(grid), "jobs": places})


def read(workdir: Path) -> tuple[Grid, tuple[Place, ...]]:
    """What `write` wrote. Raises UserError for anything else."""
    path = workdir / NAME
    found = read_json(path)
    try:
        places = tuple(
            Place(**{**job, "workdir": workdir / job["workdir"], "tasks": tuple(job["tasks"])})
            for job in found["jobs"]
        )
        grid = construct(Grid, found["grid"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {error!r}, expected what dwt study wrote (run it again)") from None
    for problem in problems(grid):
        raise UserError(f"{path}: {problem}")
    strangers = {place.arm for place in places} - {arm.name for arm in grid.arms}
    if strangers:
        raise UserError(f"{path}: a run of arm {min(strangers)!r}, expected one of the grid's arms")
    return grid, places
