"""toy_endpoint.py: facts of toy captions are counted as they are written."""
import collections

from toy_endpoint import facts, precision_recall


def test_facts_of_toy_captions_are_counted_as_they_are_written():
    star = ["star", "red star", "small red star", "small red star top left"]
    cross = ["cross", "blue cross", "large blue cross"]
    found = facts("2 shapes: small red star top left, large blue cross.")
    assert found == collections.Counter([*star, *cross, "number 2"])
    found = facts("A list: A12, B3.")
    assert found == collections.Counter(["a list", "reads A12", "reads B3"])
    found = facts("A bar chart: red 3, blue 4.")
    assert found == collections.Counter(["a bar chart", "value red 3", "value blue 4"])
    truth = "1 shape: small red star left."
    assert precision_recall([("a red square", truth)]) == (0, 0)
    assert precision_recall([("a picture with a star", truth)]) == (100, 20)
