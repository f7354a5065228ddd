"""Mutants of CUDA kernels on the host executor: that a change at a site is the mistake it stands for, the mutants that
have a name, and that the script which tries all of them can fail."""

import ctypes
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from executor import mutants
from executor.build import CSRC, EXECUTOR, build
from executor.executor import SETTINGS, Executor
from executor.faults import EVERY_SETTING, pipeline, shift
from support import cuda_backend
from support.paths import ROOT

import nf4kernels as nf4
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


# quantize, quantize_absmax and reduce_splits alone, under the race detector: what is read too soon there is often the
# right value all the same, or not used.
LAUNCHERS = """
#include "cuda/kernels.h"
using namespace nf4;
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED int run_quantize(const void* weight, int64_t numel, const float* code, uint8_t* packed, float* absmax) {
  return cuda::quantize({weight, Dtype::kBFloat16, numel, code, 6, packed, absmax}, nullptr);
}
EXPORTED int run_quantize_absmax(const float* absmax, int64_t blocks, const float* scale_code, double* sums,
                                 uint8_t* quantized, float* scale_absmax, float* offset) {
  return cuda::quantize_absmax({absmax, blocks, scale_code, false, sums, quantized, scale_absmax, offset}, nullptr);
}
EXPORTED int run_reduce(const float* partial, int64_t rows, int64_t columns, int64_t transposed,
                        float* out) {
  return cuda::reduce_splits({partial, 2, rows, columns, 1.f, Dtype::kFloat32, out, transposed != 0}, nullptr);
}
"""


class Raced:
    """The three kernels' launchers; each returns the message of the launch that failed, or an empty string."""

    def __init__(self, library):
        self.executor = Executor(library)

    def run(self, name, *arguments, blocks=0):
        self.executor.limit_grid(blocks)
        converted = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in arguments
        ]
        code = getattr(self.executor.library, f"run_{name}")(*converted)
        return self.executor.error() if code else ""

    def quantize(self):
        w, code = torch.randn(40 * 1024 + 3 * 64 + 24).bfloat16(), nf4.codebook.NF4.clone()
        packed, absmax = torch.zeros(w.numel() // 2, dtype=torch.uint8), torch.zeros(-(-w.numel() // 64))
        return self.run("quantize", w, w.numel(), code, packed, absmax)

    def quantize_absmax(self):
        """Of so many superblocks that a block has several turns, and with a sum that is rounded."""
        _, many = sanitize.scales()
        absmax, code, _ = many.args
        superblocks = -(-absmax.numel() // 256)
        sums, quantized = torch.zeros(superblocks, dtype=torch.float64), torch.zeros(absmax.numel(), dtype=torch.uint8)
        results = sums, quantized, torch.zeros(superblocks), torch.zeros(1)
        return self.run("quantize_absmax", absmax, absmax.numel(), code, *results, blocks=1)

    def reduce(self, columns, transposed):
        rows = 31 if columns % 2 else 40
        return self.run("reduce", torch.ones(2, rows, columns), rows, columns, transposed, torch.zeros(rows, columns))


@pytest.fixture(scope="module")
def raced():
    csrc = mutants.copy_with_edits(ROOT / "build" / "executor" / "mutants-scales")
    launchers = csrc.parent / "launchers.cpp"
    launchers.write_text(LAUNCHERS, encoding="utf-8")
    sources = [launchers, *(csrc / "cuda" / f"{name}.cu" for name in ("quantize", "quantize_absmax", "reduce_splits"))]
    return Raced(build("mutants-scales", sources, races=True, csrc=csrc))


def lines_of(path, function):
    """The numbers of the lines of a function, from its head to the brace at the start of a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if f" {function}(" in line and line[0] not in " /")
    end = next(i for i in range(begin, len(lines)) if lines[i].startswith("}"))
    return range(begin + 1, end + 2)


# (launcher, function, how many calls it has) -> what is read or written too soon without them.
NAMED = {
    ("quantize_absmax", "sum_superblocks", 2): "a superblock that is being staged, or the next turn's",
    ("quantize_absmax", "sum_over_block", 3): "an addend of the tree, its sum, or the sum of the next one",
    ("quantize_absmax", "mean_kernel", 2): "a chunk of the sums in the format's order, or the next chunk",
    ("quantize_absmax", "quantize_superblocks_kernel", 1): "the midpoints",
    ("quantize", "prepare_levels", 2): "the sorted levels, or the midpoints: a shuffle orders no memory",
    ("quantize", "quantize_units_kernel", 1): "the levels",
    ("quantize", "quantize_blocks_kernel", 1): "the levels",
}


@pytest.mark.exhaustive
@pytest.mark.slow  # it compiles
@pytest.mark.parametrize(("launcher", "function", "count"), NAMED)
def test_a_race_of_quantize_is_noticed(raced, launcher, function, count):
    raced.executor.reset()
    assert getattr(raced, launcher)() == ""
    sites = sorted(raced.executor.sites())
    source = Path(next(s.place for s in sites if f"/{launcher}.cu:" in s.place).rpartition(":")[0])
    places = {f"{source}:{line}" for line in lines_of(source, function)}
    own = [site for site in sites if site.place in places]
    assert len({site.place for site in own}) == count
    for site in own:
        for change in mutants.CHANGES[site.what]:
            with raced.executor.changed(site, change):
                error = getattr(raced, launcher)()
            assert mutants.kind_of(error) == "race", (site, change, error)


@pytest.mark.exhaustive
@pytest.mark.slow  # it compiles
@pytest.mark.parametrize(("columns", "transposed"), [(40, False), (41, False), (41, True)])
def test_blocks_that_all_add_all_elements_are_noticed(raced, columns, transposed):
    """Each writes the same sums, so that no result is wrong."""
    noticed = []
    assert raced.reduce(columns, transposed) == ""
    for number, edit in enumerate(mutants.EDITS, 1):
        raced.executor.library.nf4_executor_source_mutant(number)
        if error := raced.reduce(columns, transposed):
            noticed.append((edit.file, mutants.kind_of(error)))
        raced.executor.library.nf4_executor_source_mutant(0)
    assert noticed == [("reduce_splits.cu", "race")], "one of its three kernels ran"


# The script.


def test_the_edits_are_of_the_source_as_it_is(tmp_path, monkeypatch):
    copy = mutants.copy_with_edits(tmp_path)
    edited = {path.name for path in copy.glob("cuda/*") if "source_mutant" in path.read_text(encoding="utf-8")}
    assert edited == {edit.file for edit in mutants.EDITS}
    monkeypatch.setattr(mutants, "EDITS", (mutants.EDITS[0]._replace(old="nothing of the kind"),))
    with pytest.raises(SystemExit, match=r"must have once what mutants\.py edits: nothing of the kind"):
        mutants.copy_with_edits(tmp_path)


def test_the_script_tells_caught_equivalent_and_survived(trial, monkeypatch, capsys):
    """Of one call of one kernel."""
    case = next(cases_of(trial, "linear"))
    monkeypatch.setattr(cuda_backend, "load", lambda **_: trial.executor)
    monkeypatch.setattr(mutants, "copy_with_edits", lambda folder: CSRC)
    monkeypatch.setattr(mutants, "EDITS", ())
    monkeypatch.setattr(sanitize, "cases", lambda *_: [case])
    kernel = "linear_tiled"

    assert mutants.main(kernel) == 1
    printed = capsys.readouterr().out
    assert "NOT REACHED quantize.cu:" in printed
    assert "NOT REACHED linear_tiled.cuh:" not in printed
    assert "SURVIVED" not in printed

    monkeypatch.setattr(mutants, "unreached", lambda *_: [])
    assert mutants.main(kernel) == 0
    printed = capsys.readouterr().out
    assert "equivalent: linear_tiled_kernel: removed copy_async_wait<0>(); every fetch" in printed
    assert re.search(r"linear_tiled_kernel +late +sync_block\(\);  linear_tiled.cuh:\d+ +(wrong bits|race) 1", printed)

    monkeypatch.setattr(mutants, "EQUIVALENT", {})
    assert mutants.main(kernel) == 1
    assert re.search(r"SURVIVED linear_tiled_kernel<.*>: removed copy_async_wait<0>\(\);", capsys.readouterr().out)

    wrong = {("linear_tiled_kernel", "sync_block();", "late"): "a wrong proof"}
    monkeypatch.setattr(mutants, "EQUIVALENT", wrong)
    with pytest.raises(AssertionError, match="is not equivalent: "):
        mutants.main(kernel)


def test_a_mutant_that_crashes_ends_its_own_process_alone(trial, monkeypatch):
    (call,) = trial.calls(itertools.islice(cases_of(trial, "linear"), 1))
    mutant = mutants.mutants_of([call])[0]
    monkeypatch.setattr(trial, "_verdict", lambda *_: mutants.os.kill(mutants.os.getpid(), 11))
    assert trial.verdict(mutant, [call]) == "ends by signal 11"


def test_an_error_of_the_script_is_no_verdict(trial, monkeypatch):
    (call,) = trial.calls(itertools.islice(cases_of(trial, "linear"), 1))
    monkeypatch.setattr(trial, "_verdict", lambda *_: 1 / 0)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        trial.verdict(mutants.mutants_of([call])[0], [call])
