"""What one forward pass must hold, whatever the shape: caching, padding, pruning, precision, gradients."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from cpmbee.config import ModelConfig
from cpmbee.model import CpmBee, ModelOutput, language_model_loss
from cpmbee.prompt import encode_data, encode_prompt
from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.tokenizer import Tokenizer
from tests.model.factory import VOCABULARY, random_inputs, random_model, tiny_config

PRUNED = ((False, False), (True, False), (False, True), (True, True), (False, False))
CONFIGS = {
    "full": tiny_config(),
    "pruned": tiny_config(num_hidden_layers=5, mask_modules=PRUNED),
    "first attention pruned": tiny_config(mask_modules=((True, False), (False, False), (True, False))),
    "no attention": tiny_config(mask_modules=((True, False),) * 3),
    "half": tiny_config(half=True, distance_scale=8),
}
REQUEST = {
    "input": "今天天气真好",
    "options": {"<option_0>": "abc", "<option_1>": "xyz"},
    "<ans>": {"<mask_0>": "good", "<mask_1>": "<option_1>"},
    "question": "b<mask_0>d<mask_1>",
}
EXAMPLES = [{"input": "北京", "<ans>": "上学"}, {"input": "<mask_0>", "<ans>": {"<mask_0>": "q"}}]

Arrays = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def request_with_answers(config: ModelConfig) -> tuple[Arrays, int]:
    """Arrays of `REQUEST`, context first and answers last, and the number of context tokens."""
    data = encode_data(REQUEST, Tokenizer(VOCABULARY))
    columns = np.stack(
        [
            data.segment_ids,
            np.zeros_like(data.segment_ids),
            np.arange(len(data.input_ids)),
            data.context,
            np.zeros_like(data.segment_ids),
            np.full_like(data.segment_ids, data.num_segments),
            np.zeros_like(data.segment_ids),
        ]
    )
    order = np.argsort(~data.context, kind="stable")
    layout = TokenLayout(columns[:, order], data.segment_rel)
    relation = np.empty((len(layout), len(layout)), np.int16)
    RelationBuilder(config).fill(relation, layout)
    arrays = (
        torch.from_numpy(data.input_ids[order]),
        torch.from_numpy(data.input_subs[order]),
        torch.from_numpy(relation),
    )
    return (arrays[0][None], arrays[1][None], arrays[2][None]), int(data.context.sum())


def request_with_examples(config: ModelConfig, answer_tokens: int) -> tuple[Arrays, int]:
    """Arrays of `REQUEST` and its in-context examples, then ``answer_tokens`` tokens of its first answer."""
    prompt = encode_prompt(REQUEST, Tokenizer(VOCABULARY), EXAMPLES)
    layout = TokenLayout.from_prompt(prompt)
    start = len(layout)
    for i in range(answer_tokens):
        layout.append(prompt.answers[0].segment_id, start + i)
    relation = np.empty((len(layout), len(layout)), np.int16)
    RelationBuilder(config).fill(relation, layout)
    ids = np.concatenate([prompt.input_ids, np.arange(20, 20 + answer_tokens, dtype=np.int32)])
    subs = np.concatenate([prompt.input_subs, np.zeros(answer_tokens, np.int32)])
    return (torch.from_numpy(ids)[None], torch.from_numpy(subs)[None], torch.from_numpy(relation)[None]), start


def in_steps(model: CpmBee, arrays: Arrays, start: int, step: int = 1) -> list[ModelOutput]:
    """The first ``start`` tokens at once, the others ``step`` at a time."""
    ids, subs, relation = arrays
    ends = [start, *range(start + step, ids.shape[1], step), ids.shape[1]]
    outputs: list[ModelOutput] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        past = outputs[-1].past_key_values if outputs else None
        outputs.append(model(ids[:, begin:end], subs[:, begin:end], relation[:, begin:end, :end], past_key_values=past))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("with_examples", [False, True])
def test_cached_steps_equal_one_packed_forward(config: ModelConfig, with_examples: bool, step: int) -> None:
    model = random_model(config)
    arrays, start = request_with_examples(config, 6) if with_examples else request_with_answers(config)
    whole = model(*arrays)
    outputs = in_steps(model, arrays, start, step)
    assert_close(torch.cat([output.logits for output in outputs], 1), whole.logits)
    assert_close(torch.cat([output.hidden_states for output in outputs], 1), whole.hidden_states)
    assert len(whole.past_key_values) == len(config.attention_layers)
    for stepped, packed in zip(outputs[-1].past_key_values, whole.past_key_values, strict=True):
        assert packed[0].shape == (1, config.num_attention_heads, arrays[0].shape[1], config.dim_head)
        assert_close(stepped[0], packed[0])
        assert_close(stepped[1], packed[1])


@torch.no_grad()
def test_padded_batch_equals_single_sequences(config: ModelConfig) -> None:
    model = random_model(config)
    lengths = [5, 11, 1]
    ids, subs, relation = random_inputs(config, len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        relation[row, length:] = relation[row, :, length:] = -1
    batch = model(ids, subs, relation)
    assert torch.isfinite(batch.logits).all()
    for row, n in enumerate(lengths):
        single = model(ids[row : row + 1, :n], subs[row : row + 1, :n], relation[row : row + 1, :n, :n])
        assert_close(batch.logits[row, :n], single.logits[0])


@torch.no_grad()
def test_packed_spans_equal_separate_rows() -> None:
    config = tiny_config()
    model = random_model(config)
    ids, subs, relation = random_inputs(config, 2, 7)
    packed = torch.full((1, 14, 14), -1, dtype=torch.int16)
    packed[0, :7, :7], packed[0, 7:, 7:] = relation[0], relation[1]
    together = model(ids.reshape(1, 14), subs.reshape(1, 14), packed)
    assert_close(together.logits.reshape(2, 7, -1), model(ids, subs, relation).logits)


@torch.no_grad()
def test_pruned_block_is_absent_and_does_not_scale_the_residual() -> None:
    """A block that adds nothing still divides the residual stream by 1.05; one that is pruned does not."""
    pruned = random_model(CONFIGS["pruned"])
    full = random_model(dataclasses.replace(CONFIGS["pruned"], mask_modules=None), seed=1)
    full.load_state_dict(pruned.state_dict(), strict=False)
    for i, (attention, ffn) in enumerate(PRUNED):
        if attention:
            full.get_parameter(f"encoder.layers.{i}.self_att.self_attention.attention_out.weight").zero_()
        if ffn:
            full.get_parameter(f"encoder.layers.{i}.ffn.ffn.w_out.weight").zero_()
    inputs = random_inputs(pruned.config, 1, 5)
    assert not torch.allclose(pruned(*inputs).logits, full(*inputs).logits, atol=1e-3)
    assert not any("layers.3." in name for name, _ in pruned.named_parameters())


@torch.no_grad()
def test_logits_of_selected_positions_and_extension_tokens() -> None:
    config = tiny_config()
    model = random_model(config)
    ids, subs, relation = random_inputs(config, 2, 6)
    ext_ids, ext_subs = torch.tensor([0, 0, 7], dtype=torch.int32), torch.tensor([1, 2, 1], dtype=torch.int32)
    index = torch.tensor([[5, 0], [2, 2]], dtype=torch.int32)
    whole = model(ids, subs, relation, ext_ids, ext_subs)
    assert whole.logits.shape == (2, 6, config.vocab_size + 3)
    some = model(ids, subs, relation, ext_ids, ext_subs, logits_index=index)
    assert_close(some.logits, torch.stack([whole.logits[0, [5, 0]], whole.logits[1, [2, 2]]]))
    assert_close(
        whole.logits[..., config.vocab_size :], whole.hidden_states @ model.input_embedding(ext_ids, ext_subs).T
    )
    assert_close(whole.logits[..., : config.vocab_size], model(ids, subs, relation).logits)
    none = torch.zeros(0, dtype=torch.int32)
    assert model(ids, subs, relation, none, none).logits.shape == (2, 6, config.vocab_size)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision_is_close(config: ModelConfig, dtype: torch.dtype, tolerance: float) -> None:
    model = random_model(config)
    arrays, start = request_with_answers(config)
    expected = model(*arrays).logits
    low = model.to(dtype)
    outputs = in_steps(low, arrays, start)
    logits = torch.cat([output.logits for output in outputs], 1)
    assert logits.dtype == dtype
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < tolerance


def test_blind_queries_attend_to_nothing_and_keep_gradients_finite() -> None:
    config = tiny_config()
    model = random_model(config)
    ids, subs, relation = random_inputs(config, 1, 6)
    relation[0, 2] = -1
    attention = model.encoder.layers[0].self_att
    assert attention is not None
    bias = model.position_bias(relation)
    mixed, _ = attention.self_attention(torch.randn(1, 6, config.hidden_size), bias, None)
    assert (mixed[0, 2] == 0).all()
    assert (mixed[0, 1] != 0).any()
    loss = language_model_loss(model(ids, subs, relation).logits, ids)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    table = model.position_bias.relative_attention_bias
    used = set(relation.flatten().tolist()) - {-1}
    unused = sorted(set(range(config.num_bias_rows)) - used)
    assert table.grad is not None
    assert unused
    assert (table.grad[unused] == 0).all()


def test_gradients_are_right() -> None:
    config = ModelConfig(
        vocab_size=7,
        hidden_size=6,
        num_attention_heads=2,
        dim_head=2,
        dim_ff=5,
        num_hidden_layers=2,
        position_bias_num_buckets=4,
        position_bias_num_segment_buckets=3,
        position_bias_max_distance=8,
        mask_modules=((False, True), (False, False)),
    )
    model = random_model(config, dtype=torch.float64)
    ids, subs, relation = random_inputs(config, 2, 4)
    relation[1, 3] = -1
    ext_ids, ext_subs = torch.tensor([0, 3]), torch.tensor([1, 2])
    targets = torch.tensor([[1, 8, -100, 3], [-100, 2, 7, 0]])
    names = [name for name, _ in model.named_parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        inputs = (ids, subs, relation, ext_ids, ext_subs)
        output = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), inputs)
        return language_model_loss(output.logits, targets)

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()))


def test_dropout_acts_in_training_only() -> None:
    model = random_model(tiny_config(dropout_p=0.5))
    inputs = random_inputs(model.config, 1, 6)
    plain = random_model(tiny_config())
    assert torch.equal(model(*inputs).logits, plain(*inputs).logits)
    model.train()
    torch.manual_seed(0)
    first = model(*inputs).logits
    assert torch.isfinite(first).all()
    assert not torch.equal(first, model(*inputs).logits)


def test_loss_ignores_positions_and_counts_in_fp32() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[0, -100, 4], [-100, -100, 2]], dtype=torch.int32)
    by_hand = -torch.stack([logits[b, t].log_softmax(-1)[k] for b, t, k in ((0, 0, 0), (0, 2, 4), (1, 2, 2))]).mean()
    assert_close(language_model_loss(logits, targets), by_hand)
    assert language_model_loss(logits.half(), targets).dtype == torch.float32


def test_inputs_that_do_not_fit_are_refused() -> None:
    config = tiny_config()
    model = random_model(config)
    ids, subs, relation = random_inputs(config, 2, 4)
    past = model(ids, subs, relation).past_key_values
    with pytest.raises(ValueError, match="input_subs"):
        model(ids, subs[:, :3], relation)
    with pytest.raises(ValueError, match="relation has shape"):
        model(ids, subs, relation[:, :, :3])
    with pytest.raises(ValueError, match="relation has shape"):
        model(ids, subs, relation[:1])
    with pytest.raises(ValueError, match="4 queries after 4 cached tokens"):
        model(ids, subs, relation, past_key_values=past)
    with pytest.raises(ValueError, match="past_key_values has 2 layers"):
        model(ids, subs, relation, past_key_values=past[:2])
    with pytest.raises(ValueError, match="together"):
        model(ids, subs, relation, torch.tensor([1]))
