"""Without the compiled modules everything works, and says once that it is slow."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
for name in ("tokenizer", "prompt", "relation"):
    sys.modules[f"cpmbee._{name}"] = None  # importing it now raises ImportError
from cpmbee import native, prompt, relation, tokenizer
native.__file__ = "absent/native.py"
assert native.library_path() is None
for thing in (tokenizer.Tokenizer, prompt.encode_prompt, prompt.encode_data, relation.RelationBuilder):
    assert thing.__module__.startswith("cpmbee.plain."), thing
"""


def test_plain_python_takes_over_with_one_warning() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stderr.count("not built") == 1
    assert done.stdout == ""


def test_compiled_code_is_used_where_it_is_built() -> None:
    from cpmbee import prompt, relation, tokenizer

    assert tokenizer.Tokenizer.__module__ == "cpmbee._tokenizer"
    assert prompt.encode_prompt.__module__ == "cpmbee._prompt"
    assert relation.RelationBuilder.__module__ == "cpmbee._relation"
