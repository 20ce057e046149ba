"""Work done in threads, a little ahead of whoever asks for it."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor


def ahead(function, items, count, threads):
    """What a function makes of items, in their order, computed in threads up to `count` ahead.

    For work that leaves Python's lock to others, as decoding and resizing images does.
    """
    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody asks for the rest
