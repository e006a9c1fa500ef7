"""The source of a mixture: resumed exactly, shared between processes, following edits."""

import json
import logging
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from cpmbee.train.batches import TrainingBatch
from cpmbee.train.data.source import MixtureSource
from cpmbee.train.source import BatchSource
from tests.train.data.cases import make_source, numbered, same, take, texts, write_dataset, write_mixture

SCRIPT = """
def transform(data, num_samples, rng):
    return {"input": data["input"] + "abcdefgh"[: rng.integers(8)], "<ans>": {"a": "b", "c": "d"}}
"""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chance in all its places: data sets, examples, transforms, answers."""
    folder = tmp_path_factory.mktemp("mixture")
    write_dataset(folder / "first", numbered("x", 50))
    write_dataset(folder / "text", [{"text": "abcdefgh"[: 3 + i % 6]} for i in range(30)])
    (folder / "random.py").write_text(SCRIPT)
    entries = [
        {"dataset": "first", "transforms": "random.py", "incontext_weight": [2, 1, 1]},
        {
            "dataset": "text",
            "transforms": [[{"name": "mask_spans"}, {"name": "perturb_format"}], {"name": "continue_text"}],
        },
    ]
    return write_mixture(folder / "mix.json", entries)


def copy_of(mixture: Path, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The mixture where it may be edited."""
    entries = json.loads(mixture.read_text())
    for entry in entries:
        (folder / entry["dataset"]).symlink_to(mixture.parent / entry["dataset"])
    (folder / "random.py").write_text(SCRIPT)
    return write_mixture(folder / "mix.json", entries), entries


def all_same(left: list[TrainingBatch], right: list[TrainingBatch]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def test_it_is_a_batch_source(mixture: Path) -> None:
    source = make_source(mixture)
    assert isinstance(source, BatchSource)
    assert next(iter(source)).input_ids.shape == (2, 64)


@given(before=st.integers(0, 12), after=st.integers(1, 6), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resumed_source_gives_the_very_same_batches(mixture: Path, before: int, after: int, seed: int) -> None:
    source = make_source(mixture, seed=seed)
    take(source, before)
    state = json.loads(json.dumps(source.state_dict()))
    wanted = take(source, after)
    fresh = make_source(mixture, seed=seed)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert all_same(take(fresh, after), wanted)
    assert fresh.state_dict() == source.state_dict()
    source.load_state_dict(state)  # back in the same source
    assert all_same(take(source, after), wanted)
    for used in (source, fresh):
        used.close()


def test_closing_loses_nothing(mixture: Path) -> None:
    whole, parts = make_source(mixture), make_source(mixture)
    found = []
    for _ in range(4):
        found += take(parts, 2)
        parts.close()
    assert all_same(found, take(whole, 8))


def test_seeds_give_different_batches(mixture: Path) -> None:
    assert not same(next(make_source(mixture, seed=1)), next(make_source(mixture, seed=2)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_the_batches_of_one(mixture: Path, world_size: int) -> None:
    alone = make_source(mixture, batch_rows=4)
    ranks = [make_source(mixture, batch_rows=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(3):
        wanted = next(alone)
        shares = list(map(next, ranks))
        for name in ("input_ids", "targets", "task_ids", "segment_rel", "length"):
            joined = np.concatenate([getattr(share, name) for share in shares])
            np.testing.assert_array_equal(joined, getattr(wanted, name))
        assert all((share.ext_ids == wanted.ext_ids).all() for share in shares)
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
    with pytest.raises(ValueError, match="4 rows cannot be shared by 5 processes"):
        make_source(mixture, batch_rows=4, world_size=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "has seed 5, this run has 0"),
        ({"batch_rows": 5}, "has batch_rows 5, this run has 2"),
        ({"waiting": [[1]]}, "damaged"),
        ({"positions": None}, "damaged"),
    ],
)
def test_states_that_do_not_belong_are_refused(mixture: Path, change: dict[str, Any], message: str) -> None:
    source = make_source(mixture)
    with pytest.raises(ValueError, match=message):
        source.load_state_dict({**source.state_dict(), **change})


def test_an_edit_is_used_from_the_next_batch_on(mixture: Path, tmp_path: Path) -> None:
    path, entries = copy_of(mixture, tmp_path)
    source = make_source(path)
    take(source, 2)
    write_dataset(tmp_path / "new", numbered("q", 30))
    write_mixture(path, [{"dataset": "new"}, entries[0] | {"weight": 1e-9}])
    found = [text for batch in take(source, 6) for text in texts(batch)]
    assert all("<s>q" in text for text in found[30:])
    assert source.tasks == ("first", "text", "new")
    state = source.state_dict()
    wanted = take(source, 3)
    fresh = make_source(path)  # it knows the edited mixture only
    fresh.load_state_dict(json.loads(json.dumps(state)))
    assert all_same(take(fresh, 3), wanted)
    assert fresh.tasks == source.tasks


EDITS = st.sampled_from(
    [[{}, {}], [{"weight": 3}, {}], [{"weight": 0}, {}], [{}, {"transforms": [{"name": "mask_spans"}]}]]
)  # what changes in the entries of the mixture


@given(st.lists(st.one_of(st.integers(1, 3), EDITS, st.just("broken")), max_size=10))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resuming_is_exact_whatever_was_edited(
    mixture: Path, tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    path, entries = copy_of(mixture, tmp_path_factory.mktemp("edited"))
    source = make_source(path)
    for step in steps:
        if isinstance(step, int):
            take(source, step)
        elif step == "broken":
            write_mixture(path, step)
        else:
            entries = [old | new for old, new in zip(entries, step, strict=True)]
            write_mixture(path, entries)
    write_mixture(path, entries)
    state = json.loads(json.dumps(source.state_dict()))
    wanted = take(source, 3)
    fresh = make_source(path)
    fresh.load_state_dict(state)
    assert all_same(take(fresh, 3), wanted)
    assert fresh.state_dict() == source.state_dict()
    source.close()
    fresh.close()


def test_a_data_set_that_is_switched_off_changes_no_other(mixture: Path, tmp_path: Path) -> None:
    """Also where the same is named twice, and only its place tells which is which."""
    path, _ = copy_of(mixture, tmp_path)
    twice = [{"dataset": "first"}, {"dataset": "first", "weight": 3}]
    write_mixture(path, twice)
    source = make_source(path)
    take(source, 3)
    before = source.state_dict()
    write_mixture(path, [twice[0] | {"weight": 0}, twice[1]])
    next(source)
    after = source.state_dict()
    assert {draw[1] for draw in after["waiting"]} == {"first:first:2"}
    assert after["positions"]["first:first"] == before["positions"]["first:first"]
    assert after["positions"]["first:first:2"] > before["positions"]["first:first:2"]


def test_resuming_right_behind_an_edit_is_exact(mixture: Path, tmp_path: Path) -> None:
    path, entries = copy_of(mixture, tmp_path)
    source = make_source(path)
    take(source, 3)
    write_mixture(path, [entries[0] | {"weight": 5}, entries[1]])
    next(source)
    state = source.state_dict()
    wanted = take(source, 4)
    fresh = make_source(path)
    fresh.load_state_dict(state)
    assert all_same(take(fresh, 4), wanted)


def test_an_edited_python_file_is_used(mixture: Path, tmp_path: Path) -> None:
    path, _ = copy_of(mixture, tmp_path)
    source = make_source(path)
    next(source)
    (tmp_path / "random.py").write_text("def transform(data, num_samples, rng): return {'<ans>': 'zzz'}\n")
    assert any("zzz" in text for batch in take(source, 3) for text in texts(batch))


@pytest.mark.parametrize(
    "broken",
    [
        "[",
        "[]",
        '[{"dataset": "absent"}]',
        '[{"dataset": "first", "transforms": "no.py"}]',
        '[{"dataset": "first", "transforms": [{"input": "$typo", "<ans>": "$input"}]}]',
        '[{"dataset": "first"}, {"dataset": "text", "task": "new", "transforms": [{"<ans>": "$typo"}]}]',
    ],
)
def test_a_broken_edit_keeps_the_old_mixture_and_says_so_once(
    mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    path, entries = copy_of(mixture, tmp_path)
    source, unedited = make_source(path), make_source(mixture)
    assert same(next(source), next(unedited))
    write_mixture(path, broken)
    with caplog.at_level(logging.WARNING, "cpmbee"):
        assert all_same(take(source, 4), take(unedited, 4))
    (warning,) = caplog.records
    assert "training goes on with the old one: " in warning.message
    assert any(name in warning.message for name in ("mix.json", "no.py"))
    write_mixture(path, [entries[0] | {"weight": 0}, entries[1]])
    next(source)
    assert source.state_dict()["tasks"] == ["first", "text"]
    assert {draw[1] for draw in source.state_dict()["waiting"]} == {"text:text"}


def test_a_mixture_that_vanishes_is_kept(mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = copy_of(mixture, tmp_path)
    source, unedited = make_source(path), make_source(mixture)
    next(source), next(unedited)
    path.unlink()
    assert all_same(take(source, 3), take(unedited, 3))
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_touching_the_file_changes_nothing(mixture: Path, tmp_path: Path) -> None:
    path, entries = copy_of(mixture, tmp_path)
    source, unedited = make_source(path), make_source(mixture)
    for _ in range(4):
        assert same(next(source), next(unedited))
        write_mixture(path, entries)


def test_processes_agree_on_edits(mixture: Path, tmp_path: Path) -> None:
    path, entries = copy_of(mixture, tmp_path)
    said: list[Any] = []

    def first(value: Any) -> Any:
        said.append(value)
        return value

    options = {"batch_rows": 4, "world_size": 2}
    sources = [
        make_source(path, rank=0, agree=first, **options),
        make_source(path, rank=1, agree=lambda _: said[-1], **options),
    ]
    alone = make_source(path, batch_rows=4)
    for step in range(6):
        if step == 3:
            write_mixture(path, [entries[1]])
        wanted = next(alone)
        shares = list(map(next, sources))
        np.testing.assert_array_equal(np.concatenate([share.input_ids for share in shares]), wanted.input_ids)
    lonely = MixtureSource(path, sources[0]._stream._tokenizer, row_length=64, batch_rows=4, world_size=2)
    write_mixture(path, "broken")
    next(lonely)  # ignores edits, as it could not agree with anybody
