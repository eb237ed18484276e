"""A decode worker of a user without rights, to whom all bounds apply (root may start processes whatever they say)."""

from __future__ import annotations

import ctypes
import os
import sys

from mm_core.media import worker_main

_PR_SET_DUMPABLE = 4  # lost with the user's rights, and with it /proc/self

if __name__ == "__main__":
    worker_main.preload()  # the interpreter may lie where others must not look
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    worker_main.main(sys.argv[1:])
