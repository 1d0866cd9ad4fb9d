"""The keywords of a Runner, for skins that make one."""

import inspect

from sqla_river.orders import RunnerWords
from sqla_river.runner import Runner


def test_runner_words_are_the_keywords_of_a_runner() -> None:
    keywords = [each.name for each in inspect.signature(Runner).parameters.values() if each.kind is each.KEYWORD_ONLY]

    assert list(RunnerWords.__annotations__) == keywords
