"""How far a long loop has come: a bar on a terminal, a line now and then in a log file.

A root file because loops are long in every room.
"""

import sys
import time

from tqdm import tqdm

FIRST = 1  # seconds before a bar is shown: short loops show none
EVERY = 30  # seconds between two lines where there is no terminal


class Progress:
    """Iterates over items and shows on standard error how far it has come.

    total: how many items, if they have no length; done: how many were done in an earlier run; unit:
    what the items are. `note` may be set meanwhile: it stands behind.
    """

    def __init__(self, items, title, unit, total=None, done=0):
        self.items = items
        self.title = title
        self.unit = unit
        self.total = len(items) + done if total is None else total
        self.done = done
        self.note = ""

    def __iter__(self):
        return self._with_bar() if sys.stderr.isatty() else self._with_lines()

    def _with_bar(self):
        bar = tqdm(
            desc=self.title,
            total=self.total,
            initial=self.done,
            unit=f" {self.unit}",
            delay=FIRST,
            leave=False,
        )
        with bar:
            for item in self.items:
                yield item
                bar.set_postfix_str(self.note, refresh=False)
                bar.update()

    def _with_lines(self):
        done = self.done
        begin = last = time.monotonic()
        for item in self.items:
            yield item
            done += 1
            now = time.monotonic()
            if now - last >= EVERY:
                last = now
                line = f"{self.title}: {done} of {self.total} {self.unit}, {now - begin:.0f} s"
                print(f"{line} {self.note}".rstrip(), file=sys.stderr, flush=True)
