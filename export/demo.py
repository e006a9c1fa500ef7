"""``cpmbee demo``: export the bundled demo model, ask it a few things, and say what happened and how fast."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import cpmbee
import cpmbee.model
from cpmbee.errors import CheckpointError
from cpmbee.export.report import ExportReport
from cpmbee.locale_text import use_readable_encoding
from cpmbee.progress import ProgressBar

OUT = Path("demo-model")
REQUESTS: tuple[dict[str, Any], ...] = (
    {"input": "白发三千丈", "prompt": "转繁体", "<ans>": ""},
    {"input": "银行", "question": "行", "<ans>": ""},
    {"input": "校长", "question": "长", "options": {"<option_0>": "cháng", "<option_1>": "zhǎng"}, "<ans>": ""},
    {"input": "三千零五", "prompt": "写成数字", "<ans>": ""},
    {"input": "3005", "prompt": "写成汉字", "<ans>": ""},
)
STREAMED = {"input": "98765432", "prompt": "写成汉字", "<ans>": ""}
MAX_NEW_TOKENS = 24  # the longest numeral has 15 characters


def demo_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package.

    Raises:
        CheckpointError: the installation lacks it.
    """
    folder = Path(cpmbee.model.__file__).parent / "demo"
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: the demo model is not part of this installation; reinstall cpmbee")
    return folder


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cpmbee demo", description="Export the bundled demo model and try it.")
    parser.add_argument("--out", type=Path, default=OUT, help=f"model folder to write (./{OUT}, which is replaced)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder at another place, too")
    args = parser.parse_args(argv)
    from cpmbee.export import export

    use_readable_encoding(sys.stdout)
    with ProgressBar() as progress:
        report = export(demo_checkpoint(), args.out, overwrite=args.overwrite or args.out == OUT, progress=progress)
    print("\n".join(_describe(report)))
    started = time.perf_counter()
    engine = cpmbee.Engine.from_pretrained(args.out)
    print(f"loaded in {time.perf_counter() - started:.2f} s; kernels: {_listed(engine.native_ops)}\n")

    for request, result in zip(REQUESTS, engine.generate(list(REQUESTS), max_new_tokens=MAX_NEW_TOKENS), strict=True):
        print(f"{_shown(request)}  ->  {result.answer}")
    print(f"{_shown(STREAMED)}  ->  ", end="", flush=True)
    for piece in engine.stream(STREAMED, max_new_tokens=MAX_NEW_TOKENS):
        print(piece.text, end="", flush=True)
    result = engine.generate(STREAMED, max_new_tokens=MAX_NEW_TOKENS)
    first = result.timings.encode + result.timings.prefill
    rate = (result.usage.completion_tokens - 1) / result.timings.decode
    print(f"\n\nfirst token after {1000 * first:.1f} ms, then {rate:,.0f} tokens/s (one request alone)")
    typed = json.dumps(REQUESTS[0], ensure_ascii=False)
    print("now yours:\n  " + shlex.join([*_own_command(), "generate", str(args.out), typed]))
    return 0


def _own_command() -> list[str]:
    """The words that start this program, as its user can type them."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return [sys.executable, "-m", "cpmbee"]
    on_path = shutil.which("cpmbee")
    if script.name == "cpmbee" and not (on_path and script.samefile(on_path)):
        return [sys.argv[0]]
    return ["cpmbee"]


def _describe(report: ExportReport) -> list[str]:
    lines = [
        f"exported {report.num_parameters:,} parameters ({report.precision}, {report.num_bytes / 1e6:.1f} MB) "
        f"to {report.folder} in {report.seconds:.2f} s"
    ]
    if report.verification is not None:
        checks = len(report.verification.checks)
        lines.append(f"verified: {checks} checks passed in {report.verification.seconds:.2f} s")
        lines += [f"  note: {note}" for note in report.verification.notes]
    return lines


def _listed(kernels: dict[str, str]) -> str:
    return ", ".join(f"{op} {kernel}" for op, kernel in kernels.items())


def _shown(request: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in request.items() if key != "<ans>"}, ensure_ascii=False)
