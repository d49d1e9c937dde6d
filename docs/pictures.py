"""Takes the screenshots of the README from the MLflow database of the demo: `make pictures`, after `make demo`.

    python docs/pictures.py --tracking-uri sqlite:///mlflow.db

Starts the UI (`python -m pipeline.tracking ui`) on a free port, takes screenshots of its pages with an installed
Chromium (`chromium`, `chromium-browser` or `google-chrome`), and writes docs/mlflow-*.png. The database does not
change, except for the default views of its experiments."""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from pipeline.tracking import names, resolve_tracking_uri, server

DOCS = os.path.dirname(os.path.abspath(__file__))
WIDTH = 1280
PAGES = {
    "mlflow-leaderboard.png": ("leaderboard", 800),
    "mlflow-pretrain.png": ("#/experiments/{pretrain}/runs?viewStateShareKey=overview&compareRunsMode=CHART", 900),
    "mlflow-transfer.png": ("#/experiments/{transfer}", 600),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracking-uri")
    parser.add_argument("--output", default=DOCS)
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("error: Chromium not found; install the package chromium", file=sys.stderr)
        return 2
    uri = resolve_tracking_uri(options.tracking_uri)
    experiments = {name: server.experiment_id(uri, name) for name in (names.PRETRAIN, names.TRANSFER)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.tracking", "ui", "--port", str(port), "--tracking-uri", uri]
    ui = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address)
        for name, (path, height) in PAGES.items():
            target = os.path.join(options.output, name)
            screenshot(browser, address + path.format(**experiments), target, height)
            print(f"wrote {target}")
    finally:
        ui.terminate()
        ui.wait(30)
    return 0


def wait_for(address: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def screenshot(browser: str, address: str, target: str, height: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pictures-") as profile:
        command = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        command += ["--virtual-time-budget=40000", f"--window-size={WIDTH},{height}", f"--screenshot={target}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


if __name__ == "__main__":
    sys.exit(main())
