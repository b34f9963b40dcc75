"""LangChain against CLO's base URL: a chat, a stream, several at a time, and an answer as an object.

Needs ``pip install langchain-openai``. Start a server with ``clo serve --http 8000``, then run
``python -m examples.langchain_chat``; another base URL may follow.
"""

import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    """What the last request gets."""

    city: str


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    chat = ChatOpenAI(
        base_url=url, api_key="none", model="smollm2-135m-instruct", temperature=0, max_tokens=50
    )
    print(chat.invoke("What is the capital of France?").content)
    for chunk in chat.stream("What is the capital of Italy?"):
        print(chunk.content, end="", flush=True)
    print()
    for answer in chat.batch(["What is the capital of Japan?", "What is the capital of Spain?"]):
        print(answer.content)
    print(repr(chat.with_structured_output(Answer).invoke("What is the capital of France?")))


if __name__ == "__main__":
    main()
