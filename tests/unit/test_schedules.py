"""ID, DID and OD against exact fractions (method.md, section 3)."""

import json
import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from rlvr.clipping import ClipRange, LinearThreshold
from rlvr.schedules import (
    DYNAMIC_LOWER,
    DYNAMIC_UPPER,
    EPS_STD,
    OscillatoryDecay,
    SecondPhase,
    decrease_increase_decrease,
    increase_then_decrease,
)

Schedule = Callable[..., ClipRange]
Line = tuple[Fraction, Fraction]

U: Line = (Fraction(-25, 100), Fraction(1, 2))
M: Line = (Fraction(-13, 100), Fraction(3, 10))
EPS: Line = (Fraction(0), Fraction(2, 10))
TURNS = [Fraction(3, 10), Fraction(4, 10), Fraction(5, 10), Fraction(6, 10)]
SCHEDULES = [
    pytest.param(increase_then_decrease, id="ID"),
    pytest.param(decrease_increase_decrease, id="DID"),
]
READINGS = ["text", "printed"]


def between(start: Line, end: Line, done: Fraction) -> Line:
    """The line ``done`` of the way from ``start`` to ``end``."""
    slope, intercept = ((1 - done) * a + done * b for a, b in zip(start, end, strict=True))
    return slope, intercept


def exact(schedule: Schedule, k: int, total: int, turn: Fraction, reading: str) -> tuple[Line, Line]:
    """(upper, lower) of iteration k of T, from the table of method.md, section 3, in fractions."""
    rising = schedule is increase_then_decrease
    if k < turn * total:
        done = Fraction(k) / (turn * total)
        return between(*((U, EPS) if rising else (EPS, U)), done), EPS
    done = (k - turn * total) / ((1 - turn) * total)
    lower = between(EPS, M, done) if reading == "text" else between(M, EPS, done)
    return EPS if rising else U, lower


def assert_lines(clip: ClipRange, upper: Line, lower: Line) -> None:
    for threshold, (slope, intercept) in ((clip.upper, upper), (clip.lower, lower)):
        assert threshold.slope == pytest.approx(float(slope), abs=1e-14)
        assert threshold.intercept == pytest.approx(float(intercept), abs=1e-14)


def test_the_paper_s_thresholds() -> None:
    assert LinearThreshold(-0.25, 0.5) == DYNAMIC_UPPER
    assert LinearThreshold(-0.13, 0.3) == DYNAMIC_LOWER
    assert LinearThreshold(0.0, 0.2) == EPS_STD


@pytest.mark.parametrize(
    ("schedule", "reading", "k", "upper", "lower"),
    [
        pytest.param(increase_then_decrease, "text", 0, (-0.25, 0.5), (0, 0.2), id="ID k=0: U, eps"),
        pytest.param(increase_then_decrease, "text", 4, (-0.05, 0.26), (0, 0.2), id="ID last of phase I"),
        pytest.param(increase_then_decrease, "text", 5, (0, 0.2), (0, 0.2), id="ID turn: eps, still eps"),
        pytest.param(increase_then_decrease, "text", 9, (0, 0.2), (-0.104, 0.28), id="ID last: nearly M"),
        pytest.param(
            increase_then_decrease, "printed", 4, (-0.05, 0.26), (0, 0.2), id="ID printed, last of I"
        ),
        pytest.param(
            increase_then_decrease, "printed", 5, (0, 0.2), (-0.13, 0.3), id="ID printed, turn: jump to M"
        ),
        pytest.param(
            increase_then_decrease, "printed", 9, (0, 0.2), (-0.026, 0.22), id="ID printed, last: back"
        ),
        pytest.param(decrease_increase_decrease, "text", 0, (0, 0.2), (0, 0.2), id="DID k=0: GRPO"),
        pytest.param(decrease_increase_decrease, "text", 4, (-0.2, 0.44), (0, 0.2), id="DID last of phase I"),
        pytest.param(
            decrease_increase_decrease, "text", 5, (-0.25, 0.5), (0, 0.2), id="DID turn: U, still eps"
        ),
        pytest.param(
            decrease_increase_decrease, "text", 9, (-0.25, 0.5), (-0.104, 0.28), id="DID last: U, nearly M"
        ),
        pytest.param(
            decrease_increase_decrease, "printed", 5, (-0.25, 0.5), (-0.13, 0.3), id="DID printed, turn"
        ),
        pytest.param(
            decrease_increase_decrease, "printed", 9, (-0.25, 0.5), (-0.026, 0.22), id="DID printed, last"
        ),
    ],
)
def test_schedules_by_hand(
    schedule: Schedule, reading: str, k: int, upper: tuple[float, float], lower: tuple[float, float]
) -> None:
    """T = 10, turn 0.5."""
    clip = schedule(k / 10, turn=0.5, second_phase=reading)
    assert (clip.upper.slope, clip.upper.intercept) == pytest.approx(upper, abs=1e-15)
    assert (clip.lower.slope, clip.lower.intercept) == pytest.approx(lower, abs=1e-15)
    assert clip.mode == "current"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_whole_runs_against_fractions(schedule: Schedule, reading: SecondPhase, turn: Fraction) -> None:
    for total in (1, 2, 3, 7, 10, 64, 400):
        for k in range(total):
            clip = schedule(k / total, turn=float(turn), second_phase=reading)
            assert_lines(clip, *exact(schedule, k, total, turn, reading))


@pytest.mark.parametrize("turn", [*TURNS, Fraction(1, 3), Fraction(7, 100)], ids=str)
def test_phase_2_starts_at_the_first_k_that_reaches_the_turn(turn: Fraction) -> None:
    """Exactly: on integers. In floats 0.6 * 5 and 3 / 5 are traps; ID's upper threshold tells the phase."""
    for total in [*range(2, 500), 1000, 4096, 99_991, 10**6, 10**9]:
        first = -(-turn.numerator * total // turn.denominator)
        for k in {max(first - 1, 0), min(first, total - 1), min(first + 1, total - 1)}:
            in_second = increase_then_decrease(k / total, turn=float(turn)).upper == EPS_STD
            assert in_second == (k * turn.denominator >= turn.numerator * total), (k, total)


@pytest.mark.parametrize("total", [2, 10, 15, 400])
def test_a_turn_of_one_half_is_the_paper_s_lambda(total: int) -> None:
    """lambda = 1 - 2k/T: its own formulas, lambda > 0 in phase I and <= 0 in phase II."""
    for k in range(total):
        lam = 1 - Fraction(2 * k, total)
        if lam > 0:
            loosening, tightening = between(U, EPS, lam), between(EPS, U, lam)
            text = printed = EPS
        else:
            loosening, tightening = U, EPS
            text = between(EPS, M, -lam)
            printed = ((1 + lam) * M[0] - lam * EPS[0], (1 + lam) * M[1] - lam * EPS[1])
        for reading, lower in (("text", text), ("printed", printed)):
            assert_lines(increase_then_decrease(k / total, second_phase=reading), tightening, lower)
            assert_lines(decrease_increase_decrease(k / total, second_phase=reading), loosening, lower)


def test_phase_2_as_printed_is_the_text_s_run_backwards() -> None:
    """And they are no small variation: at the turn they differ by the whole of M - eps."""
    for schedule in (increase_then_decrease, decrease_increase_decrease):
        text = [schedule(k / 20, second_phase="text").lower(0.0) for k in range(10, 20)]
        printed = [schedule(k / 20, second_phase="printed").lower(0.0) for k in range(10, 20)]
        assert text == sorted(text)
        assert printed == sorted(printed, reverse=True)
        assert (text[0], printed[0]) == (0.2, 0.3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_thresholds_take_their_places(schedule: Schedule) -> None:
    """E.3: Clip-Higher for U, Clip-Lower for M."""
    higher, eps = LinearThreshold(0.0, 0.28), LinearThreshold(0.0, 0.2)
    own = {"high": higher, "low": LinearThreshold(0.0, 0.4), "base": eps, "turn": 0.25}
    rising = schedule is increase_then_decrease
    assert schedule(0.0, **own) == ClipRange(lower=eps, upper=higher if rising else eps)
    late = schedule(0.625, **own)
    assert late.upper == (eps if rising else higher)
    assert late.lower(0.5) == pytest.approx(0.3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param({"progress": -0.1}, "-0.1", id="progress below 0"),
        pytest.param({"progress": 1.0}, "1.0", id="progress of 1: there is no iteration T"),
        pytest.param({"progress": math.nan}, "nan", id="progress not a number"),
        pytest.param({"progress": 0.0, "turn": 0.0}, "turn.*0.0", id="no phase I"),
        pytest.param({"progress": 0.0, "turn": 1.0}, "turn.*1.0", id="no phase II"),
        pytest.param({"progress": 0.0, "turn": math.nan}, "turn.*nan", id="turn not a number"),
        pytest.param({"progress": 0.9, "second_phase": "both"}, "'both'", id="unknown reading, in phase II"),
        pytest.param(
            {"progress": 0.0, "second_phase": "both"}, "'both'", id="unknown reading, already at k=0"
        ),
    ],
)
def test_refused(schedule: Schedule, arguments: dict[str, float | str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        schedule(**arguments)


RAISE = ClipRange(lower=EPS_STD, upper=DYNAMIC_UPPER)
LOWER = ClipRange(lower=DYNAMIC_LOWER, upper=EPS_STD)

# T = 8, H_init = 5, floor 0.2: tau_low = 1, tau_high(k) = 1 + 4 (1 - k/8), all exact in floats.
TRACE = [
    (5.0, LOWER, "k=0, H = H_init = tau_high: not above it, s stays 0"),
    (3.0, LOWER, "between: s stays 0"),
    (1.0, RAISE, "H = tau_low: a tie switches to s = 1"),
    (3.5, RAISE, "H = tau_high: a tie does not switch back"),
    (3.1, LOWER, "H above tau_high = 3: s = 0"),
    (1.01, LOWER, "just above tau_low: s stays 0"),
    (0.5, RAISE, "below tau_low: s = 1"),
    (1.5, RAISE, "H = tau_high = 1.5: s stays 1"),
]


def test_oscillatory_decay_by_hand() -> None:
    schedule = OscillatoryDecay()
    for k, (entropy, expected, why) in enumerate(TRACE):
        assert schedule.step(entropy, k / 8) == expected, f"k={k}: {why}"
    assert schedule.switches == 3
    assert schedule.initial_entropy == 5.0


def test_the_same_entropy_has_either_state() -> None:
    """Hysteresis: what H = 2.5 does depends on the side it came from."""
    from_above, from_below = OscillatoryDecay(initial_entropy=5.0), OscillatoryDecay(initial_entropy=5.0)
    from_above.step(4.0, 0.0)
    from_below.step(0.9, 0.0)
    assert (from_above.step(2.5, 0.125), from_below.step(2.5, 0.125)) == (LOWER, RAISE)


@pytest.mark.parametrize("seed", range(5))
def test_oscillatory_decay_against_fractions(seed: int) -> None:
    """Entropies on a grid of 1/8 nat, so that ties with both taus happen, and T = 64."""
    draws = random.Random(seed)
    schedule = OscillatoryDecay(floor=0.25)
    state, switches, first = 0, 0, Fraction(4)
    for k in range(64):
        entropy = Fraction(draws.randrange(1, 33), 8) if k else first
        lowest = first / 4
        highest = lowest + (first - lowest) * (1 - Fraction(k, 64))
        before = state
        if entropy <= lowest:
            state = 1
        elif entropy > highest:
            state = 0
        switches += state != before
        assert schedule.step(float(entropy), k / 64) == (RAISE if state else LOWER)
    assert schedule.switches == switches > 0


def test_the_corridor_narrows_to_its_floor() -> None:
    schedule = OscillatoryDecay(initial_entropy=2.0, floor=0.2)
    corridors = [schedule.corridor(k / 10) for k in range(10)]
    assert [low for low, _ in corridors] == pytest.approx([0.4] * 10)
    assert [high for _, high in corridors] == pytest.approx([0.4 + 1.6 * (10 - k) / 10 for k in range(10)])


def test_a_given_initial_entropy_is_not_overwritten() -> None:
    schedule = OscillatoryDecay(initial_entropy=10.0)
    assert schedule.step(2.0, 0.0) == RAISE
    assert schedule.initial_entropy == 10.0


@pytest.mark.parametrize("cut", range(len(TRACE) + 1))
def test_a_resumed_run_goes_on_the_same(cut: int) -> None:
    """The state is plain data, through JSON here; the thresholds come from configuration, not from it."""
    before = OscillatoryDecay()
    for k in range(cut):
        before.step(TRACE[k][0], k / 8)
    after = OscillatoryDecay()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after == before
    for k in range(cut, len(TRACE)):
        assert after.step(TRACE[k][0], k / 8) == TRACE[k][1]
    assert after.switches == 3


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"raising": True}, id="keys missing"),
        pytest.param(
            {"initial_entropy": 1.0, "raising": True, "switches": 1, "flor": 0.3}, id="a key unknown"
        ),
    ],
)
def test_another_state_is_refused(state: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="raising"):
        OscillatoryDecay().load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param({"floor": 1.0}, "1.0", id="floor of 1: no corridor"),
        pytest.param({"floor": -0.1}, "-0.1", id="negative floor"),
        pytest.param({"floor": math.nan}, "nan", id="floor not a number"),
        pytest.param({"initial_entropy": 0.0}, "0.0", id="initial entropy of 0"),
        pytest.param({"initial_entropy": -1.0}, "-1.0", id="negative initial entropy"),
        pytest.param({"initial_entropy": math.inf}, "inf", id="infinite initial entropy"),
    ],
)
def test_oscillatory_decay_refused(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OscillatoryDecay(**arguments)


def test_no_corridor_before_the_first_iteration() -> None:
    with pytest.raises(ValueError, match="initial entropy"):
        OscillatoryDecay().corridor(0.0)


@pytest.mark.parametrize("progress", [-0.1, 1.0, math.nan])
def test_progress_outside_the_run_is_refused_by_od(progress: float) -> None:
    with pytest.raises(ValueError, match=str(progress)):
        OscillatoryDecay(initial_entropy=1.0).step(0.5, progress)


@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_an_entropy_that_is_not_finite_is_refused(entropy: float) -> None:
    """It would pass both comparisons silently, and as the first one disable OD for good."""
    schedule = OscillatoryDecay()
    with pytest.raises(ValueError, match=str(entropy)):
        schedule.step(entropy, 0.0)
    assert schedule == OscillatoryDecay()
