"""Mutants of CUDA kernels on the host executor: that a change at a site is the mistake it stands for, the mutants that
have a name, and that the script which tries all of them can fail."""

import itertools

import numpy as np
import pytest
from executor import mutants
from executor.build import EXECUTOR, build
from executor.executor import SETTINGS, Executor
from executor.faults import EVERY_SETTING, pipeline, shift

from benchmarks.gpu import reuse, sanitize
from nf4kernels.backends import native


@pytest.fixture(scope="module")
def library():
    return build("faults", [EXECUTOR / "faults.cu"])


@pytest.fixture
def faults(library):
    faults = Executor(library)
    yield faults
    faults.set()
    faults.reset()


def wrong_under(faults, run) -> set:
    """The settings under which a kernel ends with an error or a wrong result."""
    found = set()
    for schedule, copies, seed in EVERY_SETTING:
        faults.set(schedule, copies, seed)
        try:
            result, expected = run()
        except AssertionError:
            found.add((schedule, copies))
        else:
            found |= set() if np.array_equal(result, expected) else {(schedule, copies)}
    return found


# A change at the site of a correct kernel, the variant of faults.cu that has the same mistake in its source (0: none).
CHANGES = {
    ("copy_async_wait", "removed"): 1,
    ("copy_async_wait", "short"): 2,
    ("sync_block", "removed"): 3,
    ("sync_block", "late"): 0,
    ("copy_async_commit", "removed"): 0,
}


@pytest.mark.parametrize(("what", "change"), CHANGES)
def test_a_change_at_a_site_is_the_mistake_in_the_source(faults, what, change):
    def run(variant):
        code, result, expected = pipeline(faults, variant)
        assert code == 0
        return result, expected

    assert not wrong_under(faults, lambda: run(0))
    (site,) = (site for site in faults.sites() if site.what == what)
    assert faults.sites()[site] == (what == "sync_block"), "the barrier alone has copies after it"
    with faults.changed(site, change):
        changed = wrong_under(faults, lambda: run(0))
    assert changed
    if CHANGES[what, change]:
        assert wrong_under(faults, lambda: run(CHANGES[what, change])) <= changed
    assert not wrong_under(faults, lambda: run(0)), "the change has ended"


def test_a_change_is_of_one_kernel_alone(faults):
    shift(faults, 0, 1)
    (site,) = faults.sites()
    with faults.changed(site._replace(kernel="another"), "removed"):
        assert not wrong_under(faults, lambda: shift(faults, 0, 1))
    with faults.changed(site, "removed"):
        assert wrong_under(faults, lambda: shift(faults, 0, 1))


def test_steps_and_stages_of_a_pipeline_are_counted(faults):
    for steps, reused in ((1, False), (3, True), (5, True)):
        faults.reset()
        pipeline(faults, 0, steps)
        (found,) = faults.pipelines()
        # The step past the end copies zeros.
        assert (found.stages, found.fewest, found.most) == (min(2, steps + 1), steps + 1, steps + 1)
        assert found.is_reused == reused


# The mutants with a name.


@pytest.fixture
def trial(executor_ops):
    trial = mutants.Trial(executor_ops.executor, executor_ops.ops)
    yield trial
    trial.set(*SETTINGS[0])


def cases_of(trial, op):
    """Of each tile, unsplit, with scaled sums."""
    for each in reuse.reuses(op, native.cuda_tiles(trial.executor.library, op)):
        if each.kernel.splits == 1 and each.scales_sums:
            yield sanitize.Case(str(each), op, sanitize.product(op, each), (each.kernel,))


@pytest.mark.parametrize("op", reuse.PIPELINED)
def test_a_fetch_before_the_barrier_is_noticed_in_every_tile(trial, op):
    """Its copies fill the stage that the step before has read, and other warps may read it still: a shape of no more
    steps than stages fills each stage once, and lets it pass."""
    for case in cases_of(trial, op):
        (call,) = trial.calls([case])
        late = [mutant for mutant in mutants.mutants_of([call]) if mutant.change == "late"]
        assert len(late) == 1, late
        assert trial.verdict(late[0], [call]) in ("wrong bits", "race"), late[0]


@pytest.mark.parametrize("op", reuse.PIPELINED)
def test_a_wait_for_one_group_less_is_noticed_in_every_tile(trial, op):
    """A step would be multiplied before its copies have arrived; in the last tile, whose steps are the most."""
    (call,) = trial.calls(list(cases_of(trial, op))[-1:])
    short = [m for m in mutants.mutants_of([call]) if m.change == "short" and mutants.proof_of(m) is None]
    assert len(short) == 1, short
    assert trial.verdict(short[0], [call]) in ("wrong bits", "unfinished copy", "race")


# The script.


def test_the_script_tells_caught_equivalent_and_survived(trial, monkeypatch, capsys):
    case = next(cases_of(trial, "linear"))
    calls = list(trial.calls([case]))
    verdicts = mutants.try_all(trial, calls)
    assert set(verdicts.values()) <= {"wrong bits", "unfinished copy", "race", "equivalent", "divergent"}
    assert "equivalent" in verdicts.values()
    assert f"{len(verdicts)} mutants" in mutants.summary(verdicts)
    assert "linear_tiled_kernel" in mutants.table(verdicts)

    monkeypatch.setattr(mutants, "EQUIVALENT", {})
    unproven = mutants.try_all(trial, calls, "linear_tiled")
    assert set(unproven.values()) - set(verdicts.values()) == {"SURVIVED"}
    assert mutants.try_all(trial, calls, "dgrad") == {}

    caught = next(mutant for mutant, verdict in verdicts.items() if verdict == "wrong bits")
    monkeypatch.setattr(mutants, "EQUIVALENT", {(caught.kernel, caught.line, caught.change): "a wrong proof"})
    with pytest.raises(AssertionError, match="is not equivalent: "):
        mutants.try_all(trial, calls, "linear_tiled")


def test_a_mutant_that_crashes_ends_its_own_process_alone(trial, monkeypatch):
    (call,) = trial.calls(itertools.islice(cases_of(trial, "linear"), 1))
    mutant = mutants.mutants_of([call])[0]
    monkeypatch.setattr(trial, "_verdict", lambda *_: mutants.os.kill(mutants.os.getpid(), 11))
    assert trial.verdict(mutant, [call]) == "ends by signal 11"


def test_a_site_that_no_case_reaches_is_named(trial):
    calls = list(trial.calls(itertools.islice(cases_of(trial, "linear"), 1)))
    missing = mutants.unreached(calls)
    assert any(place.startswith("quantize.cu:") for place in missing)
    assert not any(place.startswith("linear_tiled.cuh:") for place in missing)
