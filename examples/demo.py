"""The main job on the default model: questions about one long document, answered with and without CLO.

Asks the same of two servers, one after the other: with full attention over the whole KV cache, then with CLO.
Shows both answers beside the words of the document that hold the answer, what CLO saved, and which tokens the
heads kept. Run it with ``make demo``.
"""

import argparse
import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from clo import Client
from clo.runtime.client import Result
from clo.runtime.config import Device, ModelConfig, ResolvedModel
from clo.runtime.machine.process import set_threads
from clo.runtime.units import format_size
from clo.runtime.wire.errors import CLOError
from clo.runtime.wire.messages import Text
from examples.document import pytorch_readme
from examples.questions import PROMPT, Question, answered_by

PICTURE = Path("demo.png")
WIDTH = 100  # of the terminal, in characters
ANSWER_TOKENS = 60  # an answer ends with its line, long before this, unless the model rambles
NAMES = {"full": "Full attention", "clo": "CLO"}

Report = Callable[[int, int], None]  # tokens done, of how many


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    device: Device = parser.parse_args().device
    document = pytorch_readme()
    questions = answered_by(document)
    if not questions:
        sys.exit(
            f"error: The README of PyTorch {version('torch')} answers none of the demo's questions; install "
            "torch 2.13.0, for which they are written."
        )
    say(
        f"{len(questions)} questions about one document, the README of PyTorch {version('torch')}: answered "
        "with full attention over the whole KV cache, then with CLO."
    )
    prompts = [PROMPT.format(document=document, question=question.text) for question in questions]
    set_threads(os.environ)
    try:
        from clo.runtime.model.files import resolve  # loads torch, which reads the above

        model = resolve(ModelConfig(device=device))
        with server("full", device) as client:
            full = [ask(client, NAMES["full"], *numbered) for numbered in enumerate(prompts, 1)]
        with server("clo", device) as client:
            clo = [ask(client, NAMES["clo"], *numbered) for numbered in enumerate(prompts, 1)]
            forced = [
                force(client, number, prompt, *pair)
                for number, (prompt, *pair) in enumerate(zip(prompts, full, clo, strict=True), 1)
            ]
        for number, result in enumerate(clo, 1):
            if not result.text.strip():
                sys.exit(f"error: CLO gave an empty answer to question {number}.")
        for number, results in enumerate(zip(full, clo, strict=True)):
            print_answers(number, questions[number], document, *results)
        print_savings(full, clo, forced, on_gpu=model.device == "cuda")
        print_kept(model, questions[0], prompts[0], clo[0])
    except CLOError as error:
        sys.exit(f"error: {error}")
    print()
    say(
        f"That took {time.monotonic() - began:.0f} s. Next: README.md has the options and what is measured, "
        "docs/structure.md how it works, and `clo serve --help` how to serve another model."
    )


def say(text: str) -> None:
    """Print a paragraph."""
    print(textwrap.fill(text, WIDTH), flush=True)


def ask(client: Client, name: str, number: int, prompt: str) -> Result:
    """The greedy answer to a prompt, to the end of its line."""
    with waiting(f"{name}: reading the document for question {number}") as report:
        return client.generate(
            prompt,
            temperature=0.0,
            max_tokens=ANSWER_TOKENS,
            stop=["\n"],
            logprobs=0,
            on_progress=lambda progress: report(progress.done, progress.total),
        )


def force(client: Client, number: int, prompt: str, full: Result, clo: Result) -> Result:
    """What CLO makes of full attention's answer, token by token, whatever it would have said itself.

    Where its own answer has the same tokens, that is the result; else the document must be read again.
    """
    if clo.tokens == full.tokens:
        return clo
    with waiting(f"CLO: reading the document again, with full attention's answer {number}") as report:
        return client.score(
            prompt, full.tokens, on_progress=lambda progress: report(progress.done, progress.total)
        )


@contextmanager
def server(attention: str, device: Device) -> Iterator[Client]:
    """A server on a free port; yields a client of it. Ends the program where it cannot start."""
    command = [
        "clo",
        "serve",
        "--attention",
        attention,
        "--device",
        device,
        "--kv-size",
        "1GiB",
        "--port",
        "0",
    ]
    print(f"$ {' '.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().strip()
        if not ready:  # the server has said why
            sys.exit(process.wait() or 1)
        print(ready, flush=True)
        with Client(ready.split()[1]) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


@contextmanager
def waiting(what: str) -> Iterator[Report]:
    """A progress bar on a terminal, one line in a file; yields what to tell it with."""
    with tqdm(desc=what, unit=" tokens", leave=False, disable=None) as bar:
        if bar.disable:
            print(what, flush=True)

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def print_answers(number: int, question: Question, document: str, full: Result, clo: Result) -> None:
    """Both answers, and the place of the document that shows whether they are right."""
    start = document.index(question.passage)
    line_start, line_end = document.rfind("\n", 0, start) + 1, document.find("\n", start)
    marked = document[line_start:line_end].replace(question.passage, f"[{question.passage}]")
    verdicts = ["right" if is_right(question, result) else "WRONG" for result in (full, clo)]
    same = "the same" if full.text == clo.text else "another answer"
    print(f"\n{number + 1}. {question.text}")
    for label, text in (
        (f"document, at {start / len(document):.0%}", textwrap.shorten(marked, 300, placeholder=" ...")),
        (f"full attention: {verdicts[0]}", shown(full)),
        (f"CLO: {verdicts[1]}, {same}", shown(clo)),
    ):
        lines = textwrap.wrap(text, WIDTH - 30) or [""]
        for first, line in zip([label] + [""] * len(lines), lines, strict=False):
            print(f"   {first:25}  {line}")


def is_right(question: Question, result: Result) -> bool:
    """Whether an answer came to its end and says what the document says."""
    return result.finish_reason == "stop" and question.accepts(result.text)


def shown(result: Result) -> str:
    """The text of an answer, and whether it was cut off."""
    return result.text.strip() + (" [cut off]" if result.finish_reason == "length" else "")


def print_savings(full: list[Result], clo: list[Result], forced: list[Result], on_gpu: bool) -> None:
    """What CLO held and read for each question, beside full attention.

    Args:
        forced: CLO with the answers of full attention.
    """

    def line(name: str, cells: list[str]) -> None:
        print(f"{name:46}" + "".join(f"{cell:>14}" for cell in cells))

    caches = [result.cache for result in clo]
    print()
    line("", [f"question {number}" for number in range(1, len(clo) + 1)])
    line("tokens of the prompt", [f"{result.usage.prompt_tokens:,}" for result in clo])
    line("KV in CPU memory", [format_size(cache.kv_bytes) for cache in caches])
    line("held on the worker: resident rows", [format_size(cache.resident_bytes) for cache in caches])
    line("                    index", [format_size(cache.index_bytes) for cache in caches])
    line("CPU memory read in a step: full attention", [format_size(cache.kv_bytes) for cache in caches])
    line(
        "                           CLO",
        [format_size(cache.fetched_bytes / max(cache.steps, 1)) for cache in caches],
    )
    line("rows fetched per step and head", [f"{cache.rows_per_step_and_head:.1f}" for cache in caches])
    line("selected rows that were resident already", [f"{cache.hit_rate:.1%}" for cache in caches])
    line("attention that CLO gives to codes of 2 bits", [f"{cache.tail_share:.2%}" for cache in caches])
    line("                      and to nothing", [f"{cache.dropped_share:.2%}" for cache in caches])
    line("perplexity of full attention's answer:", ["" for _ in full])
    line("                           full attention", [f"{perplexity(result):.3f}" for result in full])
    line("                           CLO", [f"{perplexity(result):.3f}" for result in forced])
    say("Both read the prompt with full attention. In each step CLO also reads what it holds on the worker.")
    if not on_gpu:
        say("On a CPU that is the same memory, so nothing gets faster; README.md has speeds on a GPU.")
    say(
        "Perplexity says how surprising a text is, token by token; 1 is no surprise at all. Both were given "
        "the same text, full attention's answer from its first token to its last; CLO was held to it also "
        "where it would have gone on with another token."
    )


def perplexity(result: Result) -> float:
    """Perplexity of all tokens of an answer, the end of its line included."""
    assert result.logprobs is not None
    return math.exp(-sum(entry.logprob for entry in result.logprobs) / len(result.logprobs))


def print_kept(model: ResolvedModel, question: Question, prompt: str, result: Result) -> None:
    """What the heads kept at the end of the answer to the first question: a few lines here, and a picture."""
    from clo.runtime.tokenizer import Tokenizer  # these load torch, see ``main``
    from examples import picture

    tokenizer = Tokenizer(Path(model.path), model.vocab_size)
    tokens = tokenizer.encode(Text(prompt), limit=len(prompt))
    start = prompt.index(question.passage)
    passage = picture.tokens_between(tokenizer, prompt, start, start + len(question.passage))
    start += question.passage.index(question.fact)
    fact = picture.tokens_between(tokenizer, prompt, start, start + len(question.fact))
    words = [tokenizer.decode([token]) for token in tokens + result.tokens[:-1]]
    print()
    with waiting("CLO: the same answer to question 1 in this process, to look at what is resident") as report:
        resident = picture.resident_after(model, tokens, result.tokens, report)
    heads = resident.shape[0] * resident.shape[1]
    say(
        f"What {heads} heads keep at the end of answer 1, from the first token to the last: the higher a "
        "block, the more of the tokens there. ▼ marks the passage that holds the answer."
    )
    print(picture.overview(resident, passage))
    print("\nThe same close up, where the answer stands:")
    print(picture.close_up(resident, fact, words))
    picture.draw(resident, passage, words, f"Question: {question.text} Answer:{result.text}", PICTURE)
    print(f"\nAs a picture: {PICTURE.resolve()}")


if __name__ == "__main__":
    main()
