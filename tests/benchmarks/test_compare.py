"""Comparing two results: a slower build is found, the same build twice is not, and noise is told apart from change."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpmbee.bench.compare import Difference, differences, main, markdown, relative_change
from cpmbee.bench.records import Result
from cpmbee.errors import ConfigError
from tests.benchmarks.samples import make_result


def verdicts(before: Result, after: Result) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for difference in differences(before, after):
        found.setdefault(difference.metric.key, set()).add(difference.verdict)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_same_build_twice_is_quiet(seed: int) -> None:
    found = differences(make_result(seed), make_result(seed + 100))
    assert [each for each in found if each.verdict] == []
    decode = [each for each in found if each.metric.key == "decode_tokens_per_s"]
    assert all(each.noise is not None and 0 < each.noise < 0.15 for each in decode)


@pytest.mark.parametrize("seed", range(20))
def test_a_build_slower_by_a_tenth_is_flagged(seed: int) -> None:
    found = verdicts(make_result(seed), make_result(seed + 100, slowdown=1.1))
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "step_p50_s"):
        assert found[key] == {"worse"}
    assert found["peak_resident_bytes"] == found["file_bytes"] == {""}
    assert verdicts(make_result(seed + 100, slowdown=1.1), make_result(seed))["decode_tokens_per_s"] == {"better"}


def test_a_difference_inside_the_noise_is_none() -> None:
    (found, *_) = [
        each
        for each in differences(make_result(1, noise=0.3), make_result(2, noise=0.3, slowdown=1.1))
        if each.metric.key == "decode_tokens_per_s"
    ]
    assert found.noise is not None
    assert found.noise > 0.1
    assert found.verdict == ""


def test_change_and_noise_by_hand() -> None:
    change, noise = relative_change([1.0, 1.0, 1.0], [1.2, 1.2, 1.2])
    assert change == pytest.approx(0.2)
    assert noise == 0.0
    logs = [0.0, 0.1]
    change, noise = relative_change([math.exp(x) for x in logs], [math.exp(x + 1) for x in logs])
    # each group has variance 0.005 and each mean half of that; with two degrees of freedom t is 9.92
    assert math.log1p(change) == pytest.approx(1.0)
    assert noise is not None
    assert math.log1p(noise) == pytest.approx(9.92 * math.sqrt(0.005))


def test_tails_are_shown_and_not_judged() -> None:
    found = verdicts(make_result(0), make_result(1, slowdown=1.5))
    assert found["step_p99_s"] == {""}
    assert found["step_p50_s"] == {"worse"}


def test_one_process_each_says_nothing_about_noise() -> None:
    assert relative_change([1.0], [1.0]) == (0.0, 0.0)
    change, noise = relative_change([1.0], [1.3])
    assert (round(change, 6), noise) == (0.3, None)
    before, after = make_result(rounds=1), make_result(3, rounds=1, slowdown=2)
    found = differences(before, after)
    assert not any(each.verdict for each in found)
    unknown = sum(each.noise is None for each in found)
    assert f"- {unknown} of them (?) are of one process each" in markdown(before, after, found)
    assert "of them (?)" not in markdown(make_result(0), make_result(1), differences(make_result(0), make_result(1)))


def test_command_exits_with_1_where_something_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_result(0).write(tmp_path / "a.json")
    make_result(1, slowdown=1.1).write(tmp_path / "b.json")
    assert main([str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    text = capsys.readouterr().out
    assert "worse" in text
    assert "decode, tokens/s" in text


def test_other_circumstances_are_said() -> None:
    before, after = make_result(0), make_result(0, prompts=(128,))
    after.about = {**after.about, "machine": {**after.about["machine"], "cpu": "another"}}
    for cell in after.cells:
        cell.rounds = [replace(each, bandwidth=[20e9]) for each in cell.rounds]
    text = markdown(before, after, differences(before, after))
    assert "NOT THE SAME MACHINE" in text
    assert "memory, 2 threads: 40.0 GB/s, then 20.0" in text
    assert "only in one of them: model (prompt 512" in text


def with_bandwidth(result: Result, factor: float, prompt: int = 128) -> Result:
    """The result with memory so many times as fast beside the cells of one prompt."""
    for cell in result.cells:
        if cell.workload.prompt == prompt:
            rates = [[factor * rate for rate in each.bandwidth] for each in cell.rounds]
            cell.rounds = [replace(each, bandwidth=new) for each, new in zip(cell.rounds, rates, strict=True)]
    return result


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_times_are_not_judged_where_memory_was_not_equally_fast(factor: float) -> None:
    before, after = make_result(0), with_bandwidth(make_result(1, slowdown=1.5), factor)
    for cell in after.cells:
        cell.rounds = [replace(each, peak_resident=2 * (each.peak_resident or 0)) for each in cell.rounds]
    found = differences(before, after)
    for each in found:
        slow_memory = "prompt 128" in each.cell
        assert each.same_machine is not slow_memory
        if each.metric.key in ("decode_tokens_per_s", "prefill_tokens_per_s", "step_p50_s"):
            assert each.verdict == ("" if slow_memory else "worse")
        if each.metric.key == "peak_resident_bytes":
            assert each.verdict == "worse"  # memory taken does not depend on how fast it is
    text = markdown(before, after, found)
    assert "- 1 of 2 cells are not judged by their times (~): memory beside them" in text
    assert "by more than 5%: model (prompt 128" in text
    rows = [line for line in text.splitlines() if "decode, tokens/s" in line]
    assert [row.endswith("| ~ |") for row in rows] == ["prompt 128" in row for row in rows]


@pytest.mark.parametrize("factor", [0.96, 1.0, 1.04])
def test_bandwidths_that_are_about_the_same_do_not_matter(factor: float) -> None:
    before, after = make_result(0), with_bandwidth(make_result(1, slowdown=1.5), factor)
    assert verdicts(before, after)["decode_tokens_per_s"] == {"worse"}
    assert "(~)" not in markdown(before, after, differences(before, after))


def test_cells_without_bandwidth_are_judged() -> None:
    before, after = make_result(0), make_result(1, slowdown=1.5)
    for cell in before.cells:
        cell.rounds = [replace(each, bandwidth=[]) for each in cell.rounds]
    assert verdicts(before, after)["decode_tokens_per_s"] == {"worse"}


def test_the_command_takes_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, slowdown in (("before", 1.0), ("after", 1.1)):
        (tmp_path / name).mkdir()
        make_result(0, slowdown=slowdown).write(tmp_path / name / "result.json")
    assert main([str(tmp_path / "before"), str(tmp_path / "after" / "result.json")]) == 1
    assert "worse" in capsys.readouterr().out


def test_folders_without_a_result_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no result\.json in this folder; cpmbee bench --out FOLDER writes one$"):
        Result.read(tmp_path)
    for number in range(9):
        make_result(0).write(tmp_path / f"{number}.json")
    (tmp_path / "table.md").touch()
    with pytest.raises(ConfigError, match=r"name one of its files: 0\.json, .*, 7\.json, \.\.\.$"):
        Result.read(tmp_path)


def test_a_result_reads_back_as_it_was(tmp_path: Path) -> None:
    result = make_result(5)
    result.skipped.append(("peer", "is not installed"))
    result.write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == result


def test_a_result_of_the_first_version_has_one_bandwidth_for_all(tmp_path: Path) -> None:
    raw: Any = json.loads(json.dumps(make_result(0).to_dict()))
    raw |= {"schema_version": 1, "bandwidth": {"2": [30e9, 50e9, 10e9]}}
    for cell in raw["cells"]:
        for each in cell["rounds"]:
            del each["bandwidth"], each["step_cache_bytes"]
    (tmp_path / "result.json").write_text(json.dumps(raw))
    assert set(Result.read(tmp_path / "result.json").bandwidth()[2]) == {30e9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a result"),
        (json.dumps({"format": "cpmbee-bench", "schema_version": 9}), "schema version 9"),
        (json.dumps({"format": "cpmbee-bench", "schema_version": 1, "about": {}}), "incomplete"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Result.read(tmp_path / "result.json")
    with pytest.raises(ConfigError, match=r"absent\.json: cannot be read \(No such file or directory\)$"):
        Result.read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("about",), {}, "incomplete .KeyError: 'commit'"),
        (("about", "machine"), [], "incomplete .KeyError: 'cpu'"),
        (("subjects",), {}, "incomplete .KeyError: 'model'"),
        (("subjects", "model", "weight_bytes"), None, ""),
        (("cells", 0, "rounds", 0, "bandwidth"), [1e9, 0], "incomplete .ValueError: memory"),
        (("cells", 0, "workload"), {"promt": 1}, "incomplete .TypeError"),
        (("cells", 0, "rounds", 0), [], "incomplete .TypeError"),
    ],
)
def test_results_with_something_missing(tmp_path: Path, place: tuple[str | int, ...], value: Any, message: str) -> None:
    raw: Any = json.loads(json.dumps(make_result(0).to_dict()))
    inner = raw
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
        message = f"incomplete .KeyError: '{place[-1]}'"
    else:
        inner[place[-1]] = value
    (tmp_path / "result.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        Result.read(tmp_path / "result.json")


def test_verdict_needs_threshold_and_noise() -> None:
    (example, *_) = differences(make_result(0), make_result(1))
    values = {"cell": "c", "metric": example.metric, "before": 1.0, "after": 1.0}
    assert Difference(**values, change=0.04, noise=0.001).verdict == ""
    assert Difference(**values, change=0.2, noise=0.3).verdict == ""
    assert Difference(**values, change=0.2, noise=0.1).verdict == "worse"  # of the time to encode
