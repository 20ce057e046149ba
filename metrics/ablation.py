"""The table of ablate.py and its figure, from the contents of the runs' files."""

from statistics import mean, stdev
from xml.sax.saxutils import escape

from metrics.intervals import difference, figures, share_difference

BASE = ("global", "without")  # row and evidence that the others are compared with

# ------------------------------------------------------------------ figures of rows


def of_all(result):
    """A result's table by image."""
    return result["per_image"]


def of_detected(result):
    """A result's table by image, of the images with a detected object alone."""
    kept = [i for i, count in enumerate(result["objects"]) if count]

    def part(values):
        if isinstance(values, dict):
            return {name: part(column) for name, column in values.items()}
        return [values[i] for i in kept]

    return part(result["per_image"])


def spread(values):
    """Mean ± sample deviation of figures, in words."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def in_words(gain):
    """A `Difference` and its interval; "-" for None."""
    if gain is None:
        return "-"
    return f"{gain.value:+.1f}, {gain.low:+.1f} to {gain.high:+.1f}"


def rivals(runs, base):
    """(runs of the row that others are compared with, whether they have the seeds of `runs`).

    Those of the same seeds, if there are all of them, else all.
    """
    seeds = [run["seed"] for run in runs]
    alike = [run for run in base if run["seed"] in seeds]
    same_seeds = [run["seed"] for run in alike] == seeds
    return (alike if same_seeds else base), same_seeds


def gains(name, choice, runs, base):
    """What a row gains over others: (on all images, on those with detections), `Difference`s.

    base: runs of the row that it is compared with, see `rivals`; or None. A gain is None without
    images, or without a comparison.
    """
    if base is None or (name, choice) == BASE:
        return None, None
    compared, same_seeds = rivals(runs, base)
    own = [run["test"][choice] for run in runs]
    others = [run["test"][BASE[1]] for run in compared]
    found = []
    for part in (of_all, of_detected):
        tables_of_own = [part(result) for result in own]
        tables_of_others = [part(result) for result in others]
        gain = None
        if tables_of_own[0]["names"]:
            gain = difference(tables_of_own, tables_of_others, same_seeds)["mR"]
        found.append(gain)
    return tuple(found)


# ------------------------------------------------------------------ tables


def row_cells(name, choice, runs, base):
    """A row of the first table; base: as of `gains`."""
    validation = [content["validation"][choice]["mR"] for content in runs]
    results = [content["test"][choice] for content in runs]
    detected = [of_detected(result) for result in results]
    any_detected = all(table["names"] for table in detected)
    cells = [
        name,
        choice,
        str(len(runs)),
        spread(validation),
        spread([result["mR"] for result in results]),
        spread([figures([table])["mR"] for table in detected]) if any_detected else "-",
    ]
    if base is None or (name, choice) == BASE:
        return [*cells, "", "", ""]
    compared, same_seeds = rivals(runs, base)
    of_base = spread([run["test"][BASE[1]]["mR"] for run in compared])
    cells.append(of_base if same_seeds else f"{of_base}, all seeds")
    return cells + [in_words(gain) for gain in gains(name, choice, runs, base)]


HEADS = (
    "row", "evidence", "seeds", "validation mR", "test mR", "images with detections",
    "global, same seeds", "gain over it", "gain, with detections",
)  # fmt: skip


FINE = {  # heading: measure and figure of metrics/fine.py
    "counting, best of ten": ("counting", "top1"),
    "kind swap, best of ten": ("kind_swap", "top1"),
    "within a class, mR": ("within_class", "mR"),
    "twins": ("twins", "right"),
}


def sides_of(measure, choice, runs):
    """A fine measure's figures of each run; None where a run has none."""
    fine = [{**run["test"]["with"]["fine"], "twins": run.get("twins")} for run in runs]
    sides = [(own[measure] or {}).get(f"{choice}_evidence") for own in fine]
    return None if None in sides else sides


def fine_cells(choice, runs):
    """The fine measures of a row, blind answers in brackets; "-" where there is none."""
    cells = []
    for measure, name in FINE.values():
        sides = sides_of(measure, choice, runs)
        if sides is None:
            cells.append("-")
            continue
        cell = spread([side[name] for side in sides])
        if f"blind_{name}" in sides[0]:
            cell += f" ({mean(side[f'blind_{name}'] for side in sides):.1f})"
        cells.append(cell)
    return cells


GAINS = {heading: FINE[heading] for heading in FINE if heading != "twins"}  # their chance is 50


def fine_gain(measure, name, choice, runs, base):
    """What a row gains in a fine measure, a `Difference`, or None; base: as of `gains`."""
    compared, same_seeds = rivals(runs, base)
    own = sides_of(measure, choice, runs)
    others = sides_of(measure, BASE[1], compared)
    if own is None or others is None:
        return None
    if measure == "within_class":
        values = [[side["per_image"] for side in sides] for sides in (own, others)]
        return difference(*values, same_seeds)[name]
    images = runs[0]["test"]["with"]["fine"][measure]["names"]
    for run in [*runs, *compared]:
        if run["test"]["with"]["fine"][measure]["names"] != images:
            return None  # of another label map, which makes other queries
    values = [[side["per_query"][name] for side in sides] for sides in (own, others)]
    return share_difference(*values, images, same_seeds)


def fine_gain_cells(name, choice, runs, base):
    """What a row gains in the fine measures; base: as of `gains`."""
    if base is None or (name, choice) == BASE:
        return [""] * len(GAINS)
    return [in_words(fine_gain(*measure, choice, runs, base)) for measure in GAINS.values()]


def by_row(contents, names):
    """{row: contents of its runs by seed}, in the order of the names of rows."""
    found = {}
    for row in names:
        own = [content for content in contents if content["row"] == row]
        if own:
            found[row] = sorted(own, key=lambda content: content["seed"])
    return found


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seed_cells(name, choice, runs):
    """A row of the table of single runs."""
    cells = [name, choice, " ".join(str(content["seed"]) for content in runs)]
    for split in ("validation", "test"):
        cells.append(" ".join(f"{content[split][choice]['mR']:.1f}" for content in runs))
    return cells


def tables(contents, names):
    """Markdown tables of all runs' contents, and a line that names the system.

    names: of the rows, in their order. The system is chosen among the rows of the most seeds: means
    over other seeds do not compare.
    """
    runs_of = by_row(contents, names)
    rows, fine_rows, gain_rows, seed_rows, validation = [], [], [], [], {}
    base = runs_of.get(BASE[0])
    most_seeds = max(map(len, runs_of.values()))
    for name, runs in runs_of.items():
        for choice in ("without", "with"):
            rows.append(row_cells(name, choice, runs, base))
            fine_rows.append([name, choice, *fine_cells(choice, runs)])
            gain_rows.append([name, choice, *fine_gain_cells(name, choice, runs, base)])
            seed_rows.append(seed_cells(name, choice, runs))
            if len(runs) == most_seeds:
                scores = [content["validation"][choice]["mR"] for content in runs]
                validation[f"{name}, {choice} evidence"] = mean(scores)
    best = max(validation, key=validation.get)
    counts = ", ".join(f"{name} {len(runs)}" for name, runs in runs_of.items())
    return "\n\n".join(
        (
            markdown(HEADS, rows),
            markdown(["row", "evidence", *FINE], fine_rows),
            markdown(["row", "evidence", *(f"gain, {heading}" for heading in GAINS)], gain_rows),
            markdown(["row", "evidence", "seeds", "validation mR", "test mR"], seed_rows),
            f"the system, by the mean on validation: {best}; seeds of each row: {counts}",
        )
    )


# ------------------------------------------------------------------ the figure

LEFT, PANEL, GAP, ROW, TOP = 150, 270, 30, 26, 62  # pixels
STYLES = {"without": ("#888888", -4), "with": ("#4363d8", 4)}  # colour, shift down in pixels


def figure(contents, names, dataset):
    """An SVG picture: what each row gains over `global`, with 95 % intervals; names: as above."""
    runs_of = by_row(contents, names)
    base = runs_of.get(BASE[0])
    found = {}  # row and choice: its gains
    for name, runs in runs_of.items():
        for choice in STYLES:
            found[name, choice] = gains(name, choice, runs, base)
    ends = [0.0]
    for pair in found.values():
        for gain in pair:
            ends += [] if gain is None else [gain.low, gain.high]
    step = 5 if max(ends) - min(ends) < 40 else 10
    low, high = step * (min(ends) // step), step * -(-max(ends) // step)
    height = TOP + ROW * len(runs_of) + 30
    width = LEFT + 2 * PANEL + GAP + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(10, 16, f"{dataset}: gain in mR over {BASE[0]} of the same seeds, 95 %"),
        *_legend(LEFT + PANEL + GAP),
    ]
    for i, name in enumerate(runs_of):
        words = f"{name} ({len(runs_of[name])} seed{'s' if len(runs_of[name]) > 1 else ''})"
        lines.append(_text(LEFT - 10, TOP + ROW * i + ROW / 2 + 4, words, anchor="end"))
    for panel, title in enumerate(("all images", "images with detections")):
        left = LEFT + panel * (PANEL + GAP)
        scale = PANEL / (high - low) if high > low else 1.0
        lines.append(_text(left + PANEL / 2, TOP - 10, title, anchor="middle"))
        lines += _axis(left, low, high, step, scale, height - 30)
        for i, name in enumerate(runs_of):
            for choice in STYLES:
                gain = found[name, choice][panel]
                if gain is not None:
                    y = TOP + ROW * i + ROW / 2
                    lines += _interval(left, low, scale, y, gain, *STYLES[choice])
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x, y, words, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _legend(left):
    lines = []
    for choice, (colour, shift) in STYLES.items():
        x = left + 75 + 18 * shift
        lines.append(f'<circle cx="{x}" cy="12" r="4" fill="{colour}"/>')
        lines.append(_text(x + 8, 16, f"{choice} evidence"))
    return lines


def _axis(left, low, high, step, scale, bottom):
    lines = []
    tick = low
    while tick <= high:
        x = left + scale * (tick - low)
        colour = "#333333" if tick == 0 else "#dddddd"
        lines.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="{colour}"/>'
        )
        lines.append(_text(x, bottom + 15, f"{tick:+.0f}" if tick else "0", anchor="middle"))
        tick += step
    return lines


def _interval(left, low, scale, y, gain, colour, shift):
    ends = [left + scale * (value - low) for value in (gain.low, gain.value, gain.high)]
    return [
        f'<line x1="{ends[0]:.1f}" y1="{y + shift}" x2="{ends[2]:.1f}" y2="{y + shift}" '
        f'stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{ends[1]:.1f}" cy="{y + shift}" r="4" fill="{colour}"/>',
    ]
