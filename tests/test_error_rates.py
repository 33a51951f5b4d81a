"""Every error rate that a gate is trusted with, and beside it what the same method finds: a bound alone would pass a method that never speaks.

A claim has rates with the least and the most that is accepted of each after as many repetitions as the full run makes: the nominal rate and three standard
errors, unless said otherwise. `make test` repeats less often and accepts as much more as that blurs; `make test-stats` makes the full run. Both print a table. The seed is
fixed; `RETRAIN_NB_SEED=7 make test-stats` takes another, of which one in a dozen shows something beyond three standard errors by chance."""
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import ndtri

from bench.gates import BETTER, CHALLENGERS, EQUAL, RULES, WORSE, models, simulate, superior
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, Estimate, Verdict
from retrain_nb.stages.backtest import slow_interval
from retrain_nb.stages.evaluate import cox, delong, squared_error
from retrain_nb.stages.gates import NEEDED, GatePolicy, refresh
from retrain_nb.stages.offline_policy import doubly_robust, ips, offline_policy, snips
from retrain_nb.stages.paired import (
    block_mean,
    diebold_mariano,
    family,
    hac_mean,
    paired_bca,
    paired_bootstrap,
    paired_mean,
    rmse_change,
    rows_needed,
)
from retrain_nb.stages.slices import fairness, judge_slices, newcombe
from retrain_nb.tasks import brier_losses, log_losses

SEED = int(os.environ.get("RETRAIN_NB_SEED", "1"))
sigmoid = lambda x: 1/(1 + np.exp(-x))


@dataclass(frozen=True)
class Claim:
    "A simulation, and what is accepted of the rates it gives"
    run:Callable[[int, int], dict[str, float]] # Seed and repetitions to the share of these in which something held
    accept:dict[str, tuple[float, float]]      # The least and the most of each, after `full` repetitions
    fast:int = 300
    full:int = 1000


def each(once): # One repetition -> a whole run
    def run(seed, reps):
        found = [once(np.random.default_rng([seed, i])) for i in range(reps)]
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    return run


def band(rate, reps=1000): return rate - 3*math.sqrt(rate*(1 - rate)/reps), rate + 3*math.sqrt(rate*(1 - rate)/reps)
def most(rate, reps=1000): return 0.0, band(rate, reps)[1]
def least(rate): return rate, 1.0
def covers(e, truth=0.0): return e is not None and e.low <= truth <= e.high


# --- Two models on the same rows ---

def world(rng, n, odds, noise=(0.5, 0.5)): # -> labels, at least two of each, and the scores of two models that see the log odds through noise
    truth = rng.normal(odds, 1, n)
    y = (rng.random(n) < sigmoid(truth)).astype(float)
    return (y, *(sigmoid(truth + rng.normal(0, sd, n)) for sd in noise)) if 2 <= y.sum() <= n - 2 else world(rng, n, odds, noise)


def paired(n, odds):
    def once(rng):
        y, a, b = world(rng, n, odds)
        test, losses, briers = delong(y, a, b), paired_mean(log_losses(y, a) - log_losses(y, b), 0.95), paired_mean(brier_losses(y, a) - brier_losses(y, b), 0.95)
        y, a, b = world(rng, n, odds, (1.6, 0.2))
        return {"DeLong covers": covers_pair(test), "DeLong rejects": test["p"] < 0.05, "log loss covers": covers(losses), "Brier covers": covers(briers),
                "log loss shows a worse model": paired_mean(log_losses(y, a) - log_losses(y, b), 0.9).low > 0}
    return each(once)


def covers_pair(test): return test["lo"] <= 0 <= test["hi"]
COVERED = dict.fromkeys(("DeLong covers", "log loss covers", "Brier covers"), band(0.95)) | {"DeLong rejects": band(0.05)}


def as_promised(rng): # A gain is found with the rows that `rows_needed` names for it
    need = rows_needed(SPREAD, GAIN)
    (y, better), (y2, equal) = models(rng, need, [EQUAL, BETTER]), models(rng, need, [EQUAL, EQUAL])
    return {"a gain is found": superior(y, better[1], better[0], 0.05), "an equal model is found better": superior(y2, equal[1], equal[0], 0.05)}


Y, S = models(np.random.default_rng(0), 400_000, [EQUAL, BETTER])
D = log_losses(Y, S[1]) - log_losses(Y, S[0])
SPREAD, GAIN = float(D.std()), float(-D.mean())


def roots(rng):
    y = rng.normal(0, 5, 300)
    e = rmse_change(y, y + rng.normal(0, 2, 300), y + rng.normal(0, 2.2, 300), 0.95)
    far = rmse_change(y, y + rng.normal(0, 2, 300), y + rng.normal(0, 2.5, 300), 0.95)
    return {"covers": covers(e, -0.2), "a better model is shown": far.high < 0}


def long_tails(rng): # Costs
    d = rng.exponential(1, 60)**1.5 - math.gamma(2.5)
    t, b = paired_mean(d, 0.95), paired_bca(d, 0.95, 500, int(rng.integers(1e6)))
    return {"BCa covers": covers(b), "t covers": covers(t), "BCa finds a cost of 1.5": paired_bca(d + 1.5, 0.95, 500).low > 0}


# --- Rows that belong together ---

def clustered(rng):
    at, shift = np.arange(600)//20, rng.normal(0, 0.5, 30)
    d = shift[at] + rng.normal(0, 1, 600)
    return {"clusters cover": covers(paired_mean(d, 0.95, at)), "rows cover": covers(paired_mean(d, 0.95)), "a harm of 0.4 is shown": paired_mean(d + 0.4, 0.95, at).low > 0}


def resampled_by(clusters):
    def once(rng):
        at = np.arange(300)*clusters//300
        shared, truth = rng.normal(0, 0.6, clusters)[at], rng.normal(-0.5, 1, 300)
        y = (rng.random(300) < sigmoid(truth + shared)).astype(float)
        a, b = (sigmoid(truth + rng.normal(0, 0.4, 300) + rng.normal(0, 0.3, clusters)[at]) for _ in range(2))
        codes, seed = None if clusters == 300 else at, int(rng.integers(1e6))
        found, worse = paired_bootstrap(y, a, b, 0.95, 400, seed, codes), paired_bootstrap(y, rng.permutation(a), b, 0.95, 400, seed, codes)
        return {"AUC covers": covers(found.get("auc")), "log loss covers": covers(found.get("log_loss")), "a useless model is shown": worse["auc"].low > 0 and worse["log_loss"].low > 0}
    return each(once)


# --- Rows that follow one another ---

def series(rng, rho, n=250):
    z = np.zeros(n)
    z[0] = rng.normal()/math.sqrt(1 - rho*rho)
    for i, e in enumerate(rng.normal(size=n - 1), 1): z[i] = rho*z[i - 1] + e
    return z


def slow(z): return slow_interval(float(z.mean()), (z - z.mean())/len(z), len(z), 0.95)


def autocorrelated(rho):
    def once(rng):
        z = series(rng, rho)
        far = z + 5/(1 - rho)/len(z)**0.5 # Five true standard errors
        seed = int(rng.integers(1e6))
        return {"t covers": covers(paired_mean(z, 0.95)), "Newey-West covers": covers(hac_mean(z, 12, 0.95)), "blocks cover": covers(block_mean(z, 0.95, draws=300, seed=seed)),
                "cosines cover": covers(slow(z)), "five errors are shown": hac_mean(far, 12, 0.95).low > 0 and block_mean(far, 0.95, draws=300, seed=seed).low > 0 and slow(far).low > 0}
    return each(once)


DEPENDENT = {"Newey-West covers": (0.87, 0.97), "blocks cover": (0.87, 0.97), "cosines cover": (0.87, 0.975), "five errors are shown": least(0.95)} # Approximate, and said so


def forecasts(rng):
    d = np.convolve(rng.normal(size=202), np.ones(3), "valid")
    return {"equal forecasts differ": diebold_mariano(d, 3)[1] < 0.05, "worse ones are told": diebold_mariano(d + 0.9, 3)[1] < 0.05}


# --- Rails, slices, groups ---

RAILS = {f"metric {i}": 0.02 for i in range(5)}
CHECKS = [Verdict(name=name, outcome=PASS, reason="fine") for name in NEEDED]


@dataclass(frozen=True)
class Compared:
    difference:dict
    rival_name:str = "champion"
    task:str = "binary"
    rival:None = None


def told(center, rng, se=0.01): # -> the estimate of a difference whose mean is `center`
    value, half = center + se*rng.normal(), 1.6448536269514722*se
    return Estimate(value=value, low=value - half, high=value + half, n=5000, clusters=30, level=0.9, method="normal", detectable=2.5*se)


def passed(rng, margins): # -> whether the gate ships a candidate that is better by these standard errors than its margins
    return refresh(Compared({m: told(0.02 - 0.01*k, rng) for m, k in zip(RAILS, margins)}), CHECKS, GatePolicy(margins=dict(RAILS))).outcome == PASS


def rails(rng):
    return {"one of five at its margin ships": passed(rng, (0, 9, 9, 9, 9)), "all five at theirs ship": passed(rng, (0,)*5),
            "all 2.5 errors better ship": passed(rng, (2.5,)*5), "all 3.5 errors better ship": passed(rng, (3.5,)*5)}


def slices(how):
    marks, days = np.repeat(np.eye(20, dtype=bool), 1000, axis=1), np.arange(20_000) % 40
    names = [str(i) for i in range(20)]
    def once(rng):
        y, a, b = world(rng, 20_000, -0.5)
        d, seed = log_losses(y, a) - log_losses(y, b), int(rng.integers(1e6))
        found = family(d, marks, 0.05, days, how, seed)
        harmed = family(d + 4.5*found.estimates[0].detectable/(ndtri(0.998) + 0.84)*marks[0], marks, 0.05, days, how, seed)
        return {"any equal slice blocks": judge_slices(names, found, 0.0).outcome == FAIL, "any point value is worse": any(e.value > 0 for e in found.estimates),
                "any slice by itself blocks": any(paired_mean(d[m], 0.9, days[m]).low > 0 for m in marks), "a harmed slice blocks": harmed.adjusted[0] <= 0.05}
    return each(once)


BLOCKED = {"any equal slice blocks": most(0.05, 500), "any point value is worse": least(0.99), "any slice by itself blocks": least(0.5), "a harmed slice blocks": least(0.85)}


def overlapping(rng): # Slices that share rows, whose differences move together
    d, days, seed = rng.standard_t(4, 2000) + rng.normal(0, 0.1, 40)[np.arange(2000) % 40], np.arange(2000) % 40, int(rng.integers(1e6))
    marks = rng.random((20, 2000)) < 0.3
    found = {how: family(d, marks, 0.05, days, how, seed) for how in ("max-T", "Holm")}
    harm = 0.4*marks[0]
    return {"max-T blocks": min(found["max-T"].adjusted) <= 0.05, "Holm blocks": min(found["Holm"].adjusted) <= 0.05,
            "max-T finds a harm of 0.4": min(family(d + harm, marks, 0.05, days, "max-T", seed).adjusted) <= 0.05}


def two_rates(n, p, n2, p2):
    def once(rng):
        x, x2, down = int(rng.binomial(n, p)), int(rng.binomial(n2, p2)), int(rng.binomial(n, p - 0.3))
        low, high = newcombe(x, n, x2, n2)
        half = 1.959964*(x/n*(1 - x/n)/n + x2/n2*(1 - x2/n2)/n2)**0.5
        return {"Newcombe covers": low <= p - p2 <= high, "Wald covers": abs(x/n - x2/n2 - p + p2) <= half, "a gap of 30 % is shown": newcombe(down, n, x2, n2)[1] < 0}
    return each(once)


GROUP, HALF = np.repeat(list("abcde"), [2000, 500, 300, 200, 100]), np.tile([0.0, 1.0], 1550)


def gaps(rng):
    told = lambda p: fairness(HALF, (rng.random(3100) < p).astype(float), GROUP, 0.05, set()).outcome
    return {"gaps as large as allowed are blamed": told(np.where(GROUP == "a", 0.4, 0.45)) == FAIL, "a gap of 20 % is blamed": told(np.where(GROUP == "b", 0.6, 0.4)) == FAIL}


# --- One holdout, many challengers ---

OURS = ("ours, spending", "ours, LOND")


def year(reps, n, noises, seed, rules=tuple(RULES)): return {f"{rule}: any ships": float(np.mean([bool(r) for r in runs])) for rule, runs in simulate(reps, n, noises, seed, rules).items()}
def equals(seed, reps): return year(reps, 2000, [EQUAL]*CHALLENGERS, seed)
def worse(seed, reps): return year(reps, 2000, [WORSE]*CHALLENGERS, seed, (*OURS, "point value"))
def gains(seed, reps): return {f"{rule}: ships the gain": float(np.mean([10 in r for r in runs])) for rule, runs in simulate(reps, 20_000, [WORSE]*10 + [BETTER], seed, OURS).items()}


# --- Calibration ---

def calibrated(rng):
    p, days = rng.beta(2, 5, 2000), np.arange(2000) % 40
    y, bent = (rng.random(2000) < p).astype(float), (rng.random(2000) < sigmoid(0.5*np.log(p/(1 - p)) - 0.4)).astype(float)
    line, off, error, far = cox(y, p, days, 0.9), cox(bent, p, days, 0.9), squared_error(y, p, days, 0.9), squared_error(bent, p, days, 0.9)
    return {"slope covers 1": covers(line["slope"], 1), "intercept covers 0": covers(line["intercept"]), "a slope of 0.5 is shown": off["slope"].high < 1, "a calibrated model is above 0": error.low > 0, "a bent one is": far.low > 0}


# --- Another policy, from logs ---

def logs(lowest):
    def once(rng):
        x = rng.normal(size=1000)
        p = np.clip(sigmoid(2*x), lowest, 1 - lowest)
        a = (rng.random(1000) < p).astype(float)
        q = lambda a: sigmoid(x/2 - 0.3 + 0.8*a)
        guess = lambda a: 0.8*q(a) + 0.05
        r, w, predicted, expected = (rng.random(1000) < q(a)).astype(float), 0.5/np.where(a == 1, p, 1 - p), guess(a), (guess(0) + guess(1))/2
        return {"IPS covers": covers(ips(r, w, 0.95), WORTH), "SNIPS covers": covers(snips(r, w, 0.95), WORTH), "doubly robust covers": covers(doubly_robust(r, w, predicted, expected, 0.95), WORTH),
                "nothing earned is shown to be less": snips(r*0, w, 0.95).high < WORTH < snips(r*0 + 1, w, 0.95).low}
    return each(once)


X = np.random.default_rng(9).normal(size=1_000_000)
WORTH = float(np.mean([sigmoid(X/2 - 0.3 + 0.8*a).mean() for a in (0, 1)]))


def tried_rarely(rng): # One action in three hundred, whatever the context
    a = (rng.random(1000) >= 0.003).astype(int)
    r, p = (rng.random(1000) < np.array([0.2, 0.5])[a]).astype(float), np.where(a == 1, 0.997, 0.003)
    return {"IPS would cover": covers(ips(r, 0.5/p, 0.95), 0.35), "the log is refused": offline_policy(r, p, np.full(1000, 0.5)).verdict.outcome == INSUFFICIENT}


def other_policy(rng):
    a = rng.integers(0, 2, 1000)
    gain = lambda r, likes: offline_policy(r, np.full(1000, 0.5), np.where(a == 1, likes, 1 - likes)).values["gain"].low > 0
    return {"an equal policy gains": gain((rng.random(1000) < 0.3).astype(float), 0.8), "one better by 0.045 does": gain((rng.random(1000) < np.where(a == 1, 0.4, 0.3)).astype(float), 0.95)}


CLAIMS = {
    "paired, n = 300, half positive": Claim(paired(300, 0.0), COVERED | {"log loss shows a worse model": least(0.99)}),
    "paired, n = 1,500, 6 % positive": Claim(paired(1500, -3.2), COVERED | {"log loss shows a worse model": least(0.95)}),
    "paired, n = 300, 18 positive": Claim(paired(300, -3.2), COVERED | {"log loss shows a worse model": least(0.5)}, fast=300),
    "as many rows as are needed": Claim(each(as_promised), {"a gain is found": band(0.8), "an equal model is found better": band(0.05)}),
    "roots of means": Claim(each(roots), {"covers": band(0.95), "a better model is shown": least(0.85)}),
    "costs with long tails, n = 60": Claim(each(long_tails), {"BCa covers": (0.90, 0.971), "t covers": (0.85, 0.93), "BCa finds a cost of 1.5": least(0.8)}, full=400, fast=40),
    "thirty clusters of twenty rows": Claim(each(clustered), {"clusters cover": band(0.95), "rows cover": (0.0, 0.75), "a harm of 0.4 is shown": least(0.9)}),
    "paired bootstrap by row": Claim(resampled_by(300), {"AUC covers": band(0.95), "log loss covers": band(0.95), "a useless model is shown": least(0.99)}, fast=25, full=1000),
    "paired bootstrap by 30 clusters": Claim(resampled_by(30), {"AUC covers": band(0.95), "log loss covers": band(0.95), "a useless model is shown": least(0.95)}, fast=25, full=1000),
    "series, rho 0": Claim(autocorrelated(0.0), DEPENDENT | {"t covers": band(0.95, 600)}, fast=150, full=600),
    "series, rho 0.3": Claim(autocorrelated(0.3), DEPENDENT | {"t covers": (0.75, 0.90)}, fast=150, full=600),
    "series, rho 0.6": Claim(autocorrelated(0.6), DEPENDENT | {"t covers": (0.55, 0.72)}, fast=150, full=600),
    "Diebold-Mariano, three steps ahead": Claim(each(forecasts), {"equal forecasts differ": most(0.07), "worse ones are told": least(0.8)}),
    "five rails": Claim(each(rails), {"one of five at its margin ships": band(0.05, 20_000), "all five at theirs ship": (0.0, 0.001), "all 2.5 errors better ship": band(0.337, 20_000),
                                      "all 3.5 errors better ship": band(0.853, 20_000)}, fast=500, full=20_000),
    "20 slices of 1,000, Holm": Claim(slices("Holm"), BLOCKED, fast=30, full=500),
    "20 slices of 1,000, max-T": Claim(slices("max-T"), BLOCKED, fast=30, full=500),
    "20 slices that overlap": Claim(each(overlapping), {"max-T blocks": most(0.05), "Holm blocks": most(0.05), "max-T finds a harm of 0.4": least(0.8)}, fast=30),
    "rates, 40 at 0.9 and 400 at 0.9": Claim(two_rates(40, 0.9, 400, 0.9), {"Newcombe covers": (0.93, 0.98), "Wald covers": (0.85, 0.94), "a gap of 30 % is shown": least(0.9)}),
    "rates, 25 at 0.95 and 1,000 at 0.95": Claim(two_rates(25, 0.95, 1000, 0.95), {"Newcombe covers": (0.93, 0.98), "Wald covers": (0.0, 0.77), "a gap of 30 % is shown": least(0.9)}),
    "rates, 200 at 0.5 and 200 at 0.5": Claim(two_rates(200, 0.5, 200, 0.5), {"Newcombe covers": (0.93, 0.98), "a gap of 30 % is shown": least(0.95)}),
    "gaps of five groups": Claim(each(gaps), {"gaps as large as allowed are blamed": most(0.05), "a gap of 20 % is blamed": least(0.95)}, fast=150),
    "52 equal challengers": Claim(equals, {f"{rule}: any ships": (0.0, 0.05) for rule in OURS} | {"point value: any ships": least(0.95), "TFMA change threshold: any ships": least(0.95),
                                          "interval, 5 % each: any ships": least(0.35), "Ladder: any ships": least(0.5)}, fast=40, full=400),
    "52 worse challengers": Claim(worse, {f"{rule}: any ships": (0.0, 0.015) for rule in OURS} | {"point value: any ships": least(0.75)}, fast=30, full=200),
    "a true gain after ten failures": Claim(gains, {f"{rule}: ships the gain": least(0.99) for rule in OURS}, fast=25, full=200),
    "calibration of 2,000 rows": Claim(each(calibrated), {"slope covers 1": band(0.9), "intercept covers 0": band(0.9), "a slope of 0.5 is shown": least(0.99), "a calibrated model is above 0": most(0.05), "a bent one is": least(0.95)}),
    "propensities of at least 0.1": Claim(logs(0.1), dict.fromkeys(("IPS covers", "SNIPS covers", "doubly robust covers"), band(0.95)) | {"nothing earned is shown to be less": least(0.99)}),
    "propensities of at least 0.01": Claim(logs(0.01), dict.fromkeys(("SNIPS covers", "doubly robust covers"), band(0.95)) | {"IPS covers": (0.80, 0.93), "nothing earned is shown to be less": least(0.99)}),
    "propensities of 0.003": Claim(each(tried_rarely), {"IPS would cover": (0.0, 0.55), "the log is refused": least(1.0)}, full=300),
    "gain of another policy": Claim(each(other_policy), {"an equal policy gains": band(0.05), "one better by 0.045 does": least(0.8)})}


def check(name, reps, record_property):
    claim = CLAIMS[name]
    found, wrong = claim.run(SEED, reps), []
    blur = lambda p: 3*math.sqrt(p*(1 - p))*(reps**-0.5 - claim.full**-0.5) # What fewer repetitions add to three standard errors
    for rate, (low, high) in claim.accept.items():
        low, high = max(low - blur(low), 0.0), min(high + blur(high), 1.0)
        record_property("rate", (f"{name}: {rate}", found[rate], low, high, reps, SEED))
        if not low - 1e-9 <= found[rate] <= high + 1e-9: wrong.append(f"{rate} in {found[rate]:.3f} of {reps}, accepted {low:.3f} to {high:.3f}")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_rate_is_about_what_it_should_be(name, record_property): check(name, CLAIMS[name].fast, record_property)


@pytest.mark.stats
@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_rate_is_what_it_should_be(name, record_property): check(name, CLAIMS[name].full, record_property)


def test_every_claim_has_a_bound_and_a_power_floor():
    for name, claim in CLAIMS.items():
        assert any(low > 0.25 for low, _ in claim.accept.values()), f"{name} would accept a method that never speaks"
        assert any(high < 1 for _, high in claim.accept.values()) or "gain" in name, f"{name} would accept a method that always does"
