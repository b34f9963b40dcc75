"""A server whose worker answers with what it was told, so that a test decides what a model writes.

``python -m tests.echo serve OPTIONS`` starts it, with the options of ``launch.py``. The answer to a chat is
its last message and the answer to a text is that text, with an end token behind; one that holds HOLD is never
answered. Every step brings a token for each request, and every token, also of prompts, has the
log-probability -0.5. Grammars are not followed.
"""

import os
import sys
import time
from typing import Any

import msgspec
import zmq

from clo import launch
from clo.runtime.config import WorkerConfig
from clo.runtime.machine.process import die_with_parent, read_key, run_process
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import (
    NO_STATS,
    Abort,
    Done,
    FromWorker,
    GetWorkerStats,
    Logprob,
    Ping,
    Pong,
    Prefilled,
    PromptScored,
    Ready,
    Reason,
    Run,
    Step,
    Stepped,
    StoreStats,
    ToWorker,
    WorkerReport,
    WorkerStats,
    worker_identity,
)
from clo.runtime.wire.sockets import DealerSocket

HOLD = "HOLD"
CAPACITY = 100_000
SLOTS = 64  # as many as the router is told; all that comes is answered at once
STEP_S = 0.001


class Echo:
    """The worker."""

    def __init__(self, config: WorkerConfig, key: str) -> None:
        self._config = config
        context: zmq.Context[Any] = zmq.Context()
        self._router: DealerSocket[FromWorker, ToWorker] = DealerSocket(
            context, config.router, ToWorker, key, worker_identity(config.worker)
        )
        self._tokenizer = Tokenizer(config.model.folder, config.model.vocab_size)
        self._runs: dict[int, Run] = {}
        self._answers: dict[int, list[int]] = {}  # what is left of them

    def serve(self) -> None:
        self._router.send(Ready(self._config.worker, os.getpid(), "numa0", CAPACITY, SLOTS))
        while True:
            while message := self._router.receive(0 if self._answers else None):
                self._handle(message)
                if not self._answers and not self._runs:
                    break
            self._step()
            time.sleep(STEP_S)

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Run():
                self._runs[message.sequence] = message
                answer = message.forced or self._answer(message)
                if HOLD not in self._tokenizer.decode(answer):
                    self._begin(message, answer)
            case Abort():
                if message.sequence in self._runs:
                    self._end(message.sequence, "cancelled")
            case Ping():
                self._router.send(Pong())
            case GetWorkerStats():
                held = len(self._runs) - len(self._answers)
                stats = WorkerStats(
                    0, len(self._answers), len(self._answers), held, 0, 0, 0, 0, 0, 0, None, None, None
                )
                self._router.send(WorkerReport(stats, StoreStats("numa0", 0, 0, 1, 1, 0, 0, 0, 0, 0)))

    def _begin(self, run: Run, answer: list[int]) -> None:
        total, wanted = len(run.tokens), run.sampling.prompt_logprobs
        self._router.send(Prefilled(run.sequence, total, total))
        if wanted is not None and total > 1:
            scores = [self._logprob(token, wanted) for token in run.tokens[1:]]
            self._router.send(PromptScored(run.sequence, 1, scores))
        self._answers[run.sequence] = answer[: run.sampling.max_tokens]
        if not self._answers[run.sequence]:
            self._end(run.sequence, "length")

    def _logprob(self, token: int, wanted: int) -> Logprob:
        return Logprob(token, -0.5, [(token, -0.5), (0, -3.0), (1, -4.0)][:wanted])

    def _answer(self, run: Run) -> list[int]:
        """The last message of a chat, or the whole of a text."""
        text = self._tokenizer.decode(run.tokens, special=True)
        if "<|im_end|>" in text:
            text = text.rpartition("<|im_end|>")[0].rpartition("<|im_start|>")[2].partition("\n")[2]
        return [*self._tokenizer._encode(text), self._tokenizer.eos[0]]

    def _step(self) -> None:
        steps, ended = [], dict[int, Reason]()
        for sequence, answer in self._answers.items():
            sampling = self._runs[sequence].sampling
            token = answer.pop(0)
            wanted = sampling.logprobs
            logprob = None if wanted is None else self._logprob(token, wanted)
            steps.append(Step(sequence, token, logprob))
            if not answer:
                ended[sequence] = "stop" if token in self._tokenizer.eos else "length"
        if steps:
            self._router.send(Stepped(steps))
        for sequence, reason in ended.items():
            self._end(sequence, reason)

    def _end(self, sequence: int, reason: Reason) -> None:
        del self._runs[sequence]
        self._answers.pop(sequence, None)
        self._router.send(Done(sequence, reason, NO_STATS))


def main() -> None:
    die_with_parent(int(sys.argv[2]))
    config = msgspec.json.decode(sys.argv[1], type=WorkerConfig)
    Echo(config, read_key()).serve()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.exit(launch.main(sys.argv[2:], worker="tests.echo"))
    run_process(main)
