"""The ONNX Runtime session: which kernels run, and what is said when something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cpmbee
from cpmbee import native
from cpmbee.folder import open_folder
from cpmbee.machine import physical_cores, physical_memory
from cpmbee.session import OrtBackend

REQUEST = {"input": "今天天气真好", "<ans>": ""}


@pytest.mark.skipif(native.library_path() is None, reason="the op library is not built")
def test_the_native_kernel_is_what_runs(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder)
    assert engine.native_ops["BucketedAttention"] in ("scalar", "neon", "avx2", "avx512")
    before = native.call_counts()["BucketedAttention"]
    result = engine.generate(REQUEST, max_new_tokens=5)
    layers = len(engine.config.attention_layers)
    runs = result.usage.completion_tokens  # the prompt's gives the first token
    assert native.call_counts()["BucketedAttention"] == before + layers * runs

    bodies = cpmbee.Engine.from_pretrained(small_folder, native=False)
    assert set(bodies.native_ops.values()) == {"function"}
    before = native.call_counts()["BucketedAttention"]
    assert bodies.generate(REQUEST, max_new_tokens=5).answer == result.answer
    assert native.call_counts()["BucketedAttention"] == before


def test_the_environment_turns_native_kernels_off(small_folder: Path) -> None:
    code = f"""if True:
        import cpmbee
        engine = cpmbee.Engine.from_pretrained({str(small_folder)!r}, num_threads=1)
        assert set(engine.native_ops.values()) == {{"function"}}, engine.native_ops
        print(engine.generate({REQUEST!r}, max_new_tokens=8, beam_size=2).answer)
    """
    environment = {"CPMBEE_NATIVE": "0", "PYTHONIOENCODING": "utf-8", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1)
    assert run.stdout.strip("\n") == engine.generate(REQUEST, max_new_tokens=8, beam_size=2).answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be"),
        ({"num_threads": -1}, "num_threads must be"),
        ({"cache_tokens": -1}, "cache_tokens must be"),
        ({"cache_tokens": 1.5}, "cache_tokens must be"),
    ],
)
def test_bad_arguments(small_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(cpmbee.ConfigError, match=message):
        cpmbee.Engine.from_pretrained(small_folder, **options)  # type: ignore[arg-type]


def test_subscripts_that_half_precision_cannot_hold(small_folder: Path) -> None:
    from dataclasses import replace

    from cpmbee.prompt import encode_prompt
    from cpmbee.request import make_request

    engine = cpmbee.Engine.from_pretrained(small_folder)
    half = replace(engine.config, half=True)

    def ask(count: int) -> None:
        data = {"input": "".join(f"<option_{i}>" for i in range(count)), "<ans>": ""}
        prompt = encode_prompt(data, engine.tokenizer)
        make_request(prompt, engine.tokenizer, half, engine.generation_config)

    ask(4095)  # subscripts up to 4,094
    with pytest.raises(cpmbee.PromptError, match="4096 different special"):
        ask(4096)


def test_machine() -> None:
    assert physical_cores() >= 1
    assert physical_memory() > 1 << 28


def test_without_compiled_modules(small_folder: Path) -> None:
    code = f"""if True:
        import sys
        for name in ("logits", "prompt", "relation", "tokenizer"):
            sys.modules[f"cpmbee._{{name}}"] = None
        import cpmbee
        engine = cpmbee.Engine.from_pretrained({str(small_folder)!r}, num_threads=1)
        assert type(engine.tokenizer).__module__ == "cpmbee.plain.tokenizer"
        for options in ({{}}, {{"beam_size": 3}}, {{"top_p": 0.9, "seed": 1}}):
            print(engine.generate({REQUEST!r}, [{REQUEST!r} | {{"<ans>": "好"}}], max_new_tokens=8, **options).answer)
    """
    environment = {"PYTHONIOENCODING": "utf-8", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1)
    examples = [{**REQUEST, "<ans>": "好"}]
    ways: list[dict[str, object]] = [{}, {"beam_size": 3}, {"top_p": 0.9, "seed": 1}]
    answers = [engine.generate(REQUEST, examples, max_new_tokens=8, **way).answer for way in ways]  # type: ignore[arg-type]
    assert run.stdout == "".join(f"{answer}\n" for answer in answers)
    assert "not built" in run.stderr


@pytest.mark.parametrize("native_kernels", [True, False])
def test_a_run_that_onnx_runtime_refuses(small_folder: Path, native_kernels: bool) -> None:
    backend = OrtBackend(open_folder(small_folder), num_threads=1, native=native_kernels)
    with backend.runner() as runner:
        runner.reshape(1, 1, 1, 0)
        runner.relation[:] = 30_000  # no such row in the bias table
        with pytest.raises(cpmbee.InferenceError, match="ONNX Runtime cannot run the model") as caught:
            runner.run()
    assert "\n" not in str(caught.value)
