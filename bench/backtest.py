"Ten monthly folds of the flights, encoded and binned once: what the page `backtest` costs over the trainings alone"
import time
from collections.abc import Callable
from typing import Any

from bench.rows import row

NOW, FOLDS = "2014-01-02", 10


def spent(work: Callable[[], Any]) -> float:
    "CPU seconds of one call, all threads"
    start = time.process_time()
    work()
    return time.process_time() - start


def folds(rounds: int = 200) -> list[dict[str, Any]]:
    "A row of the table: all that the page does, and the same with bins of its own in every fold, over `lgb.train` on data that was binned before"
    import lightgbm as lgb
    import numpy as np

    from retrain_nb.demo import flights
    from retrain_nb.demo.flights_view import view
    from retrain_nb.services.folds import BASE, RETRAINED, bin_rows, folds_of, losses_of, procedures
    from retrain_nb.stages.backtest import Plan, Stream, backtest, training_rows
    from retrain_nb.stages.features import encode, fit_encoding
    from retrain_nb.stages.train import fixed_params, matrix, predict, train
    from retrain_nb.windows import parse_time
    frame, now = flights.rows().sort_values("event_time", kind="stable").reset_index(drop=True), parse_time(NOW)
    stream = Stream("event_time", "disrupted", "label_time")
    splits = folds_of(Plan(every="month", folds=FOLDS, days=27, delay_days=2), frame, stream, now)
    params = fixed_params({"rounds": rounds, "learning_rate": 0.05, "num_leaves": 31}, 1, 0)
    tree = {k: v for k, v in params.items() if k != "rounds"}

    def binned(split: Any) -> Any:
        taught = training_rows(frame, split, stream)
        X = encode(view, fit_encoding(view, taught), taught)
        categories = [i for i, c in enumerate(X) if str(X[c].dtype) == "category"]
        return lgb.Dataset(matrix(X), taught.disrupted.to_numpy(), feature_name=list(X.columns), categorical_feature=categories, params=tree).construct()
    ready = [binned(split) for split in splits]

    def bare() -> None:
        for data in ready: lgb.train(tree, data, num_boost_round=rounds)

    def shared() -> None:
        b = bin_rows(frame, splits, stream, view, params)
        two = {name: p for name, p in procedures(b).items() if name in (RETRAINED, BASE)} # The third trains no ten models
        backtest(b.rows, splits, b.stream, two, losses_of(b), now)

    def alone(taught: Any, asked: Any) -> Any:
        X = encode(view, code := fit_encoding(view, taught), taught)
        return predict(train(X, taught.disrupted, params), encode(view, code, asked))

    def scratch() -> None:
        mean = {"alone": alone, "mean": lambda t, a: np.full(len(a), t.disrupted.mean())}
        backtest(frame, splits, stream, mean, lambda y, p: (y - p)**2, now)
    floor, ours, slow = spent(bare), spent(shared), spent(scratch)
    name = f"{FOLDS} monthly folds of {len(frame):,} flights"
    return [row(f"{name}, binned once (CPU)", ours, floor, "`lgb.train` alone", limit=1.13), row("  each fold from scratch (CPU)", slow, floor, "`lgb.train` alone")]
