r"""Workers under hostile input: deadlines, crashes, memory, orphans. Real processes, really killed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import shared_data

from rlvr.batch import Prompt, Verdict
from rlvr.verifiers import MathVerifier
from rlvr.verifiers.pool import VerifierError, WorkerPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"
DEADLINE_S = 0.5


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    made = MathVerifier(workers=1, deadline_s=DEADLINE_S)
    yield made
    made.close()


def prompt(answer: str) -> Prompt:
    return Prompt(index=0, id="p", text="", answer=answer)


def workers_of(parent: int) -> set[int]:
    """Living worker processes of a process, from /proc."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes()
        except (OSError, ValueError):  # no process, or ended meanwhile
            continue
        if int(ppid) == parent and state != "Z" and b"rlvr.answers.worker" in command:
            found.add(int(folder.name))
    return found


def gone(pid: int, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def cpu_ticks(pid: int) -> float:
    """User and system time of a process so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return float(fields[11]) + float(fields[12])


def healthy(verifier: MathVerifier) -> bool:
    """Whether a formula is judged, in a process."""
    return verifier(prompt(r"2\sqrt{3}"), r"\boxed{\sqrt{12}}").reason == "right"


def failed(verdict: Verdict) -> bool:
    return verdict.reason.startswith("verifier error") and verdict.reward == 0.0 and not verdict.correct


def test_nothing_starts_before_a_formula_needs_it() -> None:
    before = workers_of(os.getpid())
    verifier = MathVerifier(workers=1)
    for gold, answer in [
        ("7", "7"),
        ("1/2", "0.5"),
        ("(1,2)", "[1,2]"),
        (r"\text{odd}", "even"),
        ("x=1", "2"),
    ]:
        verifier(prompt(gold), rf"\boxed{{{answer}}}")
    assert workers_of(os.getpid()) == before
    assert healthy(verifier)
    assert len(workers_of(os.getpid()) - before) == 1
    verifier.close()
    assert workers_of(os.getpid()) == before


def test_the_deadline_holds_and_leaves_the_pool_healthy(verifier: MathVerifier) -> None:
    assert healthy(verifier)
    begin = time.monotonic()
    verdict = verifier(prompt("x+1"), ENDLESS)
    assert time.monotonic() - begin < DEADLINE_S + 2
    assert failed(verdict)
    assert "timeout after 0.5 s" in verdict.reason
    assert healthy(verifier)


def test_a_worker_killed_at_work_is_an_error_and_replaced(verifier: MathVerifier) -> None:
    patient = MathVerifier(workers=1, deadline_s=60)
    before = workers_of(os.getpid())
    future = patient.submit(prompt("x+1"), ENDLESS)
    end = time.monotonic() + 20
    while not (new := workers_of(os.getpid()) - before) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1.0)  # it has started by now, or has not: both count
    os.kill(new.pop(), signal.SIGKILL)
    verdict = future.result(timeout=5)
    assert failed(verdict)
    assert "died" in verdict.reason
    assert healthy(patient)
    patient.close()


def test_a_worker_killed_at_rest_is_replaced_in_silence() -> None:
    verifier = MathVerifier(workers=1)
    before = workers_of(os.getpid())
    assert healthy(verifier)
    killed = (workers_of(os.getpid()) - before).pop()
    os.kill(killed, signal.SIGKILL)
    assert gone(killed, within_s=5)
    assert healthy(verifier)
    verifier.close()


def test_out_of_memory_is_an_error_and_ends_its_own_worker_alone() -> None:
    """A number of a GiB takes one of two workers; the other goes on, and so does its replacement."""
    pool = WorkerPool(2, deadline_s=30, memory_mib=512)
    before = workers_of(os.getpid())
    assert pool.submit(r"2\sqrt{3}", r"\sqrt{12}").result(60)
    first = workers_of(os.getpid()) - before
    hungry = pool.submit("x+1", "2^{2^{33}}")
    fine = [pool.submit(rf"{i}\sqrt{{3}}", rf"\sqrt{{{3 * i * i}}}") for i in range(2, 12)]
    assert all(future.result(60) for future in fine)
    with pytest.raises(VerifierError, match="MemoryError"):
        hungry.result(60)
    assert pool.submit(r"2\sqrt{3}", r"\sqrt{12}").result(60)
    assert len(first) == 1
    assert len(workers_of(os.getpid()) - before) <= 2
    pool.close()
    assert workers_of(os.getpid()) == before


def test_a_killed_worker_takes_no_other_with_it() -> None:
    """Two workers: one is killed at work, the other keeps its process and its verdicts."""
    patient = MathVerifier(workers=2, deadline_s=60)
    before = workers_of(os.getpid())
    assert healthy(patient)
    (resting,) = workers_of(os.getpid()) - before
    # The thread that is free takes it: the second one, or the first, whose process is then the one at work.
    stuck = patient.submit(prompt("x+1"), ENDLESS)
    assert healthy(patient)
    both = workers_of(os.getpid()) - before
    assert len(both) == 2
    # The one whose time grows: what each has used before says nothing of what it does now.
    used, deadline = {pid: cpu_ticks(pid) for pid in both}, time.monotonic() + 30
    while not (at_work := [pid for pid in both if cpu_ticks(pid) >= used[pid] + 30]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (busy,) = at_work
    other = (both - {busy}).pop()
    os.kill(busy, signal.SIGKILL)
    assert "died" in stuck.result(timeout=5).reason
    assert all(healthy(patient) for _ in range(5))
    assert other in workers_of(os.getpid())
    assert resting in both
    patient.close()


def test_results_come_in_order_and_fast_ones_do_not_wait() -> None:
    verifier = MathVerifier(workers=2, deadline_s=60)
    slow = verifier.submit(prompt("x+1"), ENDLESS)
    roots = [rf"\sqrt{{{3 * i * i}}}" for i in range(2, 12)]
    golds = [rf"{i}\sqrt{{3}}" for i in range(2, 12)]
    fast = [
        verifier.submit(prompt(gold), rf"\boxed{{{root}}}") for gold, root in zip(golds, roots, strict=True)
    ]
    assert [future.result(timeout=30).answer for future in fast] == roots
    assert all(future.result().correct for future in fast)
    assert not slow.done()
    verifier.close()
    assert failed(slow.result(timeout=0))


def test_a_worker_outlives_the_thread_that_first_needed_it(verifier: MathVerifier) -> None:
    thread = threading.Thread(target=healthy, args=(verifier,))
    thread.start()
    thread.join()
    running = workers_of(os.getpid())
    assert healthy(verifier)
    assert workers_of(os.getpid()) == running


def test_close_ends_what_is_running() -> None:
    verifier = MathVerifier(workers=2, deadline_s=60)
    before = workers_of(os.getpid())
    assert healthy(verifier)
    futures = [verifier.submit(prompt("x+1"), ENDLESS) for _ in range(4)]
    begin = time.monotonic()
    verifier.close()
    verifier.close()
    assert time.monotonic() - begin < 5
    assert all(failed(future.result(timeout=0)) for future in futures)
    assert workers_of(os.getpid()) == before
    assert failed(verifier(prompt(r"\sqrt{8}"), r"\boxed{2\sqrt{2}}"))
    assert verifier(prompt("7"), r"\boxed{7}").correct


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    """kill -9 of the run leaves no orphan, neither a resting worker nor one deep in a power of C."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            r"""
            import time
            from rlvr.batch import Prompt
            from rlvr.verifiers import MathVerifier

            verifier = MathVerifier(workers=2, deadline_s=600)
            verifier(Prompt(0, "p", "", r"\sqrt{8}"), r"\boxed{2\sqrt{2}}")
            verifier.submit(Prompt(0, "p", "", "x+1"), r"\boxed{9^{9^{9^{9}}}}")
            verifier.submit(Prompt(0, "p", "", r"\sqrt{8}"), r"\boxed{2\sqrt{2}}").result()
            time.sleep(0.5)
            print("ready", flush=True)
            time.sleep(600)
            """
        )
    )
    run = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    workers = workers_of(run.pid)
    assert len(workers) == 2
    run.kill()
    run.wait()
    run.stdout.close()
    assert all(gone(pid, within_s=5) for pid in workers)


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("\\boxed{" + "1" * 100_000 + "}", id="100 kB of digits"),
        pytest.param("\\boxed{" * 14_000, id="open boxes"),
        pytest.param("\\" * 100_000, id="backslashes"),
        pytest.param("$" * 50_000 + "\\(" * 25_000, id="open formulas"),
        pytest.param("{" * 50_000 + "}" * 50_000, id="braces"),
        pytest.param("the answer is " * 7_000, id="statements without one"),
        pytest.param("1 " * 50_000, id="numbers"),
        pytest.param("1,234" * 20_000, id="thousands"),
        pytest.param("\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}", id="nested parentheses"),
        pytest.param("\\boxed{" + "\\sqrt{" * 280 + "1" + "}" * 280 + "}", id="nested roots"),
        pytest.param("\\boxed{" + "\\frac" * 380 + "}", id="fractions of fractions"),
        pytest.param("\\boxed{" + "1," * 900 + "x}", id="a long list"),
        pytest.param("\\boxed{x\ud800+1\x00}", id="lone surrogate, NUL"),
        pytest.param("\\boxed{\\sqrt{2}\ud800\udfff}", id="surrogates at a worker"),
        pytest.param("\\boxed{\\sqrt{\u0661}\u2028\u202e}", id="odd digits and directions"),
    ],
)
def test_hostile_text_ends_in_time(verifier: MathVerifier, response: str) -> None:
    begin = time.monotonic()
    verdict = verifier(prompt("x+2"), response)
    assert time.monotonic() - begin < DEADLINE_S + 2
    assert not verdict.correct
    assert healthy(verifier)


def test_nothing_of_the_model_runs(verifier: MathVerifier, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for code in (
        f"__import__('os').system('touch {made}')",
        f"open('{made}','w')",
        "exit()",
        "(lambda: 1)()",
    ):
        for frame in ("{}", r"\boxed{{{}}}", "The answer is {}", r"\boxed{{\text{{{}}}+x}}"):
            verifier(prompt("x+2"), frame.format(code))
    assert not made.exists()
    assert healthy(verifier)


def test_shared_hostile_inputs(verifier: MathVerifier) -> None:
    """Each ends within two seconds of the deadline, with a verdict or a counted error; neighbours go on."""
    neighbour = MathVerifier(workers=1)
    before = workers_of(os.getpid())
    assert healthy(neighbour)
    (beside,) = workers_of(os.getpid()) - before
    for case in shared_data.rows("verifier/adversarial_inputs.jsonl"):
        begin = time.monotonic()
        verdict = verifier(prompt(case["gold"]), case["pred"])
        assert time.monotonic() - begin < DEADLINE_S + 2, case["id"]
        assert verdict.reason in ("right", "wrong", "no answer", "answer too long") or failed(verdict)
    assert healthy(verifier)
    assert healthy(neighbour)
    assert beside in workers_of(os.getpid())
    neighbour.close()


def test_10_000_integers_a_second(verifier: MathVerifier) -> None:
    """The cheap path, at a tenth of the rate so that a busy machine passes; the benchmark measures."""
    begin = time.perf_counter()
    for i in range(2000):
        assert verifier(prompt(str(i)), rf"So the answer is \boxed{{{i}}}.").correct
    assert 2000 / (time.perf_counter() - begin) > 1000
