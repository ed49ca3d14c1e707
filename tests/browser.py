# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A real headless Chromium, driven by selenium, for what only a browser can say of a report."""

import importlib.util
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def why_not() -> str | None:
    """Why there is no browser here, and how to install one."""
    if importlib.util.find_spec("selenium") is None:
        return "needs selenium: pip install luffy-trl[dev]"
    if not any(map(shutil.which, _PROGRAMS)) or not shutil.which("chromedriver"):
        return "needs Chromium and its driver: apt-get install -y chromium chromium-driver"
    return None


@contextmanager
def chromium(width=1300, height=1000):
    """A browser with a profile of its own, which may not fetch anything on its own account."""
    from selenium import webdriver

    program = next(filter(None, map(shutil.which, _PROGRAMS)))
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for argument in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync", "disable-extensions"),
            *(f"user-data-dir={profile}", f"window-size={width},{height}", "host-resolver-rules=MAP * ~NOTFOUND"),
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


def open_page(driver, path: Path, seconds=30) -> list[dict]:
    """Opens a file, waits until its script has ended, and returns what the console has."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(Path(path).resolve().as_uri())
    WebDriverWait(driver, seconds).until(lambda d: d.execute_script("return document.body.dataset.ready") == "yes")
    return driver.get_log("browser")
