"""A browser without a screen, for the tests of pages."""

import base64
import io
import shutil

import numpy as np
import pytest
from acting import NO_HANG
from PIL import Image


def open_chromium():
    """Start Chromium, which finds no other host than this machine; where it cannot be started, skip the test."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    driver.set_page_load_timeout(NO_HANG)
    return driver


def wait_until(driver, condition):
    """Wait for what a script's condition says of the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, NO_HANG).until(lambda driver: driver.execute_script(f"return {condition}"))


def picture(element):
    """What an element looks like, as an array (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(element.screenshot_as_base64))).convert("RGB"))


def complaints(driver):
    """What the console of the page has to say of errors and of what could not be loaded."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
