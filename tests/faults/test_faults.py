"""The short part of every fault topic, as CI runs it; the full one: python -m tests.faults --full."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import TOPICS, tallies_of


@pytest.mark.parametrize("topic", TOPICS)
def test_nothing_is_lost(topic, tmp_path):
    tallies = tallies_of(topic, False, tmp_path)
    assert tallies and all(tally.tried for tally in tallies)
    assert not {tally.case: tally.lost for tally in tallies if tally.lost}
