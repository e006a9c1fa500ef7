"""The engine: requests in, results out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from cpmbee.answers import AnswerWriter
from cpmbee.cache import CachePool
from cpmbee.calls import items_of, locating
from cpmbee.choices import Choice
from cpmbee.config import ModelConfig
from cpmbee.encoding import Data, Prompt
from cpmbee.errors import PromptError, VocabularyError
from cpmbee.generation_config import GenerationConfig
from cpmbee.prompt import encode_prompt
from cpmbee.request import Request, make_request, most_rows
from cpmbee.results import CacheUsage, FinishReason, GenerationResult, Timings, Usage
from cpmbee.row_keeper import RowKeeper
from cpmbee.runner import Backend
from cpmbee.scheduler import Decoding
from cpmbee.scoring import ChoiceScore, Scoring
from cpmbee.scoring_job import ScoringJob, make_job
from cpmbee.streaming import Stream
from cpmbee.task import OnStep
from cpmbee.tokenizer import Tokenizer


class Engine:
    """Writes the answers of requests. Safe to use from several threads.

    Most callers want `from_pretrained`.

    Args:
        backend: the model.
        tokenizer: its tokenizer.
        generation_config: default options.

    Attributes:
        tokenizer: the model's tokenizer.
        generation_config: options that hold where a call sets none.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, generation_config: GenerationConfig | None = None
    ) -> None:
        if tokenizer.vocab_size != backend.config.vocab_size:
            raise VocabularyError(
                f"the vocabulary has {tokenizer.vocab_size} tokens and the model {backend.config.vocab_size}; "
                "they do not belong together"
            )
        self.tokenizer = tokenizer
        self.generation_config = generation_config or GenerationConfig()
        self._backend = backend
        self._pool = CachePool(backend.cache_rows)
        self._keeper = RowKeeper(self._pool)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "auto",
        num_threads: int = 0,
        cache_tokens: int = 0,
        *,
        verify_hashes: bool = False,
        native: bool = True,
    ) -> Engine:
        """Load an exported model folder.

        Args:
            folder: what ``cpmbee export`` wrote.
            device: ``"auto"`` or ``"cpu"``.
            num_threads: threads of one run; 0 takes one for each physical core, or fewer where a small model gains
                nothing by them.
            cache_tokens: tokens that all requests at a time may have; 0 takes 8,192, or what fits a quarter of the
                memory.
            verify_hashes: check the weights file against its hash, however large it is.
            native: use the native kernels if they are built; False runs the file's own function bodies.

        Raises:
            ModelFolderError: the folder is incomplete, altered or unsafe.
            ConfigError: an argument is out of range, or the folder's configuration is.
            VocabularyError: the vocabulary does not fit the model.
            DependencyError: ONNX Runtime is missing, cannot be imported, or is installed twice.
            InferenceError: the model cannot be run; found here only where threads are tried.
        """
        from cpmbee.folder import open_folder
        from cpmbee.session import OrtBackend

        model = open_folder(folder, verify_hashes=verify_hashes)
        tokenizer = Tokenizer.from_file(model.vocabulary)
        if tokenizer.vocab_size != model.config.vocab_size:
            raise VocabularyError(
                f"{model.vocabulary}: {tokenizer.vocab_size} tokens, but the model has {model.config.vocab_size}"
            )
        backend = OrtBackend(model, device, num_threads, cache_tokens, native=native)
        return cls(backend, tokenizer, model.generation_config)

    def close(self) -> None:
        """Give the model's memory and threads back now; streams and calls that are not over end with an error.

        Does nothing in a process that was forked after the model was loaded: it is not that process's to give.
        """
        if not self._pool.forked:
            self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._backend.config

    @property
    def native_ops(self) -> dict[str, str]:
        """For each custom op, the kernel that runs it: an instruction set, or ``"function"``."""
        return self._backend.native_ops

    @property
    def num_threads(self) -> int:
        """Threads of one run, as asked for or as chosen by default."""
        return self._backend.num_threads

    @property
    def cache_usage(self) -> CacheUsage:
        """How many rows of the cache are taken now."""
        self._pool.check_process()
        with self._pool.lock:
            kept = self._keeper.examples.kept
            return CacheUsage(self._pool.capacity, self._pool.used - kept, kept)

    @overload
    def generate(
        self,
        data: Data,
        examples: Sequence[Data] = (),
        *,
        on_step: OnStep | None = None,
        repeats: Counter[int] | None = None,
        **options: Any,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        data: Sequence[Data],
        examples: Sequence[Data] = (),
        *,
        on_step: OnStep | None = None,
        repeats: Counter[int] | None = None,
        **options: Any,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        data: Data | Sequence[Data],
        examples: Sequence[Data] = (),
        *,
        on_step: OnStep | None = None,
        repeats: Counter[int] | None = None,
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Write the answers of one request, or of several together.

        With a ``seed`` a sampled answer depends on the seed, the request with its examples, and on how many equal
        requests of the call come before it, so that equal ones differ; not on its place or on the others.

        Args:
            data: a nested dict with an ``<ans>`` key, or a list of them. It is not modified.
            examples: in-context examples for every request: nested dicts with their answers filled in.
            on_step: called after every step with the number of steps so far; returning False stops, and the results
                hold what there is, with finish reason ``"cancelled"``.
            repeats: how often each request was sampled with a seed in earlier calls that this one goes on from; the
                requests of this call are counted in it.
            **options: fields of `GenerationConfig`.

        Returns:
            One result, or a list of results in the order of the requests.

        Raises:
            PromptError: a request or example is not one; names the path.
            TokenizeError: text with a lone ``<``; names the path.
            ConfigError: an option is unknown or out of range.
            CacheFullError: a request does not fit the cache; raised before anything runs.
            InferenceError: the model cannot be run, or computes logits that are not finite.
        """
        config = self.generation_config.updated(**options)
        items, single = items_of(data)
        repeats = Counter() if repeats is None else repeats
        requests = [self._request(item, i, examples, config, single, repeats) for i, item in enumerate(items)]
        Decoding(self._backend, self._pool, self._keeper, requests).complete(on_step)
        results = [self._result(request) for request in requests]
        return results[0] if single else results

    def stream(self, data: Data, examples: Sequence[Data] = (), **options: Any) -> Stream:
        """Write the answers of one request, piece by piece.

        The pieces of a path, joined, are its answer. With beams a piece comes when all of them agree on it.

        Args:
            data: a nested dict with an ``<ans>`` key. It is not modified.
            examples: in-context examples.
            **options: fields of `GenerationConfig`.

        Returns:
            An iterator over `Piece` objects, with the result in its ``result`` when it has ended.
        """
        config = self.generation_config.updated(**options)
        request = self._request(data, 0, examples, config, single=True)
        writer = AnswerWriter(request.prompt, self.tokenizer)
        task = Decoding(self._backend, self._pool, self._keeper, [request])
        return Stream(request, writer, task, self._result)

    @overload
    def score(self, data: Data, choices: Sequence[Choice], examples: Sequence[Data] = ()) -> list[ChoiceScore]: ...

    @overload
    def score(
        self, data: Sequence[Data], choices: Sequence[Sequence[Choice]], examples: Sequence[Data] = ()
    ) -> list[list[ChoiceScore]]: ...

    def score(
        self,
        data: Data | Sequence[Data],
        choices: Sequence[Choice] | Sequence[Sequence[Choice]],
        examples: Sequence[Data] = (),
    ) -> list[ChoiceScore] | list[list[ChoiceScore]]:
        """How likely given answers are: one request with its choices, or several requests, each with its own.

        A prompt is computed once for all of its choices, and several requests run together. The tokens that count are
        said at `ChoiceScore`.

        Args:
            data: a nested dict with an ``<ans>`` key, or a list of them; what is under ``<ans>`` does not matter.
            choices: texts, or dicts shaped like ``<ans>`` where it is a dict; for several requests, a list of such
                lists. An empty text is an answer, too.
            examples: in-context examples for every request, as in `generate`.

        Returns:
            A score for each choice, in order; for several requests, a list of such lists.

        Raises:
            PromptError: a request or example is not one, or a choice cannot be its answer; names the path.
            TokenizeError: text with a lone ``<``; names the path.
            CacheFullError: a request and one of its choices do not fit the cache; raised before anything runs.
            InferenceError: the model cannot be run, or computes logits that are not finite.
        """
        items, single = items_of(data)
        if not isinstance(choices, (list, tuple)):
            raise PromptError(f"choices must be a list of answers, not {type(choices).__name__}")
        given: Sequence[Any] = [choices] if single else choices
        if len(given) != len(items):
            raise PromptError(f"{len(items)} requests need as many lists of choices, not {len(given)}")
        jobs: list[ScoringJob] = []
        for i, (item, answers) in enumerate(zip(items, given, strict=True)):
            with locating(i, single):
                prompt = self.encode(item, examples)
                jobs.append(make_job(prompt, answers, self.tokenizer, self._backend.config, self._pool.capacity))
        sums = Scoring(self._backend, self._pool, self._keeper, jobs).run()
        scores = [
            [
                ChoiceScore(choice, logprob, encoded.num_targets)
                for choice, logprob, encoded in zip(answers, logprobs, job.choices, strict=True)
            ]
            for answers, logprobs, job in zip(given, sums, jobs, strict=True)
        ]
        return scores[0] if single else scores

    def encode(self, data: Data, examples: Sequence[Data] = ()) -> Prompt:
        """The arrays of a request, as the model reads them."""
        if not isinstance(examples, (list, tuple)):
            raise PromptError(f"examples must be a list of dicts, not {type(examples).__name__}")
        return encode_prompt(data, self.tokenizer, examples)

    def cache_rows(self, data: Data, examples: Sequence[Data] = (), **options: Any) -> int:
        """The most cache rows that `generate` takes for a request: its prompt, and the answer budget of every beam.

        More than ``cache_usage.capacity`` do not fit.

        Args:
            data: a nested dict with an ``<ans>`` key.
            examples: in-context examples.
            **options: fields of `GenerationConfig`.
        """
        return most_rows(self.encode(data, examples), self.generation_config.updated(**options))

    def _request(
        self,
        data: Data,
        index: int,
        examples: Sequence[Data],
        config: GenerationConfig,
        single: bool,
        repeats: Counter[int] | None = None,
    ) -> Request:
        start = time.perf_counter()
        with locating(index, single):
            prompt = self.encode(data, examples)
            request = make_request(prompt, self.tokenizer, self._backend.config, config, repeats)
            self._pool.check(most_rows(prompt, config))
        request.encode_seconds = time.perf_counter() - start
        return request

    def _result(self, request: Request) -> GenerationResult:
        best = request.search.best()
        reason: FinishReason = "length"
        if request.search.sequences or not best.written:
            reason = "cancelled"
        elif request.search.space.ends(*best.written[-1]):
            reason = "stop"
        return GenerationResult(
            answer=AnswerWriter(request.prompt, self.tokenizer).answer(best.written),
            score=best.score,
            finish_reason=reason,
            usage=Usage(len(request.prompt), len(best.written)),
            timings=Timings(request.encode_seconds, request.prefill_seconds, request.decode_seconds),
        )
