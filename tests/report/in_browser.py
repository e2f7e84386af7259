"""What the tests in a browser share."""

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "device_scale_factor": 2}
DESK = {"viewport": {"width": 1280, "height": 900}}
# Says so if it ever runs.
HOSTILE = """</script></title><script>hacked = 1</script>"'><img src=x onerror="hacked = 1">&lt;{{ 7 * 7 }}"""

FILL = "element => getComputedStyle(element).fill"


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def assert_fits_the_phone(page):
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= PHONE["viewport"]["width"]


def assert_harmless(page):
    assert page.evaluate("typeof hacked") == "undefined"


def middle(locator):
    """Where an element is, in pixels of the window."""
    locator.scroll_into_view_if_needed()
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
