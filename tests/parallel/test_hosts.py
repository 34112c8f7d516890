"""Processes end in time and say what they waited for; signals and hangs become exit codes."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from bigmodel_jax import sections
from bigmodel_jax.errors import EXIT_WATCHDOG, InputError
from bigmodel_jax.parallel import hosts

ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def start(code, *args):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)


def finish(child, timeout=60):
    try:
        output, _ = child.communicate(timeout=timeout)
    finally:
        if child.poll() is None:
            child.kill()
    return child.returncode, output


def free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


JOIN = """
    import os, sys, time
    from bigmodel_jax.parallel import hosts
    index = int(sys.argv[2])
    assert hosts.initialise(sys.argv[1], 2, index, heartbeat_s=10, shutdown_s=5, start_s=int(sys.argv[3]))
    import jax
"""


def test_two_processes_agree_and_one_that_sleeps_is_named():
    code = (
        JOIN
        + """
    import numpy as np
    assert jax.device_count() == 4 and hosts.is_first() == (index == 0)
    assert hosts.from_first((1 << 40) + index) == 1 << 40 and hosts.worst(index) == 1
    assert hosts.from_first(-1 - index) == -1
    hosts.barrier("together", 20)
    hosts.barrier("together", 20)
    if index == 1:
        print("asleep", flush=True)
        time.sleep(30)
    began = time.monotonic()
    try:
        hosts.barrier("before_save", 2.0)
    except Exception as error:
        print(f"waited {time.monotonic() - began:.1f}: {type(error).__name__}: {error}", flush=True)
        os._exit(3)
    """
    )
    address = free_address()
    children = [start(code, address, index, 30) for index in range(2)]
    (rc0, out0), (_, out1) = [finish(child) for child in children]  # the sleeper ends with its coordinator
    assert "asleep" in out1, out1
    assert rc0 == 3, out0
    waited = float(re.search(r"waited ([\d.]+): RunError: barrier 'before_save'", out0).group(1))
    assert 1.5 < waited < 6 and "this is process 0" in out0


def test_a_missing_process_ends_the_start_in_time():
    code = (
        JOIN.replace("    assert hosts", "    try:\n      hosts")
        + """
    except Exception as error:
      print(type(error).__name__, error)
      os._exit(4)
    """
    )
    code = code.replace("    import jax\n", "")
    began = time.monotonic()
    rc, output = finish(start(code, free_address(), 1, 3))
    assert rc in (4, 134, -6) and time.monotonic() - began < 40, output
    assert rc != 4 or "process 1 of 2 could not join" in output


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((None, 2, 0), "coordinator"),
        (("h:1", None, 0), "process_id < num_processes"),
        (("h:1", 2, 2), "process 2 of 2"),
        (("h:1", "two", 0), "num_processes is 'two'"),
    ],
)
def test_impossible_jobs_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        hosts.initialise(*arguments)


def test_one_process_opens_no_socket(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("opened a socket"))
    assert hosts.initialise() is False and hosts.initialise("h:1", 1, 0) is False
    hosts.barrier("alone", 0.1)
    assert hosts.worst(3) == 3 and hosts.from_first(-1) == -1
    monkeypatch.setenv("BIGMODEL_NUM_PROCESSES", "4")
    with pytest.raises(InputError, match="4 processes need a coordinator"):
        hosts.initialise()


def test_an_absent_platform_is_one_line():
    hosts.require_platform("cpu")
    hosts.require_platform("")
    with pytest.raises(InputError, match="'gpu' was asked for") as caught:
        hosts.require_platform("gpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_question_answered_after_the_step(number):
    before = signal.getsignal(number)
    with hosts.Preemption() as preemption:
        assert not preemption.asked(1)
        os.kill(os.getpid(), number)
        assert preemption.asked(2)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
    assert signal.getsignal(number) is before


def test_a_signal_to_one_of_two_stops_both_at_the_same_step():
    code = (
        JOIN
        + """
    with hosts.Preemption() as preemption:
        for step in range(400):
            if preemption.asked(step):
                print("stopped at", step, flush=True)
                break
            if step == 3:
                print("running", flush=True)
            time.sleep(0.05)
    hosts.barrier("end", 20)
    os._exit(75)
    """
    )
    address = free_address()
    children = [start(code, address, index, 30) for index in range(2)]
    while "running" not in (line := children[1].stdout.readline()):
        assert line, "the second process ended early"
    children[1].send_signal(signal.SIGTERM)
    results = [finish(child) for child in children]
    steps = [re.search(r"stopped at (\d+)", output) for _, output in results]
    assert all(steps), results
    assert len({match.group(1) for match in steps}) == 1 and {rc for rc, _ in results} == {75}


WATCH = """
    import ctypes, os, sys, time
    from bigmodel_jax.parallel.hosts import Watchdog
    file = open(sys.argv[1], "w")
    with Watchdog(0.8, file, on_expiry=lambda: file.write("step 12\\n")) as dog:
        for _ in range(5):
            dog.pat()
            time.sleep(0.3)
        print("stuck", flush=True)
        began = time.monotonic()
        {hang}
"""


@pytest.mark.parametrize(
    "hang,codes",
    [
        ("time.sleep(30)", {EXIT_WATCHDOG}),
        ("ctypes.CDLL(None).sleep(30)", {EXIT_WATCHDOG}),  # in C, lock released
        ("ctypes.PyDLL(None).sleep(30)", {1}),  # in C, lock held: only faulthandler can act
    ],
)
def test_a_hang_ends_with_stacks_on_time(tmp_path, hang, codes):
    child = start(WATCH.format(hang=hang), tmp_path / "stacks")
    assert "stuck" in child.stdout.readline()
    began = time.monotonic()
    rc, _ = finish(child, 20)
    assert rc in codes and 0.2 < time.monotonic() - began < 4
    text = (tmp_path / "stacks").read_text()
    assert 'File "<string>", line 11' in text
    assert ("step 12" in text) == (rc == EXIT_WATCHDOG)


def test_a_run_that_goes_on_is_left_alone_and_a_pat_is_cheap(tmp_path):
    code = """
    import sys, time
    from bigmodel_jax.parallel.hosts import Watchdog
    with Watchdog(0.5) as dog:
        for _ in range(4):
            dog.pat()
            time.sleep(0.3)
        dog.pat(grace_s=5)  # one long wait
        time.sleep(1.5)
        costs = []
        for _ in range(200):
            began = time.perf_counter()
            dog.pat()
            costs.append(time.perf_counter() - began)
    time.sleep(1.2)  # disarmed
    with Watchdog(0) as off:
        off.pat()
        assert off._thread is None
    print(sorted(costs)[100])
    """
    rc, output = finish(start(code))
    assert rc == 0, output
    assert float(output) < 1.5e-3


def test_a_job_of_several_processes_is_not_waited_for_for_ever(monkeypatch):
    assert sections.Runtime().watchdog_s == -1
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [hosts.patience(asked) for asked in (-1, 0, 7)] == [hosts.PATIENCE_S, 0, 7]
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert [hosts.patience(asked) for asked in (-1, 0, 7)] == [0, 0, 7]


def test_two_processes_save_walk_back_together_and_one_process_continues(tmp_path):
    code = (
        JOIN
        + """
    import glob, os
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from bigmodel_jax.checkpoint import Checkpointer
    place = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d"))
    value = lambda n: np.full((64, 8), n, np.float32)
    full = lambda n: jax.make_array_from_callback((64, 8), place, lambda i: value(n)[i])
    directory = sys.argv[4]
    said = []
    with Checkpointer(directory, timeout_s=30, log=said.append) as saver:
        for step in (1, 2, 3):
            saver.save(step, {"w": full(step)}, {"step": step})
        saver.wait()
        if index == 0:
            path = max(glob.glob(f"{directory}/3/state/**/d/*", recursive=True), key=os.path.getsize)
            data = bytearray(open(path, "rb").read())
            data[len(data) // 2] ^= 1
            open(path, "wb").write(data)
        hosts.barrier("damaged", 30)
        state, meta = saver.restore({"w": full(0)})
        right = all((np.asarray(s.data) == 2).all() for s in state["w"].addressable_shards)
        print("restored", meta["step"], right, len(said), flush=True)
    hosts.barrier("end", 30)
    """
    )
    address = free_address()
    children = [start(code, address, index, 30, tmp_path / "c") for index in range(2)]
    results = [finish(child) for child in children]
    for rc, output in results:
        assert rc == 0 and "restored 2 True 1" in output, output
    from bigmodel_jax.checkpoint import Checkpointer

    with Checkpointer(tmp_path / "c") as saver:
        state, meta = saver.restore({"w": np.zeros((64, 8), np.float32)})
    assert meta["step"] == 2 and (state["w"] == 2).all()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2", "3.corrupt"]
