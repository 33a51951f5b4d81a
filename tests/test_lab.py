"""A recorded run, opened in a real JupyterLab in a real browser and run by hand, gives the record that it gave at night."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from retrain_nb.faces.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="no Chromium here; `apt-get install chromium` brings it, and CI always has it")
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def parcels(first_night, tmp_path_factory): return Path(shutil.copytree(first_night, tmp_path_factory.mktemp("lab")/"parcels"))


@pytest.fixture(scope="module")
def lab(parcels, tmp_path_factory):
    "Address of a JupyterLab of its own, on loopback, that ends with the tests"
    home = tmp_path_factory.mktemp("jupyter")
    news = home/"settings"/"@jupyterlab"/"apputils-extension"
    news.mkdir(parents=True)
    (news/"notification.jupyterlab-settings").write_text(json.dumps(QUIET))
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home/"config"), "JUPYTER_RUNTIME_DIR": str(home/"run"), "JUPYTER_DATA_DIR": str(home/"data"),
           "JUPYTERLAB_SETTINGS_DIR": str(home/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home/"spaces")}
    port, log = 18931, (home/"log").open("w")
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
             "--IdentityProvider.token=", f"--ServerApp.root_dir={parcels}"] # No token: a throw-away server on loopback
    server = subprocess.Popen(words, env=env, stdout=log, stderr=log, cwd=parcels)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status", server, home/"log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address, server, log, seconds=60):
    for _ in range(seconds*4):
        if server.poll() is not None: break
        try: return urllib.request.urlopen(address, timeout=2).read()
        except OSError: time.sleep(0.25)
    raise AssertionError(f"JupyterLab did not come up: {Path(log).read_text()[-2000:]}")


def run_all(page, address, name):
    "Open a notebook and press Run All, when the kernel is there"
    page.goto(f"{address}/doc/tree/{name}?reset")
    page.get_by_text(re.compile(r"\| Idle")).wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("Run All Cells$")).click()


def bare(path):
    "A copy of an executed notebook beside it, without its outputs: what is seen afterwards was made in the browser"
    nb = json.loads(path.read_text())
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell |= {"outputs": [], "execution_count": None}
    again = path.with_name("again.ipynb")
    again.write_text(json.dumps(nb))
    return again


@needs_browser
def test_a_recorded_run_opened_in_lab_and_run_again_gives_the_same_record(parcels, lab, capsys, tmp_path):
    from playwright.sync_api import sync_playwright
    capsys.readouterr()
    main(["status", "--json", "--root", str(parcels)])
    champion = json.loads(capsys.readouterr().out)["champion"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1200, "height": 12_000})
        run_all(page, lab, bare(parcels/"reports"/champion["run"]/"retrain.ipynb").relative_to(parcels).as_posix())
        page.get_by_text(re.compile(rf"'model': '{champion['model'][:12]}'")).last.wait_for(timeout=120_000)
        page.get_by_text(re.compile(r"\| Idle")).wait_for(timeout=90_000)
        errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'], .jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count()
        shot = Path(os.environ.get("LAB_SCREENSHOT", tmp_path/"lab.png"))
        page.screenshot(path=shot, clip={"x": 0, "y": 0, "width": 1200, "height": 4800})
        browser.close()
    assert errors == 0 and shot.stat().st_size > 10_000


@needs_browser
def test_a_report_asks_nothing_of_any_network(parcels, capsys):
    from playwright.sync_api import sync_playwright
    capsys.readouterr()
    main(["status", "--json", "--root", str(parcels)])
    report = parcels/json.loads(capsys.readouterr().out)["report"]
    asked, troubles = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1100, "height": 1600})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: troubles.append(message.text))
        page.goto(report.as_uri())
        assert page.locator("script").count() == 0
        assert page.get_by_text("PASS").first.is_visible()
        browser.close()
    assert [a for a in asked if not a.startswith(("file:", "data:"))] == [] and troubles == []
