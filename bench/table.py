"Rows to measure with: numbers, flags, categories, texts and times, some of them missing, as a source gives them"
from typing import Any

FIRST, DAYS = "2020-01-01T00:00Z", 1000
WORDS = "late early damaged lost returned signed parked counted weighed opened".split()


def made(n: int, seed: int = 0, days: int = DAYS) -> Any:
    "A frame of `n` rows and 20 columns, in the order of time: eight numbers, two flags, four categories, three texts, two times, a key"
    import numpy as np
    import pandas as pd
    rng = np.random.default_rng(seed)
    due = pd.to_datetime(FIRST) + pd.to_timedelta(np.sort(rng.integers(0, days*86400, n)), unit="s")
    frame = pd.DataFrame({"id": pd.array(np.char.add("R", np.arange(n).astype(str)), dtype=object), "due": due.as_unit("us")})
    for i in range(8): frame[f"x{i}"] = np.where(rng.random(n) < (0, .02)[i % 2], np.nan, rng.normal(i, 1 + i, n).round(2 + i % 3))
    for name, k in (("depot", 5), ("carrier", 12), ("zone", 40), ("route", 400)):
        codes = rng.integers(0, k, n)
        if k == 40: codes[rng.random(n) < .02] = -1
        frame[name] = pd.Categorical.from_codes(codes, [f"{name}-{i:03d}" for i in range(k)])
    notes = np.array([f"{a} {b} {i}" for a in WORDS for b in WORDS for i in range(30)], dtype=object)
    frame["note"], frame["street"] = notes[rng.integers(0, len(notes), n)], notes[rng.integers(0, 900, n)]
    frame["tail"] = pd.array(np.char.add("T", rng.integers(0, 20_000, n).astype(str)), dtype=object)
    frame["insured"] = rng.random(n) < .3
    frame["late"] = np.where(rng.random(n) < .01, np.nan, (rng.random(n) < .2).astype(float))
    frame["known"] = frame["due"] + pd.to_timedelta(rng.integers(60, 5*86400, n), unit="s").as_unit("us")
    return frame
