"""The README's picture of a report: trains three runs on the digits, and photographs their page in Chromium.

python benchmarks/report_picture.py    # two minutes; writes benchmarks/results/report.png
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

RESULT = Path(__file__).parent / "results/report.png"
WIDTH, HEIGHT = 1280, 1080
TRAIN = (
    "epochs=30",
    "model.dropout=0.3",
    "batch.micro_batch_size=16",
    "log_every_steps=5",
    "noise_scale.every_steps=5",
    "evaluation.every_steps=20",
    "tracking.quiet=true",
    "tracking.report=false",
)


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "learning rates"
        for rate in (0.001, 0.005, 0.02):
            mbgd("train", *TRAIN, f"optimizer.lr={rate}", f"run.dir='{runs}/lr {rate}'")
        mbgd("report", str(runs))
        picture = Path(folder) / "report.png"
        options = ["--headless=new", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        options += [f"--user-data-dir={folder}/profile", "--blink-settings=preferredColorScheme=1"]
        address = (runs / "report.html").as_uri()
        subprocess.run([chromium, *options, f"--screenshot={picture}", address], check=True, capture_output=True)
        with Image.open(picture) as image:
            image.convert("RGB").quantize(128).save(RESULT, optimize=True)
    print(f"picture     {RESULT}")


def mbgd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "mbgd", *arguments], check=True)


if __name__ == "__main__":
    main()
