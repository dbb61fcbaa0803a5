"""The screenshots of docs/app.md: ``python scripts/app_pictures.py`` asks two samples in Chromium, on an idle machine."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from pop_mm import PopConfig
from pop_mm.app import Asker
from pop_mm.app.server import serve

DOCS = Path(__file__).parents[1] / "docs"
LARGEST = 200_000  # bytes; a picture that has more keeps 256 colours
# model, width and height of the window, and whether the picture of the layers is unfolded
SHOTS = {"app": ("smollm2-135m", 1280, 800, True), "app-phone": ("tiny-vlm", 390, 844, False)}
_ALL_PICTURES_ARE_THERE = "return [...document.images].every(image => image.complete)"
_END_OF_PAGE = "return Math.ceil(document.querySelector('main').getBoundingClientRect().bottom + window.scrollY)"


def main(folder: Path = DOCS, theme: str = "light") -> None:
    """Save them all, of the whole page after an answer."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for name, (model, width, height, unfolded) in SHOTS.items():
            asker = Asker.load(model)
            asker.warm_up(PopConfig())
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            with serve(asker, port) as served:
                size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                driver.get(f"{served.url}?__theme={theme}")
                wait = WebDriverWait(driver, 240, 0.5)
                wait.until(lambda _: driver.find_elements("id", "ask"))
                if asker.takes_images:
                    wait.until(lambda _: driver.find_elements("css selector", "#picture img"))
                driver.find_element("id", "ask").click()
                wait.until(lambda _: driver.find_elements("css selector", ".pop-facts"))
                if unfolded:
                    driver.find_element("css selector", ".pop-result summary").click()
                wait.until(lambda _: driver.execute_script(_ALL_PICTURES_ARE_THERE))
                whole = driver.execute_script(_END_OF_PAGE) + 40
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": max(height, whole)})
                driver.execute_script("window.scrollTo(0, 0)")
                target = folder / f"{name}.png"
                driver.save_screenshot(str(target))
                if target.stat().st_size > LARGEST:
                    shot = Image.open(target).convert("RGB")  # median cut would merge the colours of thin lines
                    few = shot.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                    few.save(target, optimize=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
