"The paired bootstrap of AUC and log loss, 100,000 rows by 1,000 resamples, against drawing the random numbers alone; and max-T over a hundred slices"
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.rows import row

ROWS, DRAWS, TIMES = 100_000, 1_000, 3


def spent(work: Callable[[], Any]) -> float:
    "CPU seconds of one call, all threads"
    start = time.process_time()
    work()
    return time.process_time() - start


def paired(rows: int = ROWS, draws: int = DRAWS) -> list[dict[str, Any]]:
    "A row of the table for each question"
    import numpy as np

    from retrain_nb.stages.evaluate import delong
    from retrain_nb.stages.paired import family, resampled
    rng = np.random.default_rng(0)
    truth = rng.normal(-1.3, 1, rows)
    y = (rng.random(rows) < 1/(1 + np.exp(-truth))).astype(float)
    a, b = (1/(1 + np.exp(-truth - rng.normal(0, 0.4, rows))) for _ in range(2))
    day = np.arange(rows)*365//rows

    def indices() -> None:
        for _ in range(draws): rng.integers(0, rows, rows)

    def own() -> None:
        for _ in range(draws): rng.integers(0, 65536, rows, dtype="uint16")

    def by_row() -> None: resampled(y, a, b, draws)
    def by_day() -> None: resampled(y, a, b, draws, codes=day)
    took: dict[Callable[[], None], list[float]] = {work: [] for work in (indices, own, by_row, by_day)}
    for _ in range(TIMES): # In turn, so that a busy neighbour slows all of them
        for work, seconds in took.items(): seconds.append(spent(work))
    drawn, bits, alone, clustered = (statistics.median(seconds) for seconds in took.values())
    large = rng.integers(0, rows, 1_000_000)
    many, one, two = y[large], a[large] + rng.normal(0, 1e-6, len(large)), b[large] + rng.normal(0, 1e-6, len(large)) # Without ties, as sorts like them least
    ranked = min(spent(lambda: np.argsort(one)) for _ in range(TIMES))
    tested = min(spent(lambda: delong(many, one, two)) for _ in range(TIMES))
    d, marks = rng.normal(size=rows), rng.random((100, rows)) < 0.1
    together = min(spent(lambda: family(d, marks, codes=day)) for _ in range(TIMES))
    read = min(spent(lambda: [d[m].mean() for m in marks]) for _ in range(TIMES))
    what = f"{rows:,} rows by {draws:,}"
    return [row(f"paired bootstrap, AUC and log loss, {what} (CPU)", alone, drawn, "drawing row numbers alone", limit=4),
            row("  the same (CPU)", alone, bits, "drawing its own 16 bits"), row("  by 365 days (CPU)", clustered, drawn, "drawing row numbers alone", limit=4),
            row(f"DeLong's test of {len(large):,} rows (CPU)", tested, ranked, "one sort that ranks", limit=3),
            row(f"max-T over 100 slices of {rows:,} rows by day (CPU)", together, read, "their means")]
