"""The list of faults: it still fits the code."""

import pytest

from conftest import ROOT
from faults import FAULTS


def test_there_are_forty_faults():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_still_fits_the_code(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1 and fault.new != fault.old
    assert fault.tests and all((ROOT / test).is_file() for test in fault.tests)
