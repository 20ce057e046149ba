"""Put the forty one-line faults of faults.json into the code, one at a time: tests must catch them.

    python test/faults.py               # all, in minutes; exits with 1 if one gets through
    python test/faults.py --only 3 17   # some of them, by their numbers

Run the tests first: they must pass on the code as it is. Then each fault goes into a copy of the
tracked files, as they are in the working tree. There pytest runs the files that should catch it,
and stops at the first failure. A fault is caught where a test fails. Where pytest cannot even
collect the tests, or runs for too long, it is not: such a fault shows nothing about the tests.

If code is rewritten, carry its faults over by their names, which say what is wrong.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 600  # seconds for the tests of one fault
TESTS_FAILED = 1  # pytest's exit status; others mean that it could not run them


class Fault(NamedTuple):
    """One wrong line."""

    name: str  # what is wrong, in words that hold for any way to write the code
    file: str  # relative to the root of the project
    old: str  # text that stands exactly once in the file
    new: str  # text that takes its place
    tests: list  # the test files that should catch it


FAULTS = [
    Fault(**row)
    for row in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
]

# ------------------------------------------------------------------ putting them in


def project_root():
    """The root of the git checkout that this file lies in."""
    command = ["git", "rev-parse", "--show-toplevel"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    return Path(found.stdout.strip())


def copy_tree(root, folder):
    """Copy what git tracks, as it is in the working tree, into a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split("\0"):
        if name and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def put_in(fault, folder):
    """Write a fault into a copy of the project.

    Raises ValueError where the right text does not stand exactly once in the file, or a test file
    is missing.
    """
    path = folder / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}, "
            "expected once; carry the fault over to the code as it is now"
        )
    for test in fault.tests:
        if not (folder / test).is_file():
            raise ValueError(f"{fault.name}: no {test}; name the files that test it now")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def run_tests(tests, folder):
    """(pytest's exit status or None if it took too long, the first test that failed or "")."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-rfE", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return None, ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    return done.returncode, failed[1] if failed else ""


def try_fault(fault, root):
    """(verdict, the test that caught it or what pytest ended with) of one fault."""
    with tempfile.TemporaryDirectory(prefix="fault-") as name:
        folder = Path(name)
        copy_tree(root, folder)
        put_in(fault, folder)
        status, test = run_tests(fault.tests, folder)
    if status is None:
        return "TOO LONG", f"more than {TIMEOUT} s"
    if status == TESTS_FAILED:
        return "caught", test
    if status == 0:
        return "NOT CAUGHT", ", ".join(fault.tests)
    return "NOT RUN", f"pytest ended with {status}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = range(1, len(FAULTS) + 1)
    parser.add_argument(
        "--only",
        type=int,
        nargs="+",
        choices=numbers,
        default=numbers,
        metavar="N",
        help="numbers of faults, from 1; default all",
    )
    options = parser.parse_args(arguments)
    root = project_root()
    caught = 0
    for number in options.only:
        fault = FAULTS[number - 1]
        begin = time.perf_counter()
        verdict, detail = try_fault(fault, root)
        seconds = time.perf_counter() - begin
        if verdict == "caught":
            caught += 1
        print(f"{number:3d} {verdict:10s} {seconds:4.0f} s  {fault.name}")
        print(f"    {detail}", flush=True)
    print(f"{caught} of {len(options.only)} caught")
    return 0 if caught == len(options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
