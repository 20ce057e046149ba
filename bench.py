"""Measure how fast this project is, beside what one would use without it.

    python bench.py                                   # every row of the table
    python bench.py --row search-exact index          # some of them
    python bench.py --json bench.json --device cuda

The sides of a row run one after another, again and again: what else the machine does meets all of
them. Where the sides are to compute the same, a row asserts that before. A ratio says how many
times faster ours is; its median, least and largest value over the repetitions are given, and the
medians of the seconds. Where a row asks what something costs, the ratio is below 1.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("bench", __doc__)  # before torch is imported, which takes seconds

import json

from benchmarks.data import batches, graph_epoch, graphs
from benchmarks.encoding import (
    evaluating,
    graph_branch,
    image_features,
    text_features,
    training_step,
)
from benchmarks.frame import lines_of, machine
from benchmarks.indexing import index
from benchmarks.memory import recompute
from benchmarks.recall import recall
from benchmarks.search import search_ann, search_exact
from benchmarks.startup import startup
from clip_gcn_image_feature_integration import pick_device
from escaping import escaped
from options import parse_options, run
from writing import write_text

ROWS = {
    "training-step": training_step,
    "graph-branch": graph_branch,
    "recompute": recompute,
    "graph-epoch": graph_epoch,
    "image-features": image_features,
    "text-features": text_features,
    "evaluate": evaluating,
    "recall": recall,
    "graphs": graphs,
    "batches": batches,
    "startup": startup,
    "search-exact": search_exact,
    "search-ann": search_ann,
    "index": index,
}


def main(arguments=None):
    options = parse_options("bench", __doc__, arguments)
    unknown = sorted(set(options.row or ()) - set(ROWS))
    if unknown:
        raise ValueError(f"--row {escaped(' '.join(unknown))}: expected some of {', '.join(ROWS)}")
    device = pick_device(options.device)
    content = {"command": "bench.py", "machine": machine(device), "options": vars(options)}
    content["rows"] = {}
    for name in options.row or ROWS:
        results = ROWS[name](device, options.small)
        for result in results:
            print("\n".join(lines_of(name, result)), flush=True)
        content["rows"][name] = [result._asdict() for result in results]
        if options.json:  # after each row: a later one may fail
            write_text(options.json, json.dumps(content, indent=1) + "\n")
    return content


if __name__ == "__main__":
    run(main)
