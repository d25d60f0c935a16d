"""Starts ranks of train.py, sft.py, eval.py or curate.py in a tenth of a second.

A process that has imported everything forks them.

`Zygote().start(script, arguments, ranks, output, code)` runs the script's main() in `ranks` fresh
processes, as torchrun would, and returns their process ids. `code` is run in each of them first and
may change what it likes; it finds all modules that are imported under their names, those of
training/ and inputs/ without the name of their folder. RANK is its rank.

Forked, not spawned: the parent has never computed anything, so no threads are lost in a fork.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script


class Zygote:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, arguments, ranks, output, code=""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        return self.ask(
            script=script,
            arguments=[*map(str, arguments)],
            ranks=ranks,
            output=str(output),
            code=code,
            port=port,
        )

    def wait(self, pids, timeout=120):
        """Exit codes of the processes, negative for signals; what is left at the end is killed."""
        end = time.monotonic() + timeout
        while None in (codes := self.ask(poll=pids)) and time.monotonic() < end:
            time.sleep(0.02)
        self.kill([pid for pid, code in zip(pids, codes, strict=True) if code is None])
        assert None not in codes, f"still running after {timeout} s: exit codes {codes}"
        return codes

    def run(self, script, arguments, ranks, output, code="", timeout=120):
        return self.wait(self.start(script, arguments, ranks, output, code), timeout)

    def kill(self, pids, number=signal.SIGKILL):
        for pid in pids:
            if self.ask(poll=[pid]) == [None]:  # not reaped, so the number is its own
                os.kill(pid, number)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def child(q, rank):
    os.setsid()
    with open(q["output"], "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if q["ranks"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(q["ranks"]),
            MASTER_ADDR="127.0.0.1",
            LOCAL_WORLD_SIZE=str(q["ranks"]),
            MASTER_PORT=str(q["port"]),
        )
    import configurator

    sys.argv = [q["script"] + ".py", *q["arguments"]]
    modules = dict(sys.modules)
    for name, module in sys.modules.items():
        folder, _, short = name.rpartition(".")
        if folder in ("training", "inputs"):
            modules[short] = module
    exec(q["code"], {"RANK": rank, **modules})
    configurator.run_script(importlib.import_module(q["script"]).main)


def main():
    import torch
    import torch.utils.data

    for script in ("curate", "eval", "sft", "train"):
        importlib.import_module(script)

    torch.set_num_threads(1)
    codes = {}
    for line in sys.stdin:
        q = json.loads(line)
        if "poll" in q:
            for pid in q["poll"]:
                if codes.get(pid) is None and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(done[1])
            answer = [codes.get(pid) for pid in q["poll"]]
        else:
            answer = []
            for rank in range(q["ranks"]):
                if not (pid := os.fork()):
                    code = 1
                    try:
                        child(q, rank)
                        code = 0
                    except SystemExit as e:
                        code = e.code or 0
                    except BaseException:
                        traceback.print_exc()
                    sys.stdout.flush()
                    # a save under way ends first
                    for thread in threading.enumerate():
                        if not thread.daemon and thread is not threading.main_thread():
                            thread.join()
                    os._exit(code)
                answer.append(pid)
                codes[pid] = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
