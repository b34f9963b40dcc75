"""A batch: many prompts in a file, their answers in another, several at a time, by ``clo run``.

Start a server with ``clo serve``, then run ``python -m examples.batch reviews.txt answers.jsonl``; another
address may follow. Each line of the first file is one prompt. What was answered is kept when this is
interrupted, and the same command asks for the rest.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

SCHEMA = {
    "type": "object",
    "properties": {"feeling": {"enum": ["good", "bad"]}},
    "required": ["feeling"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}}


def main() -> None:
    reviews, answers, *more = sys.argv[1:]
    prompts = Path(answers).with_suffix(".prompts.jsonl")
    with prompts.open("w", encoding="utf-8") as file:
        for number, review in enumerate(Path(reviews).read_text(encoding="utf-8").splitlines(), 1):
            content = f"Is this review good or bad?\n\n{review}"
            line = {"id": number, "messages": [{"role": "user", "content": content}]}
            file.write(json.dumps(line | {"response_format": FORMAT}) + "\n")

    command = [sys.executable, "-m", "clo", "run", "--input", str(prompts), "--output", answers]
    command += ["--concurrency", "8", "--temperature", "0", "--max-tokens", "50"]
    command += ["--server", more[0]] if more else []
    if subprocess.run(command).returncode:
        sys.exit("Some prompts have no answer yet; the same command asks for them again.")

    counts = Counter[str]()
    for answer in map(json.loads, Path(answers).read_text(encoding="utf-8").splitlines()):
        if "error" not in answer:  # of an earlier run; there is an answer as well by now
            counts[json.loads(answer["text"])["feeling"]] += 1
    print(", ".join(f"{count} {feeling}" for feeling, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
