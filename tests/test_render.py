"Reports: nothing in them runs or loads, whatever was planted; they stay small; broken runs get one too."
import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from retrain_nb.records import RetrainError
from retrain_nb.services import render
from retrain_nb.services.profile import profile
from retrain_nb.services.render import alive, clean, index, report

PASS = {"name": "gates", "outcome": "PASS", "reason": "all checks passed", "parts": []}
HEAD = {"title": "Retrain 2013-06-01", "state": "ok", "cause": "", "verdict": PASS, "facts": {"run": "retrain-a1c0"}}
EVIL = "steal()"
PICTURE = base64.b64encode(b"\x89PNG" + b"0"*60).decode()

HTML = [ # What an output or a Markdown cell may hold
    f"<script>{EVIL}</script>", f"<img src=x onerror={EVIL}>", f"<svg onload={EVIL}><script>{EVIL}</script></svg>",
    f'<a href="javascript:{EVIL}">late</a>',
    f'<a href="java&#9;script:{EVIL}">late</a>', f'<a href="data:text/html,<script>{EVIL}</script>">late</a>',
    '<iframe src="https://evil.example"></iframe>',
    '<link rel=stylesheet href="https://evil.example/x.css">',
    "<style>@import 'https://evil.example/x.css'; body{background:url(https://evil.example)}</style>",
    '<img src="https://evil.example/x.png">', '<img srcset="https://evil.example/x.png 2x">',
    f'<form action="https://evil.example"><input autofocus onfocus={EVIL}></form>',
    '<meta http-equiv=refresh content="0;url=https://evil.example">', '<base href="https://evil.example">',
    f'<object data="javascript:{EVIL}"></object>',
    f'<math><mtext><table><mglyph><style><img src=x onerror={EVIL}></style></mglyph></table></mtext></math>',
    f"<noscript><p title=\"</noscript><img src=x onerror={EVIL}>\">",
    f'<details open ontoggle={EVIL}><summary>x</summary></details>',
    '<p style="position:fixed;inset:0;background:url(https://evil.example)">PASS</p>',
    f"<video><source onerror={EVIL}></video>", f'<img src="data:image/svg+xml;base64,{base64.b64encode(b"<svg onload=steal()>").decode()}">',
    f"</section></main><script>{EVIL}</script>", f"<!--><img src=x onerror={EVIL}>-->", f"<xmp></xmp><script>{EVIL}</script>",
    f'<b id="c0" class="verdict is-pass" onclick={EVIL}>PASS</b>']
MARKDOWN = [f"[x](javascript:{EVIL})", f"![x](javascript:{EVIL})", "![x](https://evil.example/x.png)", f"<javascript:{EVIL}>",
            f"[x]: javascript:{EVIL}\n[x]", f"```html\n<script>{EVIL}</script>\n```"]


def cell(kind, source, outputs=(), tags=()):
    return {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}, **({"outputs": list(outputs)} if kind == "code" else {})}

def display(**data): return {"output_type": "display_data", "metadata": {}, "data": {k.replace("__", "/"): v for k, v in data.items()}}

def page(folder, *cells):
    path = Path(folder)/"page.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path

def dangers(markup):
    "Everything in a document that could run, load or submit, found with another parser than ours"
    soup, found = BeautifulSoup(markup, "html.parser"), []
    for tag in soup.find_all(True):
        if tag.name in ("script", "iframe", "object", "embed", "form", "input", "svg", "math", "link", "base", "video", "audio", "source",
                        "template"): found.append(tag.name)
        if tag.name == "meta" and tag.get("http-equiv", "").lower() == "refresh": found.append("refresh")
        for name, value in tag.attrs.items():
            text = re.sub(r"\s", "", " ".join(value) if isinstance(value, list) else value).lower()
            if name.startswith("on") or name in ("srcset", "srcdoc", "action", "background", "poster", "ping"): found.append(name)
            if name == "src" and not re.match(r"data:image/(png|jpeg|gif|webp);", text): found.append(f"src={text[:30]}")
            if name == "href" and re.match(r"[a-z]+:", text) and not re.match(r"(https?|mailto):", text): found.append(f"href={text[:30]}")
            if name == "style" and not re.fullmatch(r"(text-align:\w+;?)*", text): found.append(f"style={text}")
    found += re.findall(r"@import|url\(", "".join(s.get_text() for s in soup.find_all("style")))
    return found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    cells = [cell("markdown", text) for text in HTML + MARKDOWN] + [cell("raw", HTML[0])]
    cells += [cell("code", HTML[0], [display(text__html=text) for text in HTML] + [display(text__markdown=text) for text in HTML + MARKDOWN])]
    cells += [cell("code", f"# {HTML[1]}", [
        display(application__javascript=EVIL), display(image__svg_xml=HTML[2]), display(text__latex=HTML[0]), display(text__plain=HTML[0]),
        {"output_type": "display_data", "metadata": {"image/png": {"alt": f'"><script>{EVIL}</script>', "width": f'1" onload="{EVIL}'}},
         "data": {"image/png": PICTURE, "text/plain": HTML[1]}},
        display(image__png=f'x" onerror="{EVIL}'), {"output_type": "stream", "name": "stdout", "text": HTML[0]},
        {"output_type": "error", "ename": HTML[0], "evalue": HTML[1], "traceback": [HTML[0]]}], tags=["figure"])]
    head = {"title": HTML[0], "state": HTML[1], "cause": HTML[2],
            "verdict": {"name": HTML[0], "outcome": "PASS", "reason": HTML[1], "parts": []},
            "decision": {"sentence": HTML[1]}, "facts": {"run": HTML[0], HTML[1]: HTML[2]}, "numbers": {HTML[0]: HTML[1]},
            "links": {"x": f"javascript:{EVIL}", "y": "https://evil.example", "z": "//evil.example", HTML[0]: "profile.html"}}
    return report(page(folder, *cells), head, folder/"report.html").read_text()


def test_the_check_itself_finds_every_planted_danger():
    depends_on_the_parser = ("<noscript>", "<!-->")
    assert [text for text in HTML if not dangers(text) and not text.startswith(depends_on_the_parser)] == []

def test_no_planted_script_handler_or_load_survives_in_the_report(hostile):
    assert dangers(hostile) == []

def test_our_own_second_reading_agrees(hostile):
    assert alive(hostile) == []

def test_an_output_cannot_dress_up_as_our_verdict(hostile):
    dressed = BeautifulSoup(hostile, "html.parser").select_one(".page")
    assert dressed.select("[id]:not(section)") == [] and dressed.select(".verdict, .pill, [style*=position]") == []

def test_what_was_hidden_in_source_code_and_plain_text_is_shown_as_text(hostile):
    assert "&lt;script&gt;steal()&lt;/script&gt;" in hostile

def test_nothing_disappears_without_a_note(hostile):
    assert "can only be shown by a program: application/javascript" in hostile and "a picture that is no picture was left out" in hostile

def test_the_policy_forbids_what_the_cleaning_might_miss(hostile):
    policy = BeautifulSoup(hostile, "html.parser").find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert "default-src 'none'" in policy and "script" not in policy

def test_only_plain_relative_links_lead_to_neighbours(hostile):
    outside = [a["href"] for a in BeautifulSoup(hostile, "html.parser").select("a[href]") if not a["href"].startswith("#")]
    assert outside == ["profile.html"]

def test_a_hostile_index_is_harmless(tmp_path):
    rows = [{"run": text, "state": text, "verdict": None, "as_of": text, "decision": text, "reason": text, "model": text,
             "seconds": 1.0} for text in [*HTML, "../../etc"]]
    assert dangers(index(rows, tmp_path/"index.html", HTML[0]).read_text()) == []

@pytest.mark.parametrize("text", HTML)
def test_each_fragment_alone_is_harmless(text):
    assert dangers(clean(text)) == []

def test_a_living_report_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "clean", lambda markup: markup)
    with pytest.raises(RetrainError, match="can run or load"):
        report(page(tmp_path, cell("markdown", HTML[1])), HEAD, tmp_path/"report.html")
    assert not (tmp_path/"report.html").exists()

def test_ordinary_tables_text_and_links_survive(tmp_path):
    table = ('<table border="1" class="dataframe"><thead><tr style="text-align: right;"><th></th><th>carrier</th></tr></thead>'
             '<tbody><tr><th>0</th><td>UA &amp; DL</td></tr></tbody></table>')
    made = report(page(tmp_path, cell("markdown", "## Rows\n\n| a | b |\n|---|---|\n| 1 | [more](https://example.com) |"),
                       cell("code", "frame", [display(text__html=table)])), HEAD, tmp_path/"r.html")
    soup = BeautifulSoup(made.read_text(), "html.parser").select_one(".page")
    assert [td.text for td in soup.find_all("td")] == ["1", "more", "UA & DL"] and soup.find("a")["href"] == "https://example.com"

def test_a_report_stays_below_three_megabytes_and_says_what_is_missing(tmp_path):
    big = [display(image__png="A"*n) for n in (4_000, 2_000_000, 1_400_000, 900_000)]
    talk = [{"output_type": "stream", "text": "z"*5_000_000}]
    made = report(page(tmp_path, cell("code", "x", big, tags=["figure"]), cell("code", "y", talk)), HEAD, tmp_path/"r.html")
    assert made.stat().st_size < 3_000_000
    assert "a picture of 2.0 MB was left out" in made.read_text() and "4,800,000 characters left out" in made.read_text()
    assert len(re.findall("<img", made.read_text())) == 3

def test_a_page_of_endless_code_still_gets_a_small_report(tmp_path):
    made = report(page(tmp_path, *[cell("code", "x = 1\n"*30_000) for _ in range(20)]), HEAD, tmp_path/"r.html")
    assert made.stat().st_size < 3_000_000 and "too long for a report" in made.read_text()

def test_a_failed_run_shows_its_state_and_cause_first_and_its_broken_cell(tmp_path):
    broken = cell("code", "run.read()", [{"output_type": "error", "ename": "DataError", "evalue": "column `dest` is missing.",
                                          "traceback": ["\x1b[31mtrace\x1b[0m"]}])
    head = {**HEAD, "state": "failed", "verdict": None, "cause": "DataError: column `dest` is missing."}
    made = report(page(tmp_path, cell("markdown", "# Retrain"), broken), head, tmp_path/"r.html").read_text()
    soup = BeautifulSoup(made, "html.parser")
    assert soup.select_one(".word").text == "FAILED" and "dest" in soup.select_one(".verdict").text
    assert soup.select_one(soup.select_one(".verdict a")["href"]).select_one(".error b").text == "DataError" and "\x1b" not in made

def test_a_cause_is_said_once(tmp_path):
    verdict = {**PASS, "outcome": "INSUFFICIENT", "reason": "the run failed: no seat is left", "parts": []}
    head = {**HEAD, "state": "failed", "cause": "no seat is left", "verdict": None, "decision": {"sentence": "No decision, as the run failed.", "verdict": verdict}}
    told = BeautifulSoup(report(None, head, tmp_path/"r.html").read_text(), "html.parser").select_one(".verdict").text
    assert told.count("no seat is left") == 1

def test_what_passed_is_folded_away_where_there_is_something_to_look_at(tmp_path):
    leaf = lambda name, outcome, interval=None: {**PASS, "name": name, "outcome": outcome, "interval": interval, "parts": []}
    parts = [leaf("rows", "PASS"), leaf("auc", "PASS", [0, 1]), leaf("days", "FAIL"), leaf("key", "PASS")]
    soup = BeautifulSoup(report(None, {**HEAD, "verdict": {**PASS, "parts": parts}, "decision": {}}, tmp_path/"r.html").read_text(), "html.parser")
    folded = [row.find_all("td")[1].text for row in soup.select("details tr")]
    assert folded == ["rows", "key"] and soup.select_one("details summary").text == "2 more checks passed"
    assert [b.text for b in soup.select("table.full:not(.tight) b")] == ["days", "auc"]

def test_the_index_says_how_much_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "MOST", 3)
    rows = [{"run": f"r{i}", "state": "ok"} for i in range(4)]
    shown = [index(rows[:n], tmp_path/"index.html").read_text() for n in (3, 4)]
    assert [(" 3 runs, newest first" in f" {t}".replace(">", "> "), "the newest 3 runs" in t, "r3" in t) for t in shown] == [(True, False, False), (True, True, False)]

@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"cells": 3}', b'{"cells": [3]}'])
def test_a_run_without_a_readable_notebook_still_gets_a_report(tmp_path, content):
    path = tmp_path/"page.ipynb"
    if content is not None: path.write_bytes(content)
    assert "KILLED" in report(path, {**HEAD, "state": "killed", "verdict": None, "cause": "out of memory"}, tmp_path/"r.html").read_text()

@pytest.mark.parametrize("outcome", ["PASS", "FAIL", "INSUFFICIENT"])
def test_the_first_word_is_the_outcome(tmp_path, outcome):
    made = report(None, {**HEAD, "verdict": {**PASS, "outcome": outcome}}, tmp_path/"r.html")
    assert BeautifulSoup(made.read_text(), "html.parser").select_one(".word").text == outcome

def test_a_killed_run_is_never_shown_with_the_word_of_its_decision(tmp_path):
    head = {**HEAD, "state": "killed", "verdict": None, "decision": {"sentence": "No decision.", "verdict": PASS}}
    assert BeautifulSoup(report(None, head, tmp_path/"r.html").read_text(), "html.parser").select_one(".word").text == "KILLED"

def test_equal_input_gives_equal_bytes(tmp_path):
    path = page(tmp_path, cell("markdown", "# Retrain"), cell("code", "1", [display(image__png=PICTURE)]))
    assert report(path, HEAD, tmp_path/"a.html").read_bytes() == report(path, HEAD, tmp_path/"b.html").read_bytes()

def test_rendering_needs_neither_nbconvert_nor_matplotlib(tmp_path):
    path = page(tmp_path, cell("markdown", "# Retrain"), cell("code", "1", [display(text__html="<b>1</b>")]))
    program = ("import sys; from pathlib import Path; from retrain_nb.services.render import report;"
               "report(Path(sys.argv[1]), {'title': 't', 'state': 'ok', 'verdict': None}, Path(sys.argv[2]));"
               "print([m for m in ('nbconvert', 'nbformat', 'matplotlib', 'pandas', 'bs4') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program, path, tmp_path/"r.html"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The data profile: made by somebody else's library, so kept on a short lead

SPY = """
import os, socket
def note(what): open(os.path.dirname(__file__) + "/calls.txt", "a").write(what + "\\n")
connect, lookup = socket.socket.connect, socket.getaddrinfo
def spied(self, address):
    if self.family != socket.AF_UNIX: note(f"connect {address}")
    return connect(self, address)
socket.socket.connect = spied
socket.getaddrinfo = lambda *a, **k: (note(f"lookup {a[0]}"), lookup(*a, **k))[1]
note("spy is here")
"""

@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    "A profile of a frame full of traps, and what its process tried to reach"
    import pandas as pd
    folder = tmp_path_factory.mktemp("profile")
    (folder/"spy").mkdir()
    (folder/"spy"/"sitecustomize.py").write_text(SPY)
    n = 400
    frame = pd.DataFrame({"hour": range(n), "carrier": pd.Categorical(["UA", "DL"]*(n//2)),
                          "dest": [f"<img src=x onerror={EVIL}>", "BOS"]*(n//2), f"<script>{EVIL}</script>": range(n),
                          "free": [f"<script>{EVIL}</script> {i}" for i in range(n)],
                          "when": pd.date_range("2013-01-01", periods=n, tz="UTC").astype("datetime64[us, UTC]"),
                          "passenger": ["A. Person"]*n})
    for i, part in enumerate((frame[:150], frame[150:])): part.to_parquet(folder/f"{i}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder/"spy"))
        patch.setenv("YDATA_PROFILING_NO_ANALYTICS", "")
        reason = profile([folder/"0.parquet", folder/"1.parquet"], folder/"profile.html", drop=["passenger"], rows=300,
                         title=f"<script>{EVIL}</script>")
    return reason, folder/"profile.html", (folder/"spy"/"calls.txt").read_text().splitlines()

def test_a_profile_is_made_and_keeps_to_its_budget(profiled):
    reason, path, _ = profiled
    assert reason == "" and 100_000 < path.stat().st_size < 4_000_000

def test_a_profile_calls_nobody(profiled):
    assert set(profiled[2]) == {"spy is here"}

def test_a_profile_shows_no_personal_column_and_no_live_text_of_the_data(profiled):
    soup = BeautifulSoup(profiled[1].read_text(), "html.parser")
    assert "passenger" not in soup.decode() and "A. Person" not in soup.decode()
    assert [tag for tag in soup.find_all(True) if any(name.startswith("on") for name in tag.attrs)] == []
    assert [script for script in soup.find_all("script") if EVIL in script.text] == []

def test_a_profile_may_not_load_anything(profiled):
    soup = BeautifulSoup(profiled[1].read_text(), "html.parser")
    assert "default-src 'none'" in soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    sources = [str(tag.get("src") or tag.get("href") or "") for tag in soup.find_all(["script", "link", "img", "iframe"])]
    assert [source for source in sources if source.startswith(("http", "//"))] == []

def test_a_profile_knows_categories_and_dates(profiled):
    text = {v.get_text(" ").split()[0]: v.get_text(" ") for v in BeautifulSoup(profiled[1].read_text(), "html.parser").select(".variable")}
    assert "Categorical" in text["carrier"] and "Categorical" in text["dest"] and "2013-01" in text["when"]

def test_a_profile_that_is_too_large_is_not_placed(tmp_path):
    import pandas as pd
    pd.DataFrame({"a": [1, 2, 3]}).to_parquet(tmp_path/"x.parquet")
    assert "more than its budget" in profile([tmp_path/"x.parquet"], tmp_path/"p.html", limit=1000) and not (tmp_path/"p.html").exists()

@pytest.mark.parametrize("parts", [["gone.parquet"], []])
def test_a_profile_that_cannot_be_made_is_a_sentence(tmp_path, parts):
    assert "could not be made" in profile([tmp_path/p for p in parts], tmp_path/"p.html")
