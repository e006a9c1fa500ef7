import numpy as np
import pytest
import torch

from cpmbee.config import ModelConfig
from cpmbee.model import IGNORE_INDEX, CpmBee, language_model_loss
from cpmbee.relation import RelationBuilder
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import collate, encode_sample
from cpmbee.train.loss import target_positions, task_losses

SPECIALS = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>"]
REQUESTS = [
    {"input": "abc", "<ans>": "c"},
    {"input": "b", "o": {"<option_0>": "a", "<option_1>": "b"}, "<ans>": "<option_1>"},
    {"input": "cab", "<ans>": {"first": "c", "rest": "ab"}},
]


def test_positions_of_targets_come_in_order_and_fill_up_with_others() -> None:
    none = IGNORE_INDEX
    where, targets = target_positions(np.array([[none, 4, none, 5], [none, none, 6, none]], np.int32))
    assert where.tolist() == [[1, 3], [2, 0]]
    assert targets.tolist() == [[4, 5], [6, none]]


def test_logits_only_at_targets_change_neither_loss_nor_gradients() -> None:
    tokenizer = Tokenizer([*SPECIALS, *"abcdefghijklmnopqrstuvwxyz"])
    first, second, third = (encode_sample(request, tokenizer) for request in REQUESTS)
    batch = collate([[first, third], [second]], tokenizer)
    model = CpmBee(ModelConfig(tokenizer.vocab_size, 16, 2, 8, 24, 2, position_bias_num_buckets=32))
    model.init_parameters(torch.Generator().manual_seed(0))
    relations = RelationBuilder(model.config)

    loss = task_losses(model, batch, relations, 1, torch.device("cpu"))[0] / (batch.targets != IGNORE_INDEX).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    columns = (batch.input_ids, batch.input_subs, batch.relation(relations), batch.ext_ids, batch.ext_subs)
    everywhere = language_model_loss(model(*map(torch.from_numpy, columns)).logits, torch.from_numpy(batch.targets))
    everywhere.backward()  # type: ignore[no-untyped-call]

    assert loss.item() == pytest.approx(everywhere.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5)
