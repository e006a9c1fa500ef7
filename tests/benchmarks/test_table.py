"""The recorded table: what it makes, deletes and says before it begins."""

from pathlib import Path

import pytest

from cpmbee.bench import table
from cpmbee.bench.table_estimate import estimates
from cpmbee.bench.table_plan import Group, groups


def test_groups_are_told_apart_and_need_few_models_at_a_time() -> None:
    every = list(groups())
    assert len({group.name for group in every}) == len(every)
    sizes = {size for group in every for size, _ in group.models}
    assert sizes == {"demo", "1b", "2b"}
    for index, group in enumerate(every):
        later = {model for each in every[index + 1 :] for model in each.models}
        assert len(group.models & later) <= 2


def test_a_model_is_made_by_the_first_group_that_needs_it() -> None:
    (group,) = (group for group in groups() if group.name == "2b-int4")
    first, second = estimates([group, group], 2)
    assert first > second > 60


def test_more_work_takes_longer() -> None:
    less, more, most = (
        Group("1b", ("int8",), ("llama.cpp",), (128,)),
        Group("1b", ("int8",), ("llama.cpp",), (128, 512)),
        Group("1b", ("int8",), ("llama.cpp", "matmulnbits"), (128, 512)),
    )
    seconds = [next(estimates([group], 2)) for group in (less, more, most)]
    assert seconds == sorted(seconds)
    assert 30 < seconds[0] < seconds[-1] < 300


def test_the_plan_names_what_is_missing() -> None:
    every = list(groups())
    text = table.plan(every[1:])
    assert [line.split()[1] for line in text.splitlines()[:-1]] == [group.name for group in every[1:]]
    assert "minutes, about" in text


def test_models_go_when_no_later_group_needs_them(tmp_path: Path) -> None:
    peers = tmp_path / table.PEER_MODELS
    names = ("2b", "2b-int4", "2b-int8", "1b-int4")
    for folder in (*(tmp_path / name for name in names), peers / "2b-int4-genai", peers / "2b-int8-genai"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
        folder.with_name(f"{folder.name}.origin.json").touch()
    for name in ("2b-int4.gguf", "2b-int4.gguf.origin.json", "2b-int4.txt"):
        (peers / name).touch()
    (tmp_path / "2b-int4.origin.json").rename(tmp_path / "kept")  # so that the folder is somebody's
    one, other = (Group("2b", (precision,), (), (8,)) for precision in ("int4", "int8"))

    def there() -> set[str]:
        return {path.name for path in (*tmp_path.iterdir(), *peers.iterdir()) if "origin" not in path.name} - {"peers"}

    foreign = {"2b-int4.txt", "2b-int4", "kept"}  # have no note
    table.delete_models(tmp_path, one, [one, other])
    assert there() == {*names, "2b-int4-genai", "2b-int8-genai", "2b-int4.gguf", *foreign}
    table.delete_models(tmp_path, one, [other])
    assert there() == {"2b", "2b-int8", "1b-int4", "2b-int8-genai", *foreign}
    table.delete_models(tmp_path, other, [])
    assert there() == {"1b-int4", *foreign}
    assert len(list(tmp_path.rglob("*.origin.json"))) == 1


def test_a_group_is_measured_and_its_models_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("demo", ("int4",), ("matmulnbits",), (32,), answer=4, threads=(1,), rounds=1)
    result = table.measure(group, tmp_path, 1)
    assert [cell.subject for cell in result.cells] == ["demo-int4", "demo-int4: matmulnbits"]
    assert all(len(each.bandwidth) == 2 for cell in result.cells for each in cell.rounds)
    monkeypatch.setattr(table, "export", None)
    made = table.make_folder("demo", "int4", table.demo_checkpoint(), tmp_path)
    assert made == tmp_path / "demo-int4"
    result.write(tmp_path / "demo-all.json")
    table.write_table(tmp_path)
    assert "demo-int4: matmulnbits" in (tmp_path / "demo.md").read_text(encoding="utf-8")
