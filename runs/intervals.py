"""Intervals of 95 %: of a mean, of a line, of what a line predicts, of a paired difference.

Student's t and Fisher's F come from the incomplete beta function, so that no package is needed.
"""
import functools
import math
from dataclasses import dataclass

import numpy as np

TINY = 1e-300


# ---- distributions -------------------------------------------------------------------------------

def incomplete_beta(a, b, x):
    """The regularized incomplete beta function I_x(a, b), by its continued fraction.

    DLMF 8.17.22, evaluated by Lentz's method (Press et al., Numerical Recipes, section 6.4).
    """
    if not 0 < x < 1:
        return float(x >= 1)
    # The fraction converges fast below this point; above it, its mirror image does.
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    c = 1.0
    d = 1 / (1 - (a + b) * x / (a + 1) or TINY)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d or TINY)
            c = 1 + term / c or TINY
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def t_cdf(t, freedom):
    """The probability that Student's t of so many degrees of freedom is at most t."""
    tail = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return 1 - tail if t > 0 else tail


@functools.cache
def t_quantile(p, freedom):
    """The t that Student's t stays below with probability p, by bisection."""
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    low = 0.0
    high = 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(64):
        middle = (low + high) / 2
        if t_cdf(middle, freedom) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def f_tail(f, above, below):
    """The probability that Fisher's F of (above, below) degrees of freedom is at least f."""
    return incomplete_beta(below / 2, above / 2, below / (below + above * f))


# ---- a line and its predictions ------------------------------------------------------------------

@dataclass(frozen=True)
class Line:
    """Least squares of y = a + b x through n points."""
    n: int
    a: float
    b: float
    error: float                     # standard error of b
    half: float                      # half of the 95 % interval of b
    r2: float                        # share of the variance that the line explains
    s: float                         # standard deviation of the points around the line
    x_mean: float
    x_squares: float                 # sum of (x - mean) squared

    def predict(self, x, m):
        """(prediction of the mean of m new points at x, half of its 95 % prediction interval)."""
        variance = 1 / m + 1 / self.n + (x - self.x_mean) ** 2 / self.x_squares
        return self.a + self.b * x, t_quantile(0.975, self.n - 2) * self.s * variance ** 0.5


def fit_line(x, y):
    """The Line through at least three points."""
    x0 = x - x.mean()
    y0 = y - y.mean()
    x_squares = float((x0 ** 2).sum())
    b = float((x0 * y0).sum()) / x_squares
    a = float(y.mean() - b * x.mean())
    unexplained = float(((y0 - b * x0) ** 2).sum())
    variance = float((y0 ** 2).sum())
    freedom = len(x) - 2
    s = (unexplained / freedom) ** 0.5
    error = s / x_squares ** 0.5
    r2 = 1 - unexplained / variance if variance > 1e-9 else 0.0
    half = t_quantile(0.975, freedom) * error
    return Line(len(x), a, b, error, half, r2, s, float(x.mean()), x_squares)


def pure_error(groups, y):
    """(sum of squares of y around the means of its groups, degrees of freedom)."""
    squares = 0.0
    for group in np.unique(groups):
        own = y[groups == group]
        squares += float(((own - own.mean()) ** 2).sum())
    return squares, len(y) - len(np.unique(groups))


def lack_of_fit(x, y, groups):
    """Whether points bend away from their line by more than runs of one group differ.

    Returns (F, p), (None, None) where no group has two runs. The p of a straight line is below 0.05
    one time in twenty. Draper and Smith, Applied Regression Analysis, section 2.1.
    """
    pure, freedom = pure_error(groups, y)
    line = fit_line(x, y)
    others = len(np.unique(groups)) - 2
    if freedom < 1 or others < 1 or pure < 1e-12:
        return None, None
    lack = max(0.0, line.s ** 2 * (len(y) - 2) - pure)
    f = lack / others / (pure / freedom)
    return f, f_tail(f, others, freedom)


def predict_largest(amounts, y, groups, n_left_out=1):
    """Predict the largest group's mean from the smaller ones, by three rivals.

    amounts, y (n,): data and score of each run; groups (n,): its budget. n_left_out: so many of the
    largest budgets are not looked at. Returns (measured mean, {rival: (prediction, half of its
    95 % interval or None)}). log: a line over log10 of the amount; linear: a line over the amount;
    none: the mean of the largest budget that is looked at.
    """
    budgets = np.unique(groups)
    seen = groups < budgets[-n_left_out]
    largest = groups == budgets[-1]
    m = int(largest.sum())
    predictions = {}
    for rival, of in (("log", np.log10), ("linear", np.asarray)):
        x = of(amounts.astype(float))
        predictions[rival] = fit_line(x[seen], y[seen]).predict(float(x[largest].mean()), m)

    last = groups == budgets[-n_left_out - 1]
    squares, freedom = pure_error(groups[seen], y[seen])
    half = None
    if freedom:
        error = (squares / freedom * (1 / m + 1 / int(last.sum()))) ** 0.5
        half = t_quantile(0.975, freedom) * error
    predictions["none"] = (float(y[last].mean()), half)
    return float(y[largest].mean()), predictions


# ---- differences ---------------------------------------------------------------------------------

def mean_interval(x):
    """(mean, half of its 95 % t interval) of at least two independent numbers."""
    x = np.asarray(x, float)
    error = float(x.std(ddof=1)) / len(x) ** 0.5
    return float(x.mean()), t_quantile(0.975, len(x) - 1) * error


def paired_difference(single):
    """What paired differences, one for each seed, say of their mean, as a row of numbers.

    error: its standard error; by_seed: its 95 % t interval; both None for one seed.
    """
    row = {"difference": round(float(np.mean(single)), 2), "single": np.round(single, 2).tolist(),
           "error": None, "by_seed": None}
    if len(single) > 1:
        mean, half = mean_interval(single)
        row["error"] = round(float(np.std(single, ddof=1)) / len(single) ** 0.5, 2)
        row["by_seed"] = [round(mean - half, 2), round(mean + half, 2)]
    return row


def bootstrap_interval(differences, n=4000, seed=0):
    """(low, high) of 95 % of the mean over benchmarks, if other questions had been asked.

    differences: for each benchmark the difference of two models on each question, (questions,),
    already averaged over seeds. The questions of each benchmark are drawn again n times.
    """
    rng = np.random.default_rng(seed)
    means = []
    for per_question in differences:
        drawn = rng.integers(0, len(per_question), (n, len(per_question)))
        means.append(np.asarray(per_question, float)[drawn].mean(1))
    low, high = np.percentile(np.mean(means, 0), [2.5, 97.5])
    return float(low), float(high)
