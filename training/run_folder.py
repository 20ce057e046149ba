"""The folder of a run: a new one for each, one process at a time, nothing of the user's replaced.

A folder holds `last.pth`, `best_model.pth`, `log.jsonl` and, while a process trains, `run.lock`,
which names the process. The lock ends with the process, however that ends.
"""

from pathlib import Path

from locking import locked_folder
from training import resume

RUNS = Path("runs")
LOCK = "run.lock"


# ------------------------------------------------------------------ which folder


def choose(options, runs=RUNS):
    """The folder of --out, else a new one, else, with --resume, that of the latest run.

    A new one is `runs/<data set>-N`, with the first number that is free; it is made here. Raises
    ValueError where there is no run to go on with.
    """
    if options["out"] is not None:
        return Path(options["out"])
    if options["resume"]:
        return _latest(runs)
    return _new(runs, "+".join(options["dataset"]))


def _new(runs, name):
    name = name.replace("/", "-").replace("\\", "-")
    number = 1
    while True:
        folder = runs / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run's, which may have begun just now
            number += 1


def _latest(runs):
    states = sorted(runs.glob("*/last.pth"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise ValueError(f"--resume: no run in {runs}/; name its folder with --out")
    return states[-1].parent


def require_free(out):
    """Raise ValueError where a new run would replace models: of another run, or of nobody's."""
    state, best = out / "last.pth", out / "best_model.pth"
    remedy = "take another --out, or --overwrite to replace it"
    if state.is_file():
        checkpoint = resume.read_state(state)
        progress = checkpoint["state"]["progress"]
        if progress["epoch"] <= checkpoint["options"]["epochs"]:
            raise ValueError(
                f"{state}: a run was stopped here in epoch {progress['epoch']} of "
                f"{checkpoint['options']['epochs']}; go on with --resume, {remedy}"
            )
        raise ValueError(f"{state}: a run was finished here; {remedy}")
    if best.is_file():
        raise ValueError(f"{best}: a model whose run is not in this folder; {remedy}")


def locked(out):
    """Hold the folder of a run against all other processes, see `locking.locked_folder`."""
    return locked_folder(out, LOCK, "trains in this folder")
