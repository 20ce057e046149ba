"""Several processes that share one run, as torchrun starts them; alone, each function is trivial.

    torchrun --nproc_per_node=2 train.py ...

A root file because training and encoding both share their work. W is the number of processes, and
each has a rank, 0 to W - 1. The first one alone prints, writes and saves. What lies on the CPU goes
by gloo; `training/distributed.py` gathers features on the devices (nccl on CUDA).
"""

import contextlib
import os
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# A process may wait so long for the others, which decode a data set meanwhile. By gloo one that has
# ended is noticed at once, as its connection closes; by nccl torchrun has to end the others.
WAIT = timedelta(hours=2)

SPEAKS = 1  # seconds in which a process shows its error, before torchrun ends all for another's end

# ------------------------------------------------------------------ which process this is


def started_together():
    """Whether torchrun started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def several():
    """Whether this process shares its run with others at the moment."""
    return dist.is_available() and dist.is_initialized()


def world():
    """W, how many processes share the run."""
    return dist.get_world_size() if several() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if several() else 0


def is_first():
    """Whether this process prints, writes and saves."""
    return rank() == 0


def local_rank():
    """The number of this process among those of its machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if several() else 0


# ------------------------------------------------------------------ the group


@contextmanager
def group(device_name, remedy):
    """Join the processes that torchrun started, to the end of the context or until `leave`.

    Without torchrun, or with one process, nothing happens. device_name: the option --device, which
    decides between nccl and gloo. All but the first process print nothing within. remedy: what to
    do after another process has ended, for the ConnectionError that this raises then. Raises
    ValueError where torchrun's environment is not whole.
    """
    if not started_together():
        yield
        return
    _begin(device_name)
    try:
        with contextlib.nullcontext() if is_first() else _silence():
            yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise ConnectionError(
            f"another process of this run has ended, so this one cannot go on; {remedy} "
            f"({str(error).splitlines()[0]})"
        ) from error
    finally:
        leave()


def _begin(device_name):
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start "
            "several processes by torchrun, or unset WORLD_SIZE"
        )
    backend = "gloo"
    if device_name != "cpu" and torch.cuda.is_available():
        number = int(os.environ["LOCAL_RANK"])
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"process {number} of this machine has no GPU, there are "
                f"{torch.cuda.device_count()}: take --nproc_per_node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(number)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=WAIT)


def leave():
    """End the sharing: from here on this process is alone."""
    if several():
        dist.destroy_process_group()


@contextmanager
def _silence():
    """Nothing is shown of what is printed within; errors show, as they are printed behind."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _is_lost_connection(error):
    """Whether a RuntimeError says that another process has gone."""
    # Gloo's errors have no type of their own; they name the file that they come from.
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


# ------------------------------------------------------------------ exchanges


def wait():
    """Wait until all processes are here."""
    largest(0)


@contextmanager
def first_of_machine_first():
    """Let the first process of each machine pass alone; the others find its files then.

    For preparations: where they fail in a first process, which says why, all others end without a
    word, with exit code 2.
    """
    goes_first = local_rank() == 0
    if not goes_first:
        _end_if(largest(False))
    try:
        yield
    except BaseException:
        if goes_first:
            largest(True)
        raise
    if goes_first:
        _end_if(largest(False))


def _end_if(has_failed):
    """End this process where another one's preparations have failed."""
    if has_failed:
        time.sleep(SPEAKS)
        raise SystemExit(2)


def from_first(value):
    """The value that the first process gave; of the others it is not looked at."""
    if not several():
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def largest(number):
    """The largest of all processes' whole numbers."""
    if not several():
        return number
    shared = torch.tensor(int(number))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def mean(number):
    """The mean of all processes' numbers."""
    if not several():
        return number
    shared = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(shared)
    return shared.item() / world()


def in_turn(items):
    """All processes' items, of a list of which process r has those numbered r, r + W, ..."""
    if not several():
        return items
    of_rank = [None] * world()
    dist.all_gather_object(of_rank, items)
    return [of_rank[i % world()][i // world()] for i in range(sum(map(len, of_rank)))]
