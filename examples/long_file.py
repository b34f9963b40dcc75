"""A question about a whole file, without retrieval: the file is the prompt. Uses CLO's native client.

Start a server with ``clo serve``, then run ``python -m examples.long_file report.txt "Who wrote it?"``;
another address may follow. All of the file's keys and values stay in CPU memory; the last lines show how much
of them the worker held beside its model: in GPU memory, where the server has a GPU.
"""

import sys
from pathlib import Path

from clo import Client
from clo.runtime.units import format_size
from clo.runtime.wire.messages import Progress

PROMPT = """Answer a question about this document.

{text}

Question: {question}
Answer in one short sentence."""


def main() -> None:
    file, question, *more = sys.argv[1:]
    address = more[0] if more else "tcp://127.0.0.1:5555"
    text = Path(file).read_text(encoding="utf-8")
    prompt = [{"role": "user", "content": PROMPT.format(text=text, question=question)}]

    with Client(address) as client:  # api_key="...", where the server has one
        answer = client.stream(prompt, temperature=0, max_tokens=200, on_progress=show_progress)
        for chunk in answer:
            print(chunk.text, end="", flush=True)

    usage, cache = answer.result.usage, answer.result.cache
    print(f"\n\n{usage.prompt_tokens} tokens in, {usage.completion_tokens} out")
    print(f"{format_size(cache.kv_bytes)} of keys and values in CPU memory")
    print(f"{format_size(cache.resident_bytes + cache.index_bytes)} of rows and index on the worker")
    print(f"{cache.hit_rate:.1%} of the selected rows were there already")


def show_progress(progress: Progress) -> None:
    """One line on stderr, written over, while the file is read."""
    print(f"\r{progress.done} of {progress.total} tokens read ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
