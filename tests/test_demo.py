"""The demo's verdicts: what is wrong is called wrong, and CLO is measured by what full attention said."""

import math
from dataclasses import replace

import pytest

from clo.runtime.client import Client, Result
from clo.runtime.wire.messages import NO_STATS, Logprob, Usage
from examples import demo
from examples.document import pytorch_readme
from examples.questions import ASKED, QUESTIONS, Question, answered_by, named

TEAM = Question(
    "Who is PyTorch currently maintained by?",
    "PyTorch is currently maintained by Soumith Chintala, Gregory Chanan, Dmytro Dzhulgakov, Edward Yang, "
    "Alban Desmaison, Piotr Bialecki and Nikita Shulga",
    "Soumith Chintala, Gregory Chanan, Dmytro Dzhulgakov, Edward Yang",
)
CUDA = Question(
    "Which CUDA version does the Dockerfile support?",
    "The Dockerfile is supplied to build images with CUDA 12.1\nsupport and cuDNN v9.",
    "CUDA 12.1",
)
RELEASES = Question(
    "How many minor releases are there?", "Typically, PyTorch has three minor releases a year.", "three"
)
FIRST = "The team is maintained by Soumith Chintala, Gregory Chanan, Dmytro Dzhulgakov, Edward Yang"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (TEAM, TEAM.passage),
        (TEAM, FIRST),
        (TEAM, f" {FIRST}, Alban Desmaison and Piotr Bialecki.\n"),
        (CUDA, "The Dockerfile supports CUDA 12.1."),
        (CUDA, 'It is for "CUDA 12.1" and cuDNN v9 (from the passage).'),
        (CUDA, "CUDA 12.1 support and cuDNN v9"),  # over the line's end
        (RELEASES, "Three minor releases a year."),
    ],
)
def test_an_answer_that_the_passage_bears_out_is_right(question: Question, answer: str) -> None:
    assert question.accepts(answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (TEAM, ""),
        (TEAM, "Soumith Chintala."),  # too little
        (TEAM, f"{FIRST}, Alan Desmaison, Philippe Lévy, Philippe"),  # names that nobody has
        (TEAM, f"{FIRST}, Trevor Killeen"),  # a name of another passage
        (TEAM, f"{FIRST}, Gregory Chintala"),  # parts of two names
        (TEAM, f"{FIRST}, Alban Desmaison, Piotr Biale"),  # cut off
        (TEAM, f"Alan Turing. {FIRST}"),
        (CUDA, "The Dockerfile supports CUDA 12.12."),
        (CUDA, "The Dockerfile supports CUDA 12.1.3."),
        (CUDA, "The Dockerfile supports CUDA 12.1 and CUDA 9."),
        (CUDA, "The Dockerfile supports CUDA 12.1 and 11.8."),
        (CUDA, "The Dockerfile does not support CUDA 12.1."),
        (CUDA, "The Dockerfile supports CUDA 12.1, see pytorch.org/docker."),
        (RELEASES, "Three or four minor releases a year."),
    ],
)
def test_an_answer_that_says_anything_else_is_wrong(question: Question, answer: str) -> None:
    assert not question.accepts(answer)


def test_names_are_runs_of_words() -> None:
    answer = "The team: Edward Yang, Piotr Bialecki and (of no fame) Lévy. They use CUDA 12.1, see x.org."
    assert list(named(answer)) == ["Edward Yang", "Piotr Bialecki", "no", "Lévy", "CUDA 12.1", "x.org"]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.text)
def test_a_passage_answers_its_question_and_no_other(question: Question) -> None:
    assert [other for other in QUESTIONS if other.accepts(question.passage)] == [question]
    assert question.fact in question.passage  # letter by letter: the picture marks it


def test_enough_questions_are_left_for_any_known_version_of_pytorch() -> None:
    readme = pytorch_readme()
    assert len(answered_by(readme)) == ASKED
    other = "The `Dockerfile` is supplied to build images with CUDA 11.1 support and cuDNN v8."  # of 2.11
    assert answered_by(readme.replace(QUESTIONS[0].passage, other)) == [*QUESTIONS[1:]]


def result(tokens: list[int], logprobs: list[float], text: str = "", reason: str = "stop") -> Result:
    entries = [Logprob(token, logprob, []) for token, logprob in zip(tokens, logprobs, strict=True)]
    return Result(text, tokens, entries, reason, Usage(1, len(tokens)), NO_STATS)


def test_an_answer_that_was_cut_off_is_not_right() -> None:
    answer = result([1], [0.0], "The Dockerfile supports CUDA 12.1", reason="stop")
    assert demo.is_right(CUDA, answer)
    assert not demo.is_right(CUDA, replace(answer, finish_reason="length"))


class Scoring(Client):
    """A client that scores without a server and remembers what it was given."""

    def __init__(self, scored: Result) -> None:
        self.scored, self.given = scored, list[object]()

    def score(self, prompt: object, continuation: object, **_: object) -> Result:
        self.given += [prompt, continuation]
        return self.scored


def test_perplexity_counts_the_token_at_which_the_answers_part() -> None:
    full = result([5, 6, 7], [-0.1, -0.2, -0.3])
    clo = result([5, 8, 9], [-0.1, -0.2, -0.2])
    client = Scoring(result([5, 6, 7], [-0.1, -2.0, -0.3]))
    forced = demo.force(client, 1, "prompt", full, clo)
    assert client.given == ["prompt", full.tokens]
    assert demo.perplexity(full) == pytest.approx(math.exp(0.2))
    assert demo.perplexity(forced) == pytest.approx(math.exp(0.8))


def test_the_same_answer_is_not_computed_again() -> None:
    full, clo = result([5, 6], [-0.1, -0.2]), result([5, 6], [-0.2, -0.4])
    client = Scoring(full)
    assert demo.force(client, 1, "prompt", full, clo) is clo
    assert not client.given
