"""The same reading, training and evaluating as the page `retrain`, as a script nobody keeps a record of: the floor of `make bench`."""
import json
import sys
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pandas as pd
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

store, snapshot, recipe, columns = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
manifest = json.loads((store/"snapshots"/"manifests"/f"{snapshot}.json").read_text())
parts = [store/"snapshots"/"files"/p["sha256"][:2]/f"{p['sha256']}.parquet" for p in manifest["parts"]]
frame = pd.concat([pd.read_parquet(p) for p in parts], ignore_index=True)

time, label, known = columns["time"], columns["label"], columns["label_time"]
start, cut, end = (pd.Timestamp(recipe[k]) for k in ("train_start", "cut", "end"))
taught = frame[(frame[time] >= start) & (frame[time] < cut) & frame[label].notna() & (frame[known] <= cut)]
judged = frame[(frame[time] >= cut) & (frame[time] < end) & frame[label].notna()]
categories = {c: sorted(taught[c].dropna().unique()) for c in columns["categorical"]}


def matrix(rows: pd.DataFrame) -> pd.DataFrame:
    "Numbers as they are, categories as codes fixed on the training rows"
    codes = {c: pd.Categorical(rows[c].astype(object), categories=v).codes for c, v in categories.items()}
    return pd.concat([rows[columns["numeric"]].astype("float64").reset_index(drop=True), pd.DataFrame(codes)], axis=1)


params = {k: v for k, v in recipe["params"].items() if k != "rounds"}
data = lgb.Dataset(matrix(taught), taught[label].to_numpy(), categorical_feature=columns["categorical"])
booster = lgb.train(params, data, recipe["params"]["rounds"])
text = booster.model_to_string()

y, score = judged[label].to_numpy(), np.asarray(booster.predict(matrix(judged)))
print(json.dumps({"rows": len(frame), "log_loss": log_loss(y, score), "auc": roc_auc_score(y, score), "brier": brier_score_loss(y, score), "bytes": len(text)}))
