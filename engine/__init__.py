"""Run CPM-Bee models on ONNX Runtime.

    engine = cpmbee.Engine.from_pretrained(folder)
    engine.generate({"input": "今天天气真好，", "<ans>": ""}).answer

Names are imported on first use, so that ``import cpmbee`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpmbee.chat import Chat
    from cpmbee.config import ModelConfig
    from cpmbee.encoding import AnswerSlot, Prompt
    from cpmbee.engine import Engine
    from cpmbee.errors import (
        CacheFullError,
        CheckpointError,
        ConfigError,
        CpmBeeError,
        DataError,
        DependencyError,
        ExportError,
        InferenceError,
        ModelFolderError,
        PromptError,
        TokenizeError,
        VocabularyError,
    )
    from cpmbee.generation_config import GenerationConfig
    from cpmbee.prompt import encode_prompt
    from cpmbee.results import Answer, CacheUsage, GenerationResult, Piece, Timings, Usage
    from cpmbee.scoring import ChoiceScore
    from cpmbee.streaming import Stream
    from cpmbee.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOME = {
    "Answer": "results",
    "AnswerSlot": "encoding",
    "CacheFullError": "errors",
    "CacheUsage": "results",
    "Chat": "chat",
    "CheckpointError": "errors",
    "ChoiceScore": "scoring",
    "ConfigError": "errors",
    "CpmBeeError": "errors",
    "DataError": "errors",
    "DependencyError": "errors",
    "Engine": "engine",
    "ExportError": "errors",
    "GenerationConfig": "generation_config",
    "GenerationResult": "results",
    "InferenceError": "errors",
    "ModelConfig": "config",
    "ModelFolderError": "errors",
    "Piece": "results",
    "Prompt": "encoding",
    "PromptError": "errors",
    "Stream": "streaming",
    "Timings": "results",
    "TokenizeError": "errors",
    "Tokenizer": "tokenizer",
    "Usage": "results",
    "VocabularyError": "errors",
    "encode_prompt": "prompt",
}

__all__ = [
    "Answer",
    "AnswerSlot",
    "CacheFullError",
    "CacheUsage",
    "Chat",
    "CheckpointError",
    "ChoiceScore",
    "ConfigError",
    "CpmBeeError",
    "DataError",
    "DependencyError",
    "Engine",
    "ExportError",
    "GenerationConfig",
    "GenerationResult",
    "InferenceError",
    "ModelConfig",
    "ModelFolderError",
    "Piece",
    "Prompt",
    "PromptError",
    "Stream",
    "Timings",
    "TokenizeError",
    "Tokenizer",
    "Usage",
    "VocabularyError",
    "encode_prompt",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
