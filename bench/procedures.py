"""What a choice among procedures costs or saves, over whole streams: `python -m bench.procedures` prints a table.

At each of ten cuts every procedure trains on what its window holds; the rows up to the next cut are scored by all of them, day by day. A policy follows one
procedure and asks the stage `switch` at each cut, with the days that were scored until then. Its loss, in all periods but the first two, is given relative to the best
fixed strategy in hindsight. Two rules of the house, and two that are not: a choice by the newest period alone, and the best choice for each period (a bound)."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd

from retrain_nb.records import DataError
from retrain_nb.stages.switch import Scored, SwitchPolicy, switch, winner
from retrain_nb.stages.train import fixed_params, predict, train
from retrain_nb.tasks import LOSSES, TASKS
from retrain_nb.windows import parse_time, split_at

PERIODS, ROUNDS = 10, 60


@dataclass(frozen=True)
class Stream:
    "Rows in order of time"
    name: str
    X: pd.DataFrame
    y: pd.Series
    when: pd.Series
    task: str = "binary"
    block: int = 7


def cuts(stream: Stream) -> list[Any]:
    "The ends of equal shares of the rows"
    at = [stream.when.iloc[min(len(stream.when)*i//PERIODS, len(stream.when) - 1)] for i in range(PERIODS + 1)]
    return [parse_time(at[0].to_pydatetime()), *(parse_time(t.ceil("D").to_pydatetime()) for t in at[1:])]


def ways(ends: list[Any]) -> dict[str, tuple[Any, float]]:
    "Name of each procedure to its rule and days"
    length = (ends[-1] - ends[0])/timedelta(days=1)
    found = {"expanding": ("expanding", 1.0), "sliding": ("sliding", max((ends[2] - ends[0])/timedelta(days=1), 1.0)), "latest": ("latest", max((ends[1] - ends[0])/timedelta(days=1), 1.0))}
    if length > 800: found["seasonal"] = ("seasonal", 30.0)
    return found


def losses(stream: Stream, model: str, at: np.ndarray) -> np.ndarray:
    "Loss of each of these rows"
    return LOSSES[TASKS[stream.task].goal](stream.y[at].to_numpy("float64"), np.asarray(predict(model, stream.X[at])))


def periods(stream: Stream) -> Iterator[tuple[list[Scored], dict[str, float], int]]:
    "For each period but the first two: its days, the mean loss of each strategy, its rows"
    ends = cuts(stream)
    params, models = fixed_params({"rounds": ROUNDS, "learning_rate": 0.1}, 2, 0, stream.task), dict[str, str]()
    for i in range(2, PERIODS):
        test = ((stream.when >= ends[i]) & (stream.when < ends[i + 1])).to_numpy()
        if not test.any(): continue
        for name, (rule, days) in ways(ends).items():
            split = split_at(ends[i + 1], ends[0], rule, days, (ends[i + 1] - ends[i])/timedelta(days=1)) # type: ignore[arg-type]
            taught = split.teaches(stream.when).to_numpy()
            try: models[name] = train(stream.X[taught], stream.y[taught], params)
            except DataError: pass # One class: the procedure goes on with the model that it has
        models.setdefault("never", models["expanding"]) # Which has seen every class first
        found = pd.DataFrame({name: losses(stream, model, test) for name, model in models.items()})
        days = found.groupby(stream.when[test].dt.floor("D").to_numpy())
        daily, n = days.mean().drop(columns="never"), days.size()
        yield [Scored(day=str(d), n=int(n[d]), loss=row.to_dict()) for d, row in daily.iterrows()], found.mean().to_dict(), int(test.sum())


def follow(seen: list[Any], start: str, choose: Callable[[list[Scored], list[Scored], str], str]) -> tuple[float, int]:
    "Mean loss of somebody who asks `choose` at each cut, and how often it switched"
    follows, reign, total, rows, switches = start, list[Scored](), 0.0, 0, 0
    for days, mean, n in seen:
        total, rows = total + n*mean[follows], rows + n
        reign += days
        after = choose(reign, days, follows)
        if after and after != follows: follows, reign, switches = after, [], switches + 1
    return total/rows, switches


def by_rule(rule: str, block: int, metric: str) -> Callable[..., str]:
    "The stage of the house, with one of its rules"
    def choose(reign: list[Scored], newest: list[Scored], follows: str) -> str:
        others = [name for name in newest[0].loss if name != follows]
        return winner(switch(reign, follows, others, SwitchPolicy(rule=rule, block_days=block), metric))
    return choose


def newest(reign: list[Scored], days: list[Scored], follows: str) -> str:
    "Whoever lost least in the newest period"
    return min(days[0].loss, key=lambda name: sum(d.n*d.loss.get(name, np.inf) for d in days))


def measured(stream: Stream, seen: list[Any], start: str) -> dict[str, Any]:
    "Each policy on one stream, in percent above the best fixed strategy, for somebody who begins with `start`"
    n = np.array([rows for _, _, rows in seen])
    fixed = {name: float(sum(rows*mean[name] for _, mean, rows in seen)/n.sum()) for name in seen[0][1]}
    best = min(fixed, key=fixed.__getitem__)
    goal = TASKS[stream.task].goal
    rules = {**{rule: by_rule(rule, stream.block, goal) for rule in ("proven", "leading")}, "newest": newest}
    told = {name: follow(seen, start, rule) for name, rule in rules.items()}
    bound = float(sum(rows*min(mean.values()) for _, mean, rows in seen)/n.sum())
    share = lambda loss: round(100*(loss/fixed[best] - 1), 2)
    return {"stream": stream.name, "starts as": start, "best fixed": best, "loss": round(fixed[best], 4), **{f"fixed {name}": share(loss) for name, loss in fixed.items()},
            **{name: share(loss) for name, (loss, _) in told.items()}, "bound": share(bound), "switches": "/".join(str(s) for _, s in told.values())}


def made(kind: str, days: int = 720, rows: int = 40) -> Stream:
    "A generated stream: `null` never changes, `turns` is turned round once, `drifts` goes on and on, `seasons` with the year"
    rng = np.random.default_rng(3)
    when = pd.Series(pd.date_range("2020-01-01", periods=days*rows, freq=f"{1440//rows}min", tz="UTC"))
    t = np.arange(days*rows)/(days*rows)
    X = pd.DataFrame(rng.normal(size=(days*rows, 6)), columns=list("abcdef"))
    angle = {"null": 0*t, "turns": np.pi*(t > 0.3), "drifts": 6*t, "seasons": 2*np.pi*t*days/365}[kind]
    odds = 1.5*(np.cos(angle)*X.a + np.sin(angle)*X.b) + 0.5*X.c + np.repeat(rng.normal(0, 0.3, days), rows)
    return Stream(kind, X, pd.Series((rng.random(len(odds)) < 1/(1 + np.exp(-odds))).astype("float64")), when)


def flights() -> Stream:
    "Every fourth flight of the demo"
    from retrain_nb.demo.flights import rows, view
    from retrain_nb.stages.features import encode, fit_encoding
    frame = rows().sort_values("event_time", ignore_index=True).iloc[::4].reset_index(drop=True)
    frame = frame[frame.disrupted.notna()].reset_index(drop=True)
    return Stream("flights", encode(view, fit_encoding(view, frame), frame), frame.disrupted, frame.event_time)


def main() -> None:
    "Measure and print"
    streams = [*(made(kind) for kind in ("null", "turns", "drifts", "seasons")), flights()]
    rows = [measured(stream, seen, start) for stream in streams for seen in [list(periods(stream))] for start in ("expanding", "latest")]
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__": main()
