"""Synthetic checkpoints: valid, of the published shapes, random enough; and GGUF files a reader agrees with."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpmbee.bench.peers import gguf
from cpmbee.bench.synthetic import SIZES, published_config, vocabulary, write_checkpoint
from cpmbee.config import ModelConfig
from cpmbee.model.checkpoint import open_checkpoint
from cpmbee.tokenizer import Tokenizer


@pytest.mark.parametrize(("size", "attention", "ffn"), [("1b", 19, 24), ("2b", 19, 24), ("10b", 48, 48)])
def test_published_shapes(size: str, attention: int, ffn: int) -> None:
    config = published_config(size)
    assert (len(config.attention_layers), len(config.ffn_layers)) == (attention, ffn)
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (4096, 86_583, 48)
    assert ModelConfig.from_dict(config.to_dict("original")) == config
    assert published_config(size, 5).num_hidden_layers == 5
    assert size in SIZES


def small() -> ModelConfig:
    config = published_config("1b", 5)
    return replace(config, hidden_size=64, vocab_size=500, dim_ff=32, num_attention_heads=2, dim_head=8)


def test_checkpoint_opens_and_is_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpmbee.bench.synthetic.BLOCK", 10_007)
    monkeypatch.setattr("cpmbee.bench.synthetic.SHARD_BYTES", 80_000)
    write_checkpoint(small(), tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config == small()
    assert len(checkpoint.files) > 1
    assert checkpoint.vocab_file is not None
    assert Tokenizer.from_file(checkpoint.vocab_file).vocab_size == 500
    embedding = checkpoint.read("input_embedding.weight")
    assert embedding.dtype == np.float16
    assert len(np.unique(embedding, axis=0)) == len(embedding)
    assert abs(float(embedding.std(dtype=np.float32)) - 1) < 0.1
    assert (checkpoint.read("encoder.output_layernorm.weight") == 1).all()
    gate, value = (checkpoint.read(f"encoder.layers.0.ffn.ffn.w_in.w_{i}.weight") for i in (0, 1))
    assert (gate != value).any()


def test_one_character_is_one_token(tmp_path: Path) -> None:
    tokens = vocabulary(86_583)
    tokenizer = Tokenizer(tokens)
    text = "".join(token for token in tokens if len(token) == 1)[::97]
    ids, ext = tokenizer.encode(text.replace("<", ""))
    assert not ext
    assert len(ids) == len(text.replace("<", ""))


def test_gguf_layout(tmp_path: Path) -> None:
    tensors = [gguf.Tensor("norm", (5,), gguf.F32), gguf.Tensor("matrix", (3, 64), gguf.Q4_0)]
    data = [np.arange(5, dtype=np.float32).data.cast("B"), memoryview(bytes(range(108)))]
    gguf.write(tmp_path / "m.gguf", {"name": "x", "count": 7}, zip(tensors, ([d] for d in data), strict=True))
    raw = (tmp_path / "m.gguf").read_bytes()
    assert raw[:4] == b"GGUF"
    assert struct.unpack_from("<IQQ", raw, 4) == (3, 2, 2)
    assert raw.endswith(bytes(range(108)) + bytes(-108 % 32))
    assert len(raw) % 32 == 0
    with pytest.raises(ValueError, match="matrix"):
        assert gguf.Tensor("matrix", (3, 65), gguf.Q8_0).nbytes
