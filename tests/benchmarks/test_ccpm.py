"""CCPM: reading records, the samples made from them, where training starts, and what counting gets right."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from cpmbee.bench.ccpm_data import CcpmRecord, read_records, split, unseen, vocabulary
from cpmbee.bench.ccpm_plot import plot
from cpmbee.bench.ccpm_samples import CcpmBatches, lookup, varied
from cpmbee.bench.ccpm_start import init_model, model_config
from cpmbee.bench.ccpm_table import accuracy, overlap_scorer, translation_table
from cpmbee.errors import DataError
from cpmbee.model import CpmBee
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.source import BatchSource
from tests.golden import DATA

LINES = ("残灯灭又明", "万里绝氛埃", "况欲系其尾", "引烛窥洞穴")
TEXTS = ("昏暗的灯熄灭了又被重新点亮。", "涤荡万里，威名远扬。", "何况想系住它的尾端。", "拿着火烛探寻那幽深洞穴。")
RECORDS = [CcpmRecord(text, LINES, number) for number, text in enumerate(TEXTS)]


def line(text: str = "天[1]", target: object = "2") -> str:
    return json.dumps({"input": f"[翻译]{text}[0]甲[1]乙[2]丙[3]丁[答案]", "target": target})


def batches(tokenizer: Tokenizer, lookup_batches: int = 16) -> CcpmBatches:
    return CcpmBatches(RECORDS, tokenizer, batch_size=2, lookup_batches=lookup_batches, masked=0.1, seed=3)


def test_records_are_read(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(line("天<地") + "\n\n" + line("山", "0") + "\n", encoding="utf-8")
    first, second = read_records(file)
    assert (first.text, first.lines, first.answer) == ("天<地", ("甲", "乙", "丙", "丁"), "丙")
    assert second.right == 0
    asked = first.task_record("here")
    assert asked.request["input"] == "天<<地"
    assert asked.choices == ("<option_0>", "<option_1>", "<option_2>", "<option_3>")
    assert asked.expected == "<option_2>"


@pytest.mark.parametrize("bad", ["{", "[]", '{"input": "天", "target": "0"}', line(target="4"), line(target=2)])
def test_bad_lines_are_named(tmp_path: Path, bad: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(f"{line()}\n{bad}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):
        read_records(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_records(tmp_path / "none.jsonl")


def test_held_out_texts_are_never_trained_on() -> None:
    records = [CcpmRecord(f"文{number // 2}", LINES, 0) for number in range(40)]  # every text twice
    training, held_out = split(records, 10, seed=0)
    assert len(held_out) == 10
    assert not {r.text for r in training} & {r.text for r in held_out}


def test_unseen_records_share_neither_text_nor_answer() -> None:
    other = ("山", "水", "云", "月")
    known = [CcpmRecord("天", LINES, 0)]
    records = [CcpmRecord("天", other, 0), CcpmRecord("地", LINES, 0), CcpmRecord("地", LINES, 1)]
    assert unseen(records, known) == [records[2]]


def test_variations_keep_the_right_line_and_mask_a_share() -> None:
    rng = np.random.default_rng(0)
    places = Counter()
    masked = total = 0
    for _ in range(400):
        data = varied(RECORDS[1], 0.2, rng)
        places[data["<ans>"]] += 1
        right = data["options"][data["<ans>"]].split("<mask>")
        assert all(piece in LINES[1] for piece in right)
        masked += sum(text.count("<mask>") for text in (data["input"], *data["options"].values()))
        total += len(TEXTS[1]) + sum(map(len, LINES))
    assert len(places) == 4
    assert min(places.values()) > 60
    assert masked / total == pytest.approx(0.2, abs=0.02)


def test_lookups_share_characters_with_the_right_line() -> None:
    rng = np.random.default_rng(0)
    made = [lookup(RECORDS, rng) for _ in range(600)]
    assert {record.right for record in made} == {0, 1, 2, 3}
    unlike = [record for record in made if len(set(record.lines)) == 4]
    assert accuracy(overlap_scorer(RECORDS), unlike) > 0.8
    known = {char for text in (*TEXTS, *LINES) for char in text}
    assert all(record.text and set(record.text) <= known | {"，"} for record in made)


def test_batches_go_from_lookups_to_records_and_resume() -> None:
    tokenizer = Tokenizer(vocabulary(RECORDS))
    source = batches(tokenizer)
    assert isinstance(source, BatchSource)
    seen = list(islice(source, 40))
    tasks = [set(batch.task_ids[batch.task_ids >= 0].tolist()) for batch in seen]
    assert tasks[0] == {0}
    assert all(names == {1} for names in tasks[16:])
    ends = [bool((batch.targets == tokenizer.eos_id).any()) for batch in seen]
    assert ends == [False] * 16 + [True] * 24
    state = json.loads(json.dumps(source.state_dict()))
    expected = next(iter(source))
    again = batches(tokenizer)
    again.load_state_dict(state)
    assert np.array_equal(next(iter(again)).input_ids, expected.input_ids)
    with pytest.raises(ValueError, match="another seed"):
        again.load_state_dict({**state, "seed": 4})


def test_an_epoch_has_every_record_once() -> None:
    tokenizer = Tokenizer(vocabulary(RECORDS))
    source = CcpmBatches(RECORDS, tokenizer, batch_size=1, lookup_batches=0, masked=0.0, seed=0)
    texts = Counter(tuple(sorted(batch.input_ids[0].tolist())) for batch in islice(source, 16))
    assert sorted(texts.values()) == [4, 4, 4, 4]


def test_translations_are_found_and_score_lines() -> None:
    pairs = [("大屋", "高宅"), ("小屋", "低宅"), ("大树", "高木"), ("小树", "低木")]
    records = [CcpmRecord(text, (answer, "流水", "白云", "古道"), 0) for text, answer in pairs]
    table = translation_table(records)
    probability = dict(zip(zip(table.modern, table.classical, strict=True), table.probability, strict=True))
    assert probability["屋", "宅"] > 2 * probability["屋", "高"]
    score = table.scorer()
    assert score("大屋", "高宅") > score("大屋", "低木")
    assert accuracy(score, records) == 1.0


def test_training_starts_where_characters_find_their_translations() -> None:
    tokens = vocabulary(RECORDS)
    model = CpmBee(model_config(len(tokens), dropout=0.0))
    init_model(model, Tokenizer(tokens), translation_table(RECORDS), seed=0)
    weight = model.input_embedding.weight.detach()
    related, unrelated, same = (
        float(torch.cosine_similarity(weight[tokens.index(one)], weight[tokens.index(other)], dim=0))
        for one, other in (("端", "尾"), ("端", "埃"), ("端", "端"))
    )
    assert same > related > unrelated + 0.1
    parameters = dict(model.named_parameters())
    prefix = "encoder.layers.0.self_att.self_attention.project_"
    keys, queries = parameters[f"{prefix}k.weight"], parameters[f"{prefix}q.weight"]
    assert torch.equal(keys[:96], queries[:96])
    assert not torch.equal(keys[96:], queries[96:])


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    rc_context = pytest.importorskip("matplotlib").rc_context
    points = [{"step": 1, "seconds": 1.0, "look-up": 1.4}, {"step": 2, "seconds": 2.0, "look-up": 1.0, "ccpm": 1.2}]
    held_out = [{"step": 2, "choice_accuracy": 0.5, "loss": 1.1}]
    bars = {"character overlap": {"held out": 0.7}, "translation table": {"held out": 0.8}}
    results = {
        "curve": {"loss": points, "held_out": held_out},
        "bars": bars,
        "options": {"lookup_steps": 1},
        "machine": {"cpu": "a processor", "cores": 2},
        "parameters": 1_600_000,
    }
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        plot(results, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert "CCPM: 1.6 million parameters, trained in bf16 with one thread on a processor, 2 cores" in drawn


@pytest.mark.skipif(not (DATA / "ccpm").is_dir(), reason=f"needs the CCPM files in {DATA}")
def test_the_files_are_what_they_are_said_to_be() -> None:
    assert len(read_records(DATA / "ccpm" / "train.jsonl")) == 21_778
    assert len(read_records(DATA / "ccpm" / "eval.jsonl")) == 1_700
