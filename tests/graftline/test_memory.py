"""Freed memory serves again, in whichever thread."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys, threading
if sys.argv[1] == "kept":
    from graftline.memory import keep_freed_memory
    keep_freed_memory()

def use():
    for _ in range(4):
        pieces = [b"x" * (8 << 20) for _ in range(5)]
        del pieces

def pages_of_a_thread():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages_of_a_thread()
# joined is not yet ended: on a busy machine the next thread may come before a heap is free again
print(min(pages_of_a_thread() for _ in range(10)))
"""


def new_pages(how: str, **environment: str) -> int:
    words = [sys.executable, "-c", PAGES, how]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators are left alone")
def test_what_one_thread_freed_serves_the_next_without_new_pages():
    assert new_pages("kept") < 1000  # 40 MB are 10,000 pages


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators are left alone")
def test_what_the_user_set_wins():
    given_back = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
    assert new_pages("kept", **given_back) > 10_000
    assert new_pages("default", **given_back) > 10_000
