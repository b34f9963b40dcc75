"""The ``openai`` package: a chat, the same as a stream, and an answer that follows a schema.

Start a server with ``clo serve --http 8000``, then run ``python -m examples.openai_client``; another base URL
may follow. Nothing here is special to CLO but that URL.
"""

import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam
from pydantic import BaseModel


class Person(BaseModel):
    """The answer of the last request."""

    name: str
    city: str
    year: int


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=url, api_key="none")  # the server's --api-key, where it has one
    model = client.models.list().data[0].id

    question: ChatCompletionUserMessageParam = {"role": "user", "content": "What is the capital of France?"}
    answer = client.chat.completions.create(
        model=model, messages=[question], temperature=0, max_completion_tokens=50
    )
    print(answer.choices[0].message.content)
    assert answer.usage is not None
    print(f"{answer.usage.prompt_tokens} tokens in, {answer.usage.completion_tokens} out")

    for chunk in client.chat.completions.create(
        model=model, messages=[question], temperature=0, max_completion_tokens=50, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    text = "Ada Lovelace was born in London in 1815. Name, city and year?"
    extracted = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": text}],
        response_format=Person,
        temperature=0,
        max_completion_tokens=200,
    )
    print(repr(extracted.choices[0].message.parsed))


if __name__ == "__main__":
    main()
