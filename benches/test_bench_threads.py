"""Small arrays with two threads and with one."""

import threads


def test_small_arrays_with_two_threads(printed):
    printed("")
    for text in threads.lines():
        printed(text)
