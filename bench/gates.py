"""What gates let through: 52 challengers one after the other over one holdout, none better, all worse, or one truly better.

Four rules beside ours: the better point value, TFMA's change threshold (its validator compares unsampled point values), MLflow's recipe (a fixed
threshold, and no champion), and an interval at 5 % for each challenger by itself. The peers' rules are simulated, not executed."""
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from bench.rows import rate
from retrain_nb.records import PASS
from retrain_nb.stages.budget import Budget, Holdout, Ladder, Use, climb, level
from retrain_nb.stages.evaluate import estimate
from retrain_nb.stages.gates import GatePolicy, superiority
from retrain_nb.tasks import log_losses, placements

CHALLENGERS, ALPHA = 52, 0.05
EQUAL, WORSE, BETTER = 0.55, 0.63, 0.315 # Noise in a model's log odds: log loss 0.594 for the champion, 0.006 more, 0.015 less
HOLDOUT = Holdout(digest="holdout")


def models(rng: np.random.Generator, n: int, noises: list[float]) -> tuple[np.ndarray, np.ndarray]:
    "Labels (n,) and calibrated scores (models, n): each sees the log odds through noise of its own"
    odds = rng.normal(0, 1.2, n)
    y = (rng.random(n) < 1/(1 + np.exp(-odds))).astype("float64")
    sd = np.array(noises)[:, None]
    seen = (odds + sd*rng.normal(size=(len(noises), n)))*1.44/(1.44 + sd**2)
    return y, 1/(1 + np.exp(-seen/np.sqrt(1 + np.pi/8*1.44*sd**2/(1.44 + sd**2))))


def ours(rule: str) -> Callable[[], Callable[..., bool]]:
    "The gate of the house: superiority at the level that the budget has left"
    def start() -> Callable[..., bool]:
        held = [Budget(alpha=ALPHA, decisions=CHALLENGERS, rule=rule)] # type: ignore[arg-type]
        def gate(y: np.ndarray, score: np.ndarray, champion: np.ndarray) -> bool:
            alpha = level(held[0], HOLDOUT)
            if not alpha: return False
            shipped = superior(y, score, champion, alpha)
            held[0] = held[0].after(Use(decision=str(len(held[0].uses)), holdout=HOLDOUT, alpha=alpha, shipped=shipped))
            return shipped
        return gate
    return start


def superior(y: np.ndarray, score: np.ndarray, champion: np.ndarray, alpha: float) -> bool:
    "Whether superiority in log loss is shown at one-sided `alpha`, rows independent"
    d = log_losses(y, score) - log_losses(y, champion)
    policy = GatePolicy(alpha=alpha, min_rows=1)
    found = estimate(float(d.mean()), (d - d.mean())/len(d), np.arange(len(d)), policy.level, difference=True)
    return found is not None and superiority("log_loss", {"log_loss": found}, policy).outcome == PASS


def ladder() -> Callable[..., bool]:
    "Ship what the Ladder shows as an improvement"
    held = [Ladder()]
    def gate(y: np.ndarray, score: np.ndarray, champion: np.ndarray) -> bool:
        if held[0].losses is None: held[0] = climb(held[0], log_losses(y, champion))
        before, held[0] = held[0], climb(held[0], log_losses(y, score))
        return held[0] is not before
    return gate


def stateless(gate: Callable[..., bool]) -> Callable[[], Callable[..., bool]]: return lambda: gate


def auc(y: np.ndarray, p: np.ndarray) -> float: return float(placements(y, p)[y == 1].mean())


RULES: dict[str, Callable[[], Callable[..., bool]]] = {
    "point value": stateless(lambda y, p, c: log_losses(y, p).mean() < log_losses(y, c).mean()),
    "TFMA change threshold": stateless(lambda y, p, c: auc(y, p) - auc(y, c) >= -1e-10),
    "MLflow fixed threshold": stateless(lambda y, p, c: log_losses(y, p).mean() <= 0.594),
    "interval, 5 % each": stateless(lambda y, p, c: superior(y, p, c, ALPHA)),
    "Ladder": ladder,
    "ours, spending": ours("spending"),
    "ours, LOND": ours("lond")}


def shipped(rng: np.random.Generator, n: int, noises: list[float], rules: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    "For each rule which of the challengers it shipped; one that ships is the champion that the next has to beat"
    y, scores = models(rng, n, [EQUAL, *noises])
    for name in rules:
        gate, champion, found = RULES[name](), scores[0], []
        for i, challenger in enumerate(scores[1:]):
            if gate(y, challenger, champion): champion, found = challenger, [*found, i]
        yield name, found


def simulate(reps: int, n: int, noises: list[float], seed: int, rules: Iterable[str] = tuple(RULES)) -> dict[str, list[list[int]]]:
    "Of each rule what it shipped in every repetition"
    told: dict[str, list[list[int]]] = {name: [] for name in rules}
    for rep in range(reps):
        for name, found in shipped(np.random.default_rng([seed, rep]), n, noises, told): told[name].append(found)
    return told


def any_share(runs: list[list[int]]) -> float: return sum(map(bool, runs))/len(runs)


def gates(reps: int = 400, seed: int = 1, others: int = 200) -> list[dict[str, Any]]:
    "False ships and missed gains of every rule"
    equal = simulate(reps, 2000, [EQUAL]*CHALLENGERS, seed)
    worse = simulate(others, 2000, [WORSE]*CHALLENGERS, seed + 1)
    gain = {n: simulate(others, n, [WORSE]*10 + [BETTER], seed + 2) for n in (2000, 20_000)} # The gain comes eleventh
    found = []
    for name in RULES:
        us = name.startswith("ours")
        ships = sum(map(len, equal[name]))/reps
        found += [rate(f"{name}: 52 equal challengers, any shipped", any_share(equal[name]), most=ALPHA if us else None, ships=ships),
                  rate(f"{name}: 52 worse challengers, any shipped", any_share(worse[name]), most=0.02 if us else None)]
        for n, runs in gain.items():
            found.append(rate(f"{name}: true gain shipped, n = {n:,}", sum(10 in r for r in runs[name])/others, least=0.99 if us and n == 20_000 else None))
    return found


def side_by_side(rows: list[dict[str, Any]]) -> str:
    "What `gates` found, a line for each rule: what it lets through that it should not, and what it misses that it should not"
    told = {r["name"]: r for r in rows}
    head = f"{'':<24}{'52 equal: any ships':>21}{'ships of 52':>13}{'52 worse: any ships':>21}{'gain missed, 2,000':>20}{'gain missed, 20,000':>21}"
    lines = [head]
    for rule in RULES:
        equal, worse = told[f"{rule}: 52 equal challengers, any shipped"], told[f"{rule}: 52 worse challengers, any shipped"]
        missed = [1 - told[f"{rule}: true gain shipped, n = {n:,}"]["rate"] for n in (2000, 20_000)]
        lines.append(f"{rule:<24}{equal['rate']:>21.1%}{equal['ships']:>13.2f}{worse['rate']:>21.1%}{missed[0]:>20.1%}{missed[1]:>21.1%}")
    return "\n".join(lines)
