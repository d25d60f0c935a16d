"""curation/plan.py: what a collection costs, as a table."""
from curation_helpers import run


def table(*flags):
    """{stage: numbers of its line} that plan prints, below two lines of headings."""
    code, text = run("plan", *flags)
    assert code == 0, text
    lines = [line.split() for line in text.splitlines()[2:5]]
    return {line[0]: [*map(float, line[1:])] for line in lines}


def test_twice_the_ranks_halve_hours_and_memory_of_rows_and_leave_disk_and_traffic():
    few = table("--n=300e6", "--ranks=64", "--picture_kb=100")
    many = table("--n=300e6", "--ranks=128", "--picture_kb=100")
    for stage in ("collect", "select"):
        assert abs(few[stage][0] - 2 * many[stage][0]) <= 0.02
        assert abs(few[stage][1] - 2 * many[stage][1]) <= 0.02
        assert few[stage][2:5] == many[stage][2:5]
    # 300 million of 101 KB
    assert 30 <= many["collect"][2] <= 31
