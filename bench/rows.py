"One line of the table that `make bench` prints"
from typing import Any


def row(name: str, seconds: float, floor: float, against: str, limit: float | None = None, limit_seconds: float | None = None, **more: Any) -> dict:
    "One line of the table; `ok` is whether it keeps its limit"
    ratio = seconds/floor
    ok = (limit is None or ratio <= limit) and (limit_seconds is None or seconds <= limit_seconds)
    return {"name": name, "seconds": round(seconds, 3), "floor": round(floor, 3), "ratio": round(ratio, 2), "against": against, "limit": limit, "limit_seconds": limit_seconds, "ok": ok, **more}


def rate(name: str, found: float, most: float | None = None, least: float | None = None, **more: Any) -> dict:
    "A line that tells how often something happened, and not how long it took"
    ok = (most is None or found <= most) and (least is None or found >= least)
    return {"name": name, "rate": round(found, 4), "most": most, "least": least, "ok": ok, **more}
