"""The page of ``pop-mm app`` in a real browser: asked, its slider moved, left in the middle; and that it asks no other host."""

import json
import shutil
import time
from importlib.util import find_spec

import pytest
from app_model import QUESTION, SCENE, alone, changes, free_port, idle, tiny_asker
from PIL import Image

from observe import fingerprint
from pop_mm import PopConfig
from pop_mm.app.examples import examples
from pop_mm.app.server import serve

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
MISSING += [name for name in ("gradio", "selenium") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

SETTINGS = dict(ratio=0.4, gamma=0.1, max_new_tokens=12)
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
)


@pytest.fixture(scope="module")
def asker(tmp_path_factory):
    return tiny_asker(tmp_path_factory.mktemp("app") / "tiny-qwen")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [
        *FLAGS.split(),
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
        "window-size=1200,1400",
    ]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def served(asker):
    with serve(asker, free_port(), PopConfig(0.4)) as served:
        yield served


@pytest.fixture
def browser(driver, served):
    """With the page in it."""
    driver.get(served.url)
    wait(driver, lambda: driver.find_elements("css selector", "#ask"), "the page")
    return driver


def wait(driver, found, what, seconds=120):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(driver, seconds, 0.05, [StaleElementReferenceException])
    return waiting.until(lambda _: found(), f"no sign of {what}")


def box(driver, name):
    return driver.find_element("css selector", f"#{name} textarea, #{name} input")


def text_of(driver, name):
    return box(driver, name).get_property("value")


def fill(driver, question, name="question"):
    field = box(driver, name)
    field.clear()
    field.send_keys(question)


def upload(driver, path):
    driver.find_element("css selector", "#picture input[type=file]").send_keys(str(path))
    wait(driver, lambda: driver.find_elements("css selector", "#picture img"), "the uploaded image")


def answers(driver, expected):
    """Wait for both, and for the picture to be drawn in the page."""
    wait(driver, lambda: (text_of(driver, "dense"), text_of(driver, "pruned")) == expected, f"the answers {expected}")
    script = "const all = document.querySelectorAll('#channels img'); return all.length ? all[0].naturalWidth : 0"
    wait(driver, lambda: driver.execute_script(script) > 600, "the picture of the channels")


def test_the_page_answers_a_question_about_an_uploaded_image(asker, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    own = tmp_path / "own.png"
    Image.linear_gradient("L").resize((80, 60)).convert("RGB").save(own)
    asked = dict(question="Where is the light?", image=own, max_new_tokens=64)
    expected, milder = alone(asker, **asked), alone(asker, **asked, ratio=0.1)
    upload(browser, own)
    fill(browser, asked["question"])
    browser.find_element("id", "ask").click()
    answers(browser, expected)
    status = browser.find_element("id", "status").text
    assert "60.0% of each FFN left out" in status and " image)" in status
    assert "tokens/s (" in browser.find_element("id", "pruned-speed").text

    slider = browser.find_element("css selector", "#ratio input[type=range]")
    slider.send_keys(Keys.ARROW_LEFT * 6)
    wait(browser, lambda: "0.1" in (slider.get_property("value")), "the moved slider")
    box(browser, "question").send_keys(Keys.ENTER)
    answers(browser, milder)
    wait(browser, lambda: "15.0% of each FFN" in browser.find_element("id", "status").text, "the smaller ratio")

    browser.find_elements("css selector", "#examples button")[1].click()
    wait(browser, lambda: text_of(browser, "question") == examples(True)[1][1], "the example's question")
    fill(browser, " ")
    browser.find_element("id", "ask").click()
    wait(browser, lambda: "The question is empty" in browser.find_element("id", "status").text, "the error")

    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in log if entry["method"] == "Network.requestWillBeSent"]
    own = browser.current_url
    outside = [url for url in urls if not url.startswith((own, "data:", "blob:", "chrome:"))]
    assert len(urls) > 10 and not outside, "the page asks no other host"
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture
def slow_when_pruned(asker):
    """A tiny model would be done before the browser has clicked."""
    model = asker.model
    hook = model.register_forward_pre_hook(lambda *_: time.sleep(0.1) if "generate" in vars(model) else None)
    yield
    hook.remove()


@pytest.mark.parametrize("how", ["close the tab", "press Stop"])
def test_leaving_in_the_middle_restores_the_model(asker, browser, slow_when_pruned, how):
    before = fingerprint(asker.model)
    upload(browser, SCENE)
    fill(browser, "Describe it at length.")
    fill(browser, "256", "longest")
    browser.find_element("id", "ask").click()
    wait(browser, lambda: text_of(browser, "pruned"), "the pruned answer")
    assert asker.busy
    if how == "close the tab":
        browser.get("about:blank")
    else:
        browser.find_element("id", "stop").click()
        wait(browser, lambda: "Stopped" in browser.find_element("id", "status").text, "the stop")
    idle(asker)
    assert changes(asker, before) == []
    (*_, last) = asker.ask(SCENE, QUESTION, **SETTINGS)
    assert (last.dense.text, last.pruned.text) == alone(asker)
