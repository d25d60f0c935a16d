"""runs/intervals.py: intervals are what the textbooks say, and hold what they promise."""
import numpy as np
import pytest

from runs import intervals

# Abramowitz and Stegun, table 26.10, and the closed forms of 1 and 2 degrees of freedom.
T_975 = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 5: 2.5705818, 8: 2.3060041,
         10: 2.2281389, 13: 2.1603687, 20: 2.0859634, 30: 2.0422725, 120: 1.9799304,
         10**6: 1.9599664}


def test_quantiles_of_t_are_those_of_the_tables():
    for freedom, wanted in T_975.items():
        assert intervals.t_quantile(0.975, freedom) == pytest.approx(wanted, abs=2e-6)
    assert intervals.t_quantile(0.95, 4) == pytest.approx(2.1318468, abs=1e-6)
    assert intervals.t_quantile(0.025, 4) == pytest.approx(-2.7764451, abs=1e-6)
    for p in (0.6, 0.9, 0.999):
        # One degree of freedom is the Cauchy distribution.
        assert intervals.t_quantile(p, 1) == pytest.approx(np.tan(np.pi * (p - 0.5)), rel=1e-9)


def test_tails_of_f_are_those_of_the_tables():
    # The 5 % points of F.
    for above, below, f in ((1, 1, 161.4476), (2, 10, 4.102821), (3, 5, 5.409451),
                            (5, 20, 2.710890), (10, 10, 2.978237)):
        assert intervals.f_tail(f, above, below) == pytest.approx(0.05, abs=1e-6)
    # F of (1, n) is t squared.
    t = intervals.t_quantile(0.975, 7)
    assert intervals.f_tail(t * t, 1, 7) == pytest.approx(0.05, abs=1e-9)


def test_distributions_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0.01, 0.999)
        freedom = rng.integers(1, 200)
        f = rng.uniform(0.01, 20)
        below = rng.integers(1, 50)
        assert intervals.t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-7)
        assert intervals.f_tail(f, freedom, below) == pytest.approx(
            stats.f.sf(f, freedom, below), rel=1e-7)


BUDGETS = np.repeat([10, 20, 40, 80, 160], 3)


def drawn(rng, truth, n_worlds):
    """Scores of 15 runs in each of many worlds, (worlds, 15)."""
    return truth + rng.normal(0, 2, (n_worlds, len(BUDGETS)))


def test_an_interval_of_95_percent_holds_the_true_slope_95_times_in_100():
    x = np.log10(BUDGETS)
    held = 0
    predicted = 0
    for y in drawn(np.random.default_rng(1), 30 + 12 * x, 1000):
        line = intervals.fit_line(x, y)
        held += abs(line.b - 12) <= line.half
        measured, rivals = intervals.predict_largest(BUDGETS, y, BUDGETS)
        middle, half = rivals["log"]
        predicted += abs(measured - middle) <= half
    assert 930 <= held <= 968, held
    assert 930 <= predicted <= 968, predicted


def test_a_line_is_that_of_numpy():
    rng = np.random.default_rng(2)
    x = np.log10(BUDGETS)
    (y,) = drawn(rng, 30 + 12 * x, 1)
    line = intervals.fit_line(x, y)
    (b, a), covariance = np.polyfit(x, y, 1, cov=True)
    assert (line.a, line.b) == pytest.approx((a, b))
    assert line.error == pytest.approx(covariance[0, 0] ** 0.5)
    assert line.half == pytest.approx(line.error * T_975[13])


def test_a_straight_line_does_not_lack_fit_and_a_bent_one_does():
    x = np.log10(BUDGETS)
    rng = np.random.default_rng(3)
    straight = [intervals.lack_of_fit(x, y, BUDGETS)[1] for y in drawn(rng, 30 + 12 * x, 1000)]
    # One straight line in twenty is called bent.
    assert 0.03 < np.mean(np.array(straight) < 0.05) < 0.07
    bent = 30 + 12 * x - 14 * (x - 1.6) ** 2
    found = [intervals.lack_of_fit(x, y, BUDGETS)[1] for y in drawn(rng, bent, 200)]
    assert np.mean(np.array(found) < 0.05) > 0.8
    assert intervals.lack_of_fit(np.arange(5.0), np.arange(5.0) ** 2, np.arange(5)) == (None, None)


@pytest.mark.parametrize("truth, of", [
    ("log", lambda n: 20 + 25 * np.log10(n)),
    ("linear", lambda n: 20 + 0.3 * n),
    ("none", lambda n: np.full(len(n), 60.0)),
])
def test_the_rival_that_is_true_predicts_the_largest_budget(truth, of):
    right = dict.fromkeys(("log", "linear", "none"), 0)
    worlds = drawn(np.random.default_rng(4), of(BUDGETS), 200)
    for y in worlds:
        measured, rivals = intervals.predict_largest(BUDGETS, y, BUDGETS, n_left_out=2)
        for rival, (middle, half) in rivals.items():
            right[rival] += abs(measured - middle) <= half
    assert right[truth] > 180, right
    if truth != "none":
        # The others are refuted, most of the time.
        assert all(n < 100 for rival, n in right.items() if rival != truth), right


def test_the_largest_budget_is_not_looked_at():
    y = 20 + 25 * np.log10(BUDGETS)
    other = np.where(BUDGETS == 160, 0.0, y)
    _, one = intervals.predict_largest(BUDGETS, y, BUDGETS)
    measured, two = intervals.predict_largest(BUDGETS, other, BUDGETS)
    assert one == two and measured == 0
    far = np.where(BUDGETS >= 80, 0.0, y)
    assert intervals.predict_largest(BUDGETS, far, BUDGETS, 2)[1] == intervals.predict_largest(
        BUDGETS, y, BUDGETS, 2)[1]
    single = np.array([10, 20, 40, 80])
    _, rivals = intervals.predict_largest(single, np.arange(4.0), single)
    assert rivals["none"] == (2.0, None)


def test_the_interval_of_a_mean_is_the_textbooks():
    # Student's sleep data, 1908: the paired difference is 1.58 [0.70, 2.46].
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    other = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    mean, half = intervals.mean_interval(np.subtract(other, one))
    assert mean == pytest.approx(1.58)
    assert (mean - half, mean + half) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


def test_a_bootstrap_over_questions_holds_the_true_difference():
    rng = np.random.default_rng(5)
    held = 0
    for world in range(200):
        easy = rng.choice([-1, 0, 1], 200, p=[0.1, 0.6, 0.3])
        hard = rng.choice([-1, 0, 1], 100, p=[0.2, 0.7, 0.1])
        low, high = intervals.bootstrap_interval([easy, hard], n=400, seed=world)
        held += low <= (0.2 - 0.1) / 2 <= high
    assert 180 <= held <= 199, held
    assert intervals.bootstrap_interval([np.ones(9)]) == (1.0, 1.0)
