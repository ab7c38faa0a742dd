"""What both test files use. ppo_procgen comes before PyTorch, as it sets how long OpenMP's threads spin."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_procgen


def run_main(module, arguments, folder):
    """Run a script's main() in folder with these arguments, in this process; return it like a finished one."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    handlers = {signum: signal.getsignal(signum) for signum in ppo_procgen.STOP_SIGNALS}
    folder_before, argv_before = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = [module.__name__ + ".py", *arguments]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = module.main() or 0
    except SystemExit as exit:
        code = exit.code
    finally:
        os.chdir(folder_before)
        sys.argv = argv_before
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def assert_one_line(stderr, *parts):
    assert len(stderr.strip().splitlines()) == 1, stderr
    for part in parts:
        assert part in stderr
