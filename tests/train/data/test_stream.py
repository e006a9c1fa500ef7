"""The stream of a mixture whose data sets are no longer what they were."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.train.data.cases import make_source, numbered, take, write_dataset, write_mixture


def test_draws_from_behind_the_end_of_a_data_set_that_shrank_are_dropped(tmp_path: Path) -> None:
    """To whatever size: the first record that is gone is as gone as the others."""
    mixture = write_mixture(tmp_path / "mixture.json", [{"dataset": "set"}])
    write_dataset(tmp_path / "set", numbered("x", 60))
    source = make_source(mixture)
    take(source, 2)
    source.close()
    state = source.state_dict()
    waiting = [record for _, _, (record,) in state["waiting"]]
    assert len(waiting) > 20
    for size in sorted(waiting)[len(waiting) // 2 :: 5]:
        shutil.rmtree(tmp_path / "set")
        write_dataset(tmp_path / "set", numbered("x", size))
        shrunk = make_source(mixture)
        shrunk.load_state_dict(state)
        kept = [record for _, _, (record,) in shrunk.state_dict()["waiting"]]
        assert kept == [record for record in waiting if record < size]
        take(shrunk, 2)
        shrunk.close()
