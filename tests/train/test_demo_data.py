from itertools import islice

import numpy as np
import pytest
import torch

from cpmbee.config import ModelConfig
from cpmbee.engine import Engine
from cpmbee.model import CpmBee
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import demo_data
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.demo_accuracy import HeldOutAccuracy
from cpmbee.train.demo_batches import DemoBatches
from cpmbee.train.demo_data import TASKS, DemoData
from cpmbee.train.demo_start import init_demo_model
from cpmbee.train.drawn_batches import BATCHES_PER_DRAW
from cpmbee.train.readings import Reading
from cpmbee.train.torch_backend import TorchBackend
from cpmbee.train.traditional import Line

LINES = [Line("头发白山水", "頭髮白山水"), Line("云白山水头", "雲白山水頭")]
POLYPHONES = [Reading("银行", "行", "háng", ("xíng", "háng")), Reading("行走", "行", "xíng", ("xíng", "háng"))]
PARTNERS = {"頭": "头", "髮": "发", "發": "发", "雲": "云"}


@pytest.fixture(scope="module")
def data() -> DemoData:
    unwritable = Line("头发白山龘", "頭髮白山龘")
    return demo_data.select(LINES * 20, [*LINES, unwritable], POLYPHONES * 20, POLYPHONES, PARTNERS)


@pytest.fixture(scope="module")
def tokenizer(data: DemoData) -> Tokenizer:
    return Tokenizer(data.vocabulary)


@pytest.fixture
def model(data: DemoData, tokenizer: Tokenizer) -> CpmBee:
    model = CpmBee(ModelConfig(tokenizer.vocab_size, 48, 4, 16, 48, 2, position_bias_num_buckets=32))
    init_demo_model(model, tokenizer, data.partners, seed=0)
    return model.eval()


def test_the_vocabulary_writes_what_is_kept(data: DemoData, tokenizer: Tokenizer) -> None:
    assert len(set(data.vocabulary)) == len(data.vocabulary)
    assert {line.simplified for line in data.held_out_lines} == {line.simplified for line in LINES}
    for requests in data.held_out(2, seed=0).values():
        for request in requests:
            assert tokenizer.unk_id not in tokenizer.encode("".join(map(str, request.values())))[0]
    assert tokenizer.encode("háng")[0] == [tokenizer.token_to_id("háng")]  # a syllable is one token


def test_held_out_requests_come_by_task(data: DemoData) -> None:
    held_out = data.held_out(2, seed=0)
    assert tuple(held_out) == TASKS
    assert all(len(requests) == 2 for requests in held_out.values())
    assert held_out == data.held_out(2, seed=0)
    assert [r["<ans>"] for r in held_out["reading"]] == [r["options"][r["<ans>"]] for r in held_out["choice"]]


def test_training_draws_every_task_by_its_share(data: DemoData) -> None:
    drawn = list(islice(data.samples(np.random.default_rng(0)), 2000))
    counts = np.bincount([task for task, _ in drawn], minlength=len(TASKS))
    np.testing.assert_allclose(counts / len(drawn), demo_data.SHARES, atol=0.04)
    lines = [request for task, request in drawn if TASKS[task] == "traditional"]
    assert all(len(line["input"]) == len(line["<ans>"]) for line in lines)
    assert {len(line["input"]) for line in lines} == {1, 2, 3, 4, 5}  # whole lines and fragments


def taken(source: DemoBatches, count: int) -> list[TrainingBatch]:
    return list(islice(source, count))


def test_batches_go_on_where_they_stopped(data: DemoData, tokenizer: Tokenizer) -> None:
    def source(**options: int) -> DemoBatches:
        return DemoBatches(data, tokenizer, **{"batch_size": 4, "seed": 1, **options})

    whole = taken(source(), BATCHES_PER_DRAW + 3)
    for stop in (3, BATCHES_PER_DRAW):
        first = source()
        taken(first, stop)
        second = source()
        second.load_state_dict(first.state_dict())
        for ours, theirs in zip(taken(second, 3), whole[stop:], strict=False):
            np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
    np.testing.assert_array_equal(taken(source(rank=1, world_size=2), 1)[0].input_ids, whole[0].input_ids[2:])
    with pytest.raises(ValueError, match="another seed"):
        source(seed=2).load_state_dict(source().state_dict())


def test_accuracy_is_that_of_greedy_decoding(data: DemoData, tokenizer: Tokenizer, model: CpmBee) -> None:
    with torch.no_grad():  # answers of a new model are long and wrong; make some short
        model.input_embedding.weight[tokenizer.eos_id] *= 3
    questions = [{"input": text, "<ans>": ""} for text in ("头", "发白", "山水", "12", "云云", "银行")]
    results = Engine(TorchBackend(model, 256), tokenizer).generate(questions, max_new_tokens=8)
    answers = [result.answer if result.finish_reason == "stop" else None for result in results]
    solved = [{**question, "<ans>": answer or "山"} for question, answer in zip(questions, answers, strict=True)]
    right = sum(answer is not None and answer != "" for answer in answers)
    found = HeldOutAccuracy({"any": solved}, tokenizer, rows_per_batch=4).measure(model)["any"]
    assert found.right == right
    assert found.total == len(questions)


def test_partners_start_close_to_each_other(tokenizer: Tokenizer, model: CpmBee) -> None:
    def similarity(first: str, second: str) -> float:
        ids = [tokenizer.token_to_id(first), tokenizer.token_to_id(second)]
        return torch.cosine_similarity(*model.input_embedding.weight.detach()[ids], dim=0).item()

    assert min(similarity(*pair) for pair in (("頭", "头"), ("髮", "发"), ("雲", "云"))) > 0.7
    assert similarity("頭", "云") < 0.6
